"""Gradients of the user's own: ``torch.autograd.Function``, and hooks on activations."""

from __future__ import annotations

import copy
import gc
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import gpdfx
from gpdfx.errors import InputError
from gpdfx.teacher.module import Teacher

from .helpers import parts, trains_as


# --------------------------------------------------------------------------- functions
class Round(Function):
    """A straight-through quantizer; ``steps`` is no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: int) -> Tensor:
        return (x * steps).round() / steps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Reverse(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grads[0], None


class Learned(Function):
    """Learned step size: one scale for all, or one a channel, that has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return (x / scale).round().clamp(-4, 3) * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        inside = ((x / scale) > -4) & ((x / scale) < 3)
        by_scale = torch.where(inside, (x / scale).round() - x / scale, (x / scale).clamp(-4, 3))
        by_scale = (by_scale * grads[0]).sum_to_size(scale.shape)
        return grads[0] * inside, by_scale


class Swish(Function):
    """Saves its input alone; the new form with a context of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x * x.sigmoid()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grads[0] * s * (1 + x * (1 - s))


class Spike(Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return grads[0] / (1 + 10 * v.abs()) ** 2


class Sign(Function):
    """A binary weight with the mean of its row as scale: not elementwise along the row."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return w.sign() * w.abs().mean(1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return grads[0] * (w.abs() < 1)


class Halves(Function):
    """Two results, one that is no tensor, a list of tensors as argument, positions that matter."""

    @staticmethod
    def forward(ctx: Any, xs: list[Tensor], x: Tensor, flag: bool = True) -> Any:
        ctx.half = x.shape[1] // 2
        return x[:, : ctx.half] + xs[0][:, : ctx.half], x[:, ctx.half :].clone(), "no tensor"

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, 3 * torch.cat([grads[0], grads[1]], 1), None


class Nearest(Function):
    """The nearest code, whose gradient goes to what it is near to."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, codes: Tensor) -> Any:
        index = torch.cdist(z, codes).argmin(-1)
        ctx.mark_non_differentiable(index)
        return codes[index], index

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class Stochastic(Function):
    """Draws at the shape that it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 4 + torch.rand_like(x)).floor() / 4

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Clip(Function):
    """PACT: reads a number out of a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: Tensor) -> Tensor:
        ctx.save_for_backward(x, most)
        return (x.clamp(0, most.item()) * 4 / most).round() * most / 4

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, most = ctx.saved_tensors
        return grads[0] * ((x > 0) & (x < most)), (grads[0] * (x >= most)).sum().view(most.shape)


class Largest(Function):
    """Reads one that follows from all elements; in the new form the context reads another."""

    @staticmethod
    def forward(w: Tensor) -> Tensor:  # type: ignore[override]
        step = w.abs().max().item() / 3
        return (w / step).round() * step

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.scale = 1 / (1 + inputs[0].square().mean().item())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.scale


class Elsewhere(Function):
    """Leaves PyTorch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(np.sign(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


# --------------------------------------------------------------------------- networks
class QuantizedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(Round.apply(x, 16), Round.apply(self.weight, 8), self.bias, padding=1)


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = QuantizedConv(3, 8, 3), QuantizedConv(8, 8, 3)
        self.norm, self.c = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.norm(self.b(self.a(x).relu())).mean((2, 3)))


class Steps(nn.Module):
    """Learned steps of activations (one a channel) and of a weight (one for all)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(8, 12), nn.Linear(12, 4)
        self.one = nn.Parameter(torch.full((), 0.2))
        self.each = nn.Parameter(torch.rand(12) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        weight = Learned.apply(self.a.weight, self.one)
        return self.c(Learned.apply(F.linear(x, weight, self.a.bias), self.each))


class Adversary(nn.Module):
    """Embedding, reversal before one of two heads; activations by name, in a loop over depth."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.deep = nn.Embedding(9, 8), nn.ModuleList(nn.Linear(8, 8) for _ in "ab")
        self.left, self.right = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, i: Tensor) -> tuple[Tensor, Tensor]:
        h = self.words(i)
        for layer in self.deep:
            h = h + Swish.apply(layer(h))
        return self.left(h), self.right(Reverse.apply(h, 0.3))


class Spiking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        v, total = x.new_zeros(len(x), 12), x.new_zeros(len(x), 4)
        for _ in range(3):
            v = 0.5 * v + self.a(x)
            s = Spike.apply(v - 0.2)
            v, total = v - s.detach() * 0.2, total + self.c(s)
        return total


class Binary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        return self.c(F.linear(h, Sign.apply(self.b.weight), self.b.bias).tanh())


class Splits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        one, two, word = Halves.apply([self.b(x)], self.a(x), True)
        assert word == "no tensor"
        return self.c(one * two)


