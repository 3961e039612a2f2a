"""Several processes: ``fully_shard``, checkpoints, statistics. The checks are in ``ranks``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .ranks import checks


def launch(count: int, folder: Path, only: str = "") -> dict[str, str]:
    """What became of the checks of so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    argv = [sys.executable, *torchrun, "-m", "tests.ranks", str(folder), only]
    done = subprocess.run(
        argv, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert not done.returncode, done.stderr
    found: dict[str, str] = json.loads((folder / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, str]:
    return launch(2, folder)


@pytest.mark.parametrize("name", [name for name, _ in checks(2)])
def test_two_processes(name: str, results: dict[str, str]) -> None:
    assert not results[name], results[name]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_any_number_resumes(count: int, results: dict[str, str], folder: Path) -> None:
    assert not results["checkpoint"]
    assert launch(count, folder) == {"checkpoint": ""}
