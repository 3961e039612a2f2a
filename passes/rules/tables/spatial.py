"""Ops on the last, spatial, dimensions: pooling, padding, resizing. Channels pass through."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...program import value
from ..op import Axes, Op, dims_of
from ..signature import Signature, by, parse, rows, sig
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


def _stft(op: Op) -> Signature:
    pair = "" if value(op.node).is_complex() else " pair#stacked"
    return parse(f"... *t, *w? -> ... *f *n{pair}")


_SLIDING = {1: "... *w -> ... *x", 2: "... *h *w -> ... *y *x", 3: "... *d *h *w -> ... *z *y *x"}

TABLE: dict[Any, Rule] = rows(
    {
        "_adaptive_avg_pool2d upsample_bilinear2d upsample_bilinear2d.vec upsample_bicubic2d "
        "upsample_bicubic2d.vec _upsample_bicubic2d_aa _upsample_bicubic2d_aa.vec "
        "_upsample_bilinear2d_aa _upsample_bilinear2d_aa.vec": _SLIDING[2],
        "upsample_linear1d upsample_linear1d.vec": _SLIDING[1],
        "_adaptive_avg_pool3d upsample_trilinear3d upsample_trilinear3d.vec": _SLIDING[3],
        "grid_sampler grid_sampler_2d grid_sampler_3d": "n c *s, n *g -> n c *t",
        "pad constant_pad_nd": Rule(_pad),
        "fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn "
        "fft_ifftn fft_rfftn fft_irfftn fft_fftshift fft_ifftshift fft_hfft fft_ihfft fft_hfft2 "
        "fft_ihfft2 fft_hfftn fft_ihfftn": Rule(_fft),
        "stft stft.center": by(_stft, "self window"),
        "istft": sig("... *f *n, *w? -> ... *t", "self window"),
        "affine_grid_generator": "n! a! b! -> n *s two",
        "max_unpool2d": "... *h *w, ... *h *w -> ... *y *x",
        "max_unpool3d": "... *d *h *w, ... *d *h *w -> ... *z *y *x",
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
