"""State that forward keeps in Python, and draws from Python's and NumPy's generators."""

from __future__ import annotations

import copy
import functools
import random
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gpdfx
from gpdfx.errors import CaptureError, InputError, LossyError
from gpdfx.teacher.module import Teacher

from .helpers import parts


class Body(nn.Module):
    """What stays to be captured beside the module that keeps something."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12))
        self.inner, self.head = inner, nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.stem(x)))


class Warm(nn.Module):
    """A warm-up that ends long after the calls of the check."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(12, 12), 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x + self.layer(x).relu() * min(1.0, self.calls / 1000)


class Average(nn.Module):
    """Statistics in a plain attribute, used in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(12)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class Initialised(nn.Module):
    """By the first batch, once; the flag alone tells."""

    def __init__(self) -> None:
        super().__init__()
        self.done, self.scale, self.layer = False, torch.tensor(1.0), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            self.scale, self.done = 1 / x.detach().std(), True
        return self.layer(x * self.scale)


class First(nn.Module):
    """Only the first call is another one, and only its result tells."""

    def __init__(self) -> None:
        super().__init__()
        self.met, self.layer = False, nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        if self.met:
            return self.layer(x)
        self.met = True
        return self.layer(x) * 2


class Memory(nn.Module):
    """A bounded list of what was before, attended to."""

    def __init__(self) -> None:
        super().__init__()
        self.before: deque[Tensor] = deque(maxlen=3)
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        for one in self.before:
            y = y + 0.1 * one
        self.before.append(x.detach().mean(0))
        return y


class Tracked(nn.Module):
    """In an object of no module, that a child changes and its parent reads."""

    class Child(nn.Module):
        """Counts."""

        def __init__(self, shared: Any) -> None:
            super().__init__()
            self.shared, self.layer = shared, nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            self.shared.n += 1
            return self.layer(x)

    def __init__(self) -> None:
        super().__init__()
        self.shared = SimpleNamespace(n=0)
        self.child = self.Child(self.shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) / (1 + self.shared.n)


class Hooked(nn.Module):
    """By a hook that counts, which a closure does, too, on an instance."""

    class Meter:
        """Divides by the mean of what it has met."""

        __slots__ = ("n", "total")

        def __init__(self) -> None:
            self.n, self.total = 0, 0.0

        def __call__(self, module: Any, args: Any, y: Tensor) -> Tensor:
            self.n, self.total = self.n + 1, self.total + float(y.detach().abs().mean())
            return y / (self.total / self.n)

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other, calls = nn.Linear(12, 12), nn.Linear(12, 12), 0
        self.layer.register_forward_hook(self.Meter())
        old = self.other.forward

        def forward(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return old(x) * (1 + calls / 30)

        self.other.forward = forward  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.layer(x).relu())


def counting(share: Callable[[int], float]) -> Any:
    """A function that counts in its variables and in an attribute; there is one lock for all."""
    import threading

    calls, lock = 0, threading.Lock()

    def scale(y: Tensor) -> Any:
        nonlocal calls
        with lock:
            calls += threading.active_count() > 0
        scale.calls = getattr(scale, "calls", 0) + 1  # type: ignore[attr-defined]
        return y * (1 + share(calls + scale.calls))  # type: ignore[attr-defined]

    return scale


class Functions(nn.Module):
    """A closure that names no module, and a partial over a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(12, 12), counting(lambda n: n / 30)
        self.other = functools.partial(self.add, Counter[str]())

    @staticmethod
    def add(counter: Counter[str], y: Tensor) -> Tensor:
        counter["n"] += 1
        return y + counter["n"] / 10

    def forward(self, x: Tensor) -> Any:
        return self.other(self.scale(self.layer(x)))


