"""Fake quantization in float64, where PyTorch's ops take float32 only: for the check, in which an
error of float32 would now and then be one of a whole step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..torch_private import LEARNED_STEPS

aten = torch.ops.aten


def _by_channel(x: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    return torch.fake_quantize_per_channel_affine(x, scale.float(), *rest)


def _in_one_range(x: Tensor, scale: Any, zero: Any, *bounds: int) -> Tensor:
    """As a single channel: the other op multiplies in float32 whatever it is given."""
    if not isinstance(scale, Tensor):
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, *bounds)
    return _by_channel(x[None], scale, zero, 0, *bounds)[0]


def _observed(x: Tensor, observe: Tensor, quantize: Tensor, *rest: Any) -> Tensor:
    """The range is found in float32, what lies in it is rounded in the dtype of ``x``."""
    *ranges, zero, momentum, least, largest, dim, by_channel, symmetric = (*rest, False, False)[:10]
    single = [t.float() for t in ranges]
    options = zero, momentum, least, largest, dim, by_channel, symmetric
    aten.fused_moving_avg_obs_fake_quant(x.detach().float(), observe, quantize, *single, *options)
    for t, new in zip(ranges, single, strict=True):
        t.resize_as_(new).copy_(new)
    if not quantize.item():
        return x.clone()
    if by_channel:
        return _by_channel(x, ranges[2], zero, dim, least, largest)
    return _in_one_range(x, ranges[2], zero, least, largest)


def _observed_anew(x: Tensor, observe: Tensor, quantize: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    new = [t.clone() for t in rest[:4]]
    y = _observed(x, observe, quantize, *new, *rest[4:])
    return y, torch.ones_like(x, dtype=torch.bool), *new  # a mask that only a backward would read


def _learned(
    x: Tensor, scale: Tensor, zero: Tensor, least: int, largest: int, factor: float = 1.0
) -> Tensor:
    """Of a step that learns, whose gradient PyTorch has in float32 only."""
    scale, zero = (t * factor + (t - t * factor).detach() for t in (scale, zero))
    zero = zero + (zero.round().clamp(least, largest) - zero).detach()
    steps = x / scale
    steps = steps + (steps.round() - steps).detach()
    place = (steps + zero).detach()
    inside = (place >= least) & (place <= largest)
    return torch.where(inside, steps * scale, (place.clamp(least, largest) - zero) * scale)


def _learned_by_channel(x: Tensor, scale: Tensor, zero: Tensor, dim: int, *rest: Any) -> Tensor:
    shape = [-1 if d == dim else 1 for d in range(x.ndim)]
    return _learned(x, scale.view(shape), zero.view(shape), *rest)


SINGLE: dict[Any, Any] = {
    torch.fake_quantize_per_channel_affine: _by_channel,
    aten.fake_quantize_per_channel_affine.default: _by_channel,
    torch.fake_quantize_per_tensor_affine: _in_one_range,
    aten.fake_quantize_per_tensor_affine.tensor_qparams: _in_one_range,
    LEARNED_STEPS[0]: _learned,
    aten._fake_quantize_learnable_per_tensor_affine.default: _learned,
    LEARNED_STEPS[1]: _learned_by_channel,
    aten._fake_quantize_learnable_per_channel_affine.default: _learned_by_channel,
    torch.fused_moving_avg_obs_fake_quant: _observed,
    aten.fused_moving_avg_obs_fake_quant.default: _observed,
    aten._fused_moving_avg_obs_fq_helper_functional.default: _observed_anew,
}
"""Ops that take only float32 -> the same in float64."""
