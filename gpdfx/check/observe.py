"""What a call shows: outputs, gradients, and how far two of them are apart."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import tree

GRADIENTS = {"all": "", "parameters": "of inputs", "none": "of anything"}
"""What a student can be differentiated by -> which gradients it has not; some forbid inputs that
take gradients, or overwrite in eval mode what a gradient would need."""

Inputs = tuple[Any, Any]
"""Positional and keyword inputs of a call."""


class Kind(StrEnum):
    """What can be observed, in words."""

    OUTPUT = "output {}"
    INPUT_GRADIENT = "gradient of input {}"
    PARAMETER_GRADIENT = "gradient of {}"
    BUFFER = "buffer {}"


@dataclass(frozen=True)
class Fact:
    """One thing that is observed: an output or an input by number, a parameter or a buffer by
    name. ``part``: the path of the captured module that returned an output on the way.

    >>> str(Fact(Kind.OUTPUT, 3, "stem"))
    'output 3 (stem)'
    """

    kind: Kind
    which: int | str
    part: str = ""

    def __str__(self) -> str:
        text = self.kind.format(self.which)
        return f"{text} ({self.part})" if self.part else text


Observed = dict[Fact, Tensor]


def observe(
    call: Callable[..., Any],
    inputs: Inputs,
    seed: int,
    gradients: str = "all",
    *,
    parameters: Mapping[str, Tensor] | None = None,
    parts: dict[str, nn.Module] | None = None,
    given: Observed | None = None,
) -> Observed:
    """Run ``call`` with a seeded RNG; its outputs, those of ``parts`` on the way, and the
    gradients of a random projection of them with respect to the floating inputs and to some
    ``parameters``. Of the latter only whether the gradient has values other than zero. ``given``:
    what the parts of another run returned; the user's Python goes on with these."""
    differentiable = torch.is_grad_enabled() and gradients != "none"
    args, kwargs = tree.map_leaves(partial(_fresh, gradients == "all"), inputs)
    leaves = tree.leaves((args, kwargs))
    torch.manual_seed(seed)
    with _watching(parts or {}, given or {}) as seen, torch.set_grad_enabled(differentiable):
        outputs = tree.leaves(call(*args, **kwargs))
    seen |= {Fact(Kind.OUTPUT, k): y for k, y in enumerate(outputs) if isinstance(y, Tensor)}
    draw = torch.Generator().manual_seed(seed + 1)
    total = torch.zeros((), dtype=torch.float64)
    for y in seen.values():  # drawn for all: only some may depend on what takes gradients
        cotangent = torch.randn(y.shape, generator=draw, dtype=torch.float64).to(y.device)
        if y.requires_grad:
            total = total + (y.real.double() * cotangent).sum().cpu()
    sources = {Fact(Kind.INPUT_GRADIENT, k): x for k, x in enumerate(leaves) if floating(x)}
    sources = sources if gradients == "all" else {}
    sources |= {Fact(Kind.PARAMETER_GRADIENT, n): p for n, p in (parameters or {}).items()}
    if total.requires_grad and sources:
        seen |= _gradients(total, sources)
    return {fact: y.detach() for fact, y in seen.items()}


def _fresh(differentiable: bool, x: Any) -> Any:
    """Another tensor of the same values, a leaf."""
    if not isinstance(x, Tensor):
        return x
    return x.detach().clone().requires_grad_(differentiable and floating(x))


def _gradients(total: Tensor, sources: dict[Fact, Tensor]) -> Observed:
    """Of the sources that ``total`` depends on; of parameters only ``(grad != 0).any()``, so that
    no two gradients of them stay."""
    seen: Observed = {}

    def take(fact: Fact, x: Tensor) -> None:
        assert x.grad is not None
        seen[fact] = (x.grad != 0).any() if fact.kind is Kind.PARAMETER_GRADIENT else x.grad
        x.grad = None

    with contextlib.ExitStack() as hooks:
        for fact, x in sources.items():
            handle = x.register_post_accumulate_grad_hook(partial(take, fact))
            hooks.enter_context(handle)
        total.backward(inputs=list(sources.values()))
    return {fact: seen[fact] for fact in sources if fact in seen}