class Straight(nn.Module):
    """Vector quantization; a result without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(8, 6), nn.Linear(6, 4)
        self.register_buffer("codes", torch.randn(5, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code, index = Nearest.apply(self.a(x), self.codes)
        return self.c(code), index.float()


class Rounding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():  # one without gradients, too
            y = Round.apply(x, 4)
        return self.c(Stochastic.apply(self.a(y).relu()))


class Hooks(nn.Module):
    """Hooks on activations: one scales, one only looks; one clips, which is not linear in what
    copies get, and must see their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        early = h * 2  # a use before the hook, whose gradient goes through it, too
        if h.requires_grad:
            h.register_hook(lambda g: 0.1 * g)
            h.register_hook(lambda g: None)
        y = self.b(h.relu() + early)
        if y.requires_grad:
            y.register_hook(lambda g: g.clamp(-0.1, 0.1))
        return self.c(y.relu())


class Clipped(nn.Module):
    """An activation with a limit of its own, in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.most = nn.Parameter(torch.tensor([0.6]))

    def forward(self, x: Tensor) -> Tensor:
        return Clip.apply(x, self.most)


class Clips(nn.Sequential):
    def __init__(self) -> None:
        conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Clipped())
        super().__init__(conv, nn.Conv2d(8, 6, 3), Clipped(), nn.Flatten(), nn.Linear(96, 4))


class Scaled(nn.Module):
    """The weights of a recurrent cell, by their largest element."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        for _ in range(2):
            h = F.linear(h, Largest.apply(self.b.weight)).tanh()
        return self.c(h)


class Shared(nn.Module):
    """One limit for two places, under names."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.ModuleDict({"a": nn.Linear(8, 12), "b": nn.Linear(12, 12)})
        self.most, self.c = nn.Parameter(torch.tensor(0.5)), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.deep.values():
            x = Clip.apply(layer(x), self.most)
        return self.c(x)


to_steps = Round.apply  # as the tutorial has it


class Steeper(Spike):
    """A class that has only its backward for itself."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * Spike.backward(ctx, *grads)


class Named(nn.Module):
    """By a name in its file, and under a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = to_steps(self.a.weight, 8)
        y = checkpoint(lambda y: to_steps(F.conv2d(y, weight).relu(), 4), x, use_reentrant=False)
        return self.c(y.mean((2, 3)))


class Activation(nn.Module):
    """By an attribute: a function in C, or one in a table that its container has."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


class Acts(nn.Sequential):
    def __init__(self) -> None:
        acts = {"swish": Swish.apply, "spike": partial(Steeper.apply), "spiked": Spike.apply}
        layers = (nn.Sequential(nn.Linear(8, 8), Activation(act)) for act in acts.values())
        super().__init__(*layers, nn.Linear(8, 4))


class Twofold(nn.Module):
    """The same function by both names; several results, one without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.near = nn.Linear(8, 6), nn.Linear(6, 4), Nearest.apply
        self.register_buffer("codes", torch.randn(5, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, index = self.near(self.a(x), self.codes)
        two, _ = Nearest.apply(one * 2, self.codes)
        return self.c(one + two), index.float()


TEXT = torch.randint(0, 9, (3, 5), generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[type[nn.Module], Any, int]] = {
    "quantized": (Quantized, (3, 8, 8), 0),
    "learned steps": (Steps, (8,), 0),
    "adversary": (Adversary, None, 0),
    "spiking": (Spiking, (8,), 0),
    "binary": (Binary, (8,), 0),
    "splits": (Splits, (8,), 1),
    "vector quantizer": (Straight, (8,), 1),
    "draws": (Rounding, (8,), 1),
    "hooks": (Hooks, (8,), 1),
    "limits": (Clips, (3, 8, 8), 0),
    "largest": (Scaled, (8,), 2),
    "one limit": (Shared, (8,), 0),
    "another name": (Named, (3, 8, 8), 0),
    "attributes": (Acts, (8,), 0),
    "both names": (Twofold, (8,), 2),
}
"""Network, shape of a sample, and how many nodes are bridged."""


def made(name: str) -> tuple[nn.Module, Tensor, Teacher]:
    torch.manual_seed(0)
    kind, size, _ = CASES[name]
    model, x = kind(), TEXT if size is None else torch.randn(4, *size)
    return model, x, gpdfx.expand(model, 1.5, example_inputs=(x,), branches=None)


@pytest.mark.parametrize("name", ["another name", "attributes", "both names"])
def test_other_names_need_no_check(name: str) -> None:
    torch.manual_seed(0)
    model, x = CASES[name][0](), torch.randn(4, *CASES[name][1])
    teacher = gpdfx.expand(model, 2, example_inputs=(x,), branches=None, verify=False)
    assert not teacher.report().apart
    trains_as(model, teacher, x)
    assert not isinstance(Spike.forward, partial)  # the user's classes are as they were


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_users_function(name: str) -> None:
    model, x, teacher = made(name)
    report = teacher.report()
    assert not report.apart
    assert len({b.node for b in report.bridged}) == CASES[name][2], report.bridged
    calls, wide = map(sum, zip(*report.functions.values(), strict=True))
    assert calls > 0
    assert calls - wide == CASES[name][2]
    assert f"{next(iter(report.functions))} (" in str(report)
    trains_as(model.eval(), teacher.eval(), x)
    trains_as(model.train(), copy.deepcopy(teacher).train(), x)


@pytest.mark.parametrize("name", ["quantized", "splits", "hooks"])
def test_functions_go_through_the_compiler(name: str) -> None:
    model, x, teacher = made(name)
    model.eval(), teacher.eval()
    compiled = torch.compile(teacher, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    mine = {n: p.grad for n, p in teacher.named_parameters()}
    teacher.zero_grad()
    teacher(x).square().sum().backward()
    for n, p in teacher.named_parameters():
        torch.testing.assert_close(mine[n], p.grad, msg=n)


class Bound(Function):
    """A bound that lets gradients through which lead away from it: by their sign, so that what
    comes back to copies is not what comes back to one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: Tensor) -> Tensor:
        ctx.save_for_backward(x, bound)
        return torch.max(x, bound)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, bound = ctx.saved_tensors
        return grads[0] * ((x >= bound) | (grads[0] < 0)), None


