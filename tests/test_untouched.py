"""Nothing of the user's is touched: model, inputs, generators, threads, the caller's state."""

from __future__ import annotations

import contextlib
import copy
import logging
import random
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import gpdfx
from gpdfx.calls import tree
from gpdfx.passes.capture.limits import quiet
from gpdfx.passes.program import duplicate
from gpdfx.teacher.compiled import find_caches

from .helpers import program_of, teacher_of


class Net(nn.Module):
    """Two layers, and between them what a test asks for."""

    def __init__(self, step: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.c = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 4)
        self.step = step or (lambda _, h: h)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.step(self, self.norm(self.a(x)).relu()))
        return y


def example() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def follows(model: nn.Module, teacher: nn.Module, x: Tensor) -> None:
    """Both compute the same, and the teacher is wider."""
    sizes = [sum(p.numel() for p in m.parameters()) for m in (teacher, model)]
    assert sizes[0] > sizes[1]
    own, wide = copy.deepcopy(model).eval()(x), teacher.eval()(x)
    torch.testing.assert_close(wide, own, rtol=1e-5, atol=1e-4)


# --------------------------------------------------------------------------- inputs
class Box:
    """Holds a tensor, and something else."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.seen = x, [0]


class Writes(nn.Module):
    """Writes to whatever it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor, held: Any, *, box: Box, option: Any) -> Tensor:
        option.calls += 1
        y: Tensor = self.c(self.a(x.mul_(2) + held["y"][0].add_(1) + box.x.mul_(3)).relu())
        return y


class Option:
    calls = 0


@pytest.mark.parametrize("parts", [False, True])
def test_inputs_are_copied(parts: bool) -> None:
    class InParts(Writes):
        def forward(self, x: Tensor, held: Any, *, box: Box, option: Any) -> Tensor:
            if parts and x.sum() > 1e9:
                return x
            return super().forward(x, held, box=box, option=option)

    torch.manual_seed(0)
    tensors = [torch.randn(3, 8) for _ in range(3)]
    before, option = [x.clone() for x in tensors], Option()
    tensors[0].grad = torch.ones(3, 8)
    kwargs = {"box": Box(tensors[2]), "option": option}
    inputs = (tensors[0], {"y": [tensors[1]]})
    options: Any = {"example_inputs": inputs, "example_kwargs": kwargs, "dynamic": "batch"}
    teacher = gpdfx.expand(InParts(), **options)
    for x, was in zip(tensors, before, strict=True):
        assert torch.equal(x, was)
        assert not x.requires_grad
    assert tensors[0].grad is not None
    assert torch.equal(tensors[0].grad, torch.ones(3, 8))
    assert kwargs["box"].x is tensors[2]
    teacher(*inputs, **kwargs)  # the same option: another one would be another call


def test_what_has_a_state_is_copied_for_every_run() -> None:
    option = Option()
    option.calls = 5
    call = (torch.randn(3, 8), {"y": [torch.randn(3, 8)]}), {"box": Box(torch.randn(3, 8))}
    call[1]["option"] = option
    program_of(Writes(), call, dynamic="batch")
    assert find_caches(Writes(), call) == ()
    assert option.calls == 5


def test_fresh_keeps_structure_ties_and_what_has_no_state() -> None:
    x, sentinel, draw = torch.ones(2, requires_grad=True), object(), torch.Generator()
    box = Box(x * 2)
    first, (second, third), same, other = tree.fresh((x, [x, box], sentinel, draw))
    assert tree.copied(draw) is draw
    assert first is second
    assert first is not x
    assert first.is_leaf
    assert first.requires_grad
    assert third.x.is_leaf
    assert third.x.tolist() == [2, 2]
    assert same is sentinel
    assert other is not draw


