"""What users put on instances: functions that close over the model, modules and tensors in plain
objects, methods that move tensors of their own."""

from __future__ import annotations

import copy
import functools
import itertools
import types
import weakref
from collections import deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gpdfx
from gpdfx.calls.held import call_with

from .helpers import hidden_student, parts, trains_as

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


class Wraps(nn.Sequential):
    """Copies itself, and its wrapper with it."""

    def __init__(self) -> None:
        super().__init__(*net())
        old = self[0].forward
        self[0].forward = lambda input: old(input) * 2
        self.history: list[int] = []

    def __deepcopy__(self, memo: Any) -> Wraps:
        twin = memo[id(self)] = Wraps()
        for name, p in self.named_parameters():
            path, _, leaf = name.rpartition(".")
            twin.get_submodule(path)._parameters[leaf] = copy.deepcopy(p, memo)
        return twin.train(self.training)


def wraps_and_more() -> nn.Module:
    """Its copies have less."""
    model = Wraps()
    model.history.append(1)
    model.tags = {"of": "the original"}  # type: ignore[assignment]
    return model


FUNCTIONS: list[Make] = [
    Wraps,
    wraps_and_more,
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


def test_a_copy_keeps_what_its_functions_share() -> None:
    model, x = over_itself(), example()
    plain: Any = gpdfx.collapse(gpdfx.expand(model, 2, example_inputs=(x,), dynamic="batch"))
    before = model(x)
    plain.set_rounds(0)
    close(plain(x) * 1.5**2, before)
    close(model(x), before)


def test_python_cannot_pickle_a_closure(tmp_path: Path) -> None:
    teacher = gpdfx.expand(by_closure(), 2, example_inputs=(example(),), dynamic="batch")
    with pytest.raises(gpdfx.InputError, match="cannot pickle") as caught:
        torch.save(teacher, tmp_path / "teacher")
    assert caught.value.module_path == "2 (Linear)"
    assert "gpdfx.save" in str(caught.value.remedy)


# --------------------------------------------------------------------------- tensors
class Layers(nn.Module):
    """Two layers' tensors, which ``hold`` keeps elsewhere and ``read`` reads there; ``parts``: what
    depends on values, so that it runs as Python."""

    def __init__(self, hold: Any, read: Any, parts: bool) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12))
        self.w, self.v = nn.Parameter(torch.randn(12, 12) / 4), nn.Parameter(torch.randn(4, 12) / 4)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 12))
        self.held, self.read, self.parts = hold(self), read, parts

    def forward(self, x: Tensor) -> Tensor:
        w, v, scale = self.read(self.held)
        y = self.a(x).relu()
        if self.parts and y.sum() > 1e9:
            return y
        return nn.functional.linear((y @ w.T).tanh() * scale, v)


Pair = namedtuple("Pair", ("first", "second"))


class Slots:
    __slots__ = ("w",)


def slotted(model: Any) -> Any:
    slots = Slots()
    slots.w = (model.w, model.v, model.scale)
    return slots


def unregistered(model: Any) -> Any:
    """A module in a list, whose tensors are another one's."""
    linear = nn.Linear(12, 4, bias=False)
    linear.weight = model.v
    return [linear, {"w": model.w, "scale": model.scale}]


HELD: dict[str, Any] = {
    "list": (lambda m: [m.w, m.v, m.scale], lambda h: h),
    "dict": (
        lambda m: {"w": m.w, "rest": {"v": m.v, 0: m.scale}},
        lambda h: (h["w"], *h["rest"].values()),
    ),
    "tuple": (lambda m: (m.w, (m.v, [m.scale])), lambda h: (h[0], h[1][0], h[1][1][0])),
    "named tuple": (lambda m: Pair(Pair(m.w, m.v), m.scale), lambda h: (*h.first, h.second)),
    "queue": (lambda m: deque([m.v, m.scale, m.w]), lambda h: (h[2], h[0], h[1])),
    "object": (
        lambda m: types.SimpleNamespace(w=m.w, v=[m.v], s=m.scale),
        lambda h: (h.w, h.v[0], h.s),
    ),
    "slots": (slotted, lambda h: h.w),
    "closure": (lambda m: by_variables(m.w, m.v, m.scale), lambda h: h()),
    "partial": (lambda m: functools.partial(tuple, (m.w, m.v, m.scale)), lambda h: h()),
    "module": (unregistered, lambda h: (h[1]["w"], h[0].weight, h[1]["scale"])),
}


def by_variables(*tensors: Tensor) -> Any:
    return lambda: tensors


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("name", HELD)
def test_tensors_that_python_holds(name: str, in_parts: bool, tmp_path: Path) -> None:
    works(lambda: Layers(*HELD[name], in_parts), tmp_path)


def test_what_is_not_looked_into_is_named() -> None:
    def hold(model: Any) -> Any:
        held = np.empty(1, dtype=object)
        held[0] = (model.w, model.v, model.scale)
        return held

    model = Layers(hold, lambda held: held[0], parts=False)
    with pytest.raises(gpdfx.InputError, match="the parameter w from where no call"):
        gpdfx.expand(model, 2, example_inputs=(example(),), dynamic="batch")


