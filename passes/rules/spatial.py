"""Ops on the last, spatial, dimensions: pooling, padding, resizing. Channels pass through."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..program import shape
from .base import Axes, Op, Rule

aten = torch.ops.aten


def _pass(op: Op, spatial: int, count: int = 1) -> Any:
    """All but the last ``spatial`` dimensions pass; in those the op slides over positions."""
    source = op.node.all_input_nodes[0]
    out = list(op.axes(source))
    values = op.node.meta["val"]
    sizes = shape(values[0] if isinstance(values, tuple | list) else values)
    for d in range(len(out) - spatial, len(out)):
        moving = op.hold(source, d, "the op slides along it", out=d)
        out[d] = op.free(sizes[d]) if moving else op.fixed(sizes[d])
    return tuple(out) if count == 1 else [tuple(out)] * count


def _pad(op: Op) -> Axes:
    """Padded dimensions are fixed; the others pass."""
    axes, pads = op.axes("self"), list(op["pad"])
    result = list(axes)
    for k in range(len(pads) // 2):
        d = len(axes) - 1 - k
        if pads[2 * k] != 0 or pads[2 * k + 1] != 0:
            if not op.solver.is_fixed(axes[d]):
                op.narrow(op["self"], d, "padding adds positions")
            result[d] = op.fixed(op.out_shape[d])
    return tuple(result)


def _fft(op: Op) -> Axes:
    axes = op.axes("self")
    dims = op.args.get("dim", -1)
    dims = range(len(axes)) if dims is None else [dims] if isinstance(dims, int) else dims
    result = list(axes)
    for d in dims:
        d = int(d) % len(axes)
        if not op.solver.is_fixed(axes[d]):
            op.narrow(op["self"], d, "frequencies mix positions")
        result[d] = op.fixed(op.out_shape[d])
    return tuple(result)


def _grid_sample(op: Op) -> Axes:
    x, grid = op.axes("input"), op.axes("grid")
    for name, axes in (("input", x), ("grid", grid)):
        for d in range(2 if name == "input" else 1, len(axes)):
            op.hold(op[name], d, "the op samples positions along it")
    grid = (grid[0], *(op.fixed(a.size) for a in grid[1:]))
    return (op.unify(x[0], grid[0]), x[1], *grid[1:-1])


TABLE: dict[Any, Rule] = {}
for _n in (1, 2, 3):
    for _name, _count in (
        (f"max_pool{_n}d", 1),
        (f"max_pool{_n}d_with_indices", 2),
        (f"avg_pool{_n}d", 1),
        (f"adaptive_avg_pool{_n}d", 1),
        (f"_adaptive_avg_pool{_n}d", 1),
        (f"adaptive_max_pool{_n}d", 2),
        (f"reflection_pad{_n}d", 1),
        (f"replication_pad{_n}d", 1),
        (f"upsample_nearest{_n}d", 1),
        (f"_upsample_nearest_exact{_n}d", 1),
        (("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")[_n - 1], 1),
    ):
        for _overload in ("default", "vec"):
            if hasattr(aten, _name) and hasattr(getattr(aten, _name), _overload):
                TABLE[getattr(getattr(aten, _name), _overload)] = Rule(
                    partial(_pass, spatial=_n, count=_count)
                )
for _op in (
    aten.upsample_bicubic2d.default,
    aten.upsample_bicubic2d.vec,
    aten._upsample_bicubic2d_aa.default,
    aten._upsample_bicubic2d_aa.vec,
    aten._upsample_bilinear2d_aa.default,
    aten._upsample_bilinear2d_aa.vec,
):
    TABLE[_op] = Rule(partial(_pass, spatial=2))
TABLE |= {
    aten.pad.default: Rule(_pad),
    aten.constant_pad_nd.default: Rule(_pad),
    aten.grid_sampler.default: Rule(_grid_sample),
    aten.grid_sampler_2d.default: Rule(_grid_sample),
}
TABLE |= {
    getattr(aten, f"fft_{name}").default: Rule(_fft)
    for name in (
        *("fft", "ifft", "rfft", "irfft", "fft2", "ifft2", "rfft2", "irfft2"),
        *("fftn", "ifftn", "rfftn", "irfftn", "fftshift", "ifftshift"),
    )
}
