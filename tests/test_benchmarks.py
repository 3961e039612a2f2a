"""The benchmarks' scripts start from anywhere, and their CSVs survive a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gpdfx
from benchmarks import expand_time, libraries
from benchmarks.tables import Table, read, write_between
from benchmarks.uses import USES, uses

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)
# What takes long to import is imported once, and forked; gpdfx as if it were not installed.
EACH = """
import json, os, runpy, sys
import timm, torch, torchvision, transformers
installed = [f for f in sys.meta_path if getattr(f, "__module__", "").startswith("__editable__")]
sys.meta_path[:] = [f for f in sys.meta_path if f not in installed]
root, folder, ways = json.loads(sys.argv[1])

def start(way, script):
    os.chdir(folder if way == "path" else root)
    file = os.path.join(root, "benchmarks", script + ".py")
    sys.argv = [file, "--help"]
    sys.path[0] = os.path.dirname(file) if way == "path" else root
    try:
        if way == "path":
            runpy.run_path(file, run_name="__main__")
        else:
            runpy.run_module("benchmarks." + script, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, end.code
    print(getattr(sys.modules.get("gpdfx"), "__file__", "none"))

for way, script in ways:
    read, write = os.pipe()
    if not os.fork():
        os.dup2(write, 1), os.dup2(write, 2)
        try:
            start(way, script)
        except BaseException as error:
            print(repr(error))
        sys.stdout.flush(), os._exit(0)
    os.close(write)
    with open(read) as said:
        print(json.dumps([way, script, said.read()]))
    os.wait()
"""


def test_scripts_start_from_anywhere(tmp_path: Path) -> None:
    ways = [(way, script) for script in SCRIPTS for way in ("path", "module")]
    run = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps([str(ROOT), str(tmp_path), ways])],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert not run.returncode, run.stderr
    said = [json.loads(line) for line in run.stdout.splitlines()]
    assert [(way, script) for way, script, _ in said] == ways
    for way, script, text in said:
        assert text.startswith(f"usage: python -m benchmarks.{script}"), (way, text)
        imported = "none" if script == "code_lines" else str(ROOT / "gpdfx" / "__init__.py")
        assert text.splitlines()[-1] == imported, (way, script)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_goes_on_after_a_kill(tmp_path: Path, end: str) -> None:
    table = Table(tmp_path / "a.csv", ("name", "text"), ("name",), end)
    assert table.rows() == []
    table.append({"name": "a", "text": "one, two"}, {"name": "b", "text": 'a "word"'})
    table.append({"name": "c", "text": 1 / 3})
    whole = table.path.read_bytes()
    assert [row["text"] for row in read(table.path)] == ["one, two", 'a "word"', "0.333333"]
    table.path.write_bytes(whole[:-3])
    assert list(table.done()) == [("a",), ("b",)]
    table.append({"name": "c", "text": 1 / 3})
    assert table.path.read_bytes() == whole


def test_a_table_is_written_between_its_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- t -->\nold\n<!-- end of t -->\nb\n")
    write_between(readme, "new", "t")
    assert readme.read_text() == "a\n<!-- t -->\nnew\n<!-- end of t -->\nb\n"


@pytest.mark.slow
def test_the_time_of_expand_is_told_by_stage(tmp_path: Path) -> None:
    setting = expand_time.Setting("transformers:GPT2LMHeadModel")
    row = expand_time.measure(setting, torch.get_num_threads(), pairs=1)
    stages = [row[stage] for stage in expand_time.STAGES]
    assert sum(stages) == pytest.approx(row["total"], rel=0.05, abs=0.02)
    assert row["verify_capture"] == pytest.approx(row["verify"] / row["capture"])
    assert row["total_export"] == pytest.approx(row["total"] / row["export"])
    assert 1 < row["capture_export_free"] < 10
    table = Table(tmp_path / "a.csv", expand_time.COLUMNS, expand_time.COLUMNS[:3])
    key = dict(zip(table.key, setting.key, strict=True))
    table.append(key | row | {"peak": 3.0, "peak_unverified": 2.0})
    assert setting.key in table.done()
    assert f"verify / capture {row['verify_capture']:.2f}," in expand_time.summary(table)


def small() -> tuple[nn.Module, gpdfx.Teacher, tuple[tuple[torch.Tensor], dict[str, object]]]:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    return model, gpdfx.expand(model, 2, example_inputs=(x,)), ((x,), {})


def test_the_uses_of_a_teacher_are_tried() -> None:
    assert uses(*small()) == dict.fromkeys(USES, "yes")


def test_a_use_that_goes_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(teacher: gpdfx.Teacher) -> nn.Module:
        plain = collapse(teacher)
        next(plain.parameters()).data.zero_()
        return plain

    def refuses(*args: object) -> None:
        raise gpdfx.InputError("no file for today")

    model, teacher, call = small()
    nn.init.ones_(model[0].weight)  # another network than the teacher is of
    collapse = gpdfx.collapse
    monkeypatch.setattr(gpdfx, "collapse", forgetful)
    monkeypatch.setattr(gpdfx, "save", refuses)
    found = uses(model, teacher, call)
    assert found["deepcopy"] == "yes"
    assert found["other_batch"].startswith("differs by")
    assert found["joint_step"].startswith("differs by")
    assert found["save_load"] == "no file for today"


def test_where_float32_chooses_float64_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(teacher: gpdfx.Teacher) -> nn.Module:
        plain = collapse(teacher)
        if next(plain.parameters()).dtype is torch.float32:
            next(plain.parameters()).data.zero_()
        return plain

    collapse = gpdfx.collapse
    monkeypatch.setattr(gpdfx, "collapse", coarse)
    assert uses(*small())["joint_step"] == "yes"


def test_rows_of_libraries_name_what_installs_them() -> None:
    lists = (ROOT / "benchmarks" / "libraries").glob("*.txt")
    required = [line for path in lists for line in path.read_text().splitlines()]
    listed = {line.partition("==")[0] for line in required if "==" in line}
    assert set(libraries.VERSIONS) <= listed
    assert all(not libraries.VERSIONS[package] for package in libraries.SKIPPED)
