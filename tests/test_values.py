"""What a trace has no value for: buffers that forward replaces, constants that Python reads, and
functions of TorchScript that a module holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpdfx

from .helpers import trains_as


class Around(nn.Module):
    """A module between two layers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(6, 8), inner, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.stem(x)))


def example() -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------- replaced buffers
class Average(nn.Module):
    """An average over calls, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        return x - self.average


class Spiking(nn.Module):
    """A potential that decays from call to call, and is reset where it fires."""

    def __init__(self, *start: int) -> None:
        super().__init__()
        self.register_buffer("potential", torch.zeros(start), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.potential.numel():
            self.potential = torch.zeros_like(x)
        charged = 0.8 * self.potential + x
        fired = torch.sigmoid(4 * charged - 2)
        self.potential = (charged * (1 - fired)).detach()
        return fired


class Steps(nn.Module):
    """A count, and a state that is begun anew, both replaced twice in a call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("state", torch.ones(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            self.count = self.count + 1
            self.state = (self.state + x.detach().amax(0, keepdim=True)).tanh()
        return x * self.state + self.count


class Remade(nn.Module):
    """Makes its buffer anew, in the default type, whatever that of the parameters is."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.register_buffer("mask", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.mask = torch.full((8,), 0.5, dtype=torch.float32) * self.count
        return x * self.mask


def test_a_buffer_is_made_anew_in_a_narrower_type_than_the_check_has() -> None:
    model = Around(Remade())
    teacher = gpdfx.expand(model, example_inputs=(example(),))
    assert "keeps count" in teacher.report().apart["inner"]
    trains_as(model, teacher, example())


@pytest.mark.parametrize("build", [Average, lambda: Spiking(4, 8), Steps])
def test_a_buffer_that_forward_replaces_is_written_to(build: Callable[[], nn.Module]) -> None:
    model = Around(build())
    teacher = gpdfx.expand(model, example_inputs=(example(),), branches=None)
    assert teacher.report().widened == 1
    assert not teacher.report().apart
    own = copy.deepcopy(model)
    for k in range(3):
        x = (1 + k) * example()
        expected = own(x)
        torch.testing.assert_close(teacher(x), expected)
        torch.testing.assert_close(teacher.student(x), expected)
    for got, expected in zip(gpdfx.collapse(teacher).buffers(), own.buffers(), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("start", [(0,), (1, 8), (2, 8)])
def test_a_buffer_that_gets_another_size_is_refused(start: tuple[int, ...]) -> None:
    x = torch.cat([example()] * 2)[: 6 if start[0] < 2 else 2].clone()
    inner = Spiking(*start)
    if start[0] == 2:  # in any place, also of a size that only depends on the call
        inner.forward = lambda x: _longer(inner, x)  # type: ignore[method-assign]
    model = Around(inner)
    with pytest.raises(gpdfx.InputError, match="gives the buffer potential another size") as caught:
        gpdfx.expand(model, example_inputs=(x,), branches=None)
    assert caught.value.module_path == "inner (Spiking)"
    assert "call the model once" in str(caught.value.remedy)
    if start[0] < 2:
        with torch.no_grad():
            model(x)
        assert gpdfx.expand(model, example_inputs=(x,), branches=None).report().widened == 1


def _longer(part: nn.Module, x: Tensor) -> Tensor:
    part.potential = torch.cat([part.potential, x.detach()])
    return x + part.potential.mean(0)


# --------------------------------------------------------------------------- constants
class Reads(nn.Module):
    """Something that reads values of constants."""

    def __init__(self, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x)

    def gated(self, x: Tensor) -> Tensor:
        return self.gate(x, x)


def dims(x: Tensor) -> Tensor:
    x = x[:, None]
    return (x - x.mean(torch.arange(1, x.ndim).tolist(), keepdim=True))[:, 0]


def computed(x: Tensor) -> Tensor:
    scales = torch.linspace(0, 1, 3) * 4
    for scale in scales[1:]:
        x = x * float(scale) if scale > 3 else x + int(scale)
    return x


def branches(x: Tensor) -> Tensor:
    pair = torch.tensor([1, 2]).split(1)
    return x.relu() if pair[1] > pair[0] else x.tanh()


def drawn(x: Tensor) -> Tensor:
    return x.relu() if torch.bernoulli(torch.full((1,), 0.5)).item() > 0.5 else x


def written(x: Tensor) -> Tensor:
    table = torch.zeros(3)
    seen = table[1:]
    table[1] = 2.0
    return x.relu() if seen[0].item() > 1 else x


@pytest.mark.parametrize("form", [dims, computed, branches, written])
def test_python_reads_constants(form: Callable[[Tensor], Tensor]) -> None:
    model = Around(Reads(form))
    teacher = gpdfx.expand(model, example_inputs=(example(),))
    assert teacher.report().widened == 1
    assert not teacher.report().apart
    trains_as(model, teacher, example())


def test_what_is_drawn_is_no_constant() -> None:
    model = Around(Reads(drawn))
    teacher = gpdfx.expand(model, example_inputs=(example(),))
    assert teacher.report().apart
    for seed in range(4):
        torch.manual_seed(seed)
        expected = model(example())
        torch.manual_seed(seed)
        torch.testing.assert_close(teacher(example()), expected)


# --------------------------------------------------------------------------- assertions
ASSERTS = """
def asserts(x):
    assert (x.abs() < 1e9).all(), f"{x.shape}"
    assert not x.isnan().any()
    return x.relu()
"""
_NAMES: dict[str, Any] = {}
exec(ASSERTS, _NAMES)  # pytest writes its own branches for those of a test


def raises(x: Tensor) -> Tensor:
    if x.ndim == 2 and (x.abs() > 1e9).any():
        raise ValueError(f"Expected {x}" + repr(x.shape))
    return torch.distributions.Normal(x, torch.ones_like(x), validate_args=True).mean.relu()


def returns_or_raises(x: Tensor) -> Tensor:
    if not (x.abs() > 1e9).any():
        return x.relu()
    raise ValueError("too large")


@pytest.mark.parametrize("form", [_NAMES["asserts"], raises, returns_or_raises])
def test_what_forward_asserts_of_values_holds(form: Callable[[Tensor], Tensor]) -> None:
    """A branch that only raises is none; the student still looks."""
    model = Around(Reads(form))
    teacher = gpdfx.expand(model, example_inputs=(example(),))
    assert teacher.report().widened == 1
    assert not teacher.report().apart
    trains_as(model, teacher, example())
    with pytest.raises((AssertionError, ValueError)):
        teacher.student(example() * 1e20)


def chooses(x: Tensor) -> Tensor:
    if x.mean() > 0:
        x = x * 2
    return x.relu()


def test_any_other_branch_on_values_stays_python() -> None:
    model = Around(Reads(chooses))
    teacher = gpdfx.expand(model, example_inputs=(example(),))
    assert "data-dependent" in teacher.report().apart[""]
    for sign in (1, -1):
        torch.testing.assert_close(teacher(sign * example()), model(sign * example()))


def by_type(x: Tensor) -> Tensor:
    return x * 2 if x.dtype == torch.float32 else x * 3


def test_a_branch_on_the_type_stays_python() -> None:
    """In float64, in which the laws are looked at, it is another function."""
    model = Around(Reads(by_type))
    teacher = gpdfx.expand(model, example_inputs=(example(),))
    trains_as(model, teacher, example())
    torch.testing.assert_close(
        teacher.double()(example().double()), model.double()(example().double())
    )


class ByType(nn.Module):
    """Normalizes by a number, or a function, that depends on the type."""

    def __init__(self, function: bool) -> None:
        super().__init__()
        self.scale, self.function = nn.Parameter(torch.ones(8)), function

    def forward(self, x: Tensor) -> Tensor:
        single = x.dtype == torch.float32
        if self.function:
            x = x.sin() if single else x.cos()
        variance = x.var(-1, keepdim=True)
        return x * (variance + (1e-2 if single else 1e-1)).rsqrt() * self.scale


class Attends(nn.Module):
    """In single precision, whatever its parameters have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.all, self.last = ByType(False), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.all(self.norm(x)).chunk(3, -1)
        weights = (q @ k.transpose(-1, -2)).softmax(-1, dtype=torch.float32)
        y: Tensor = self.last(weights.type(q.dtype) @ v)
        return x + y


def test_a_number_chosen_by_type_follows_it() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), Attends(), nn.Linear(8, 3)), torch.randn(2, 5, 8)
    teacher = gpdfx.expand(model, example_inputs=(x,))
    assert teacher.report().widened == 1
    trains_as(model, teacher, x)
    torch.testing.assert_close(teacher.double()(x.double()), model.double()(x.double()))


