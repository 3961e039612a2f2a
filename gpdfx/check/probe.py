"""The probe: generic parameters, and the most exact precision in which a network runs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..calls import tree
from ..calls.held import converted, has_gradient
from ..kernels.quantize import SINGLE
from ..passes.capture.modes import EVAL, TRAIN, enter
from ..passes.program import duplicate
from ..torch_private import BATCH_NORMS, NORMS, tree_leaves
from .facts import Inputs, floating
from .observe import keep_rng

_NORMS = (*NORMS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_STATISTICS = {"running_mean": (-0.5, 0.5), "running_var": (0.5, 1.5)}


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Generic parameters and statistics, in place: no zeros, nothing equal, well scaled."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(t: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(t.shape, generator=draw, dtype=torch.float64) * (high - low) + low

    for module in model.modules():
        norm = isinstance(module, _NORMS) or "norm" in type(module).__name__.lower()
        for name, p in module.named_parameters(recurse=False):
            if not p.is_floating_point():
                continue
            if p.ndim >= 2:
                fan = max(p.numel() // max(p.shape[0], 1), 1)
                p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) / fan**0.5)
            elif p.ndim == 0 or (norm and name == "weight"):
                p.copy_(uniform(p, 0.5, 1.5))
            else:
                size = uniform(p, 0.05, 0.5)
                p.copy_(size * (torch.randint(0, 2, p.shape, generator=draw) * 2 - 1))
        for name, b in module.named_buffers(recurse=False):
            if name in _STATISTICS:
                b.copy_(uniform(b, *_STATISTICS[name]))
    return model


def jitter(x: Tensor, draw: torch.Generator) -> None:
    """Make every number larger by a tenth at most, in place; copies, which lie at regular
    distances, by different ones: the noise repeats after a prime number."""
    noise = 1 + 0.1 * torch.rand(4093, generator=draw, dtype=torch.float64).to(x)
    flat = x.reshape(-1)  # a view, or a copy
    whole = len(flat) // len(noise) * len(noise)
    flat[:whole].view(-1, len(noise)).mul_(noise)
    flat[whole:].mul_(noise[: len(flat) - whole])
    if not x.is_contiguous():
        x.copy_(flat.view(x.shape))


def settle_statistics(student: nn.Module, inputs: Inputs) -> None:
    """Let batch norm have the statistics of this batch: with random ones a deep network multiplies
    every difference, that of rounding too."""
    run = enter(duplicate(student, ours=True), TRAIN, {})
    norms: list[Any] = [m for m in run.modules() if isinstance(m, BATCH_NORMS)]
    for m in norms:
        m.momentum = 1.0
    args, kwargs = tree.fresh(inputs)
    with torch.no_grad(), keep_rng():
        run(*args, **kwargs)
        settled = dict(run.named_buffers())
        for name, buffer in student.named_buffers():
            if name.rpartition(".")[2] in _STATISTICS:
                buffer.copy_(settled[name])


# --------------------------------------------------------------------------- precision
_ALWAYS = frozenset(("zeros", "ones", "empty", "rand", "randn", "eye", "linspace", "logspace"))
_PERHAPS = frozenset(("full", "scalar_tensor", "arange", "normal"))
"""What makes tensors of none: of the default dtype, or if their arguments are floating numbers.
(``tensor`` and ``as_tensor`` are none of these: capture holds what they make, so rounded.)"""


class _Lifted(TorchFunctionMode):
    """Casts to a narrow floating dtype go to float64, and so does what has the default dtype: they
    must not hide a difference by their rounding, nor make one. (No other thread sees that, as it
    would see another default dtype.) Ops that take only float32 get it where it does not matter.
    """

    _METHODS: ClassVar = dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args = tuple(map(self._lift, args))
        kwargs = {k: self._lift(v) for k, v in (kwargs or {}).items()}
        func = SINGLE.get(func, func)
        name = getattr(func, "__name__", "").partition(".")[0]
        if name in _ALWAYS and kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float64
        result = self._METHODS.get(func, func)(*args, **kwargs)
        if type(result) is not Tensor or result.dtype is not torch.get_default_dtype():
            return result
        if any(floating(x) for x in tree_leaves((args, kwargs))):
            return result
        if name in _PERHAPS and "dtype" not in kwargs:
            return func(*args, **kwargs, dtype=torch.float64)
        return result.double() if result.is_floating_point() else result  # of integers

    @staticmethod
    def _lift(x: Any) -> Any:
        number = isinstance(x, torch.dtype) and (x.is_floating_point or x.is_complex)
        return torch.promote_types(x, torch.float64) if number else x


@dataclass(frozen=True)
class Precision:
    """How a network is run for the check: its parameters in ``dtype`` (``None``: their own), its
    own casts ``lifted`` to float64 or not, on ``inputs`` that fit."""

    dtype: torch.dtype | None
    lifted: bool
    inputs: Inputs

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in it; if lifted, whatever a network asks for."""
        return _Lifted() if self.lifted else contextlib.nullcontext()

    def convert(self, module: nn.Module) -> nn.Module:
        """A module's parameters to it, in place."""
        return converted(module, self.dtype) if self.dtype else module


