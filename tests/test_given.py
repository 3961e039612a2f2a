"""Networks that put their results into a dict or list that they are called with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpdfx
from gpdfx.calls import given
from gpdfx.teacher import captured

from .helpers import parts


class Own(dict[str, Any]):
    """A dict of the user's own class."""


class Writes(nn.Module):
    """It replaces, adds and removes items, and appends to a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        h = self.first(features["x"]).relu()
        features["all"].append(h.mean(1))
        features["again"], features["step"] = features["kept"], features["step"] + 1
        features["x"] = self.second(h)
        del features["mask"]
        return features


class Only(nn.Module):
    """What it writes is all that comes of a call beside one number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor, into: list[Any]) -> Tensor:
        into[0] = self.second(self.first(x).relu())
        return x.mean()


def features(kind: Callable[..., Any] = dict) -> Any:
    items = {"x": torch.randn(4, 6), "mask": torch.ones(4), "step": 1, "all": [torch.zeros(4)]}
    return kind({**items, "kept": torch.randn(4)})


@pytest.mark.parametrize("kind", [dict, OrderedDict, Own])
def test_the_callers_dict_holds_the_results(kind: Callable[..., Any]) -> None:
    teacher = gpdfx.expand(Writes(), 2, example_inputs=(features(kind),))
    report = teacher.report()
    assert report.widened == 1
    assert not report.apart
    call = features(kind)
    calls = [kind({**call, "all": [*call["all"]]}) for _ in range(2)]
    items = calls[0]["all"]
    for run, one in zip((teacher, teacher.student), calls, strict=True):
        assert run(one) is one
        assert list(one) == ["x", "step", "all", "kept", "again"]
        assert one["step"] == 2
        assert one["again"] is one["kept"] is call["kept"]
    assert calls[0]["all"] is items
    assert len(items) == 2
    assert items[0] is call["all"][0]
    for key in ("x", "again"):
        torch.testing.assert_close(calls[0][key], calls[1][key])
    torch.testing.assert_close(items[1], calls[1]["all"][1])


def test_student_and_teacher_do_not_read_each_others() -> None:
    teacher = gpdfx.expand(Writes(), 2, example_inputs=(features(),), branches=None)
    call = features()
    before, x = list(call), call["x"]
    of_teacher, of_student = teacher.both(call)
    torch.testing.assert_close(of_teacher["x"], of_student["x"])
    assert list(call) == before
    assert call["x"] is x
    assert len(call["all"]) == 1
    pair = gpdfx.GPD(Writes(), example_inputs=(call,), logits=lambda out: out["x"], branches=None)
    distilled = pair((call,), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(distilled.student_logits, distilled.teacher_logits)
    assert call["x"] is x


def test_beside_a_result() -> None:
    teacher = gpdfx.expand(Only(), 2, example_inputs=(torch.randn(4, 6), [None]), branches=None)
    assert teacher.report().widened == 1
    x, into, other = torch.randn(3, 6), [None], [None]
    torch.testing.assert_close(teacher(x, into), teacher.student(x, other))
    torch.testing.assert_close(*into, *other)


def test_the_check_compares_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(outcome: given.Outcome, containers: list[Any]) -> Any:
        (one, items), *_ = outcome[1]
        return given.settle((outcome[0], [[one, {0: items[0] * 1.001}]]), containers)

    monkeypatch.setattr(captured, "settle", settle)
    teacher = gpdfx.expand(Only(), 2, example_inputs=(torch.randn(4, 6), [None]), branches=None)
    assert list(teacher.report().apart) == [""]  # in parts its own Python writes


class Chooses(nn.Module):
    """Python around a part that writes to its dict."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.last = Writes(), nn.Linear(6, 3)

    def forward(self, call: dict[str, Any]) -> Tensor:
        self.part(call)
        x: Tensor = self.last(call["x"] if call["x"].sum().item() < 1e6 else call["x"] * 2)
        return x


class Adds(nn.Module):
    """Two layers that add to a dict what they make of it, or Python that does."""

    def __init__(self, python: bool) -> None:
        super().__init__()
        self.first, self.second, self.python = nn.Linear(6, 12), nn.Linear(12, 6), python

    def forward(self, call: dict[str, Any]) -> dict[str, Any]:
        x = call["x"]
        if self.python and x.sum().item() > 1e6:
            x = 2 * x
        call["sum"] = x.sum(1)
        call["x"] = self.second(self.first(x).relu())
        return call


def test_what_passes_through_parts_is_what_was_given() -> None:
    model = nn.Sequential(Adds(True), Adds(False), Adds(False))
    call = {"x": torch.randn(4, 6), "mask": torch.ones(4, dtype=torch.long)}
    teacher = gpdfx.expand(model, 2, example_inputs=({**call},), branches=None)
    assert {"1", "2"} <= set(parts(teacher))
    mine, other = {**call}, {**call}
    result, wanted = teacher(mine), model(other)
    assert result is mine
    assert result["mask"] is call["mask"]
    torch.testing.assert_close(result, wanted)


def test_a_part_writes_for_the_python_around_it() -> None:
    teacher = gpdfx.expand(Chooses(), 2, example_inputs=(features(),), branches=None)
    assert set(parts(teacher)) == {"part", "last"}
    assert teacher.get_parameter("part.first.weight").shape == (24, 6)
    call = features()
    other = {**call, "all": [*call["all"]]}
    torch.testing.assert_close(teacher(call), teacher.student(other))
    assert list(call) == list(other)
