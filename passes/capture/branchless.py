"""Modules that ask their buffers for values (those of ``torch.ao.quantization``, batch norms that
average all batches), and assertions about values, without branches.

Fake quantizers look in every call whether they are to observe and to quantize, observers whether
they have seen anything. A graph cannot branch on that; it can compute both and choose. These are
the same numbers (the laws see to that), and the switches work on after capture.
"""

from __future__ import annotations

import dis
import math
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import fake_quantize, observer
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...torch_private import BATCH_NORMS, LEARNED_STEPS, in_transform
from .limits import has_unknown_size

aten = torch.ops.aten

_MOVING = observer.MovingAverageMinMaxObserver, observer.MovingAveragePerChannelMinMaxObserver
_OBSERVERS = (observer.MinMaxObserver, observer.PerChannelMinMaxObserver, *_MOVING)
_GIVEN = observer.FixedQParamsObserver


def without_branches(module: nn.Module) -> None:
    """Let the modules in a copy of the user's that are known here, and have no forward of their
    own, run without branches."""
    for part in module.modules():
        if isinstance(part, BATCH_NORMS) and part.momentum is None:
            part.momentum = 0.1  # for a graph, which reads it anew (see ``follow_norms``)
        spelled = _spelled(part)
        if spelled is not None:
            part.forward = partial(spelled, part)


def unknown(module: nn.Module) -> tuple[str, str] | None:
    """The first fake quantizer that is not known here, and what to do."""
    fused = fake_quantize.FusedMovingAvgObsFakeQuantize.forward
    for path, part in module.named_modules():
        own = isinstance(part, fake_quantize.FakeQuantizeBase) and type(part).forward is not fused
        if own and _spelled(part) is None:
            inner = type(getattr(part, "activation_post_process", None)).__name__
            remedy = "quantize by a qconfig whose observers keep extremes or their moving averages"
            remedy += " (get_default_qat_qconfig's do), or expand the float model and prepare the"
            return f"{path} ({type(part).__name__} with {inner})", f"{remedy} collapsed student"
    return None


def _spelled(part: Any) -> Callable[[Any, Tensor], Tensor] | None:
    runs = type(part).forward
    if "forward" in vars(part):
        return None
    if any(runs is kind.forward for kind in _OBSERVERS):
        return _observed if part.min_val.numel() else None
    if runs is not fake_quantize.FakeQuantize.forward:
        return None
    inner = part.activation_post_process
    known = type(inner).forward is _GIVEN.forward or _spelled(inner) is not None
    return _quantized if known else None


def _observed(part: Any, x: Tensor, on: Tensor | None = None) -> Tensor:
    """What an observer does, if it is ``on``."""
    low, high = part.min_val, part.max_val
    seen = x.detach()
    seen = seen if seen.dtype == low.dtype else seen.to(low.dtype)
    by_channel = hasattr(part, "ch_axis")
    others = [d for d in range(x.ndim) if not by_channel or d != part.ch_axis % x.ndim]
    least, largest = seen.amin(others), seen.amax(others)
    if isinstance(part, _MOVING):
        first = torch.zeros_like(low, dtype=torch.bool)
        if not by_channel:
            first = torch.isposinf(low) & torch.isneginf(high)
        step = part.averaging_constant
        least = torch.where(first, least, low + step * (least - low))
        largest = torch.where(first, largest, high + step * (largest - high))
    else:
        least, largest = torch.min(least, low), torch.max(largest, high)
    for buffer, new in ((low, least), (high, largest)):
        buffer.copy_(new if on is None else torch.where(on, new, buffer))
    return x


def _quantized(part: Any, x: Tensor) -> Tensor:
    """What a fake quantizer does."""
    inner, scale, zero = part.activation_post_process, part.scale, part.zero_point
    if not isinstance(inner, _GIVEN):
        on = part.observer_enabled[0] == 1
        _observed(inner, x, on)
        for buffer, new in zip((scale, zero), _parameters(inner), strict=True):
            buffer.copy_(torch.where(on, new.reshape(buffer.shape), buffer))
    bounds = inner.quant_min, inner.quant_max
    if part.is_per_channel:
        y = torch.fake_quantize_per_channel_affine(x, scale, zero, part.ch_axis, *bounds)
    else:
        y = torch.fake_quantize_per_tensor_affine(x, scale, zero, *bounds)
    return torch.where(part.fake_quant_enabled[0] == 1, y, x)


def _parameters(part: Any) -> tuple[Tensor, Tensor]:
    """``calculate_qparams`` of an observer that has seen something."""
    low, high, steps = part.min_val, part.max_val, float(part.quant_max - part.quant_min)
    if part.qscheme == torch.per_channel_affine_float_qparams:
        scale = (high - low) / steps
        scale = torch.where(scale > part.eps, scale, torch.ones_like(scale))
        return scale, -1 * low / scale
    below, above = torch.min(low, torch.zeros_like(low)), torch.max(high, torch.zeros_like(high))
    if part.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric):
        scale = torch.max(torch.max(-below, above) / (steps / 2), part.eps)
        middle = (part.quant_min + part.quant_max) // 2 if part.has_customized_qrange else 128
        middle = middle if part.dtype in (torch.quint8, torch.uint8) else 0
        middle = 2**15 if part.dtype == torch.uint16 else middle
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    scale = torch.max((above - below) / steps, part.eps)
    zero = part.quant_min - torch.round(below / scale).to(torch.int)
    return scale, torch.clamp(zero, part.quant_min, part.quant_max)