class Bounded(nn.Module):
    """Bounded parameters of a normalization, a bounded gain, or bounded activations."""

    def __init__(self, what: str, width: int, bound: Tensor) -> None:
        super().__init__()
        self.what = what
        self.a, self.c = nn.Conv2d(3, width, 3), nn.Conv2d(width, 4, 1)
        self.beta, self.gamma = (nn.Parameter(torch.rand(width, *more)) for more in ((), (width,)))
        self.register_buffer("bound", bound)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.what == "activations":
            return self.c(Bound.apply(h, self.bound))
        scale = Bound.apply(self.beta, self.bound)
        if self.what == "gain":
            return self.c(h * scale[:, None, None])
        gamma = Bound.apply(self.gamma, self.bound)[:, :, None, None]
        return self.c(h * F.conv2d(h.square(), gamma, scale.square()).abs().rsqrt())


@pytest.mark.parametrize("what", ["norm", "gain", "activations"])
@pytest.mark.parametrize("width", [2, 12])
def test_a_backward_that_is_not_linear_stays_at_the_students_width(what: str, width: int) -> None:
    """Whatever arguments are drawn to try it with: a bound may lie below all of them."""
    torch.manual_seed(0)
    model, x = Bounded(what, width, torch.tensor([0.3])), torch.randn(2, 3, 5, 5)
    teacher = gpdfx.expand(model, 2, example_inputs=(x,), branches=None)
    [(calls, wide)] = teacher.report().functions.values()
    assert calls
    assert not wide
    trains_as(model, teacher, x)


def test_a_function_that_needs_values_is_python() -> None:
    """And PyTorch is as it was after the capture that failed."""

    class Signs(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(Elsewhere.apply(x * 2))

    torch.manual_seed(0)
    model, x = Signs(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)), torch.randn(4, 8)
    outer = nn.Sequential(nn.Linear(8, 8), model)
    teacher = gpdfx.expand(outer, 2, example_inputs=(x,), branches=None)
    assert "" in teacher.report().apart
    gc.collect()
    trains_as(outer, teacher, x)


def test_a_teacher_with_functions_is_pickled() -> None:
    model, x, teacher = made("quantized")
    again = pickle.loads(pickle.dumps(teacher))
    trains_as(model, again, x)


