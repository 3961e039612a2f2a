"""Values that follow from constants, which export takes for unknown; tensors under transforms of
``torch.func``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp

import gpdfx

from .helpers import parts, trains_as


class Net(nn.Module):
    """Two layers; what stands between them is the case's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv1d(6, 12, 1), nn.Conv1d(12, 4, 1)
        self.order = torch.tensor([0, 2, 1])

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.inside(self.a(x)).relu())

    def inside(self, h: Tensor) -> Any:
        raise NotImplementedError


class Dimensions(Net):
    def inside(self, h: Tensor) -> Any:
        dims = torch.arange(1, h.ndim).tolist()
        return h - h.mean(dims, keepdim=True)


class Computed(Net):
    def inside(self, h: Tensor) -> Any:
        order = torch.argsort(torch.tensor([0, 2, 1]))
        return (h.permute(*order).tanh() * 2).permute(*order.tolist())


class Attribute(Net):
    def inside(self, h: Tensor) -> Any:
        h = h.permute(*self.order).cumsum(1)
        return h.permute(*(int(d) for d in self.order))


class Written(Net):
    """In place, through views too."""

    def inside(self, h: Tensor) -> Any:
        sizes = torch.full((3,), 4)
        sizes[0] += 2
        sizes[1:].sub_(torch.tensor([2, 0]))
        a, b, c = h.split(sizes.tolist(), 1)
        return torch.cat([a * 2, b.tanh(), c], 1)


class Branches(Net):
    def inside(self, h: Tensor) -> Any:
        mask = torch.ones(3, 3).triu(1)
        if mask.sum() > 2:
            h = h * 2
        for k in torch.linspace(1, 3, 3).int():
            h = h + k if (mask == 5).any() else h * int(k)
        return h