def test_a_type_chooses_in_more_modules_than_are_tried_one_by_one() -> None:
    many = [ByType(True) for _ in range(10)]
    model, x = nn.Sequential(nn.Linear(8, 8), *many, nn.Linear(8, 3)), torch.randn(3, 8)
    teacher = gpdfx.expand(model, example_inputs=(x,))
    assert teacher.report().apart.keys() == {"", *map(str, range(1, 11))}
    trains_as(model, teacher, x)
    torch.testing.assert_close(teacher.double()(x.double()), model.double()(x.double()))


class Decays(nn.Module):
    """By numbers in attributes, which stay in single precision when the parameters do not."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.step = torch.tensor(0.1), torch.tensor([0.7, 0.3])

    def forward(self, x: Tensor) -> Tensor:
        x = x * (1 - self.rate / 3) + (self.step * self.rate).sum()
        return x.tanh() * (self.rate * 7 + 1)


def test_constants_compute_in_their_own_type() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), Decays(), nn.Linear(8, 3)), torch.randn(3, 8)
    teacher = gpdfx.expand(model, example_inputs=(x,))
    assert teacher.report().widened == 1
    trains_as(model, teacher, x)
    y = teacher.double()(x.double())
    torch.testing.assert_close(y, model.double()(x.double()), rtol=1e-12, atol=1e-12)


class Rotates(nn.Module):
    """A complex constant, in the type of a complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.randn(12, dtype=torch.complex64))
        self.start = torch.full((12,), 0.6 + 0.8j, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        turn = self.start.to(self.turn.dtype) * self.turn
        y: Tensor = torch.vmap(lambda row: (row * turn).real)(x)
        return y + x.softmax(-1, dtype=torch.float32).type(x.dtype)


def test_a_cast_to_complex_that_only_float64_has() -> None:
    """Under ``vmap`` a cast that does nothing leaves no trace."""
    model, x = nn.Sequential(nn.Linear(8, 12), Rotates(), nn.Linear(12, 3)), torch.randn(3, 8)
    teacher = gpdfx.expand(model, example_inputs=(x,))
    assert teacher.report().widened == 1
    trains_as(model, teacher, x)
    y, wanted = teacher.double()(x.double()), model.double()(x.double())
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)


