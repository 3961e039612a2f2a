"""Run a call and observe it: outputs, gradients, the generators after it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..calls import tree
from ..calls.examples import seed_all
from ..calls.given import Given, Kept, Watch, map_result
from ..torch_private import Checkpoints, checkpoints, in_transform
from .facts import Fact, Inputs, Law, Observed, floating

GRADIENTS = {"all": "", "parameters": "of inputs", "none": "of anything"}
"""What a student can be differentiated by -> which gradients it has not; some forbid inputs that
take gradients, or overwrite in eval mode what a gradient would need."""


def observe(
    call: Callable[..., Any],
    inputs: Inputs,
    seed: int,
    gradients: str = "none",
    *,
    parameters: Mapping[str, Tensor] | None = None,
    parts: dict[str, nn.Module] | None = None,
    given: Observed | None = None,
    number: int = 0,
    reach: bool = False,
    copy: Callable[[Any], Any] = tree.fresh,
) -> Observed:
    """Run ``call`` with seeded generators; its outputs, those of ``parts`` on the way, the
    gradients of a random projection of them with respect to the floating inputs and to
    ``parameters``, and the states of the generators. ``given``: what the parts of another run
    returned; the user's Python goes on with these. ``number``: of the call in a sequence;
    ``reach``: for a gradient, only that there is one (true for what an output depends on);
    ``copy``: of the inputs (a teacher knows objects among them by identity)."""
    args, kwargs = tree.map_leaves(partial(_leaf, gradients == "all"), copy(inputs))
    leaves = tree.leaves((args, kwargs))
    seed_all(seed)
    on = gradients != "none"
    watched, watch = _watching(parts or {}, given or {}, number), Watch((args, kwargs))
    with watched as seen, torch.set_grad_enabled(on), checkpoints(Checkpoints()):
        result = call(*args, **kwargs)
    outputs, structure = tree.flatten(result)
    written, places = tree.flatten(watch.outcome(result))
    outputs += [y for y in written if not any(y is x for x in outputs)]
    for k, y in enumerate(outputs):
        if isinstance(y, Tensor):
            seen[Fact(Law.OUTPUTS, k, call=number)] = y
    after = states()
    if on:
        sources = {Fact(Law.INPUTS, k): x for k, x in enumerate(leaves) if floating(x)}
        sources = sources if gradients == "all" else {}
        sources |= {Fact(Law.PARAMETERS, name): p for name, p in (parameters or {}).items()}
        seen |= reached(seen, sources) if reach else _gradients(seen, sources, seed)
    seen = {fact: y.detach() for fact, y in seen.items()}
    seen[Fact(Law.OUTPUTS, "structure", call=number)] = _shape(outputs, structure, places)
    return seen | {Fact(Law.GENERATORS, k, call=number): x for k, x in after.items()}


def _leaf(differentiable: bool, x: Any) -> Any:
    return x.requires_grad_(differentiable and floating(x)) if isinstance(x, Tensor) else x


def _gradients(seen: Observed, sources: Observed, seed: int) -> Observed:
    """Of a random projection, by the inputs and the parameters that it depends on."""
    draw = torch.Generator().manual_seed(seed + 1)
    total = torch.zeros((), dtype=torch.float64)
    for y in seen.values():  # drawn for all: only some may depend on what takes gradients
        cotangent = torch.randn(y.shape, generator=draw, dtype=torch.float64).to(y.device)
        if y.requires_grad:
            total = total + (y.real.double() * cotangent).nan_to_num(0.0, 0.0, 0.0).sum().cpu()
    if not (total.requires_grad and sources):
        return {}
    total.backward(inputs=list(sources.values()))
    found = {fact: x.grad for fact, x in sources.items() if x.grad is not None}
    for x in sources.values():
        x.grad = None
    return found


def reached(seen: Observed, sources: Observed) -> Observed:
    """Those that a backward would come to."""
    waiting, leaves = [y.grad_fn for y in seen.values()], {id(y) for y in seen.values()}
    met = set(waiting)
    while waiting:
        node: Any = waiting.pop()
        if node is not None:
            leaves.add(id(getattr(node, "variable", None)))
            following = {other for other, _ in node.next_functions} - met
            met |= following
            waiting += following
    return {fact: torch.tensor(True) for fact, x in sources.items() if id(x) in leaves}


# --------------------------------------------------------------------------- generators
def states() -> dict[str, Tensor]:
    """Where the generators are, as numbers that can be compared."""
    numpy_state: Any = np.random.get_state()
    found = {
        "torch's generator": torch.get_rng_state().numpy().tobytes(),
        "Python's generator": random.getstate(),
        "NumPy's generator": (numpy_state[1].tobytes(), *numpy_state[2:]),
    }
    return {name: _number(state) for name, state in found.items()}


def drew(seen: Observed, seed: int) -> bool:
    """True if torch's generator moved in a call that was observed."""
    with keep_rng():
        seed_all(seed)
        start = states()
    return any(not torch.equal(x, seen[Fact(Law.GENERATORS, name)]) for name, x in start.items())


def _shape(outputs: list[Any], *structures: tree.Spec) -> Tensor:
    """Of a result without its tensors: the containers, and what is no tensor, objects by type."""
    plain = (bool, int, float, str, type(None), torch.dtype, Given, Kept)
    rest = [repr(y) if isinstance(y, plain) else str(type(y)) for y in outputs]
    kinds = (tuple(o.kind for o in one.opened) for one in structures)
    return _number((*(repr(one.outer) for one in structures), *kinds, *rest))


def _number(value: Any) -> Tensor:
    """Equal for equal values."""
    return torch.tensor(hash(value))


@contextlib.contextmanager
def keep_rng(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Leave the global generators, and those of CUDA ``devices``, as they were."""
    python, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)


# --------------------------------------------------------------------------- parts
@contextlib.contextmanager
def _watching(parts: dict[str, nn.Module], given: Observed, number: int) -> Iterator[Observed]:
    """Gather what modules return while they run. What follows them may hide it (a choice of
    boxes), and may make much of a difference in the last bit (their order): so a second run goes on
    with what the first was ``given``."""
    seen: Observed = {}

    def note(path: str, y: Any) -> Any:
        if not isinstance(y, Tensor) or in_transform():  # a wrapped one is gone after the call
            return y
        fact = Fact(Law.OUTPUTS, len(seen), path, number)
        seen[fact] = y.clone()  # a copy: it may be overwritten
        other = given.get(fact)
        if other is None or other.shape != y.shape or torch.equal(other, y):
            return y  # itself: it may be what the call was given
        return _Forced.apply(y, other)

    def hook(path: str, _module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        return map_result(partial(note, path), (args, kwargs), result)

    with contextlib.ExitStack() as hooks:
        for path, module in parts.items():
            hooks.enter_context(module.register_forward_hook(partial(hook, path), with_kwargs=True))
        yield seen


class _Forced(torch.autograd.Function):
    """The second tensor's values with the first one's gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, given: Tensor) -> Tensor:
        return given.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