class Iterated(nn.Module):
    """What has no attributes to look at: an iterator, and generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.order, self.drawn = iter([0, 1, 1, 0] * 9), random.Random(1)
        self.noise = np.random.default_rng(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[next(self.order)](x) * (1 + self.drawn.random())
        return y + float(self.noise.uniform())


class Called(nn.Module):
    """Through objects that count how often they call a layer."""

    class Of:
        """A layer."""

        def __init__(self, layer: nn.Module) -> None:
            self.layer, self.n = layer, 0

        def __call__(self, x: Tensor) -> Any:
            self.n += 1
            return self.layer(x) / self.n

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(12, 12), nn.Linear(12, 12)
        self.run = [self.Of(self.layer), self.Of(self.other)]

    def forward(self, x: Tensor) -> Any:
        return self.run[1](self.run[0](x).relu())


class LayerDrop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not (self.training and random.random() < 0.5):
                x = x + layer(x).relu()
        return x


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * float(1 + np.random.rand()) if self.training else self.layer(x)


class TrainBranch(nn.Module):
    """A branch on values, in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and float(x.detach().mean()) > 0:
            return self.other(x)
        return self.layer(x)


class Looked(nn.Module):
    """Keeps what it last saw, for whoever looks: no state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last, self.seen = nn.Linear(12, 12), None, {"x": 0}

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).relu()
        self.last, self.seen["x"] = y.detach(), len(x.shape)
        return y


KINDS: dict[str, tuple[type[nn.Module], str]] = {
    "warm-up": (Warm, "keeps calls"),
    "average": (Average, "keeps mean"),
    "initialised": (Initialised, "keeps done, scale"),
    "first call": (First, "keeps met"),
    "memory": (Memory, "keeps before"),
    "object": (Tracked, "keeps shared"),
    "hooks": (Hooked, "keeps a hook's state"),
    "functions": (Functions, "keeps other, scale"),
    "iterators": (Iterated, "keeps drawn, noise, order"),
    "callables": (Called, "keeps run"),
    "layer drop": (LayerDrop, "draws from Python's generator"),
    "noise": (Noise, "draws from NumPy's generator"),
    "branch": (TrainBranch, "data-dependent"),
}


def made(build: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, Teacher]:
    torch.manual_seed(0)
    model = Body(build())
    options = {"branches": None} | options
    return model, gpdfx.expand(model, 2, example_inputs=(torch.randn(6, 8),), **options)


def follows(model: nn.Module, call: Callable[..., Any], training: list[bool]) -> None:
    """Several calls in a row give the same, gradients of the input too."""
    draw = torch.Generator().manual_seed(5)
    for number, mode in enumerate(training):
        x, results = torch.randn(5, 8, generator=draw), []
        for run in (model, call):
            getattr(run, "__self__", run).train(mode)
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(number)
            own = x.clone().requires_grad_()
            y = run(own)
            y.square().sum().backward()
            results.append((y.detach(), own.grad))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_teacher_and_student_keep_their_own(name: str) -> None:
    kind, why = KINDS[name]
    teacher = made(kind)[1]
    report = teacher.report()
    told = [text for path, text in report.apart.items() if path.startswith("inner")]
    assert any(why in text for text in told), report.apart
    assert {"stem", "head"} <= set(parts(teacher))
    for call in (teacher, teacher.student):
        torch.manual_seed(0)
        follows(Body(kind()), call, [True, True, False, True, True, False])
    twin = copy.deepcopy(teacher)
    follows(gpdfx.collapse(twin), twin.student, [True, False, True])


@pytest.mark.parametrize(
    "name", ["warm-up", "average", "layer drop", "hooks", "functions", "iterators"]
)
def test_without_a_check_they_are_kept_too(name: str) -> None:
    model, teacher = made(KINDS[name][0], verify=False)
    follows(model, teacher, [True, True, False])


class Codes(nn.Module):
    """A codebook that follows what it met: other parameters after every call."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.layer = nn.Embedding(5, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        near = torch.cdist(x, self.codes.weight).argmin(1)
        code = self.codes.weight[near]
        if self.training:
            step = torch.zeros_like(self.codes.weight).index_add(0, near, x.detach() - code)
            moved = (self.codes.weight + 0.1 * step).detach()
            self.codes.weight = nn.Parameter(moved, requires_grad=False)
        return x + (code - x).detach()


class Follows(nn.Module):
    """One network follows another, by its slow average; ``assign``: as another tensor."""

    def __init__(self, assign: bool) -> None:
        super().__init__()
        self.fast, self.slow = nn.Linear(12, 12), nn.Linear(12, 12).requires_grad_(False)
        self.assign = assign

    def forward(self, x: Tensor) -> Tensor:
        for p, q in zip(self.fast.parameters(), self.slow.parameters(), strict=True):
            if self.assign:
                q.data = 0.9 * q.data + 0.1 * p.data
            else:
                q.data.lerp_(p.data, 0.1)
        return self.fast(x).tanh() + self.slow(x).detach()