class Letters(nn.Module):
    """Takes numbers of letters, if that is really what it gets, or their shares."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and x.dtype is torch.long:
            x = nn.functional.one_hot(x, 4).float()
        y: Tensor = self.body(x)
        return y


def test_forward_asks_for_the_class_of_a_tensor() -> None:
    model, x = Letters(), torch.randint(4, (3, 7))
    teacher = gpdfx.expand(model, example_inputs=(x,))
    assert teacher.report().widened == 1
    torch.testing.assert_close(teacher(x), model(x))


class Tries(nn.Module):
    """Calls each layer in two ways, of which it takes but one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            try:
                x = layer(x, lengths=None)
            except TypeError:
                x = layer(x)
        return x


def test_forward_catches_what_a_module_raises() -> None:
    model = nn.Sequential(nn.Linear(6, 8), Tries(), nn.Linear(8, 4))
    teacher = gpdfx.expand(model, example_inputs=(example(),))
    assert teacher.report().widened == 1
    assert not teacher.report().apart
    trains_as(model, teacher, example())


# --------------------------------------------------------------------------- TorchScript
def test_a_function_of_torchscript_in_an_attribute() -> None:
    def gate(x: Tensor, y: Tensor) -> Tensor:
        return x * torch.sigmoid(y)

    model = Around(Reads(lambda x: x))
    model.inner.gate = torch.jit.script(gate)
    model.inner.form = partial(Reads.gated, model.inner)
    teacher = gpdfx.expand(model, example_inputs=(example(),))
    assert teacher.report().widened == 1
    twin = copy.deepcopy(teacher)
    for run in (teacher, teacher.student, twin, twin.student, gpdfx.collapse(twin)):
        torch.testing.assert_close(run(example()), model(example()))