def precisions(
    student: nn.Module, inputs: Inputs, *, lift: bool, casts: bool
) -> Iterator[Precision]:
    """The precisions in which a network runs, the most exact first: all of it in float64, its
    parameters in float64, or in its own dtype. Some refuse an input in another dtype than theirs:
    that one stays. What is finite in its own dtype has to be in float64. ``lift``: it asks for
    dtypes, or may; ``casts``: its graph does."""
    own = Precision(None, False, inputs)
    finite = cache(lambda: _finite(_outputs(student, own)))
    found: list[Precision] = []
    for lifted in (True, False) if lift else (False,):
        for precision in (Precision(torch.float64, lifted, x) for x in _castings(inputs)):
            outputs = _outputs(student, precision)
            if outputs is not None and (_finite(outputs) or not finite()):
                plain = replace(precision, lifted=False)
                if lifted and not casts and _same(outputs, _outputs(student, plain)):
                    precision = plain
                found.append(precision)
                yield precision
                break
        if found and not found[-1].lifted:
            break
    if not found:
        yield own


def _castings(inputs: Inputs) -> Iterator[Inputs]:
    """The inputs in float64; then all but those of one name."""
    flat, spec = tree.flatten(inputs)
    names = [re.split(r"[\[.]", name)[-1] for name in tree.names(inputs)]
    named = list(zip(names, flat, strict=True))
    kept = dict.fromkeys(name for name, x in named if number(x))
    for one in (None, *kept) if len(kept) > 1 else (None,):
        cast = [
            x.to(torch.promote_types(x.dtype, torch.float64)) if number(x) and name != one else x
            for name, x in named
        ]
        yield tree.unflatten(cast, spec)


def number(x: Any) -> bool:
    """True for a tensor that has a precision."""
    return isinstance(x, Tensor) and has_gradient(x)


def _outputs(student: nn.Module, precision: Precision) -> list[Tensor] | None:
    """What a network returns; ``None`` if it does not run: some bake float32 tensors."""
    args, kwargs = tree.fresh(precision.inputs)
    try:
        run = enter(precision.convert(duplicate(student, ours=True)), EVAL, {})
        with torch.no_grad(), keep_rng(), precision():
            torch.manual_seed(0)
            outputs = tree.leaves(run(*args, **kwargs))
    except Exception:  # whatever the user's code raises in a dtype it was not written for
        return None
    return [y for y in outputs if floating(y)]


def _finite(outputs: list[Tensor] | None) -> bool:
    return outputs is not None and all(bool(y.isfinite().all()) for y in outputs)


def _same(outputs: list[Tensor], others: list[Tensor] | None) -> bool:
    return others is not None and all(map(torch.equal, outputs, others))