# --------------------------------------------------------------------------- the model
class Itself(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Itself:
        return self


class Lost(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 4)

    def __deepcopy__(self, memo: Any) -> None:
        return None


class Anew(nn.Linear):
    """Its copies have its values, and no memo knows them."""

    def __deepcopy__(self, memo: Any) -> Anew:
        twin = Anew(self.in_features, self.out_features)
        twin.load_state_dict(self.state_dict())
        return twin.train(self.training)


class OwnWeight(nn.Parameter):
    def __deepcopy__(self, memo: Any) -> OwnWeight:
        return self


def wrapped() -> nn.Module:
    """By a function that reads the model as a global."""
    model = Net()
    model.a.forward = eval("lambda x: 2 * old(x)", {"old": model.a.forward})
    return model


def with_weight() -> nn.Module:
    model = Net()
    model.a.weight = OwnWeight(torch.randn(12, 8))
    return model


def locked() -> nn.Module:
    model = Net()
    model.lock = threading.Lock()
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Itself(8, 4), ["shares", "(root) (Itself)"]),
        (lambda: nn.Sequential(nn.Linear(8, 8), Itself(8, 4)), ["shares", "1 (Itself)"]),
        (with_weight, ["shares", "a.weight (OwnWeight)"]),
        (wrapped, ["shares", "a (Linear)"]),
        (locked, ["cannot be copied", "lock"]),
        (Lost, ["shares", "(root) (Lost)"]),
        (lambda: nn.Sequential(nn.Linear(8, 8), Anew(8, 4)), ["1.weight anew", "1 (Anew)"]),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_a_model_that_does_not_copy(
    make: Callable[[], nn.Module], words: list[str], verify: bool
) -> None:
    model = make()
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    with pytest.raises(gpdfx.InputError) as caught:
        gpdfx.expand(model, example_inputs=(example(),), verify=verify)
    assert all(word in str(caught.value) for word in words), caught.value
    assert caught.value.remedy
    for name, t in model.state_dict().items():
        assert t.dtype == before[name].dtype
        assert torch.equal(t, before[name])


def test_what_is_meant_to_be_shared_may_be() -> None:
    model = Net()
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    twin = duplicate(model, shared)
    assert twin.a.weight is model.a.weight
    assert twin.norm.running_mean is not model.norm.running_mean


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a model is, module by module."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            entries = value.items() if isinstance(value, dict) else [("", value)]
            for key, x in entries:
                held = [id(x)]
                if isinstance(x, Tensor):
                    held += [x.detach().tolist(), x.requires_grad, x.dtype]
                    held += [None if x.grad is None else (id(x.grad), x.grad.tolist())]
                found[f"{path}/{name}/{key}"] = held
    return found


def test_the_model_stays_as_it_is() -> None:
    class Counts(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    stem = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12))
    model = nn.Sequential(stem, nn.BatchNorm1d(12), Counts(0.1), nn.Linear(12, 4))
    model[2].calls = 0
    model[1].eval()
    stem[0].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones(4, 12)
    model[0].register_forward_hook(lambda module, args, y: y * 2)
    before = snapshot(model)
    follows(model, gpdfx.expand(model, example_inputs=(example(),), branches=None), example())
    assert snapshot(model) == before


# --------------------------------------------------------------------------- the caller's state
class Seen(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


CONTEXTS: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "set_grad": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "cpu": lambda: torch.device("cpu"),
    "mode": Seen,
}


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_of_the_caller(context: str, made_inside: bool) -> None:
    model, x = Net(), example()
    with CONTEXTS[context]():
        if made_inside:
            model, x = Net(), example()
        teacher = gpdfx.expand(model, example_inputs=(x,))
    assert not any(t.is_inference() for t in (*teacher.parameters(), *teacher.buffers()))
    follows(Net(), teacher, example())
    teacher(example()).sum().backward()


def test_a_context_without_values() -> None:
    model, x = Net(), example()
    with torch.device("meta"):
        teacher = gpdfx.expand(model, example_inputs=(x,))
        inside = Net()
        with pytest.raises(gpdfx.InputError, match="meta device"):
            gpdfx.expand(inside, example_inputs=(x,))
    follows(model, teacher, x)


def test_random_generators_and_other_state_of_the_process() -> None:
    def draws(_: nn.Module, h: Tensor) -> Tensor:
        random.random()
        np.random.rand()
        return nn.functional.dropout(h, 0.1)

    def state() -> Any:
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # type: ignore[index]
            torch.get_default_dtype(),
            torch.backends.mha.get_fastpath_enabled(),
            sys.stderr,
            list(warnings.filters),
            logging.root.manager.disable,
        )

    model, before = Net(draws), state()
    gpdfx.expand(model, example_inputs=(example(),), verify=False)
    assert state() == before
    with pytest.raises(gpdfx.InputError):
        gpdfx.expand(model, example_inputs=(torch.ones(2, 5),))
    assert state() == before


