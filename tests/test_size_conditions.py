"""What the user's code asks of sizes holds for the teacher: compiled or not, checked or loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import gpdfx

from .helpers import trains_as


class Forks(nn.Module):
    """Another way where a condition holds; a sum over the length, so that none is no nothing."""

    def __init__(self, holds: Callable[[Tensor], Any], *, train_only: bool = False) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(8, 6), nn.Linear(6, 4)
        self.holds, self.train_only = holds, train_only

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).sum(1)
        if self.train_only and not self.training:
            return self.c(h)
        return self.c(h * 2 if self.holds(x) else h - 1)


def expanded(model: nn.Module, *shape: int, **options: Any) -> gpdfx.Teacher:
    torch.manual_seed(0)
    example = (torch.randn(shape),)
    return gpdfx.expand(model, 2, example_inputs=example, branches=None, **options)


def same(teacher: Callable[[Tensor], Any], model: nn.Module, shape: tuple[int, ...]) -> None:
    """Values and gradients."""
    x = torch.randn(shape, requires_grad=True)
    got, want = teacher(x), model(x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    (a,), (b,) = (torch.autograd.grad(y.square().sum(), x) for y in (got, want))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


class Pointwise(Forks):
    """Of nothing it gives nothing, whichever way it goes."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(h * 2 if self.holds(x) else h - 1)


@pytest.mark.parametrize(
    ("holds", "refused"),
    [
        (lambda x: x.shape[1] > 2, (3, 2, 8)),
        (lambda x: x.shape[1] >= 2, (3, 1, 8)),
        (lambda x: x.shape[0] > 1, (1, 5, 8)),
        (lambda x: x.shape[1] % 5 != 2, (3, 7, 8)),
    ],
)
def test_that_nothing_is_nothing_tells_nothing(
    holds: Callable[[Tensor], Any], refused: tuple[int, ...]
) -> None:
    model = Pointwise(holds)
    teacher = expanded(model, 3, 5, 8)
    same(teacher, model, (2, 8, 8))
    with pytest.raises(gpdfx.InputError, match="needs"):
        teacher(torch.randn(refused))