@contextlib.contextmanager
def _watching(parts: dict[str, nn.Module], given: Observed) -> Iterator[Observed]:
    """Gather what modules return while they run. What follows them may hide it (a choice of
    boxes), and may make much of a difference in the last bit (their order): so a second run goes on
    with what the first was ``given``."""
    seen: Observed = {}

    def note(path: str, y: Any) -> Any:
        if not isinstance(y, Tensor):
            return y
        fact = Fact(Kind.OUTPUT, len(seen), path)
        seen[fact] = y.clone()  # a copy: it may be overwritten
        other = given.get(fact)
        return y if other is None or other.shape != y.shape else _Forced.apply(y, other)

    def hook(path: str, _module: nn.Module, _args: Any, result: Any) -> Any:
        return tree.map_leaves(partial(note, path), result)

    with contextlib.ExitStack() as hooks:
        for path, module in parts.items():
            hooks.enter_context(module.register_forward_hook(partial(hook, path)))
        yield seen


class _Forced(torch.autograd.Function):
    """The second tensor's values with the first one's gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, given: Tensor) -> Tensor:
        return given.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


HUGE = 1e30
"""Larger values stand for infinity (masked logits); each is compared with itself."""


def difference(reference: Tensor, other: Tensor | None, floor: float = 0.0) -> float:
    """``max |a - b| / max(max |a|, floor)``; infinite if shapes differ, or what is not finite."""
    if other is None or reference.shape != other.shape:
        return math.inf
    if not (reference.is_floating_point() or reference.is_complex()):
        return 0.0 if torch.equal(reference, other) else math.inf
    finite = reference.isfinite()
    if not finite.all():  # a mask of -inf, as a rule
        if not identical(reference[~finite], other[~finite]):
            return math.inf
        reference, other = reference[finite], other[finite]
    if reference.numel() == 0:
        return 0.0
    size = reference.abs()
    huge = size > HUGE
    if huge.any():
        ratio = other[huge] / reference[huge] - 1
        rest = difference(reference[~huge], other[~huge], floor)
        return max(rest, difference(torch.ones_like(ratio), 1 + ratio))
    scale = max(float(size.max()), floor)
    gap = float((reference - other).abs().max())
    if not math.isfinite(gap) or not math.isfinite(scale):
        return math.inf
    return gap / scale if scale else (0.0 if gap == 0 else math.inf)


def errors_of(reference: Observed, other: Observed, inputs: Inputs) -> dict[Fact, float]:
    """The relative error of all that is observed. Below some size a value is zero but for rounding:
    a mean is measured by the standard deviation, a gradient by 1e-6 of output over input (instance
    norm has a gradient of zero)."""
    outputs = (y.abs() for f, y in reference.items() if f.kind is Kind.OUTPUT and floating(y))
    finite = (y[y < HUGE] for y in outputs)
    largest = max((float(y.max()) for y in finite if y.numel()), default=0.0)
    leaves = tree.leaves(inputs)

    def floor(fact: Fact) -> float:
        match fact:
            case Fact(Kind.BUFFER, str(name)) if name.endswith("_mean"):
                variance = reference.get(Fact(Kind.BUFFER, name.removesuffix("mean") + "var"))
                return 0.0 if variance is None else math.sqrt(float(variance.max()))
            case Fact(Kind.INPUT_GRADIENT, int(k)) if leaves[k].any():
                return 1e-6 * largest / float(leaves[k].abs().max())
        return 0.0

    return {fact: difference(x, other.get(fact), floor(fact)) for fact, x in reference.items()}


def identical(a: Tensor, b: Tensor) -> bool:
    """Equal, number by number; not a number is equal to itself."""
    if torch.equal(a, b) or a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def keep_rng() -> contextlib.AbstractContextManager[None]:
    """Leave the global random state as it was."""
    return torch.random.fork_rng(devices=[])