# --------------------------------------------------------------------------- moves
class Moves(nn.Module):
    """Moves a tensor of its own as ``how`` says; ``parts``: as of ``Layers``."""

    def __init__(self, parts: bool = False) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12))
        self.c, self.parts, self.grid = nn.Linear(12, 4), parts, [torch.linspace(0.5, 1.5, 12)]

    def forward(self, x: Tensor) -> Any:
        y = self.a(x) * self.grid[0]
        return y if self.parts and y.sum() > 1e9 else self.c(y)


class ByApply(Moves):
    """With the signature that ``_apply`` once had."""

    def _apply(self, fn: Any) -> Any:  # type: ignore[override]
        super()._apply(fn)
        self.grid[0] = fn(self.grid[0])
        return self


class ByTo(Moves):
    def to(self, *args: Any, **kwargs: Any) -> Any:
        super().to(*args, **kwargs)
        self.grid[0] = self.grid[0].to(*args, **kwargs)
        return self

    def double(self) -> Any:
        super().double()
        self.grid[0] = self.grid[0].double()
        return self


class Within(nn.Module):
    """Of torch's own, around one that moves its tensors."""

    def __init__(self, parts: bool) -> None:
        super().__init__()
        self.inner = ByApply(parts)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x).tanh()


class OnInstance(Moves):
    def __init__(self, parts: bool) -> None:
        super().__init__(parts)
        old = self._apply

        def apply(fn: Any) -> Any:
            self.grid[0] = fn(self.grid[0])
            return old(fn)

        self._apply = apply  # type: ignore[method-assign]


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("kind", [ByApply, ByTo, Within, OnInstance])
def test_tensors_that_the_model_moves(kind: Any, in_parts: bool, tmp_path: Path) -> None:
    teacher = works(lambda: kind(in_parts), tmp_path)
    assert max(teacher.report().error.values()) < 1e-10  # in float64: there, too, it was moved
    x = example()
    torch.manual_seed(3)
    stir(teacher)
    want = teacher.to(torch.float64).student(x.double())
    close(gpdfx.collapse(teacher)(x.double()), want)
    teacher.to(torch.bfloat16)
    for y in (teacher(x.bfloat16()), teacher.student(x.bfloat16())):
        assert y.dtype is torch.bfloat16


def test_a_move_to_where_there_are_no_values() -> None:
    """As to a device: what ``to`` finds of parameters was moved already."""

    class Checked(ByTo):
        def to(self, device: Any) -> Any:  # type: ignore[override]
            super().to(device)
            assert self.c.weight.device == torch.device(device)
            return self

    teacher = gpdfx.expand(Checked(), 2, example_inputs=(example(),), dynamic="batch")
    assert hidden_student(teacher.to("meta")).grid[0].is_meta
    assert teacher.student(example().to("meta")).shape == (5, 4)


# --------------------------------------------------------------------------- objects
class Box:
    """Holds whatever it is given."""

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


class Keeps(nn.Module):
    """Keeps results, with their graphs, in an object, and calls layers through others; one of them
    is registered nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(8, 12), nn.Linear(12, 4)
        self.box = Box(inner=Box(layers=[self.a]), last={"c": self.c}, other=[nn.Linear(12, 12)])
        self.box.other[0].requires_grad_(False)
        torch.nn.init.eye_(self.box.other[0].weight)

    def forward(self, x: Tensor) -> Any:
        y = self.box.other[0](self.box.inner.layers[0](x)).relu()
        y = y + 0.0 * float(y.detach().sum() > 0)
        self.box.inner.kept = torch.distributions.Categorical(logits=self.box.last["c"](y))
        return self.box.inner.kept.logits


class KeepsOutside(Keeps):
    """The same in one piece."""

    def forward(self, x: Tensor) -> Any:
        y = self.box.last["c"](self.box.inner.layers[0](x).relu())
        self.box.inner.kept = [Box(y=y, z={"y": (y, 2)})]
        return y


@pytest.mark.parametrize("kind", [Keeps, KeepsOutside])
def test_objects_that_keep_results(kind: Any) -> None:
    torch.manual_seed(0)
    model, x = kind(), example()
    model(x)  # there is one already
    teacher = gpdfx.expand(model, 2, example_inputs=(x,), branches=None, dynamic="batch")
    want = [y.detach() for y in teacher.both(x)]
    close(want[1], model(x))
    for again in (copy.deepcopy(teacher), copy.deepcopy(copy.deepcopy(teacher))):
        for y, z in zip(again.both(x), want, strict=True):
            close(y, z)
    plain = gpdfx.collapse(teacher)
    stir(teacher)
    stir(model)
    close(plain(x), want[1])
    assert plain.box.inner.layers[0] is plain.a
    plain(x).sum().backward()
    assert plain.a.weight.grad is not None


class Reads(nn.Module):
    """A child that reads what its parent registers."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held
        self.layers = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12))

    def forward(self, x: Tensor) -> Any:
        last = self.held[0]
        return self.layers(x) @ getattr(last, "weight", last).T


