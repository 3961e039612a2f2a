"""Ops on the last, spatial, dimensions: pooling, padding, resizing. Channels pass through."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..op import Axes, Op, dims_of
from ..signature import rows
from ..writer import Rule


def _mixed(op: Op, dims: Iterable[int], why: str) -> Axes:
    """All but some dimensions pass; those the op sees at the student's width, and makes anew."""
    axes = list(op.axes("self"))
    for d in dims:
        if not op.solver.is_fixed(axes[d]):
            op.narrow(op["self"], d, why)
        axes[d] = op.fixed(op.out_shape[d])
    return tuple(axes)


def _pad(op: Op) -> Axes:
    rank, pads = len(op.axes("self")), list(op["pad"])
    pairs = enumerate(zip(pads[::2], pads[1::2], strict=True))  # from the last dimension on
    padded = (rank - 1 - k for k, pair in pairs if pair != (0, 0))
    return _mixed(op, padded, "padding adds positions")


def _fft(op: Op) -> Axes:
    return _mixed(op, dims_of(op, op.args.get("dim", -1)), "frequencies mix positions")


_SLIDING = {1: "... *w -> ... *x", 2: "... *h *w -> ... *y *x", 3: "... *d *h *w -> ... *z *y *x"}

TABLE: dict[Any, Rule] = rows(
    {
        "_adaptive_avg_pool2d upsample_bilinear2d upsample_bilinear2d.vec upsample_bicubic2d "
        "upsample_bicubic2d.vec _upsample_bicubic2d_aa _upsample_bicubic2d_aa.vec "
        "_upsample_bilinear2d_aa _upsample_bilinear2d_aa.vec": _SLIDING[2],
        "upsample_linear1d upsample_linear1d.vec": _SLIDING[1],
        "_adaptive_avg_pool3d upsample_trilinear3d upsample_trilinear3d.vec": _SLIDING[3],
        "grid_sampler grid_sampler_2d": "n c *s, n *g -> n c *t",
        "pad constant_pad_nd": Rule(_pad),
        "fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn "
        "fft_ifftn fft_rfftn fft_irfftn fft_fftshift fft_ifftshift": Rule(_fft),
    }
)
for _n, _text in _SLIDING.items():
    TABLE |= rows(
        {
            f"max_pool{_n}d avg_pool{_n}d adaptive_avg_pool{_n}d reflection_pad{_n}d "
            f"replication_pad{_n}d upsample_nearest{_n}d upsample_nearest{_n}d.vec "
            f"_upsample_nearest_exact{_n}d _upsample_nearest_exact{_n}d.vec": _text,
            f"max_pool{_n}d_with_indices adaptive_max_pool{_n}d": (
                f"{_text}, {_text.partition('->')[2]}"
            ),
        }
    )
