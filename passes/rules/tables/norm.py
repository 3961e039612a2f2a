"""Normalisation. Statistics over a widened axis are the student's as they stand if copies are
equal in number; else they are weighted by 1 / copies."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx

from ....kernels import copies
from ...program import shape
from ..op import Op, outputs
from ..signature import rows, sig
from ..writer import Rule, Writer

aten = torch.ops.aten

# Batch norm contracts everything but its channels: copies there would be counted twice.
_BATCH = sig("b! c ...!, c?, c?, c?, c? -> b c ...", "input weight bias running_mean running_var")
_INSTANCE = sig("b c ...!, c?, c?, c?, c? -> b c ...", "input weight bias running_mean running_var")
_GROUP = sig("b (g i) ...!, (g i)?, (g i)? -> b (g i) ...", "input weight bias", g="num_groups")


def _functional_batch_norm(op: Op) -> Any:
    """Several results: the output, then statistics per channel."""
    x, *others = outputs(op.node)
    axes = _BATCH.infer(op)[0]
    axes = tuple(op.fixed(x.shape[d]) if d in op.spread else a for d, a in enumerate(axes))
    op.spread = set()  # of the output only
    return [axes] + [(axes[1],) if v.numel() else tuple(map(op.fixed, shape(v))) for v in others]


# --------------------------------------------------------------------------- layer and RMS norm
_LAYER = sig("..., ...?, ...? -> ...", "input weight bias")


def _widen_layer_norm(w: Writer, center: bool) -> fx.Node:
    op = w.op
    axes, count = op.axes("input"), len(op["normalized_shape"])
    dims = list(range(len(axes) - count, len(axes)))
    if not w.uneven(axes, dims):
        sizes = [w.size(axes[d], n) for d, n in zip(dims, op["normalized_shape"], strict=True)]
        return w.copy(normalized_shape=sizes)
    number = w.copies(axes, dims), w.gain(axes, dims)
    y = w.call(copies.standardize, w["input"], dims, *number, op["eps"], center)
    return _affine(w, y, 0)


def _affine(w: Writer, y: fx.Node, right: int) -> fx.Node:
    """``y * weight + bias``, each with ``right`` dimensions after it."""
    for name, function in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
        x = w[name]
        if x is not None:
            for _ in range(right):
                x = w.call(aten.unsqueeze.default, x, -1)
            y = w.call(function, y, x)
    return y


# --------------------------------------------------------------------------- group norm
def _widen_group_norm(w: Writer) -> fx.Node:
    op = w.op
    groups, inner = w.frozen(op.env["g"]), w.frozen(op.env["i"])
    if inner.even:
        return w.copy(num_groups=groups.teacher)
    x, rank = w["input"], len(op.axes("input"))
    split = w.call(aten.unflatten.int, x, 1, [groups.teacher, inner.teacher])
    count = w.constant(inner.copies[inner.map].reshape(-1, *(1,) * (rank - 2)))
    dims, gain = list(range(2, rank + 1)), inner.teacher / inner.student
    y = w.call(copies.standardize, split, dims, count, gain, op["eps"], True)
    return _affine(w, w.call(aten.flatten.using_ints, y, 1, 2), rank - 2)


# --------------------------------------------------------------------------- of a weight
def _widen_weight_norm(w: Writer) -> fx.Node:
    """``dim`` is the one that is not normalised over; -1: none."""
    axes = w.op.axes("v")
    dims = [d for d in range(len(axes)) if d != w.op["dim"]]
    if not any(w.wide(axes[d]) for d in dims):
        return w.copy()
    return w.call(copies.weight_norm, w["v"], w["g"], dims, w.copies(axes, dims))


TABLE: dict[Any, Rule] = rows(
    {
        "batch_norm": _BATCH,
        "_native_batch_norm_legit_functional _native_batch_norm_legit_no_training": Rule(
            _functional_batch_norm
        ),
        "instance_norm": _INSTANCE,
        "layer_norm": replace(_LAYER, widen=partial(_widen_layer_norm, center=True)),
        "rms_norm": replace(_LAYER, widen=partial(_widen_layer_norm, center=False)),
        "group_norm": replace(_GROUP, widen=_widen_group_norm),
        "_weight_norm": replace(sig("..., ... -> ..."), widen=_widen_weight_norm),
    }
)