# --------------------------------------------------------------------------- threads
def test_two_at_once() -> None:
    model, teachers = Net(), list[Any]()

    def work() -> None:
        teachers.append(gpdfx.expand(model, example_inputs=(example(),), seed=3, branches=None))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work()
    assert len(teachers) == 4
    follows(model, teachers[0], example())
    for other in teachers[1:]:
        for p, q in zip(teachers[0].parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)


def test_another_thread_may_draw_meanwhile() -> None:
    """Now and then it does between student and teacher, which is nobody's fault."""
    stop: list[int] = []

    def draw() -> None:
        while not stop:
            torch.randn(1)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        gpdfx.expand(Net(), 2, example_inputs=(example(),), branches=None)
    finally:
        stop.append(1)
        thread.join()


def test_quiet_speaks_for_its_own_thread(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    stderr, logger = sys.stderr, logging.getLogger("torch.fx.experimental.symbolic_shapes")

    def speak(text: str) -> None:
        warnings.warn(text, stacklevel=1)
        logger.warning(text)

    handler = caplog.handler
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught, quiet():
            warnings.simplefilter("always", append=True)
            speak("mine")
            other = threading.Thread(target=speak, args=("another's",))
            other.start()
            other.join()
            assert sys.stderr is stderr
        assert [str(w.message) for w in caught] == ["another's"]
        assert {r.getMessage() for r in caplog.records} == {"another's"}
        logger.warning("after")
        assert "after" in caplog.text
    finally:
        logger.removeHandler(handler)


def test_a_failed_export_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    def depends(_: nn.Module, h: Tensor) -> Tensor:
        return h if h.sum() > 0 else -h

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return depends(self, x * self.weight)

    with pytest.raises(gpdfx.CaptureError, match="cannot capture Whole"):
        gpdfx.expand(Whole(), example_inputs=(example(),))
    assert capfd.readouterr() == ("", "")


# --------------------------------------------------------------------------- forward fails
def fails(error: Exception, *modes: bool) -> nn.Module:
    def step(module: nn.Module, h: Tensor) -> Tensor:
        if module.training in modes:
            raise error
        return h

    return Net(step)


@pytest.mark.parametrize(
    ("modes", "mode"), [((True, False), "train"), ((True,), "train"), ((False,), "eval")]
)
def test_a_forward_that_raises(modes: tuple[bool, ...], mode: str) -> None:
    model = fails(ValueError("boom"), *modes)
    with pytest.raises(gpdfx.InputError, match=f"itself fails in {mode} mode: ValueError") as e:
        gpdfx.expand(model, example_inputs=(example(),))
    assert e.value.source is not None
    assert "raise error" in e.value.source
    assert e.value.remedy
    assert isinstance(e.value.__cause__, ValueError)


CALLS: list[Tensor] = []  # what is global, no copy has for itself


def test_a_forward_that_raises_later() -> None:
    def step(_: nn.Module, h: Tensor) -> Tensor:
        CALLS.append(h)
        if len(CALLS) > 7:
            raise KeyError("a cache that is full")
        return h

    with pytest.raises(gpdfx.InputError, match="KeyError") as caught:
        gpdfx.expand(Net(step), example_inputs=(example(),))
    assert caught.value.source is not None
    assert "raise KeyError" in caught.value.source


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_what_is_not_the_models_passes_through(kind: type[Exception]) -> None:
    with pytest.raises(kind):
        gpdfx.expand(fails(kind(), False), example_inputs=(example(),))


@pytest.mark.parametrize("result", [None, "text", [], {"loss": 1.0}])
def test_a_forward_that_returns_no_tensor(result: Any) -> None:
    class Odd(Net):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y if self.training else result

    with pytest.raises(gpdfx.InputError, match="fails in eval mode: it returns no tensor"):
        gpdfx.expand(Odd(), example_inputs=(example(),))


# --------------------------------------------------------------------------- kinds of tensors
class Held(nn.Module):
    """Two layers, and a tensor ``z`` of some kind."""

    def __init__(self, z: Tensor, use: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c, self.use = nn.Linear(8, 12), nn.Linear(12, 4), use
        self.z = nn.Parameter(z, requires_grad=z.is_floating_point() or z.is_complex())

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.a(x), self.z)


class Tagged(nn.Parameter):
    """A parameter of an own class that computes like any."""


WORK: dict[str, tuple[Tensor, Any]] = {
    "integers summed": (torch.arange(3), lambda m, h, z: m.c(h) * z.sum()),
    "integers beside": (torch.arange(12), lambda m, h, z: m.c(h * z) * z.sum()),
    "integers as index": (torch.arange(12).flip(0), lambda m, h, z: m.c(h[:, z])),
    "bool": (torch.arange(12) % 2 == 0, lambda m, h, z: m.c(h * z) * z.sum()),
    "computed integers": (torch.ones(4), lambda m, h, z: m.c(h) + z * (h > 0).sum(1, True)),
    "complex": (torch.randn(12, dtype=torch.complex64), lambda m, h, z: m.c((h * z).real)),
    "empty": (torch.zeros(0), lambda m, h, z: m.c(h) + z.sum()),
    "no columns": (torch.zeros(3, 0), lambda m, h, z: m.c(h) + z.sum()),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", WORK)
def test_kinds_of_parameters(kind: str, verify: bool) -> None:
    model = Held(*WORK[kind])
    teacher = gpdfx.expand(model, example_inputs=(example(),), verify=verify, branches=None)
    follows(model, teacher, 3 * example())


def test_a_parameter_of_an_own_class() -> None:
    model = Held(torch.zeros(1), lambda m, h, z: m.c(h) + z)
    model.a.weight = Tagged(model.a.weight.detach())
    teacher = gpdfx.expand(model, example_inputs=(example(),))
    follows(model, teacher, example())
    torch.testing.assert_close(teacher.student(example()), model(example()))


REFUSED = {
    "sparse": torch.eye(4).to_sparse(),
    "csr": torch.eye(4).to_sparse_csr(),
    "float8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "meta": torch.zeros(4, 4, device="meta"),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", REFUSED)
def test_kinds_of_parameters_that_are_refused(kind: str, verify: bool) -> None:
    model = Held(REFUSED[kind], lambda m, h, z: m.c(h) + z.to_dense().float().sum())
    with pytest.raises(gpdfx.InputError, match=r"^z is ") as caught:
        gpdfx.expand(model, example_inputs=(example(),), verify=verify)
    assert caught.value.remedy


# --------------------------------------------------------------------------- forces
class Forces(nn.Module):
    """Differentiates in forward: energies, and forces as their gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 10), nn.Tanh(), nn.Linear(10, 1))

    def forward(self, r: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            r = r if r.requires_grad else r.requires_grad_()
            energy = self.net(r).sum((1, 2))
            return energy, -torch.autograd.grad(energy.sum(), r, create_graph=True)[0]


def test_a_forward_that_differentiates() -> None:
    """It is taken apart; gradients of forces reach the teacher's parameters."""
    model, r = Forces(), torch.randn(4, 5, 3)
    program = program_of(model, ((r.clone(),), {}))
    assert program.parts == ["net"]
    teacher = teacher_of(program, ((r.clone(),), {}))
    for wide, own in zip(teacher(r.clone()), model(r.clone()), strict=True):
        torch.testing.assert_close(wide, own)
    for network in (model, teacher):
        network(r.clone())[1].square().sum().backward()
    wide = dict(teacher.named_parameters())
    for name, p in model.named_parameters():
        if p.grad is None:  # the last bias moves no force
            assert name == "net.2.bias"
            continue
        grad, summed = wide[name].grad, torch.zeros_like(p)
        assert grad is not None
        places = torch.meshgrid(*(torch.tensor(m.map) for m in program.maps[name]), indexing="ij")
        summed.index_put_(places, grad, accumulate=True)
        torch.testing.assert_close(summed, p.grad)


def test_nothing_is_left_of_a_context() -> None:
    with contextlib.suppress(gpdfx.GpdfxError):
        gpdfx.expand(fails(ValueError("boom"), True), example_inputs=(example(),))
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert torch.ones(2).device.type == "cpu"
