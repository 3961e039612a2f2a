"""The probe: generic parameters, and the most exact precision in which a network runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import tree
from .observe import floating, keep_rng
from .passes.program import duplicate

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


def settle(student: nn.Module, inputs: tuple[Any, Any]) -> None:
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
Precision = Callable[[], contextlib.AbstractContextManager[None]]


def precisions(
    student: nn.Module, inputs: tuple[Any, Any]
) -> Iterator[tuple[torch.dtype | None, Precision]]:
    """The ways in which a network runs, the most exact first: all of it in float64, its parameters
    in float64, or in its own dtype."""
    double = False
    for precision in (lifted, contextlib.nullcontext):
        if _runs(student, *inputs, torch.float64, precision):
            double = True
            yield torch.float64, precision
    if not double:
        yield None, contextlib.nullcontext


def _runs(
    student: nn.Module, args: Any, kwargs: Any, dtype: torch.dtype, precision: Precision
) -> bool:
    """Some networks bake float32 tensors and do not run in float64, or not without overflow."""
    finite = []
    for to in (None, dtype):
        twin = convert(duplicate(student), to).eval()
        some_args, some_kwargs = cast((args, kwargs), to)
        try:
            with torch.no_grad(), keep_rng(), precision() if to else contextlib.nullcontext():
                outputs = tree.leaves(twin(*some_args, **some_kwargs))
        except Exception:  # whatever the user's code raises in a dtype it was not written for
            return False
        finite.append(all(bool(y.isfinite().all()) for y in outputs if floating(y)))
    return finite[1] or not finite[0]
