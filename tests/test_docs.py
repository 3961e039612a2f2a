"""What README and docs say is so: code runs, commands parse, links lead somewhere, tables are what
the scripts make of their results.

Python blocks of a file run one after another in one namespace and an empty folder. Comments of HTML
say more: ``set-up`` holds code that runs in its place; before a block ``raises ERROR`` (or an exit
code), and ``output``: the block before prints this, or it is the text of its error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import gpdfx
from benchmarks import accuracy, accuracy_summary, branches, coverage_summary, speed_summary
from benchmarks.tables import RESULTS, markdown, read
from gpdfx import cli
from gpdfx.cli import app
from gpdfx.passes.rules import SIGNATURES, TABLE

ROOT = Path(__file__).resolve().parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
FILES = {str(p.relative_to(ROOT)): p for p in (README, *sorted(DOCS.glob("*.md")))}
TEXTS = {name: path.read_text() for name, path in FILES.items()}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
BLOCK = re.compile(r"^<!-- ([\w-]+)(?:[ :]*(.*?))?\s*-->\n|^```(\w*)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """``kind``: ``python``, ``sh``, ``text`` or ``set-up``; ``marks``: what stands before it."""

    kind: str
    code: str
    line: int
    marks: dict[str, str]


def blocks(text: str) -> Iterator[Block]:
    marks: dict[str, str] = {}
    for found in BLOCK.finditer(text):
        mark, said, kind, code = found.groups()
        line = text[: found.start()].count("\n") + 1
        if mark == "set-up":
            yield Block(mark, said, line, {})
        elif mark in ("raises", "output"):
            marks[mark] = said
        elif kind is not None:
            yield Block(kind, code, line + 1, marks)
            marks = {}


BLOCKS = {name: tuple(blocks(text)) for name, text in TEXTS.items()}


# --------------------------------------------------------------------------- python
@pytest.mark.parametrize(
    "name", [n for n, found in BLOCKS.items() if any(b.kind == "python" for b in found)]
)
def test_python_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": name}
    printed = ""
    for block in BLOCKS[name]:
        if block.kind in ("python", "set-up"):
            printed = run(block, FILES[name], space)
        elif "output" in block.marks and printed:
            assert block.code in printed
            printed = ""


def run(block: Block, file: Path, space: dict[str, Any]) -> str:
    """What it prints, or what its error says."""
    code = compile("\n" * block.line + block.code, str(file), "exec")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if "raises" not in block.marks:
            exec(code, space)
            return out.getvalue()
        with pytest.raises(gpdfx.GpdfxError) as caught:
            exec(code, space)
    assert caught.type.__name__ == block.marks["raises"]
    return f"{caught.type.__module__}.{caught.type.__name__}: {caught.value}\n"


def test_every_block_says_what_it_is() -> None:
    for name, text in TEXTS.items():
        kinds = {kind for kind, _ in FENCE.findall(text)}
        assert kinds <= {"python", "sh", "text"}, name
        assert text.count("```") == 2 * len(FENCE.findall(text)), name


# --------------------------------------------------------------------------- commands
def commands(text: str) -> Iterator[list[str]]:
    """Lines of shell blocks, and benchmarks that a sentence names."""
    lines = [b.code.replace("\\\n", " ") for b in blocks(text) if b.kind == "sh"]
    named = re.findall(r"`(python\s+-m\s+benchmarks\.[^`]+)`", text)
    lines += [" ".join(one.split()) for one in named]
    for line in "\n".join(lines).splitlines():
        if words := shlex.split(line, comments=True):
            yield words


COMMANDS = [(name, words) for name, text in TEXTS.items() for words in commands(text)]


class Parsed(Exception):
    """A benchmark knows its command line, and is not run."""


@pytest.mark.parametrize(
    "words", [words for _, words in COMMANDS], ids=[f"{n}: {' '.join(w)}" for n, w in COMMANDS]
)
def test_commands_are_understood(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where one that runs by mistake does no harm

    def stopping(parse: Callable[..., Any]) -> Callable[..., None]:
        def stop(parser: argparse.ArgumentParser, *args: Any) -> None:
            parse(parser, *args)
            raise Parsed

        return stop

    parser = argparse.ArgumentParser
    monkeypatch.setattr(parser, "parse_args", stopping(parser.parse_args))
    match words:
        case ["torchrun", *_]:
            words = words[words.index("-m") + 1 :]
    match words:
        case ["gpdfx", *rest]:
            app.parse(app._parser(), rest)
        case ["python", "-m", module, *rest] if module.startswith("benchmarks."):
            monkeypatch.setattr(sys, "argv", [module, *rest])
            monkeypatch.delitem(sys.modules, module, raising=False)
            with pytest.raises(Parsed):
                runpy.run_module(module, run_name="__main__")
        case ["python", script]:
            assert (ROOT / script).is_file()
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
        case ["pip", "install", *what]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
                "optional-dependencies"
            ]
            for word in what:
                if named := re.fullmatch(r"\.\[(.+)\]", word):
                    assert {*named[1].split(",")} <= extras.keys()
                else:
                    assert word.startswith("-") or (ROOT / word).exists()
        case _:
            pytest.fail(f"nobody knows {' '.join(words)}")


def test_the_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that it begins with is shortened; what it says of that run afterwards is not."""
    monkeypatch.chdir(tmp_path)
    of_the_run = [w[1:] for n, w in COMMANDS if n == "README.md" and "run" in w and "PATH" not in w]
    of_the_run = [words for words in of_the_run if not any("PATH" in word for word in words)]
    assert [words[0] for words in of_the_run] == ["train", "eval", "export"]
    for words in of_the_run:
        short = ["--epochs", "1", "--time-steps", "1"] if words[0] == "train" else []
        assert cli.main([*words, *short]) == 0
    assert {"student.safetensors", "student_best.safetensors", "curves.png", "summary.json"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }


