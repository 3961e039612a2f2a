"""Arguments and results of any structure: containers of the user's own, sizes, one tensor in
several places, complex numbers."""

from __future__ import annotations

import operator
from collections import OrderedDict, UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpdfx
from gpdfx.calls import tree

from .helpers import trains_as


class Named(dict[str, Any]):
    """As many configurations are."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


class Linked(dict[str, Any]):
    """The shorter way to the same."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__ = self


class Masked:
    """No dict of its own, and an order of arguments."""

    __slots__ = ("mask", "tensors")

    def __init__(self, tensors: Tensor, mask: Tensor) -> None:
        self.tensors, self.mask = tensors, mask


@dataclass(slots=True)
class Slotted:
    tensors: Tensor
    mask: Tensor
    number: int = 3


class Batch(UserDict[str, Any]):
    """Copied by a method of its class."""


class Ordered(OrderedDict[str, Any]):
    """Made by another class than ``dict``."""


class Several(list[Any]):
    pass


class Fixed(tuple[Any, ...]):
    pass


def by_name(kind: Callable[..., Any]) -> Any:
    return lambda x, m: kind(tensors=x, mask=m), lambda q: (q.tensors, q.mask)


def by_key(kind: Callable[..., Any]) -> Any:
    return lambda x, m: kind(tensors=x, mask=m), lambda q: (q["tensors"], q["mask"])


def in_order(kind: Callable[..., Any]) -> Any:
    return lambda x, m: kind([x, m]), lambda q: (q[0], q[1])


CONTAINERS = {
    "attributes": by_name(Named),
    "linked": by_name(Linked),
    "slots": by_name(Masked),
    "dataclass": by_name(Slotted),
    "namespace": by_name(SimpleNamespace),
    "user dict": by_key(Batch),
    "ordered": by_key(Ordered),
    "list": in_order(Several),
    "tuple": in_order(Fixed),
    "nested": (
        lambda x, m: Named(inner=Several([Masked(x, m)]), number=3),
        lambda q: (q.inner[0].tensors, q.inner[0].mask),
    ),
}


class Net(nn.Module):
    def __init__(self, put: Callable[..., Any], take: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.put, self.take = put, take

    def forward(self, given: Any) -> Any:
        x, mask = self.take(given)
        h = self.b(self.a(x).relu())
        return {"kept": self.put(self.c(h), mask), "size": h.shape[:2]}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_of_the_users_own(name: str) -> None:
    torch.manual_seed(0)
    put, take = CONTAINERS[name]
    model = Net(put, take)
    example = put(torch.randn(4, 5, 4), torch.rand(4, 5) > 0.5)
    teacher = gpdfx.expand(model, 2, example_inputs=(example,), branches=None)
    assert not teacher.report().apart
    assert teacher.get_parameter("a.weight").shape == (16, 4)
    given = put(torch.randn(3, 7, 4), torch.rand(3, 7) > 0.5)
    trains_as(model, teacher, given)
    for result in (teacher(given), teacher.student(given)):
        assert type(result["kept"]) is type(given)
        assert torch.equal(take(result["kept"])[1], take(given)[1])
        assert type(result["size"]) is torch.Size
        assert result["size"] == (3, 7)


@pytest.mark.parametrize("name", CONTAINERS)
def test_flattened_and_made_again(name: str) -> None:
    put, take = CONTAINERS[name]
    given = put(torch.zeros(1), torch.ones(2))
    leaves, spec = tree.flatten([given])
    assert {id(x) for x in leaves if isinstance(x, Tensor)} == set(map(id, take(given)))
    (again,) = tree.unflatten(leaves, spec)
    assert again is not given
    assert tree.flatten([again])[1] == spec
    assert all(map(operator.is_, take(again), take(given)))
    assert len(tree.paths([given])) == len(leaves)


class Attends(nn.Module):
    """Asks by identity, as ``nn.MultiheadAttention`` does, to the same end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.k, self.v = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(4, 8)
        self.c = nn.Linear(8, 3)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.a(q) @ self.k(k).mT
        return self.c(scores.softmax(-1) @ (self.v(k) if v is k else self.v(v)))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("make", "width"),
    [(Attends, 4), (lambda: nn.MultiheadAttention(8, 2, batch_first=True), 8)],
)
def test_one_tensor_in_several_places_is_several_inputs(
    make: Callable[[], nn.Module], width: int, verify: bool
) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(2, 5, width)
    teacher = gpdfx.expand(model, 2, example_inputs=(x, x, x), branches=None, verify=verify)
    assert not teacher.report().apart
    trains_as(model, teacher, x, x, x)
    memory = torch.randn(3, 6, width)
    trains_as(model, teacher, torch.randn(3, 4, width), memory, torch.randn(3, 6, width))
    trains_as(model, teacher, torch.randn(3, 4, width), memory, memory)


class Spectral(nn.Module):
    """A filter of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 8), nn.Linear(8, 3)
        self.filter = nn.Parameter(torch.randn(8, 4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        f = torch.fft.rfft(self.a(x), dim=1)
        return self.c(torch.fft.irfft(f * self.filter.mT, n=x.shape[1], dim=1))


class Waves(nn.Module):
    """A layer of complex numbers, and some that come out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 8), nn.Linear(6, 3)
        self.b = nn.Linear(8, 6, dtype=torch.complex64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.b(self.a(x).to(torch.complex64))
        return self.c(z.abs()), z.real


class Phase(nn.Module):
    """A bias of complex numbers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 8), nn.Linear(8, 3)
        self.phase = nn.Parameter(torch.randn(8, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.c((self.a(x) + self.phase).imag.tanh() + self.a(x))


class Operator(nn.Module):
    """As neural operators do: low frequencies are written into zeros of a given dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 8), nn.Linear(8, 3)
        self.low = nn.Parameter(torch.randn(8, 8, 2, dtype=torch.cfloat) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).mT
        f = torch.fft.rfft(x)
        low = torch.zeros(*f.shape, dtype=torch.cfloat)
        low[..., :2] = torch.einsum("bix,iox->box", f[..., :2], self.low)
        return self.c((torch.fft.irfft(low, n=x.shape[-1]) + x).relu().mT)


@pytest.mark.parametrize("kind", [Spectral, Waves, Phase, Operator])
@pytest.mark.parametrize("branches", [None, "auto"])
def test_complex_parameters(kind: type[nn.Module], branches: str | None) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(3, 6, 4)
    teacher = gpdfx.expand(model, 2, example_inputs=(x,), branches=branches)
    report = teacher.report()
    assert not report.apart
    assert report.parameters[1] > report.parameters[0]
    assert max(report.error.values()) <= 1e-10
    student = gpdfx.collapse(teacher)
    torch.testing.assert_close(student(x), model(x))
    teacher.load_state_dict(gpdfx.to_teacher(student.state_dict(), teacher))
    trains_as(model, teacher, x)