# --------------------------------------------------------------------------- backwards with modules
class Reversible(Function):
    """Saves its results alone: inputs and activations are made again from them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, f: nn.Module, g: nn.Module) -> Any:
        with torch.no_grad():
            a = x + f(y)
            b = y + g(a)
        ctx.f, ctx.g = f, g
        ctx.save_for_backward(a, b)
        return a, b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a, b = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        da, db = grads
        with torch.enable_grad():
            made = ctx.g(a)
            torch.autograd.backward(made, db)
        da, y = da + a.grad, (b - made).detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.f(y), da)
        return da, db + y.grad, None, None


class Coupling(nn.Module):
    def __init__(self, reversible: bool) -> None:
        super().__init__()
        self.reversible = reversible
        self.f, self.g = (
            nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6)) for _ in "fg"
        )

    def forward(self, z: Tensor) -> Tensor:
        x, y = z.chunk(2, 1)
        if self.reversible:
            return torch.cat(Reversible.apply(x, y, self.f, self.g), 1)
        if float(z.detach().mean()) < 1e9:  # as Python, too
            x = x + self.f(y)
        return torch.cat([x, y + self.g(x)], 1)


def coupled(reversible: bool) -> nn.Module:
    torch.manual_seed(0)
    blocks = (Coupling(reversible) for _ in range(2))
    return nn.Sequential(nn.Linear(8, 12), *blocks, nn.Linear(12, 4))


class ByName(Coupling):
    """``apply`` as a function of C, which cannot be met where its modules have no tensors."""

    def __init__(self) -> None:
        super().__init__(True)
        self.run = Reversible.apply

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat(self.run(*z.chunk(2, 1), self.f, self.g), 1)


@pytest.mark.parametrize("verify", [True, False])
def test_by_another_name_such_a_function_is_refused(verify: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 12), ByName(), nn.Linear(12, 4))
    with pytest.raises(InputError, match=r"Reversible\.apply, which is given modules") as caught:
        gpdfx.expand(model, 2, example_inputs=(torch.randn(4, 8),), verify=verify)
    assert "write Reversible.apply(...) where it is called" in str(caught.value)


@pytest.mark.parametrize("branches", [None, "auto"])
def test_a_backward_that_calls_modules_has_the_tensors_of_its_call(branches: Any) -> None:
    """It runs as the user's Python, its modules captured; branches too get their gradients."""
    x, gradients = torch.randn(4, 8), []
    for reversible in (True, False):
        model = coupled(reversible)
        teacher = gpdfx.expand(
            model, 2, example_inputs=(x,), branches=branches, scales="scratch", seed=1
        )
        if reversible:
            assert {"1.f", "1.g", "2.f", "2.g"} <= set(parts(teacher))
            assert "is called with a module" in teacher.report().apart["1"]
            if branches is None:
                trains_as(model, teacher, x)
        one, two = teacher.both(x)
        (one.square().sum() + two.sum()).backward()
        gradients.append({n: p.grad for n, p in teacher.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


class Recording(nn.Module):
    """Draws in the backward what it drew in the forward, as reversible transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None
        self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 12))

    def forward(self, x: Tensor, record: bool = False) -> Tensor:
        if record:
            self.state = torch.get_rng_state()
            return self.net(x)
        with torch.random.fork_rng([]):
            torch.set_rng_state(self.state)
            return self.net(x)


class Replayed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, f: nn.Module) -> Tensor:
        ctx.f = f
        ctx.save_for_backward(x)
        with torch.no_grad():
            return x + f(x, record=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.f(x), grads)
        return grads[0] + x.grad, None


class Replay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = Recording()

    def forward(self, x: Tensor) -> Tensor:
        return Replayed.apply(x, self.f)


def test_what_a_forward_leaves_for_the_backward_stays_python() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), Replay(), nn.Linear(12, 4))
    x = torch.randn(4, 8)
    teacher = gpdfx.expand(model, 2, example_inputs=(x,), branches=None)
    assert "1.f (Recording) keeps state" in teacher.report().apart["1.f"]
    assert "1.f.net" in parts(teacher)
    trains_as(model, teacher, x)


class Again(Function):
    """A checkpoint written by hand, as diffusion networks have it: runs a function again, and asks
    for the gradients of its inputs and of the parameters that it is given."""

    @staticmethod
    def forward(ctx: Any, function: Any, count: int, *args: Tensor) -> Tensor:
        ctx.function, ctx.inputs, ctx.weights = function, args[:count], args[count:]
        with torch.no_grad():
            return function(*args[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs = [x.detach().requires_grad_() for x in ctx.inputs]
        with torch.enable_grad():
            y = ctx.function(*(x.view_as(x) for x in inputs))
        asked = [*inputs, *ctx.weights]
        return None, None, *torch.autograd.grad(y, asked, grads, allow_unused=True)


class Inner(nn.Module):
    """Its function is named as ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12)), how
        self.scale = nn.Parameter(torch.rand(12))

    def inside(self, x: Tensor) -> Tensor:
        return x * self.scale + self.net(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "module":
            return x * self.scale + Again.apply(self.net, 1, x, *self.net.parameters())
        function = self.inside if self.how == "method" else lambda y: self.inside(y)
        return Again.apply(function, 1, x, *self.parameters())


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("how", ["module", "method", "lambda"])
def test_a_backward_that_asks_for_parameters(how: str, verify: bool) -> None:
    """What it names runs as Python, too: the gradients are those of its own parameters."""
    torch.manual_seed(0)
    blocks = nn.Sequential(Inner(how), nn.Sequential(nn.ReLU(), Inner(how)))
    head = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    model, x = nn.Sequential(nn.Linear(8, 12), blocks, head), torch.randn(4, 8)
    teacher = gpdfx.expand(model, 2, example_inputs=(x,), branches=None, verify=verify)
    assert "2" in parts(teacher)
    assert "Again asks for gradients of its parameters" in teacher.report().apart.values()
    trains_as(model, teacher, x)