@pytest.mark.parametrize("name", ["docs/command-line.md"])
def test_what_a_command_prints(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for before, block in zip(BLOCKS[name], BLOCKS[name][1:], strict=False):
        if before.kind == "sh" and "output" in block.marks:
            code = int(before.marks.get("raises", "0"))
            assert cli.main(shlex.split(before.code, comments=True)[1:]) == code
            assert block.code in capsys.readouterr()[code]


# --------------------------------------------------------------------------- links
def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    path = FILES[name]
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", TEXTS[name])):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text()), target


def test_every_page_is_in_the_index() -> None:
    named = set(re.findall(r"\]\((\S+\.md)\)", TEXTS["docs/README.md"]))
    assert named == {p.name for p in DOCS.glob("*.md")} - {"README.md"} | {"../README.md"}


# --------------------------------------------------------------------------- figures
def test_tables_are_what_the_results_say(tmp_path: Path) -> None:
    for page in ("speed", "accuracy", "breadth"):
        shutil.copy(DOCS / f"{page}.md", tmp_path)
    speed_summary.write(tmp_path / "speed.md", RESULTS)
    assert (tmp_path / "speed.md").read_text() == TEXTS["docs/speed.md"]
    table = markdown(branches.COLUMNS, map(branches.cells, read(RESULTS / "branches.csv")))
    assert f"<!-- branches -->\n{table}\n<!-- end" in TEXTS["docs/speed.md"]
    out = accuracy.tables(RESULTS)
    text = accuracy_summary.summary(out.final.rows(), out.rates.rows())
    assert f"<!-- accuracy -->\n{text}\n<!-- end" in TEXTS["docs/accuracy.md"]
    text = coverage_summary.summary(sorted(RESULTS.glob("coverage_*.csv")))
    assert f"<!-- coverage -->\n{text}\n<!-- end" in TEXTS["docs/breadth.md"]


def test_figures_of_the_readme_stand_in_these_tables() -> None:
    """Seconds and differences, as they stand there."""
    cost = TEXTS["README.md"].partition("## What it costs")[2].partition("\n## ")[0]
    seconds = set(re.findall(r"\b\d+\.\d{3,}\b|\b1\.37\b", cost))
    assert len(seconds) == 9
    assert seconds <= set(re.findall(r"[\d.]+", TEXTS["docs/speed.md"]))
    differences = re.findall(r"[+-][\d.]+ \[[^]]+\]", cost)
    assert len(differences) == 8
    of_gpd = re.findall(r"^\| gpd: .*$", TEXTS["docs/accuracy.md"], re.M)
    assert re.findall(r"[+-][\d.]+ \[[^]]+\]", "\n".join(of_gpd)) == differences


def test_the_number_of_signatures_is_stated() -> None:
    told = f"{SIGNATURES} of the {len(TABLE)} rows of the rule table are signatures"
    assert told in " ".join(TEXTS["docs/how-it-works.md"].split())


def test_the_readme_stays_short() -> None:
    assert len(TEXTS["README.md"].encode()) < 16_000
