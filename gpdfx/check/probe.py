"""The probe: generic parameters, and the most exact precision in which a network runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..calls import tree
from ..passes.program import duplicate
from .observe import floating, keep_rng

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Generic parameters and statistics, in place: no zeros, nothing equal, well scaled."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(t: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(t.shape, generator=draw, dtype=torch.float64) * (high - low) + low

    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                if not p.is_floating_point():
                    continue
                if p.ndim < 2:
                    norm = isinstance(module, _NORMS) or "norm" in type(module).__name__.lower()
                    low = 0.5 if (norm and name == "weight") or p.ndim == 0 else 0.05
                    new = uniform(p, low, low + 1.0 if low == 0.5 else 0.5)
                    if low == 0.05:
                        new = new * (torch.randint(0, 2, p.shape, generator=draw) * 2 - 1)
                else:
                    fan = max(p.numel() // p.shape[0], 1)
                    new = torch.randn(p.shape, generator=draw, dtype=torch.float64) / fan**0.5
                p.copy_(new.to(p.device, p.dtype))
            for name, b in module.named_buffers(recurse=False):
                if name == "running_mean":
                    b.copy_(uniform(b, -0.5, 0.5).to(b.device, b.dtype))
                elif name == "running_var":
                    b.copy_(uniform(b, 0.5, 1.5).to(b.device, b.dtype))
    return model


class _Lifted(TorchFunctionMode):
    """Casts to a narrow floating dtype go to float64: they must not hide a difference by their
    rounding, nor make one."""

    _METHODS: ClassVar = dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args = tuple(map(self._lift, args))
        kwargs = {k: self._lift(v) for k, v in (kwargs or {}).items()}
        return self._METHODS.get(func, func)(*args, **kwargs)

    @staticmethod
    def _lift(x: Any) -> Any:
        return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


@contextmanager
def lifted() -> Iterator[None]:
    """Compute in float64 whatever a network asks for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Lifted():
            yield
    finally:
        torch.set_default_dtype(before)


def cast(structure: Any, dtype: torch.dtype | None) -> Any:
    return tree.map_leaves(lambda x: x.to(dtype) if dtype and floating(x) else x, structure)


def convert(module: Any, dtype: torch.dtype | None) -> Any:
    return module.to(dtype) if dtype else module


def settle_statistics(student: nn.Module, inputs: tuple[Any, Any]) -> None:
    """Let batch norm have the statistics of this batch: with random ones a deep network multiplies
    every difference, that of rounding too."""
    norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momentum = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
    with torch.no_grad(), keep_rng():
        student.train()(*inputs[0], **inputs[1])
    for m, before in zip(norms, momentum, strict=True):
        m.momentum = before


# --------------------------------------------------------------------------- precision
@dataclass(frozen=True)
class Precision:
    """How a network is run for the check: its parameters in ``dtype`` (``None``: their own), its
    own casts ``lifted`` to float64 or not, on ``inputs`` that fit."""

    dtype: torch.dtype | None
    lifted: bool
    inputs: tuple[Any, Any]

    def __call__(self) -> contextlib.AbstractContextManager[None]:
        return lifted() if self.lifted else contextlib.nullcontext()


def precisions(student: nn.Module, inputs: tuple[Any, Any]) -> Iterator[Precision]:
    """The precisions in which a network runs, the most exact first: all of it in float64, its
    parameters in float64, or in its own dtype. Some refuse an input in another dtype than theirs:
    that one stays."""
    own = Precision(None, False, inputs)
    finite = _finite(student, own)
    double = False
    for lift in (True, False):
        for fitting in _castings(inputs):
            precision = Precision(torch.float64, lift, fitting)
            found = _finite(student, precision)
            if found is not None and (found or not finite):
                double = True
                yield precision
                break
    if not double:
        yield own


def _castings(inputs: tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """The inputs in float64; then all but those of one name."""
    yield cast(inputs, torch.float64)
    flat, spec = tree.flatten(inputs)
    names = [name.rsplit("[", 1)[-1].rsplit(".", 1)[-1] for name in tree.names(inputs)]
    kinds = dict.fromkeys(n for n, x in zip(names, flat, strict=True) if floating(x))
    for kind in kinds if len(kinds) > 1 else ():
        mixed = [
            x if n == kind else cast(x, torch.float64) for n, x in zip(names, flat, strict=True)
        ]
        yield tree.unflatten(mixed, spec)


def _finite(student: nn.Module, precision: Precision) -> bool | None:
    """True if all that a network returns is finite; ``None`` if it does not run: some bake float32
    tensors."""
    twin = convert(duplicate(student), precision.dtype).eval()
    args, kwargs = precision.inputs
    try:
        with torch.no_grad(), keep_rng(), precision():
            outputs = tree.leaves(twin(*args, **kwargs))
    except Exception:  # whatever the user's code raises in a dtype it was not written for
        return None
    return all(bool(y.isfinite().all()) for y in outputs if floating(y))
