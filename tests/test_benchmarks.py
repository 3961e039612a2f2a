"""The benchmarks' scripts start from anywhere, and their CSVs survive a kill."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gpdfx
from benchmarks import expand_time, libraries
from benchmarks.tables import Table, read, write_readme
from benchmarks.uses import USES, uses

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)
# As if gpdfx were not installed; in the end it says which one was imported.
SITE = """
import atexit, sys
installed = [f for f in sys.meta_path if getattr(f, "__module__", "").startswith("__editable__")]
sys.meta_path[:] = [f for f in sys.meta_path if f not in installed]
atexit.register(lambda: print(getattr(sys.modules.get("gpdfx"), "__file__", "none")))
"""


@pytest.mark.parametrize("by_path", [True, False], ids=["path", "module"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_start_from_anywhere(script: str, by_path: bool, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    way = [str(ROOT / "benchmarks" / f"{script}.py")] if by_path else ["-m", f"benchmarks.{script}"]
    run = subprocess.run(
        [sys.executable, *way, "--help"],
        cwd=tmp_path if by_path else ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert not run.returncode, run.stderr
    assert run.stdout.startswith(f"usage: python -m benchmarks.{script}")
    imported = "none" if script == "code_lines" else str(ROOT / "gpdfx" / "__init__.py")
    assert run.stdout.splitlines()[-1] == imported


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
    write_readme(readme, "new", "t")
    assert readme.read_text() == "a\n<!-- t -->\nnew\n<!-- end of t -->\nb\n"


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


def test_rows_of_libraries_name_what_installs_them() -> None:
    lists = (ROOT / "benchmarks" / "libraries").glob("*.txt")
    required = [line for path in lists for line in path.read_text().splitlines()]
    listed = {line.partition("==")[0] for line in required if "==" in line}
    assert set(libraries.VERSIONS) <= listed
    assert all(not libraries.VERSIONS[package] for package in libraries.SKIPPED)
