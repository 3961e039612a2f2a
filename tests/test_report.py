"""The report: costs, counted without data where that is possible, and seconds that add up."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import gpdfx
from gpdfx import compiler, passes
from gpdfx.control import ExpandOptions, make_control
from gpdfx.passes.infer import NeedsFunctional
from gpdfx.report.cost import Cost, Subject, cost
from gpdfx.torch_private import is_fake

from .helpers import hidden_student, program_of, python_shell, teacher_of
from .networks import NETWORKS

Case = tuple[nn.Module, tuple[Tensor, ...]]
MEASURES = (Subject.student_macs, Subject.teacher_macs, Subject.fold_macs, Subject.kept)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Remembers(nn.Module):
    """Keeps its last result and a list of all, in plain attributes; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        self.last: Any = None
        self.all: list[Tensor] = []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.net(x)
        self.last = y.detach()
        self.all.append(self.last)
        return y


class Chooses(Remembers):
    """Its Python asks for values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if float(x.detach().sum()) > 1e9 else 1)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(224, 32, 2, 2, 32, 48, dropout=0.1)


IMAGE = torch.randn(2, 3, 32, 32)
CASES: dict[str, Callable[[], Case]] = {
    "resnet18": lambda: (torchvision.models.resnet18(), (IMAGE,)),
    "mobilenet": lambda: (torchvision.models.mobilenet_v3_small(), (IMAGE,)),
    "convnext": lambda: (timm.create_model("convnext_atto"), (IMAGE,)),
    "vit": lambda: (vit(), (torch.randn(2, 3, 224, 224),)),
    "encoder": lambda: (encoder(), (torch.randn(3, 7, 16),)),
    "tied": lambda: (NETWORKS["gpt"].model(), NETWORKS["gpt"].inputs()),
    "odd": lambda: (NETWORKS["odd"].model(), NETWORKS["odd"].inputs()),
}
SMALL: dict[str, Callable[[], Case]] = {
    "recurrent": lambda: (Recurrent(), (torch.randn(3, 7, 8),)),
    "chooses": lambda: (Chooses(), (torch.randn(3, 4),)),
}


def subjects(case: Case, branches: Any, **options: Any) -> tuple[Any, Any, Any]:
    """What ``cost`` takes."""
    model, inputs = case
    call = inputs, dict[str, Any]()
    program = program_of(model, call, branches=branches, **{"dynamic": "batch", **options})
    return teacher_of(program, call), program.student, call


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """How ``cost`` ran what it counts: on fake tensors or not."""
    made: list[bool] = []
    original = Subject.__init__

    def noted(self: Subject, *args: Any) -> None:
        made.append(args[3])
        original(self, *args)

    monkeypatch.setattr(Subject, "__init__", noted)
    return made


# --------------------------------------------------------------------------- costs
@pytest.mark.parametrize("name", CASES)
def test_costs_are_the_same_without_data(name: str) -> None:
    large = name in ("resnet18", "mobilenet")  # whose branches take seconds with data
    parts = subjects(CASES[name](), None if large else "auto")
    fake, real = (Subject(*parts, fake) for fake in (True, False))
    counted = [[measure(one) for measure in MEASURES] for one in (fake, real)]
    assert counted[0] == counted[1]
    assert counted[0][3]


@pytest.mark.parametrize("name", SMALL)
def test_what_needs_values_is_run(name: str, used: list[bool]) -> None:
    parts = subjects(SMALL[name](), "auto")
    found = cost(*parts)
    assert used == [True, False]
    real = Subject(*parts, False)
    macs = real.student_macs(), real.teacher_macs()
    assert found == Cost(macs, real.fold_macs(), real.kept())


@pytest.mark.parametrize("name", ["held", "cached", "experts"])
def test_tensors_outside_of_registries_need_no_values(name: str, used: list[bool]) -> None:
    parts = subjects((NETWORKS[name].model(), NETWORKS[name].inputs()), None)
    found = cost(*parts)
    assert used == [True]
    real = Subject(*parts, False)
    assert found == Cost((real.student_macs(), real.teacher_macs()), 0, real.kept())


def test_costs_are_those_of_the_formulas(used: list[bool]) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    found = cost(*subjects((net, (torch.randn(5, 4),)), None))
    assert used == [True]
    assert found.macs == (4 * 6 + 6 * 3, 4 * 12 + 12 * 3)
    assert found.fold == 0
    assert found.kept == (4 * 6, 4 * (12 + 6))  # one tanh; the input is there anyway


def test_attention_is_counted_though_it_has_a_fused_path() -> None:
    found = cost(*subjects(CASES["encoder"](), None))
    assert found.macs[0] >= 2 * 7 * (4 * 16 * 16 + 2 * 16 * 32)  # layers, tokens, products


def test_a_fixed_batch_has_no_slope(used: list[bool]) -> None:
    found = cost(*subjects((nn.Linear(4, 3), (torch.randn(5, 4),)), None, dynamic="none"))
    assert used == [True]
    assert found == Cost((12, 12), 0, None)


@pytest.mark.parametrize("kind", [Remembers, Chooses])
def test_counting_leaves_nothing_behind(kind: type[Remembers]) -> None:
    """No fake tensor, no further call, in student and teacher."""
    teacher, student, call = subjects((kind(), (torch.randn(3, 4),)), "auto")
    held = [student, hidden_student(teacher), python_shell(teacher)]
    modules = [teacher, *(module for module in held if module is not None)]

    def state() -> list[Any]:
        return [
            (len(part.all), part.last is None) if isinstance(part, Remembers) else part.training
            for module in modules
            for part in module.modules()
        ]

    tensors = {n: x.clone() for n, x in teacher.state_dict().items()}
    trained = [p.requires_grad for p in teacher.parameters()]
    before = state()
    cost(teacher, student, call)
    assert state() == before
    assert [p.requires_grad for p in teacher.parameters()] == trained
    assert all(torch.equal(x, tensors[n]) for n, x in teacher.state_dict().items())
    assert not any(is_fake(x) for module in modules for x in module.parameters())
    assert float(student.calls) == 0


# --------------------------------------------------------------------------- seconds
@pytest.mark.parametrize("verify", [True, False])
def test_seconds_add_up_to_all_of_expand(verify: bool) -> None:
    model, inputs = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (torch.ones(3, 4),)
    start = time.perf_counter()
    seconds = gpdfx.expand(model, 2, example_inputs=inputs, verify=verify).report().seconds
    taken = time.perf_counter() - start
    assert list(seconds) == ["capture", "transform", *["verify"] * verify, "report"]
    assert sum(seconds.values()) == pytest.approx(taken, rel=0.05, abs=0.02)


def test_a_pass_that_asks_for_another_capture_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a second: laps are contiguous."""
    ticks, tries = count(), iter([NeedsFunctional(), None])
    clock_face = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr(compiler, "time", clock_face)
    run, model, call = passes.run, nn.Linear(4, 3), ((torch.ones(3, 4),), dict[str, Any]())

    def once_more(program: Any, *rest: Any) -> Any:
        if error := next(tries):
            raise error
        return run(program, *rest)

    monkeypatch.setattr(passes, "run", once_more)
    options, clock = ExpandOptions(make_control(model, 2)), compiler.Clock()
    assert compiler.compile_program(model, call, options, clock).functional
    assert clock.laps == {"capture": 2, "transform": 2}
    assert next(ticks) == 5