class Masked(Net):
    """Sizes that depend on values, which are constant."""

    def inside(self, h: Tensor) -> Any:
        keep = torch.arange(h.shape[1]) % 3 == 0
        values, counts = torch.unique(torch.tensor([0, 1, 1, 2]), return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            h = h + value * count
        half: Any = torch.tensor(h.shape[1]) // 2
        h = torch.cat([h[:, half:], h[:, :half]], 1)
        return h + torch.zeros_like(h).index_add(1, keep.nonzero()[:, 0], h[:, keep])


@pytest.mark.parametrize("kind", [Dimensions, Computed, Attribute, Written, Branches, Masked])
def test_what_follows_from_constants_is_one(kind: Any) -> None:
    torch.manual_seed(0)
    model = kind()
    teacher = gpdfx.expand(model, 2, example_inputs=(torch.randn(4, 6, 5),), branches=None)
    report = teacher.report()
    assert not report.apart
    assert report.parameters[1] > 1.8 * report.parameters[0]
    trains_as(model, teacher, torch.randn(3, 6, 7))


class Counted(Net):
    """A value that follows from inputs, written to what was a constant."""

    def inside(self, h: Tensor) -> Any:
        counts = torch.zeros(3)
        last = counts[1:]
        last.add_((h.detach().mean(-1) > 0).sum())
        return h * int(counts.tolist()[2])


class Drawn(Net):
    def inside(self, h: Tensor) -> Any:
        return h * int(torch.randint(1, 90, ()))


class Buffered(Net):
    """A buffer is loaded, and no constant."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor([3, 2]))

    def inside(self, h: Tensor) -> Any:
        return h * self.get_buffer("steps").tolist()[0]


@pytest.mark.parametrize("kind", [Counted, Drawn, Buffered])
def test_what_does_not_is_none(kind: Any) -> None:
    torch.manual_seed(0)
    model = kind()
    teacher = gpdfx.expand(model, 2, example_inputs=(torch.randn(4, 6, 5),), branches=None)
    for name, buffer in [*teacher.named_buffers(), *model.named_buffers()]:
        if name.endswith("steps"):
            buffer.fill_(5)
    for k in range(4):
        x = torch.randn(3, 6, 5) + k - 2
        for run in (teacher, teacher.student):
            torch.manual_seed(k)
            want = model(x)
            torch.manual_seed(k)
            torch.testing.assert_close(run(x), want)


# --------------------------------------------------------------------------- torch.func
class Mapped(nn.Module):
    """What is mapped reads parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.m, self.c = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.w = nn.Parameter(torch.randn(12, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.inside(self.a(x)).relu())

    def inside(self, h: Tensor) -> Any:
        return torch.vmap(lambda row: self.w @ row)(h)


class Several(Mapped):
    """Two results, one of them where the last dimension was."""

    def inside(self, h: Tensor) -> Any:
        a, b = torch.vmap(lambda row: (self.w @ row, (row * row).sum()), out_dims=(-1, 0))(h)
        return a.T * b[:, None]


class Nested(Mapped):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda one: Mapped.forward(self, one[None].expand(2, -1)))(x).sum(1)


class Pairs(Mapped):
    def inside(self, h: Tensor) -> Any:
        inner: Any = torch.vmap(lambda row, w: (row * w).sum(), in_dims=(None, 0))
        return torch.vmap(lambda row: inner(row, self.w).softmax(0) @ self.w)(h)


@pytest.mark.parametrize("kind", [Mapped, Several, Nested, Pairs])
def test_functions_of_parameters_are_mapped(kind: Any) -> None:
    torch.manual_seed(0)
    model = kind()
    teacher = gpdfx.expand(model, 2, example_inputs=(torch.randn(6, 8),))
    assert list(parts(teacher)) == [""]
    assert teacher.report().parameters[1] > 1.3 * teacher.report().parameters[0]
    trains_as(model, teacher, torch.randn(6, 8))
    trains_as(model, teacher, torch.randn(3, 8))


class Steps(Mapped):
    """A step of gradient descent within."""

    def inside(self, h: Tensor) -> Any:
        own = dict(self.m.named_parameters())
        g = grad(lambda p: functional_call(self.m, p, (h,)).square().mean())(own)
        return functional_call(self.m, {k: p - 0.1 * g[k] for k, p in own.items()}, (h,))


class Also(Mapped):
    """A module that is called under a transform and outside."""

    def inside(self, h: Tensor) -> Any:
        return grad(lambda z: self.m(z).square().sum())(h) + self.m(h)


class Pulled(Mapped):
    def inside(self, h: Tensor) -> Any:
        y, back = vjp(lambda z: self.m(z).tanh(), h)
        return back(torch.ones_like(y))[0] + y


class Lent(Mapped):
    """A module that is called with others' parameters, in Python."""

    def inside(self, h: Tensor) -> Any:
        y = functional_call(self.m, {"weight": self.w}, (h,))
        return y if float(y.detach().sum()) < 1e9 else y + self.m(h)


@pytest.mark.parametrize("kind", [Steps, Also, Pulled, Lent])
def test_modules_under_transforms_are_no_parts(kind: Any) -> None:
    torch.manual_seed(0)
    model = kind()
    teacher = gpdfx.expand(model, 2, example_inputs=(torch.randn(6, 8),), branches=None)
    assert set(parts(teacher)) == {"a", "c"}
    trains_as(model, teacher, torch.randn(3, 8))


class Wavelengths(nn.Module):
    """Makes features of numbers in its own Python, in float32 for whatever it is cast to, as DOFA
    does: of angles so large that the last bit of a number is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.first = nn.Linear(16, 12), nn.Linear(6, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        length = torch.tensor([0.66, 0.55, 0.48]).float() * 1000
        steps = 1.0 / 10000 ** (torch.arange(8, dtype=torch.float32) / 8)
        angles = torch.einsum("m,d->md", length, steps)
        features = self.features(torch.cat([angles.sin(), angles.cos()], 1)).relu()
        return self.last(self.first(x) * features.sum(0))


def test_numbers_of_forwards_own_are_rounded_as_it_rounds_them() -> None:
    torch.manual_seed(0)
    model, x = Wavelengths(), torch.randn(4, 6)
    teacher = gpdfx.expand(model, 2, example_inputs=(x,))
    assert not teacher.report().apart
    assert teacher.report().widened == 1
    trains_as(model, teacher, x)
