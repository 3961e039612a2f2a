"""What a call shows: outputs, gradients, and how far two of them are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import tree

GRADIENTS = ("all", "parameters", "none")
"""What a student can be differentiated by; some forbid inputs that take gradients, or overwrite in
eval mode what a gradient would need."""


def observe(
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    seed: int,
    wrt: dict[str, Tensor] | None = None,
    parts: dict[str, nn.Module] | None = None,
    given: dict[str, Tensor] | None = None,
    gradients: str = "all",
) -> dict[str, Tensor]:
    """Run ``call`` with a seeded RNG; its outputs, those of ``parts`` on the way, and the
    gradients of a random projection of them with respect to the floating inputs and to ``wrt``.
    Of ``wrt`` only whether the gradient has values other than zero. ``given``: what the parts of
    another run returned; the user's Python goes on with these."""
    leaves, spec = tree.flatten((args, kwargs))
    leaves = [
        x.detach().clone().requires_grad_(x.is_floating_point() and gradients == "all")
        if isinstance(x, Tensor)
        else x
        for x in leaves
    ]
    torch.manual_seed(seed)
    again_args, again_kwargs = tree.unflatten(leaves, spec)
    differentiable = torch.is_grad_enabled() and gradients != "none"
    with _watching(parts or {}, given) as seen, torch.set_grad_enabled(differentiable):
        outputs = tree.leaves(call(*again_args, **again_kwargs))
    seen |= {f"output {k}": y for k, y in enumerate(outputs) if isinstance(y, Tensor)}
    draw = torch.Generator().manual_seed(seed + 1)
    total = torch.zeros((), dtype=torch.float64)
    for y in seen.values():  # drawn for all: only some may depend on what takes gradients
        cotangent = torch.randn(y.shape, generator=draw, dtype=torch.float64).to(y.device)
        if y.requires_grad:
            total = total + (y.real.double() * cotangent).sum().cpu()
    sources = {f"input {k}": x for k, x in enumerate(leaves) if floating(x)}
    sources = (sources if gradients == "all" else {}) | (wrt or {})
    if total.requires_grad and sources:
        seen |= _gradients(total, sources, set(wrt or {}))
    return {name: y.detach() for name, y in seen.items()}


def _gradients(total: Tensor, sources: dict[str, Tensor], brief: set[str]) -> dict[str, Tensor]:
    """Of the sources that ``total`` depends on; of the ``brief`` ones only ``(grad != 0).any()``,
    so that no two of them stay."""
    seen: dict[str, Tensor] = {}

    def take(name: str, x: Tensor) -> None:
        assert x.grad is not None
        seen[f"gradient of {name}"] = (x.grad != 0).any() if name in brief else x.grad
        x.grad = None

    handles = [
        x.register_post_accumulate_grad_hook(partial(take, name)) for name, x in sources.items()
    ]
    try:
        total.backward(inputs=list(sources.values()))
    finally:
        for x, handle in zip(sources.values(), handles, strict=True):
            x.grad = None
            handle.remove()
    return {key: seen[key] for key in (f"gradient of {name}" for name in sources) if key in seen}


@contextmanager
def _watching(
    parts: dict[str, nn.Module], given: dict[str, Tensor] | None
) -> Iterator[dict[str, Tensor]]:
    """Gather what modules return while they run. What follows them may hide it (a choice of
    boxes), and may make much of a difference in the last bit (their order): so a second run goes on
    with what the first was ``given``."""
    seen: dict[str, Tensor] = {}

    def hook(path: str) -> Callable[..., Any]:
        def write(_: nn.Module, __: Any, result: Any) -> Any:
            def leaf(y: Any) -> Any:
                if not isinstance(y, Tensor):
                    return y
                name = f"output {len(seen)} ({path})"
                seen[name] = y.clone()  # a copy: it may be overwritten
                other = given.get(name) if given else None
                same = other is not None and other.shape == y.shape
                return _Forced.apply(y, other) if same else y

            return tree.map_leaves(leaf, result)

        return write

    handles = [m.register_forward_hook(hook(path)) for path, m in parts.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


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


def identical(a: Tensor, b: Tensor) -> bool:
    """Equal, number by number; not a number is equal to itself."""
    if torch.equal(a, b) or a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


@contextmanager
def keep_rng() -> Iterator[None]:
    """Leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        yield