# --------------------------------------------------------------------------- what widened
class Looks(nn.Module):
    """Its Python looks at values between all of its layers; one weight it reads itself."""

    def __init__(self, *layers: nn.Module, own: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.own = nn.Parameter(torch.randn(own, own)) if own else None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x = x / 2 if float(x.detach().mean()) > 1e9 else x
        return x if self.own is None else x @ self.own


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def image_parts() -> nn.Module:
    pool = nn.AdaptiveAvgPool2d(1)
    return Looks(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), pool, nn.Flatten(), nn.Linear(6, 2))


NOTHING: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any], str]] = {
    "single layers": (image_parts, torch.randn(4, 3, 8, 8), {}, "goes to Python"),
    "one part": (lambda: Looks(nn.Linear(4, 3)), torch.randn(3, 4), {}, "goes to Python"),
    "one layer": (lambda: nn.Linear(4, 3), torch.randn(3, 4), {}, ""),
    "ratio one": (lambda: mlp(4, 8, 3), torch.randn(3, 4), {"ratio": 1}, ""),
    "all kept": (lambda: mlp(4, 8, 3), torch.randn(3, 4), {"keep": "*"}, ""),
    "Python's": (lambda: Looks(nn.Linear(4, 3), own=3), torch.randn(3, 4), {}, "uncaptured"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_widens_the_report_says_so(name: str) -> None:
    make, x, options, why = NOTHING[name]
    options = {"ratio": 2, "branches": None, "dynamic": "batch"} | options
    report = gpdfx.expand(make(), example_inputs=(x,), **options).report()
    before, after = report.parameters
    assert before == after
    assert (report.widened, report.groups) == (0.0, ())
    assert report.to_dict()["widened"] == 0.0
    row = next(line for line in str(report).splitlines() if line.startswith("widened"))
    assert row.split(None, 1)[1].startswith("0.0% of the weights: the teacher is no wider")
    held = [f.reason for f in report.fixed if not f.cannot]
    assert bool(held) == bool(why)
    assert any(reason.startswith(why) for reason in held) or not why


SHARES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "all of it": (lambda: mlp(4, 8, 3), 56, 56),
    "its parts": (lambda: Looks(mlp(4, 8, 6), mlp(6, 5, 3)), 80 + 45, 80 + 45),
    "not a layer alone": (lambda: Looks(mlp(4, 8, 6), nn.Linear(6, 3)), 80, 80 + 18),
    "not what Python reads": (lambda: Looks(mlp(4, 8, 3), own=3), 56, 56 + 9),
    "neither": (lambda: Looks(nn.Linear(4, 6), mlp(6, 5, 3), own=3), 45, 24 + 45 + 9),
}


@pytest.mark.parametrize("name", SHARES)
def test_the_share_is_of_all_that_could_widen(name: str) -> None:
    make, did, could = SHARES[name]
    x = torch.randn(3, 4)
    teacher = gpdfx.expand(make(), 2, example_inputs=(x,), branches=None, dynamic="batch")
    report = teacher.report()
    assert report.widened == pytest.approx(did / could)
    assert f"{did / could:.1%} of the weights, in" in str(report)
    if report.apart:
        assert "float(x.detach().mean())" in report.apart[""]
        assert "not captured (runs as Python, at the student's width)" in str(report)