class Bounded(nn.Linear):
    """Rows of a norm of at most one; ``graph``: as a graph can, too."""

    def __init__(self, graph: bool) -> None:
        super().__init__(12, 12)
        self.graph = graph

    def forward(self, x: Tensor) -> Tensor:
        if self.graph:
            with torch.no_grad():
                self.weight.clamp_(-0.1, 0.1)
        else:
            self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.3)
        return super().forward(x)


class Starts(nn.Module):
    """Scales by what the first batch says, which its value tells that it has met."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(12, 12), nn.Parameter(torch.zeros(1, 12))
        self.register_buffer("met", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if not self.met > 0.0:
            self.scale.data = -torch.log(x.std(0, keepdim=True) + 1e-6).data
            self.met = torch.tensor(1.0)
        y: Tensor = x * self.scale.exp()
        return y


WRITERS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "replaced": (Codes, ["codes.weight"]),
    "assigned": (partial(Follows, True), ["slow.weight", "slow.bias"]),
    "in place": (partial(Follows, False), ["slow.weight", "slow.bias"]),
    "own": (partial(Bounded, False), ["weight"]),
    "in a graph": (partial(Bounded, True), ["weight"]),
    "once": (Starts, ["scale"]),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_nothing_is_written_before_the_first_call(kind: str) -> None:
    make, _ = WRITERS[kind]
    model = nn.Sequential(nn.Linear(6, 12), make(), nn.Linear(12, 3))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    teacher = gpdfx.expand(model, example_inputs=(torch.randn(5, 6),))
    for found in (model.state_dict(), gpdfx.collapse(teacher).state_dict()):
        assert all(torch.equal(found[name], x) for name, x in before.items())


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_parameters_that_forward_changes(name: str, verify: bool) -> None:
    """Where Python does so they keep the student's width: what is written to them is theirs."""
    build, written = WRITERS[name]
    model, teacher = made(build, branches="auto", verify=verify)
    before = copy.deepcopy(model)
    for which in ("forward", "student"):
        own, twin = copy.deepcopy(model), copy.deepcopy(teacher)
        follows(own, getattr(twin, which), [True, True, False, True])
        plain = gpdfx.collapse(twin)
        for leaf in written:
            p = own.get_parameter(f"inner.{leaf}")
            assert not torch.equal(p, before.get_parameter(f"inner.{leaf}"))
            torch.testing.assert_close(plain.get_parameter(f"inner.{leaf}").data, p.data)
            narrow = twin.get_parameter(f"inner.{leaf}").shape == p.shape
            assert narrow == bool(teacher.report().apart)


class Momentum(nn.Module):
    """Its target follows it, written to in one of several ways."""

    def __init__(self, write: Callable[[Tensor, Tensor], Any], counts: bool = False) -> None:
        super().__init__()
        self.online, self.last = nn.Sequential(nn.Linear(8, 12), nn.Tanh()), nn.Linear(12, 4)
        self.target, self.write = copy.deepcopy(self.online).requires_grad_(False), write
        self.counts, self.n = counts, 0

    def forward(self, x: Tensor) -> Any:
        y = self.last(self.online(x))
        with torch.no_grad():
            if self.training:
                self.n += self.counts
                pairs = zip(self.online.parameters(), self.target.parameters(), strict=True)
                for own, other in pairs:
                    self.write(own, other)
            z = self.target(x).tanh() / (1 + self.n)
        return y * z.sum(-1, keepdim=True)


