"""Quantization-aware training: numbers are rounded as they will be, in a range that is observed
meanwhile. Copies have the least and the largest number of what they are copies of, so that ranges
stay, or are copied with the channels that they belong to."""

from __future__ import annotations

from typing import Any

from ...program import shape
from ..op import Op, dim_of
from ..signature import Signature, by, parse, rows
from ..writer import Rule

_RANGE = ("running_min", "running_max", "scale", "zero_point")


def _by_channel(op: Op, dim: int, ranges: int) -> tuple[str, list[str]]:
    """How the tensor reads, and how its ranges do: one for every index of a dimension."""
    names = ["c" if d == dim else f"d{d}" for d in range(len(op.axes("self")))]
    return " ".join(names), ["c"] * ranges


def _along_axis(op: Op) -> Signature:
    names, ranges = _by_channel(op, dim_of(op, op["axis"]), 2)
    return parse(f"{', '.join([names, *ranges])} -> {names}")


def _observed(op: Op, anew: bool = False) -> Signature:
    """``anew``: the mask and the new ranges are results, too."""
    if op["per_row_fake_quant"]:
        names, ranges = _by_channel(op, dim_of(op, op["ch_axis"]), len(_RANGE))
    else:
        names, ranges = "...", ["one" if shape(op[name]) else "" for name in _RANGE]
    inputs, results = [names, *ranges], [names, names, *ranges] if anew else [names]
    return parse(f"{', '.join(inputs)} -> {', '.join(results)}")


_OBSERVED = " ".join(("self", *_RANGE))
TABLE: dict[Any, Rule] = rows(
    {
        "fused_moving_avg_obs_fake_quant": by(_observed, _OBSERVED),
        "_fused_moving_avg_obs_fq_helper_functional": by(
            lambda op: _observed(op, anew=True), _OBSERVED
        ),
        "fake_quantize_per_channel_affine _fake_quantize_learnable_per_channel_affine": by(
            _along_axis, "self scale zero_point"
        ),
        "fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine.tensor_qparams "
        "_fake_quantize_learnable_per_tensor_affine": "... -> ...",
    }
)
