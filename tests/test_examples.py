"""The scripts under ``examples``, each as a program of its own, and the table that names them."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"
EXAMPLES = {
    "plain_loop": ("sklearn",),
    "lightning_fit": ("sklearn", "lightning"),
    "accelerate_loop": ("sklearn", "accelerate"),
    "hf_causal_lm": ("transformers", "accelerate"),
    "hf_sequence_classifier": ("transformers", "accelerate"),
    "hf_image_classifier": ("sklearn", "transformers", "accelerate"),
    "timm_loop": ("sklearn", "timm"),
    "torchrun_ddp": ("sklearn",),
    "fsdp2": ("sklearn",),
    "finetune": ("torchcrepe",),
    "grow_llama": ("transformers",),
}
"""What each needs."""
HELPERS = {"digits"}
PROCESSES = {"accelerate_loop", "torchrun_ddp"}
"""Those that run in two."""


def run(*command: str) -> str:
    """What a script printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command],
        **{"cwd": ROOT, "env": environment, "capture_output": True},
        text=True,
        timeout=900,
    )
    assert not done.returncode, done.stderr
    return done.stdout


def needs(name: str) -> None:
    for package in EXAMPLES[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install '.[examples]'")


def test_the_plain_loop() -> None:
    needs("plain_loop")
    assert "averaged student" in run("examples/plain_loop.py")


@pytest.mark.examples
@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - {"plain_loop", "fsdp2"}))
def test_example(name: str) -> None:
    """Its own checks end it."""
    needs(name)
    launch = (*TORCHRUN, "2") if name in PROCESSES else ()
    assert run(*launch, f"examples/{name}.py")


@pytest.mark.examples
def test_shards_are_saved_by_two_processes_and_read_by_three(tmp_path: Path) -> None:
    needs("fsdp2")
    for count, what in ((2, "save"), (3, "resume")):
        assert what in run(*TORCHRUN, str(count), "examples/fsdp2.py", what, str(tmp_path))


def test_every_script_is_run_here_and_short() -> None:
    scripts = {path.stem: path for path in (ROOT / "examples").glob("*.py")}
    assert scripts.keys() == EXAMPLES.keys() | HELPERS
    for path in scripts.values():
        assert len(path.read_text().splitlines()) < 80, path.name


def test_the_table_names_what_exists() -> None:
    """A row is ``| habit | verdict | `tests/FILE.py::NAME` or `examples/FILE.py`, ... |``."""
    table = (ROOT / "docs/loops.md").read_text().partition("| habit |")[2]
    rows = re.findall(r"^\| (?!---)(.+) \|$", table, re.M)
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`((?:tests|examples)/\w+\.py)(?:::(\w+))?`", row.split(" | ")[-1])
        assert named, row
        for file, test in named:
            assert (ROOT / file).is_file(), file
            if test:
                assert test in _functions(ROOT / file), f"{file}::{test}"


def _functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