CONDITIONS = [
    (lambda x: x.shape[1] != 4, (3, 8, 8), (2, 9, 8), (3, 4, 8)),
    (lambda x: x.shape[1] in (4, 12), (3, 8, 8), (2, 9, 8), (3, 12, 8)),
    (lambda x: x.shape[0] > x.shape[1], (3, 5, 8), (2, 6, 8), (7, 5, 8)),
    (lambda x: math.floor(x.shape[1] * 0.3) > 2, (3, 16, 8), (2, 10, 8), (3, 9, 8)),
    (lambda x: round(x.shape[1] * 0.3) > 2, (3, 16, 8), (2, 11, 8), (3, 7, 8)),
    (lambda x: torch.sym_float(x.shape[1]) / 3 > 2.5, (3, 16, 8), (2, 8, 8), (3, 7, 8)),
    (lambda x: math.ceil(x.shape[1] / 4) > 2, (3, 16, 8), (2, 9, 8), (3, 8, 8)),
    (lambda x: x.shape[1] // 3 > 2, (3, 9, 8), (2, 12, 8), (3, 8, 8)),
    (lambda x: x.shape[1] % 5 == 0, (3, 5, 8), (2, 10, 8), (3, 6, 8)),
    (lambda x: x.shape[1] % 7 == 0, (3, 14, 8), (1, 21, 8), (3, 15, 8)),
    (lambda x: x.shape[1] / x.shape[0] > 2.5, (3, 16, 8), (2, 9, 8), (8, 16, 8)),
    (lambda x: x.shape[1] > 0, (3, 5, 8), (1, 1, 8), (3, 0, 8)),
    (lambda x: x.shape[0] != 10**9, (3, 5, 8), (1, 1, 8), (3, 5, 7)),
]


@pytest.mark.parametrize(("holds", "example", "allowed", "refused"), CONDITIONS)
def test_a_condition_is_kept_compiled_or_not(
    holds: Callable[[Tensor], Any],
    example: tuple[int, ...],
    allowed: tuple[int, ...],
    refused: tuple[int, ...],
) -> None:
    model = Forks(holds)
    teacher = expanded(model, *example)
    torch._dynamo.reset()
    whole = torch.compile(teacher, backend="eager", dynamic=True, fullgraph=True)
    for run in (teacher, whole):
        same(run, model, example)
        same(run, model, allowed)
        with pytest.raises(Exception, match=r"captured|InputError"):
            run(torch.randn(refused))
    loose = torch.compile(teacher, backend="aot_eager")
    for run in (teacher, loose):
        with pytest.raises(gpdfx.InputError, match="captured"):
            run(torch.randn(refused))


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_a_compiled_teacher_is_compiled_once_for_all_that_is_allowed(dynamic: bool | None) -> None:
    model = Forks(lambda x: x.shape[1] > 20 or x.shape[1] % 2)
    teacher = expanded(model, 4, 6, 8)
    torch._dynamo.reset()
    counter = CompileCounter()
    fast = torch.compile(teacher, backend=counter, dynamic=dynamic, fullgraph=True)
    sizes = (6, 8, 10, 12, 20)
    for length in sizes:
        same(fast, model, (4, length, 8))
    most = {None: 2, True: 1, False: len(sizes)}[dynamic]
    assert counter.frame_count == most
    for length in (22, 7):
        with pytest.raises(Exception, match=r"needs x\.shape\[1\]|InputError"):
            fast(torch.randn(4, length, 8))
    same(fast, model, (4, 10, 8))
    assert counter.frame_count == most


def test_a_marked_dimension_keeps_its_conditions() -> None:
    model = Forks(lambda x: x.shape[1] <= 20)
    teacher = expanded(model, 4, 6, 8)
    torch._dynamo.reset()
    counter = CompileCounter()
    fast = torch.compile(teacher, backend=counter)
    for length in (6, 9, 20):
        x = torch.randn(4, length, 8)
        torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    with pytest.raises(gpdfx.InputError, match=r"x\.shape\[1\] <= 20"):
        fast(torch.randn(4, 21, 8))


class Twice(nn.Module):
    """One module at two lengths, on both sides of its condition, and Python in between."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.d = Forks(lambda x: x.shape[1] > 9), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(x)
        if float(y.detach().sum()) > 1e9:
            y = y + 1
        return self.d(y + self.b(torch.cat([x, x, x], 1)))


def test_a_compiled_part_goes_on_to_the_graph_that_holds() -> None:
    model = Twice()
    teacher = expanded(model, 3, 5, 8)
    torch._dynamo.reset()
    fast = torch.compile(teacher, backend="eager")
    for run in (teacher, fast):
        same(run, model, (3, 5, 8))
        same(run, model, (2, 9, 8))


@pytest.mark.parametrize(
    "holds", [lambda x: x.shape[0] == 1, lambda x: x.shape[0] > 1, lambda x: x.shape[0] % 3 == 1]
)
def test_an_example_of_one_sample_may_go_its_own_way(holds: Callable[[Tensor], Any]) -> None:
    model = Forks(holds)
    teacher = expanded(model, 1, 5, 8)
    same(teacher, model, (1, 5, 8))
    same(teacher, model, (1, 7, 8))
    with pytest.raises(gpdfx.InputError, match="size 2 in dimension 0"):
        teacher(torch.randn(2, 5, 8))


def test_in_train_mode_only() -> None:
    model = Forks(lambda x: x.shape[1] % 4 == 0, train_only=True)
    teacher = expanded(model, 3, 8, 8)
    same(teacher.eval(), model.eval(), (2, 7, 8))
    same(teacher.train(), model.train(), (2, 12, 8))
    with pytest.raises(gpdfx.InputError, match="% 4"):
        teacher(torch.randn(2, 7, 8))


def test_several_inputs_of_one_argument_have_names_of_their_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, *x: Tensor) -> Tensor:
            y = torch.cat([self.a(one) for one in x], 1)
            return self.c(y * 2 if x[0].shape[1] > x[1].shape[1] else y)

    inputs = torch.randn(3, 7, 8), torch.randn(3, 5, 8)
    teacher = gpdfx.expand(Two(), 2, example_inputs=inputs, branches=None)
    with pytest.raises(gpdfx.InputError, match=r"x\[1\]\.shape\[1\] < x\[0\]|x\[0\].*> x\[1\]"):
        teacher(torch.randn(3, 5, 8), torch.randn(3, 6, 8))


@pytest.mark.parametrize("how", ["unverified", "loaded"])
@pytest.mark.parametrize(
    ("holds", "refused"),
    [
        (lambda x: x.shape[1] != 7, (3, 7, 8)),
        (lambda x: x.shape[0] == 1, (1, 5, 8)),
        (lambda x: x.shape[1] > 0, (3, 0, 8)),
        (lambda x: x.shape[1] > 2, (3, 2, 8)),
    ],
)
def test_what_nobody_visits_is_refused(
    how: str, holds: Callable[[Tensor], Any], refused: tuple[int, ...], tmp_path: Path
) -> None:
    model = Forks(holds)
    teacher = expanded(model, 3, 5, 8, verify=how == "loaded")
    if how == "loaded":
        gpdfx.save(teacher, tmp_path / "teacher")
        teacher = gpdfx.load(tmp_path / "teacher", model)
    same(teacher, model, (2, 6, 8))
    with pytest.raises(gpdfx.InputError, match="captured"):
        teacher(torch.randn(refused))


def test_a_loaded_teacher_takes_what_the_check_had_visited(tmp_path: Path) -> None:
    model = Forks(lambda x: x.shape[1] != 7)
    gpdfx.save(expanded(model, 3, 5, 8), tmp_path / "teacher")
    teacher = gpdfx.load(tmp_path / "teacher", model)
    same(teacher, model, (1, 5, 8))
    same(teacher, model, (3, 1, 8))


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module, wide: int) -> None:
        super().__init__()
        self.a, self.r, self.c = nn.Linear(8, 6), layer, nn.Linear(wide, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.r(self.a(x))
        return self.c(y) + (state[0] if isinstance(state, tuple) else state).mean()


@pytest.mark.parametrize(
    ("layer", "wide"),
    [
        (nn.LSTM(6, 5, batch_first=True), 5),
        (nn.LSTM(6, 5, proj_size=3), 3),
        (nn.GRU(6, 5, 2, bidirectional=True), 10),
        (nn.GRU(6, 5, batch_first=True), 5),
        (nn.RNN(6, 5, bidirectional=True, batch_first=True), 10),
        (nn.RNN(6, 5, nonlinearity="relu"), 5),
    ],
)
def test_the_length_of_a_recurrent_layer_is_free(layer: nn.Module, wide: int) -> None:
    model = Recurrent(layer, wide)
    teacher = expanded(model, 4, 9, 8)
    assert teacher.report().inputs == {"x": "batch x any x 8"}
    for shape in ((4, 9, 8), (2, 11, 8), (1, 3, 8)):
        same(teacher, model, shape)


def test_a_recurrent_layers_own_conditions_hold() -> None:
    class Long(Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * 2 if x.shape[1] > 7 else y

    model = Long(nn.GRU(6, 5, batch_first=True), 5)
    teacher = expanded(model, 4, 5, 8)
    same(teacher, model, (2, 7, 8))
    with pytest.raises(gpdfx.InputError, match=r"x\.shape\[1\] <= 7"):
        teacher(torch.randn(2, 8, 8))


class Inside(nn.Module):
    """A recurrent layer in a region of its own."""

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.a, self.r, self.c = nn.Linear(5, 8), nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 4)
        self.autocast = autocast

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        region = torch.autocast("cpu", enabled=False) if self.autocast else torch.no_grad()
        with region:
            y = self.r(h)[0]
        return self.c(y) + h[..., :4]


@pytest.mark.parametrize("autocast", [True, False])
def test_a_recurrent_layer_in_a_region_widens_too(autocast: bool) -> None:
    torch.manual_seed(0)
    model, x = Inside(autocast), torch.randn(3, 7, 5)
    teacher = gpdfx.expand(model, 2, example_inputs=(x,), branches=None)
    assert not teacher.report().bridged
    trains_as(model, teacher, torch.randn(3, 9, 5))


def test_a_visit_leaves_no_statistics_behind() -> None:
    """Of no samples there are none, and the branches of a layer have norms of their own."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)).train()
    teacher = gpdfx.expand(model, 2, example_inputs=(torch.randn(4, 3, 8, 8),), branches="dbb")
    assert all(bool(buffer.isfinite().all()) for buffer in teacher.buffers())
