"""What users put on instances: functions that close over the model, modules and tensors in plain
objects, methods that move tensors of their own."""

from __future__ import annotations

import copy
import functools
import itertools
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpdfx

Make = Callable[[], nn.Module]


def example() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def stir(module: nn.Module) -> None:
    """Other values, as training makes them."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw).to(p))


def works(make: Make, folder: Path, **options: Any) -> Any:
    """Teacher, student, collapsed student, copies and files are this network, on tensors of their
    own: the user's module is the reference. Returns the teacher."""
    torch.manual_seed(0)
    model, x = make(), example()
    options = {"branches": None, "dynamic": "batch", **options}
    teacher = gpdfx.expand(model, 2, example_inputs=(x,), **options)
    assert sum(p.numel() for p in teacher.parameters()) > sum(p.numel() for p in model.parameters())
    for y in teacher.both(x):
        close(y, model(x))
    stir(teacher)
    plain = gpdfx.collapse(teacher)
    model.load_state_dict(plain.state_dict())
    close(teacher.student(x), model(x))
    # gradients are the user's, and flow into the teacher alone
    teacher.student(x).square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    wide, own = dict(teacher.named_parameters()), dict(plain.named_parameters())
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert p.grad.any(), name
        close(own[name].grad, p.grad)
        close(teacher.narrow(name, wide[name].grad), p.grad)
    want, wanted = teacher.student(x).detach(), teacher(x).detach()
    # copies and files
    twin = copy.deepcopy(teacher)
    gpdfx.save(teacher, folder / "teacher")
    read = gpdfx.load(folder / "teacher", make())
    with torch.no_grad():
        for p in itertools.chain(model.parameters(), teacher.parameters()):
            p.zero_()
    assert not torch.equal(teacher(x), wanted)
    assert not torch.equal(teacher.student(x), want)
    for other in (twin, read):
        close(other(x), wanted)
        close(other.student(x), want)
    close(plain(x), want)
    close(gpdfx.collapse(twin)(x), want)
    # another dtype
    twin.double()
    for y in (twin.student(x.double()), gpdfx.collapse(twin)(x.double())):
        assert y.dtype is torch.float64
        close(y.float(), want)
    close(twin(x.double()).float(), wanted)
    return teacher


# --------------------------------------------------------------------------- functions
def net() -> Any:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def by_default() -> nn.Module:
    model = net()
    model.forward = lambda input, old=model.forward: old(input) * 2
    return model


def by_closure() -> nn.Module:
    model = net()
    old = model[2].forward
    model[2].forward = lambda input: old(input).tanh()
    return model


def as_accelerate_does() -> nn.Module:
    """A partial of a function of the module, which knows the old forward by two more names."""
    model = net()
    layer = model[0]
    layer.old_forward = layer.forward

    def forward(module: Any, *args: Any) -> Any:
        return module.old_forward(*args) + 1

    wrapper = functools.partial(forward, layer)
    layer.forward = functools.update_wrapper(wrapper, layer.old_forward)
    return model


def by_decorators() -> nn.Module:
    """Three deep, and one by keyword."""

    def times(factor: float) -> Any:
        def decorate(function: Any) -> Any:
            @functools.wraps(function)
            def run(x: Tensor, *, of: Any = function) -> Any:
                return of(x) * factor

            return run

        return decorate

    model = net()
    model.forward = times(2.0)(times(0.5)(times(3.0)(model.forward)))
    return model


def by_method() -> nn.Module:
    """Bound to another module than that on which it is."""
    model = net()
    first = model[0]

    def forward(self: Any, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) + first.bias

    model[0].forward = types.MethodType(forward, model[0])
    return model


def over_layers() -> nn.Module:
    """Of a list of layers and of one in an object; the module itself holds none as it calls it."""
    model = net()
    layers, other = list(model), types.SimpleNamespace(last=model[2])

    def forward(x: Tensor) -> Any:
        for layer in layers[:-1]:
            x = layer(x)
        return other.last(x)

    model.forward = forward
    return model


def over_parameters() -> nn.Module:
    model = net()
    weight, pair = model[0].weight, (model[2].weight, model[2].bias)
    bias = model[0].bias
    model.forward = lambda x: (x @ weight.T + bias).relu() @ pair[0].T + pair[1]
    return model


def over_itself() -> nn.Module:
    """Two functions that share a variable, one of them its own."""
    model = net()
    old, rounds = model.forward, 3

    def again(x: Tensor, left: int) -> Tensor:
        return x if not left else again(x * 1.5, left - 1)

    def set_rounds(count: int) -> None:
        nonlocal rounds
        rounds = count if old else 0

    model.forward = lambda x: again(old(x), rounds)
    model.set_rounds = set_rounds
    model.set_rounds(2)
    return model


def by_hook() -> nn.Module:
    """What a layer gets and returns passes through another one, and through one of the closure's
    own."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4))
    middle = model[1]
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + middle(args[0]).relu(),))
    model[0].register_forward_hook(lambda module, args, y, by=middle: y * by.bias)
    return model


class Child(nn.Module):
    """Knows its parent weakly, and remembers a result of a method."""

    def __init__(self, parent: Any) -> None:
        super().__init__()
        self.parent, self.layer = weakref.ref(parent), nn.Linear(8, 12)
        self.sizes = functools.lru_cache(maxsize=4)(self.count)

    def count(self, dim: int) -> int:
        return int(self.layer.weight.shape[dim])

    def forward(self, x: Tensor) -> Any:
        return self.parent().last(self.layer(x).relu()) / self.sizes(1)


def weakly() -> nn.Module:
    model = nn.Module()
    model.child, model.last = Child(model), nn.Linear(12, 4)
    model.forward = functools.partial(lambda child, x: child(x), model.child)
    return model


FUNCTIONS: list[Make] = [
    by_default,
    by_closure,
    as_accelerate_does,
    by_decorators,
    by_method,
    over_layers,
    over_parameters,
    over_itself,
    by_hook,
    weakly,
]


@pytest.mark.parametrize("make", FUNCTIONS)
def test_functions_on_instances(make: Make, tmp_path: Path) -> None:
    works(make, tmp_path)