# --------------------------------------------------------------------------- ops
_BY_TENSORS = aten.fake_quantize_per_tensor_affine.tensor_qparams
_OPS = {
    torch.fake_quantize_per_tensor_affine: aten.fake_quantize_per_tensor_affine.default,
    torch.fake_quantize_per_channel_affine: aten.fake_quantize_per_channel_affine.default,
    LEARNED_STEPS[0]: aten._fake_quantize_learnable_per_tensor_affine.default,
    LEARNED_STEPS[1]: aten._fake_quantize_learnable_per_channel_affine.default,
}
"""What PyTorch cannot trace with gradients at sizes that are free."""
_NAMED: dict[str, Any] = {str(op): op for op in (*_OPS.values(), _BY_TENSORS)}


@torch.library.custom_op("gpdfx::fake_quantize", mutates_args=())
def _stand_in(tensors: list[Tensor], integers: list[int], factors: list[float], op: str) -> Tensor:
    made: Tensor = _NAMED[op](*_ordered(tensors, integers, factors, op))
    return made


@_stand_in.register_fake
def _like(tensors: list[Tensor], *rest: Any) -> Tensor:
    return torch.empty_like(tensors[0])


def _ordered(tensors: Any, integers: Any, factors: Any, op: str) -> list[Any]:
    """The arguments of an op, given by type."""
    left = {"Tensor": [*tensors], "int": [*integers], "float": [*factors]}
    rows = [left[str(a.type)] for a in _NAMED[op]._schema.arguments]
    return [row.pop(0) for row in rows if row]


class StandIns(TorchFunctionMode):
    """While a module is traced, these ops are another that stands for them, and what it asserts of
    values holds."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        op = _OPS.get(func)
        if func is Tensor.__bool__ and not in_transform():
            holds = asserted(sys._getframe(1))
            if holds is not None:
                return holds
        if func is F.batch_norm:
            rows = math.prod((args[0].shape[0], *args[0].shape[2:]))
            if has_unknown_size(rows):  # it asks whether that is one, or none
                torch._check(rows > 1)
        if op is None:
            return func(*args, **(kwargs or {}))
        named = [a.name for a in op._schema.arguments]
        given = dict(zip(named, args, strict=False)) | (kwargs or {})
        if func is torch.fake_quantize_per_tensor_affine and isinstance(given["scale"], Tensor):
            op = _BY_TENSORS
        by_type: dict[str, list[Any]] = {"Tensor": [], "int": [], "float": []}
        for a in op._schema.arguments[: len(given)]:
            by_type[str(a.type)].append(given[a.name])
        return _stand_in(*by_type.values(), str(op))


# --------------------------------------------------------------------------- assertions
def asserted(frame: FrameType) -> bool | None:
    """The truth of what a frame is about to branch on, if all that it does otherwise is to raise
    (``assert x.all()``, ``if x.isnan().any(): raise``); ``None`` for any other branch. A graph has
    nothing to choose there: the student itself still looks."""
    while frame.f_code.co_name == "__torch_function__" and frame.f_back:  # of other modes
        frame = frame.f_back
    return _asserted(frame.f_code, frame.f_lasti)


@lru_cache(1024)
def _asserted(code: CodeType, at: int) -> bool | None:
    body = list(dis.get_instructions(code))
    places = {instruction.offset: k for k, instruction in enumerate(body)}
    turned = False
    for k in range(places[at], len(body)):
        name = body[k].opname
        if name == "UNARY_NOT":
            turned = not turned
        elif "JUMP" in name and name.endswith(("IF_TRUE", "IF_FALSE")):
            next_, there = _raises(body, k + 1), _raises(body, places[body[k].argval])
            truth = name.endswith("TRUE") == next_
            return None if next_ == there else truth != turned
        elif body[k].offset != at and name not in ("TO_BOOL", "EXTENDED_ARG", "COPY"):
            break
    return None


def _raises(body: list[dis.Instruction], start: int) -> bool:
    """Whether nothing but a ``raise`` can come of the instructions from there on."""
    for instruction in body[start:]:
        name = instruction.opname
        if name == "RAISE_VARARGS":
            return True
        if name.startswith(("RETURN", "YIELD", "FOR_ITER", "RERAISE")) or "JUMP" in name:
            return False
    return False


def stand_back(graph: fx.Graph) -> None:
    """Put the ops themselves back."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.gpdfx.fake_quantize.default):
        node.target, node.args = _NAMED[str(node.args[3])], tuple(_ordered(*node.args))
