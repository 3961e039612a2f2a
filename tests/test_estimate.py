"""What a run says before its first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpdfx.cli import main
from gpdfx.errors import InputError
from gpdfx.train import run, state
from gpdfx.train.ranks import Ranks
from gpdfx.train.recipes import with_changes
from gpdfx.train.steps import estimate as module
from gpdfx.train.steps.estimate import Estimate, duration, estimate
from gpdfx.train.steps.step import clip_gradients

from .runs import TINY, command, config, go, keep_last_checkpoint
from .small_networks import tiny

CPU = Ranks(torch.device("cpu"))


def begun(out: Path, **changes: Any) -> run.Run:
    return run.Run(config(out, **changes), CPU, quiet=True)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("branches", [None, "orepa"])
def test_what_trains_and_what_a_checkpoint_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Any, branches: str | None
) -> None:
    keep_last_checkpoint(monkeypatch)
    recipe = with_changes(TINY, optimizer=optimizer, epochs=1)
    summary = go(tmp_path, branches=branches, recipe=recipe)
    told, file = summary["estimate"], tmp_path / state.STATE
    tensors, _ = state.read_state(file)
    exact = sum(x.numel() * x.element_size() for x in tensors.values())
    assert told["checkpoint"][0] == exact
    assert exact < file.stat().st_size < exact + 40_000  # names and facts
    assert told["parameters"][0] == summary["parameters"]["teacher"]
    if branches is None:
        assert told["parameters"][1] == told["checkpoint"][1] == 0
    else:
        without = go(tmp_path / "none", branches=None, recipe=recipe)["estimate"]
        for what in ("parameters", "checkpoint"):
            assert told[what][0] - told[what][1] == pytest.approx(without[what][0], rel=1e-3)


def test_what_is_measured_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as a run in which nothing is timed."""
    monkeypatch.setattr(module, "ROUNDS", 2)
    keep_last_checkpoint(monkeypatch)
    recipe = with_changes(TINY, mixup=0.4, epochs=1)
    student = "tests.small_networks:Smooth"
    for name, steps in (("told", 1), ("untold", 0)):
        go(tmp_path / name, student=student, recipe=recipe, time_steps=steps)
    one, other = (state.read_state(tmp_path / name / state.STATE) for name in ("told", "untold"))
    assert all(torch.equal(x, other[0][name]) for name, x in one[0].items())
    assert one[1]["cost"]["ratio"] > 0
    assert other[1]["cost"]["seconds"] is None


def test_the_parts_are_those_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts calls of it, every part has its place in the sentence."""
    made = begun(tmp_path, time_steps=1, branches="orepa")
    monkeypatch.setattr(module.Probe, "times", lambda self: [(2.0, 9.0, 3.0)] * 3)
    monkeypatch.setattr(module, "_updates", lambda stepper: (0, 1.0))
    told = estimate(made.stepper, made.data)
    part = told.parameters[1] / told.parameters[0]
    assert (told.seconds, told.ratio) == (10.0, 5.0)
    assert told.branches == pytest.approx((3 + part) / 2)


def test_the_sentence() -> None:
    told = Estimate((63_399_385, 43_712_223), (507_000_000, 349_000_000), 200, 2.0, 6.9, 1.9)
    assert str(told) == (
        "a step costs about 6.9 of a plain one (teacher 4.0, branches 1.9), 63,399,385 parameters "
        "train, a checkpoint takes 507 MB, 200 steps take about 6.7 min; --branches none: about "
        "5.0 of a plain step, 19,687,162 parameters, 158 MB"
    )
    assert str(Estimate((1000, 0), (8000, 0), 5)) == (
        "1,000 parameters train, a checkpoint takes 0.008 MB"
    )
    assert [*map(duration, (0.2, 40, 90, 1000, 7200, 10**6))] == [
        *("1 s", "40 s", "1.5 min", "17 min", "2.0 h", "278 h")
    ]


def test_it_is_said_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*command(tmp_path / "run"), "--time-steps", "1"]

    def interrupted(self: Any, values: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run.log.RunLog, "end_step", interrupted)
        assert main(argv) == 130
    said = capsys.readouterr().err
    assert "a step costs about" in said
    assert "--branches none: about" in said
    monkeypatch.setattr(run, "estimate", None)  # it is in the checkpoint
    assert main([*argv, "--json"]) == 0
    told = capsys.readouterr()
    assert said.splitlines()[0] in told.err
    assert json.loads(told.out)["estimate"]["ratio"] > 0


def test_a_finished_run_keeps_one_teacher(tmp_path: Path) -> None:
    """The checkpoint gives up its tensors, and the same command gives the same summary at once."""
    summary = go(tmp_path / "run")
    tensors, facts = state.read_state(tmp_path / "run" / state.STATE)
    assert not tensors
    assert facts["epoch"] == 2
    assert go(tmp_path / "run", device="auto") == summary
    (tmp_path / "run" / state.SUMMARY).unlink()
    with pytest.raises(InputError, match=r"finished, and its summary.json is not there"):
        go(tmp_path / "run")


@pytest.mark.parametrize("clip", [None, 0.5, 5.0])
def test_clipping_is_pytorchs(clip: float | None) -> None:
    torch.manual_seed(0)
    one, other = tiny(10, 1), tiny(10, 1)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        p.grad = torch.randn_like(p) * 0.1
        q.grad = p.grad.clone()
    assert clip_gradients(one, clip)
    torch.nn.utils.clip_grad_norm_(other.parameters(), clip or torch.inf)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, q.grad)
    p.grad[0] = torch.nan
    assert not clip_gradients(one, clip)