class Constrained(nn.Module):
    """Weights of bounded norm, and a scale that the first batch sets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 12)
        self.scale, self.c, self.done = nn.Parameter(torch.ones(12)), nn.Linear(12, 4), False

    def forward(self, x: Tensor) -> Any:
        self.b.weight.data = torch.renorm(self.b.weight.data, 2, 0, 0.3)
        y = self.b(self.a(x).tanh())
        if not self.done:
            self.scale.data, self.done = 1 / y.detach().std(0), True
        return self.c(y * self.scale)


WRITES: dict[str, Callable[[], nn.Module]] = {
    "of its data": lambda: Momentum(lambda own, other: other.data.mul_(0.7).add_(0.3 * own.data)),
    "in Python": lambda: Momentum(lambda own, other: other.lerp_(own, 0.3), counts=True),
    "constraints": Constrained,
}


@pytest.mark.parametrize("name", WRITES)
def test_parameters_that_forward_writes_to(name: str) -> None:
    torch.manual_seed(0)
    model, x = WRITES[name](), torch.randn(6, 8)
    before = {n: p.clone() for n, p in model.named_parameters()}
    teacher = gpdfx.expand(model, 2, example_inputs=(x,))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for follow in ("teacher", "student"):
        torch.manual_seed(0)
        own, twin = WRITES[name](), copy.deepcopy(teacher)
        call = twin if follow == "teacher" else twin.student
        follows(own, call, [True, True, False, True, False])
        for n, p in gpdfx.collapse(twin).named_parameters():
            torch.testing.assert_close(p, own.get_parameter(n), rtol=1e-4, atol=1e-4)


class Swaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Any:
        self.a, self.b = self.b, self.a
        return self.a(x)


class Makes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer: nn.Module | None = None

    def forward(self, x: Tensor) -> Any:
        if self.layer is None:
            self.layer = nn.Linear(x.shape[-1], 12)
        return self.layer(x)


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (Swaps, "another module into the place"),
        (Makes, "makes the parameter inner.layer.weight"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_registries_that_forward_changes(kind: type[nn.Module], word: str, verify: bool) -> None:
    with pytest.raises(InputError, match=word):
        made(kind, verify=verify)
    model = Body(kind())
    model(torch.randn(2, 8))
    if kind is Makes:
        gpdfx.expand(model, 2, example_inputs=(torch.randn(6, 8),), verify=verify)


COUNTS = Counter[str]()


class Global(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        COUNTS["calls"] += 1
        return x * (1 + COUNTS["calls"] / 10)


class OfItsClass(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return x * (1 + self.calls / 10)


class ByDefault(nn.Module):
    def forward(self, x: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
        seen.append(len(x))
        return x * (1 + len(seen) / 10)


@pytest.mark.parametrize("kind", [Global, OfItsClass, ByDefault])
def test_what_belongs_to_no_copy_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(LossyError, match="does not repeat itself") as caught:
        made(kind)
    assert "keep it in an attribute of the module" in str(caught.value)
    assert "bug in gpdfx" not in str(caught.value)


def test_what_is_only_looked_at_is_captured() -> None:
    model, teacher = made(Looked)
    assert list(parts(teacher)) == [""]
    follows(model, teacher, [True, False])


class Leaves(nn.Module):
    """Losses and maps on itself, for a training loop to read; and weights that are computed."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.layer = nn.utils.spectral_norm(nn.Linear(12, 12))
        self.aux, self.counts, self.n = 0.0, counts, 0
        self.losses, self.seen = {"norm": None}, SimpleNamespace(shape=None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.aux = self.losses["norm"] = y.square().mean()
        self.map, self.seen.shape, self.n = y.softmax(-1), y.shape, self.n + self.counts
        return y.relu() / (1 + self.n)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("counts", [True, False])
def test_results_that_are_left_on_a_module_are_named(counts: bool, verify: bool) -> None:
    _, teacher = made(lambda: Leaves(counts), verify=verify)
    report = teacher.report()
    assert report.left == ("inner.aux", "inner.losses", "inner.map")
    assert "has to be returned by forward: inner.aux, inner.losses, inner.map" in str(report)
    assert report.to_dict()["left"] == report.left
    assert not made(Looked, verify=verify)[1].report().left


def test_nothing_of_a_network_can_be_captured() -> None:
    """Said before the work, with the line and what to do."""

    class Leaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.n = nn.Parameter(torch.randn(8, 4)), 0

        def forward(self, x: Tensor) -> Tensor:
            self.n += 1
            return x @ self.weight * self.n

    with pytest.raises(CaptureError) as caught:
        gpdfx.expand(Leaf(), 2, example_inputs=(torch.randn(3, 8),))
    text = str(caught.value)
    assert "keeps n from call to call" in text
    assert "self.n += 1" in text
    assert "depend on nothing but its inputs" in text