class Parent(nn.Module):
    def __init__(self, hold: Any) -> None:
        super().__init__()
        self.last = nn.Linear(12, 4, bias=False)
        self.child = Reads(hold(self.last))

    def forward(self, x: Tensor) -> Any:
        y = self.child(x)
        return y if y.sum() < 1e9 else self.last(y)


@pytest.mark.parametrize(
    "hold",
    [
        lambda last: [last],
        lambda last: (last.weight,),
        lambda last: {0: last.weight},
    ],
)
def test_what_a_part_reads_of_others_is_no_constant(hold: Any, tmp_path: Path) -> None:
    teacher = works(lambda: Parent(hold), tmp_path)
    assert set(parts(teacher)) == {"child.layers"}
    assert "not in it" in teacher.report().apart["child"]


# --------------------------------------------------------------------------- torch.func
class Ensemble(nn.Module):
    """Members of one module, called as one on stacked parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        stacked, _ = torch.func.stack_module_state(list(self.members))

        def one(p: dict[str, Tensor], y: Tensor) -> Any:
            return torch.func.functional_call(self.members[0], p, (y,)).tanh()

        return torch.vmap(one, (0, None))(stacked, x).mean(0)


class Samples(nn.Module):
    """One sample at a time, one dimension of it at a time within."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale = nn.Linear(12, 12), nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Any:
        inner: Any = torch.vmap(lambda v, s: v * s.tanh())
        return torch.vmap(lambda row: inner(row, self.scale) * row.sum())(self.a(x))


class Hyper(nn.Module):
    """Weights of each sample's own."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.base = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Any:
        def call(shift: Tensor, y: Tensor) -> Any:
            own = {"weight": self.base.weight * shift, "bias": self.base.bias}
            return torch.func.functional_call(self.base, own, (y,))

        return torch.vmap(call)(self.make(x).sigmoid(), x)


@pytest.mark.parametrize("kind", [Ensemble, Samples, Hyper])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_mapped_over_samples_or_members(kind: Any, training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), kind(), nn.Linear(12, 4))
    model.train(training)
    teacher = gpdfx.expand(model, 2, example_inputs=(example(),))
    assert list(parts(teacher)) == [""]
    trains_as(model, teacher, example())
    trains_as(model, teacher, example()[:3])


# --------------------------------------------------------------------------- modules of two names
class Cell(nn.Module):
    """Made of modules that are another's, too."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x).relu())


class Lazy(nn.Module):
    """Makes its cell when it first runs; a weight of the cell is tied."""

    def __init__(self, python: bool) -> None:
        super().__init__()
        self.a, self.b, self.python = nn.Linear(8, 12), nn.Linear(12, 12), python
        self.tied = nn.Linear(8, 12)
        self.tied.weight = self.a.weight
        self.last, self.made = nn.Linear(12, 4), None

    def forward(self, x: Tensor) -> Any:
        if self.python and x.sum().item() > 1e6:
            x = 2 * x
        if self.made is None:
            self.made = Cell(self.a, self.b)  # type: ignore[assignment]
        return self.last(self.made(x) + self.tied(x))  # type: ignore[misc]


@pytest.mark.parametrize("python", [False, True])
@pytest.mark.parametrize("called", [False, True])
def test_a_cell_that_is_made_of_the_modules_there_are(python: bool, called: bool) -> None:
    torch.manual_seed(0)
    model = Lazy(python)
    if called:
        model(example())
    teacher = gpdfx.expand(model, 2, example_inputs=(example(),))
    before = list(model.state_dict())
    trains_as(model, teacher, example())
    close(gpdfx.collapse(teacher)(example()), model(example()))
    after = list(model.state_dict())
    assert list(gpdfx.collapse(teacher).state_dict()) in (before, after)
    assert (before == after) is called


def test_a_call_with_other_tensors_gives_every_name_its_own_back() -> None:
    """``torch.func.functional_call`` leaves its tensors in modules that have two names."""
    model = Lazy(False)
    model(example())
    own = {name: (t, type(t)) for name, t in model.named_parameters(remove_duplicate=False)}
    other = {name: t.detach() * 2 for name, t in model.named_parameters()}
    result = call_with(model, dict(other), (example(),), {})
    now = dict(model.named_parameters(remove_duplicate=False))
    assert all(now[name] is t and type(now[name]) is kind for name, (t, kind) in own.items())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    close(result, model(example()))


def test_what_a_call_with_other_tensors_replaces_is_written_down() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("n", torch.zeros(()))
            self.again = nn.ModuleList([nn.BatchNorm1d(3)])
            self.again.append(self.again[0])

        def forward(self, x: Tensor) -> Any:
            self.n = self.n + 1
            return self.again[1](self.again[0](x))

    model = Counts()
    tensors = {name: t.clone() for name, t in model.named_buffers()}
    call_with(model, tensors, (torch.randn(4, 3),), {})
    assert (float(tensors["n"]), float(model.n)) == (1, 0)
    assert int(tensors["again.0.num_batches_tracked"]) == 2
    assert int(model.again[0].num_batches_tracked) == 0  # type: ignore[arg-type,union-attr]
