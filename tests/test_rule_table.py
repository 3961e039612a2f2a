"""The op check over every row of the rule table: each op is run, widened and differentiated.

Example arguments follow from an op's schema and the names of its arguments; what a schema does not
say (shapes that have to fit each other) stands in ``EXAMPLES``.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import gpdfx
from gpdfx.check.op import check_rule, shown
from gpdfx.passes import rules
from gpdfx.passes.rules import SIGNATURES, TABLE, rule_of
from gpdfx.passes.rules.tables.contraction import NAMED

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def r(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def n(*values: Any) -> Tensor:
    return torch.tensor(values)


X = r(4, 6, 5)

# --------------------------------------------------------------------------- by schema
# What an argument may be, by its name: each value is tried, its default too if it has one.
BY_NAME: dict[str, list[Any]] = {
    **{"periodic": [False], "alpha": [0.6], "beta": [0.3], "boundaries": [r(6).sort()[0]]},
    **{"dim": [0, 1, -1], "keepdim": [True], "unbiased": [False], "correction": [0, 2], "k": [2]},
    **{"repeats": [3], "p": [0.3], "train": [True], "training": [True], "value": [0.5]},
    **{"mask": [X > 0], "condition": [X > 0], "fill_value": [0.5], "shifts": [[1, 2]]},
    **{
        "half_to_float": [False],
        "device": ["cpu"],
        "dtype": [torch.float64],
        "cudnn_enabled": [False],
    },
    **{"align_corners": [False, True], "norm": ["ortho"], "stable": [True], "ord": [1, 0, 3.5]},
    **{"n": [3], "m": [4], "s": [2.5], "start": [1], "end": [7], "steps": [5], "row": [3]},
    **{"col": [4], "window_length": [6], "size": [[2, 3, 4]], "scale_factors": [None]},
    **{"dims": [[0, 2]], "descending": [True], "largest": [False]},
}
FOLLOWS = ("dtype", "layout", "device", "pin_memory", "memory_format", "out_dtype")


def by_schema(op: Any) -> Iterator[Arguments]:
    """Calls in which every argument takes each of its values at least once."""
    values: dict[str, list[Any]] = {}
    for a in op._schema.arguments:
        known = [] if a.has_default_value() and a.name in FOLLOWS else BY_NAME.get(a.name, [])
        known = [[v] if "List" in str(a.type) and isinstance(v, int) else v for v in known]
        default = [a.default_value] if a.has_default_value() else []
        values[a.name] = [*default, *known] or ([X] if str(a.type) == "Tensor" else [])
        if not values[a.name]:
            return  # no example
    keyed = {a.name for a in op._schema.arguments if a.kwarg_only}
    for k in range(max(map(len, values.values()), default=1)):
        given = {name: some[k % len(some)] for name, some in values.items()}
        positional = tuple(v for name, v in given.items() if name not in keyed)
        yield positional, {name: v for name, v in given.items() if name in keyed}


# --------------------------------------------------------------------------- by name
def _images(d: int, *shape: int, size: int = 6) -> Tensor:
    return r(*shape, *[size] * d)


def _convs(transposed: bool) -> Callable[[int], list[Any]]:
    """Plain, in groups with strides and a bias, and a kernel that slides along one dimension."""

    def examples(d: int) -> list[Any]:
        plain, grouped = r(*(6, 4) if transposed else (4, 6), *[3] * d), r(8, 4, *[3] * d)
        thin = r(*(6, 4) if transposed else (4, 6), *[1] * d)
        given = {"stride": [2] * d, "groups": 2}
        calls = [(_images(d, 2, 6), plain), (_images(d, 2, 6), thin)]
        bias = r(8)
        return [*calls, (_images(d, 2, 8), grouped, bias, given)]

    return examples


def _lstm(gates: int, cell: bool) -> list[Any]:
    """One direction; then two layers both ways, with dropout between them, batch first."""
    state = [r(2, 5), r(2, 5)] if gates == 4 else r(2, 5)
    weights = r(gates * 5, 6), r(gates * 5, 5)
    biases = r(gates * 5), r(gates * 5)
    if cell:
        return [(r(2, 6), state, *weights), (r(2, 6), state, *weights, *biases)]
    first = r(3, 2, 6), r(1, 2, 5), list(weights), False, 1, 0.0, True, False, False
    params = [
        p for source in (6, 6, 10, 10) for p in (r(gates * 5, source), r(gates * 5, 5), *biases)
    ]
    second = r(2, 3, 6), r(4, 2, 5), params, True, 2, 0.3, True, True, True
    return [(x, [h, h + 1] if gates == 4 else h, *rest) for x, h, *rest in (first, second)]


def _packed(gates: int) -> list[Any]:
    """The same on five steps of two sequences."""
    calls = (call[:-1] for call in _lstm(gates, False))
    return [(r(5, 6), n(2, 2, 1), *rest) for _, *rest in calls]


SQUARE = r(3, 5, 5)
DEFINITE = SQUARE @ SQUARE.mT + 3 * torch.eye(5)
PADS = [(X, [0, 1]), (X, [0, 0, 1, 2])]
INDEX = n(2, 0, 2)
CORNERS = n([0, 2], [8, 10]).expand(2, 3, 2, 2)
ELEMENTS = [(X, d, torch.zeros(2, 6, 5, dtype=torch.long).movedim(0, d)) for d in (0,)]

# Positional arguments, and perhaps a dictionary of others, by names of ops (with wildcards). A
# function: of the number in the op's name (2 of conv2d).
EXAMPLES: dict[str, Any] = {
    # contraction
    "linear.*": [(r(2, 3, 6), r(4, 6)), (r(2, 3, 6), r(4, 6), r(4))],
    "conv_transpose*": _convs(transposed=True),
    "conv?d.padding": lambda d: [(_images(d, 2, 6), r(4, 6, *[3] * d), r(4), {"padding": "same"})],
    "conv?d.*": _convs(transposed=False),
    "matmul.*": [
        (r(*a), r(*b))
        for a in ((6,), (4, 6), (3, 4, 6), (2, 3, 4, 6))
        for b in ((6,), (6, 5), (3, 6, 5), (2, 1, 6, 5))
        if (a, b) != ((6,), (2, 1, 6, 5))
    ],
    "mm.*": [(r(4, 6), r(6, 5))],
    "bmm.*": [(r(3, 4, 6), r(3, 6, 5))],
    "mv.*": [(r(4, 6), r(6))],
    "dot.* vdot.*": [(r(6), r(6) + 1)],
    "einsum.*": [
        ("bchw,oc", [r(2, 6, 3, 4), r(5, 6)]),
        ("bhqd, bhkd -> bhqk", [r(2, 3, 4, 5), r(2, 3, 6, 5)]),
        ("...i,oi,oj->...oj", [r(2, 3, 6), r(4, 6), r(4, 5)]),
    ],
    "addmm.*": [(r(5), r(4, 6), r(6, 5)), (r(4, 5), r(4, 6), r(6, 5), {"beta": 0.5, "alpha": 2})],
    "addmv.*": [(r(4), r(4, 6), r(6))],
    "baddbmm.*": [(r(3, 1, 5), r(3, 4, 6), r(3, 6, 5))],
    "bilinear.*": [(r(2, 3, 6), r(2, 3, 5), r(4, 6, 5)), (r(2, 6), r(2, 5), r(4, 6, 5), r(4))],
    "_grouped_mm.* grouped_mm_fallback.*": [
        (r(8, 8), r(2, 8, 16), torch.tensor([3, 8], dtype=torch.int32))  # rows of 16 bytes
    ],
    "scaled_dot_product_attention.*": [
        (r(2, 4, 3, 6), r(2, 4, 5, 6), r(2, 4, 5, 7)),
        (r(2, 4, 3, 6), r(2, 4, 5, 6), r(2, 4, 5, 7), r(3, 5), 0.4, {"scale": 0.3}),
        (r(2, 4, 5, 6), r(2, 2, 5, 6), r(2, 2, 5, 7), {"enable_gqa": True, "is_causal": True}),
    ],
    "convolution.*": [
        (r(2, 6, 5), r(8, 3, 3), r(8), [2], [1], [1], False, [0], 2),
        (r(2, 6, 5), r(6, 4, 3), None, [1], [0], [1], True, [0], 2),
    ],
    "conv_tbc.*": [(r(5, 2, 6), r(3, 6, 4), r(4), 1)],
    "addbmm.*": [(r(4, 5), r(3, 4, 6), r(3, 6, 5), {"alpha": 2})],
    "addr.*": [(r(4, 5), r(4), r(5) + 1), (r(5), r(4), r(5) + 1)],
    # matrices
    "linalg_cholesky*": [(DEFINITE,)],
    "linalg_inv* inverse.* *det.* matrix_exp.* linalg_matrix_exp.* logdet.*": [(DEFINITE,)],
    "tril.* triu.*": [(X,), (X, -1)],
    "trace.*": [(r(5, 5),), (r(4, 6),)],
    "*matrix_power.*": [(SQUARE, 3)],
    "linalg_solve.*": [
        (DEFINITE, r(3, 5, 4)),
        (DEFINITE, r(3, 5)),
        (DEFINITE[0], r(5)),
        (DEFINITE, r(3, 4, 5), {"left": False}),
    ],
    "linalg_solve_triangular.*": [
        (DEFINITE, r(3, 5, 4), {"upper": True}),
        (DEFINITE, r(3, 4, 5), {"upper": False, "left": False}),
    ],
    "cholesky_solve.*": [(r(3, 5, 4), DEFINITE)],
    # recurrent
    "lstm.input": _lstm(4, False),
    "gru.input": _lstm(3, False),
    "rnn_tanh.input rnn_relu.input": _lstm(1, False),
    "lstm.data": _packed(4),
    "gru.data": _packed(3),
    "rnn_tanh.data rnn_relu.data": _packed(1),
    "_pack_padded_sequence.*": [(r(2, 3, 6), n(3, 2), True), (r(3, 2, 6, 4), n(3, 1), False)],
    "_pad_packed_sequence.*": [
        (r(5, 6), n(2, 2, 1), True, 0.5, 4),
        (r(5), n(2, 2, 1), False, 0, 3),
    ],
    "lstm_cell.*": _lstm(4, True),
    "gru_cell.*": _lstm(3, True),
    "rnn_tanh_cell.* rnn_relu_cell.*": _lstm(1, True),
    # norms
    "_weight_norm.*": [
        (r(4, 6, 3), r(4, 1, 1) + 3),
        (r(4, 6), r(1, 6) + 3, 1),
        (r(4, 6), r(1)[0], -1),
    ],
    "batch_norm.*": [
        (r(3, 6, 5), r(6), r(6), r(6), r(6) + 4, training, 0.1, 1e-5, False)
        for training in (False, True)
    ]
    + [(r(3, 6), None, None, None, None, True, 0.1, 1e-5, False)],
    "_native_batch_norm_legit_functional.*": [
        (r(3, 6, 5), r(6), r(6), r(6), r(6) + 4, True, 0.1, 1e-5)
    ],
    "_native_batch_norm_legit_no_training.*": [(r(3, 6, 5), r(6), r(6), r(6), r(6) + 4, 0.1, 1e-5)],
    "instance_norm.*": [
        (r(3, 6, 5), r(6), r(6), None, None, True, 0.1, 1e-5, False),
        (r(3, 6, 5, 4), None, None, r(6), r(6) + 4, False, 0.1, 1e-5, False),
    ],
    "layer_norm.*": [(X, [5]), (X, [6, 5], r(6, 5), r(6, 5) + 1, 1e-3)],
    "rms_norm.*": [(X, [5]), (X, [6, 5], r(6, 5), 1e-3)],
    "group_norm.*": [(r(3, 6, 5), 3), (r(3, 6, 4, 5), 2, r(6), r(6) + 1), (r(3, 6), 2)],
    # pointwise
    "prelu.*": [(X, r(6)), (X, r(1))],
    "glu.*": [(X, 0), (X, 1)],
    "clip.*": [(X, -0.5), (X, None, 0.5)],
    "_conj.*": [(torch.complex(X, X + 1),)],
    "polar.* complex.*": [(X, X + 1)],
    "masked_fill_.Tensor": [(X, X > 0, torch.tensor(0.5))],
    "where.ScalarSelf": [(X > 0, 0.5, X)],
    "where.ScalarOther": [(X > 0, X, 0.5)],
    "where.Scalar": [(X > 0, 0.5, 1.5)],
    "to.other": [(X, r(2))],
    "type_as.*": [(X, r(2))],
    "copy_.*": [(X, r(6, 1))],
    "masked_fill.Tensor": [(X, X > 0, torch.tensor(0.5))],
    "fill.Tensor": [(X, torch.tensor(0.5))],
    "floor_divide.Scalar": [(X, 0.3)],
    # distances and losses
    "cosine_similarity.*": [(X, X + r(6, 1)), (X, r(6, 5), -1), (X, r(4, 6, 1), 1)],
    "cdist.*": [(X, r(3, 5)), (X, r(4, 3, 5), 1.0), (r(30, 5), r(3, 5), math.inf)],
    "pdist.*": [(r(4, 5),), (r(4, 5), 1.0)],
    "dist.*": [(X, X + r(6, 1)), (X, -X, 3.0), (X, -X, 0)],
    "mse_loss.* huber_loss.* smooth_l1_loss.* soft_margin_loss.*": [(X, -X, k) for k in (0, 1, 2)],
    "binary_cross_entropy.*": [(X.sigmoid(), (-X).sigmoid(), r(5).abs(), k) for k in (0, 1, 2)],
    "binary_cross_entropy_with_logits.*": [
        (X, (-X).sigmoid(), r(6, 1).abs(), r(5).abs(), k) for k in (0, 1, 2)
    ],
    # positions
    "*quantile.scalar": [(X, 0.3, 1), (X, 0.7), (X, 0.3, 0, True)],
    "*quantile.default": [(X, n(0.3, 0.7), 1), (X, n(0.7)[0], 0, True)],
    "renorm.*": [(X, 2, 1, 0.5), (X, 1.5, 0, 1), (X, math.inf, 1, 0.5)],
    "linalg_cross.*": [(r(4, 3), r(4, 3) + r(3)), (r(3, 1, 4), r(3, 6, 4), {"dim": 0})],
    "bucketize.*": [(X, r(6).sort()[0])],
    "searchsorted.*": [(r(6).sort()[0], X), (X.sort()[0], r(4, 6, 3))],
    "isin.Tensor_Tensor": [(X.round(), X[0].round())],
    "isin.Tensor_Scalar": [(X.round(), 1)],
    "take.*": [(X, n([1, 7], [119, 0]))],
    "all.dims any.dims": [(X > 0, d, k) for d, k in (([0, 1], False), ([2], True))],
    "norm.*dtype": [(X, 2.0, [1], True, {"dtype": torch.float64})],
    "any.dim all.dim": [(X > 0, d, k) for d, k in ((0, False), (1, True), (2, False))],
    "any.* all.*": [(X > 0,)],
    "diff.*": [(X,), (X, 2, 0)],
    "mode.*": [(torch.round(X), 1)],
    # movement
    "view.* reshape.* _unsafe_view.*": [
        (X, s) for s in ([24, 5], [-1], [4, 2, 3, 5], [2, 2, 30], [4, 1, 6, 5])
    ],
    "view_as.* reshape_as.*": [(X, r(24, 5)), (X, r(4, 2, 3, 5))],
    "flatten.*": [(X,), (X, 1), (X, 0, 1)],
    "unflatten.*": [(X, 1, [2, 3]), (X, 0, [2, -1])],
    "permute.*": [(X, [2, 0, 1]), (X, [0, -1, 1])],
    "transpose.* swapaxes.* swapdims.*": [(X, 0, 2), (X, -1, 1)],
    "movedim.int": [(X, 0, 2), (X, -1, 0)],
    "movedim.intlist": [(X, [0, 1], [2, 0])],
    "t.* matrix_H.* numpy_T.*": [(r(4, 6),)],
    "as_strided.*": [(X, [4, 3, 5], [30, 5, 1]), (X, [2, 4], [1, 6], 3)],
    "squeeze.default": [(r(4, 1, 5),)],
    "squeeze.dim": [(r(4, 1, 5), 1), (X, 1)],
    "squeeze.dims": [(r(4, 1, 5, 1), [1, -1])],
    "unsqueeze.*": [(X, 1), (X, -1)],
    "expand.* broadcast_to.*": [(r(4, 1, 5), [4, 6, -1]), (r(6), [2, 3, 6])],
    "expand_as.*": [(r(4, 1, 5), X)],
    "repeat.*": [(X, [1, 2, 1]), (X, [3, 1, 1, 2]), (X[:, :1], [1, 3, 1]), (r(5), [3, 1])],
    "tile.*": [(X, [2]), (X, [3, 1, 1, 2]), (X[..., :1], [2])],
    "repeat_interleave.*": [(X, 3, 1)],
    "cat.* concat.*": [([X, r(4, 3, 5)], 1), ([r(0), r(4), r(3)],)],
    "stack.*": [([X, X + 1], 1), ([X, X + 1, X], -1)],
    "split.Tensor unsafe_split.Tensor": [(X, 2, 1), (X, 4, 1)],
    "*split_with_sizes.* split.sizes": [(X, [1, 2, 3], 1)],
    "chunk.* tensor_split.sections": [(X, 3, 1), (X, 2, -1)],
    "tensor_split.indices": [(X, [1, 4], 1)],
    "slice.*": [(X, 1, *some) for some in ((2, 5), (-4,), (0, 6), (None, None, 2), (6,))],
    "slice_scatter.*": [(X, r(4, 2, 5), 1, 1, 3), (X, r(4, 3, 5), 1, 0, 6, 2), (X, X + 1, 1)],
    "select.*": [(X, 1, 2), (r(4, 1), -1, 0)],
    "select_scatter.*": [(X, r(4, 5), 1, 2)],
    "unbind.*": [(X, 1)],
    "pixel_shuffle.*": [(r(2, 12, 3, 4), 2)],
    "pixel_unshuffle.*": [(r(2, 3, 4, 6), 2)],
    "channel_shuffle.* native_channel_shuffle.*": [(r(2, 6, 3, 4), 2)],
    "im2col.*": [(r(2, 3, 5, 6), [2, 3], [1, 1], [0, 1], [1, 1])],
    "col2im.*": [(r(2, 12, 9), [6, 6], [2, 2], [1, 1], [0, 0], [2, 2])],
    "unfold.*": [(X, 1, 2, 2)],
    "view_as_complex.*": [(r(4, 6, 2),)],
    "view_as_real.*": [(torch.complex(X, X + 1),)],
    "roll.*": [(X, [1]), (X, [1, 2], [1, 2])],
    "diagonal.*": [(X, 0, 1, 2), (X, 1, 0, 2), (r(4, 5, 5), 0, 2, 1)],
    "diag_embed.*": [(X,), (X, 0, 0, 2), (X, 1)],
    "rot90.*": [(X, 1, [1, 2])],
    # spatial
    "max_unpool2d.*": [(r(2, 3, 2, 2), CORNERS, [4, 4])],
    "max_unpool3d.*": [
        (r(2, 3, 2, 2, 2), CORNERS[..., None] + n(0, 1), [4, 4, 2], [2, 2, 1], [0] * 3)
    ],
    "fft_*freq.*": [(5,)],
    "*pad?d.*": lambda d: [(_images(d, 2, 3), [1, 2] * d)],
    "pad.* constant_pad_nd.*": PADS,
    "adaptive*pool?d.* _adaptive*pool?d.*": lambda d: [(_images(d, 2, 3), [2] * d)],
    "*pool?d*": lambda d: [(_images(d, 2, 3), [2] * d)],
    "*upsample_nearest*.vec": lambda d: [
        (_images(d, 2, 3), [4] * d, None),
        (_images(d, 2, 3), None, [2.0] * d),
    ],
    "*upsample*.vec": lambda d: [(_images(d, 2, 3), None, True, [2.0] * d)],
    "*upsample_nearest*.default": lambda d: [(_images(d, 2, 3), [4] * d)],
    "*upsample*.default": lambda d: [(_images(d, 2, 3), [4] * d, False)],
    "grid_sampler.* grid_sampler_2d.*": [(r(2, 3, 5, 6), r(2, 4, 3, 2) / 2, 0, 0, False)],
    "affine_grid_generator.*": [
        (r(2, 2, 3), [2, 4, 5, 6], False),
        (r(2, 3, 4), [2, 1, 4, 5, 6], True),
    ],
    "grid_sampler_3d.*": [(r(2, 3, 4, 5, 6), r(2, 4, 3, 2, 3) / 2, 0, 0, False)],
    "stft.*": [(r(3, 12), 4, 2, None, r(4), {"return_complex": k}) for k in (False, True)],
    "istft.*": [(torch.complex(r(2, 3, 7), r(2, 3, 7)), 4)],
    "fft_fftshift.* fft_ifftshift.*": [(X,), (X, [1])],
    "fft_ir*2.* fft_r*2.* fft_*2.*": [(X,), (X, None, [0, 1])],
    "fft_*n.*": [(X,), (X, None, [1])],
    "fft_*": [(X,), (X, None, 1), (X, 4, 0)],
    # lookup
    "embedding.*": [(r(7, 6), n([1, 6], [0, 3]))],
    "embedding_bag.default": [(r(7, 6), n(1, 6, 0, 3), n(0, 1), False, k) for k in (0, 1, 2)],
    "embedding_bag.padding_idx": [
        (r(7, 6), n(1, 6, 0, 3), n(0, 1), False, 0, False, None, False, 0)
    ],
    "index.*": [
        (X, [None, INDEX]),
        (X, [INDEX, n([0], [1]), None]),
        (X, [INDEX, None, n([0], [1])]),
    ],
    "index_select.*": [(X, 1, INDEX)],
    "gather.*": [(X, 1, torch.zeros(4, 2, 5, dtype=torch.long))],
    "scatter.value_reduce": [(*ELEMENTS[0], 0.5, {"reduce": "multiply"})],
    "scatter.value": [(*ELEMENTS[0], 0.5)],
    "scatter.reduce": [(*ELEMENTS[0], r(2, 6, 5), {"reduce": "add"})],
    "scatter.src scatter_add.*": [(*ELEMENTS[0], r(2, 6, 5))],
    "scatter_reduce.*": [(*ELEMENTS[0], r(2, 6, 5), "amax")],
    "index_add.*": [(X, 1, INDEX, r(4, 3, 5))],
    "index_copy.*": [(X, 1, n(2, 0, 4), r(4, 3, 5))],
    "index_reduce.*": [(X, 1, INDEX, r(4, 3, 5), "amax")],
    "index_fill.int_Tensor": [(X, 1, INDEX, torch.tensor(0.5))],
    "index_fill.*": [(X, 1, INDEX, 0.5)],
    "index_put.*": [
        *((X, [None, INDEX], r(4, 3, 5), True), (X, [INDEX, n(1, 0, 2)], r(5))),
        *((X, [mask], torch.tensor(2.0)) for mask in (X > 0, X[:, :, 0] > 0, X[:, 0, 0] > 0)),
    ],
    # random
    "empty_permuted.*": [([2, 3], [1, 0])],
    "empty_strided.*": [([2, 3], [1, 2])],
    "bernoulli.default": [(r(4, 6, 5).sigmoid(),)],
}


def _observed(shape: tuple[int, ...], dim: int | None, *flags: bool) -> tuple[Any, ...]:
    """What is quantized, in one range or in one for every index along ``dim``."""
    size = 1 if dim is None else shape[dim]
    low = r(size).abs().neg() if dim is not None else torch.tensor(-0.5)
    zero = torch.zeros(size, dtype=torch.int32)
    rest = 0.1, -8, 7, -1 if dim is None else dim, dim is not None
    return r(*shape), n(1), n(1), low, 1 - low, r(size).abs(), zero, *rest, *flags


_RANGES = r(6).abs() / 4 + 0.1, n(0, 1, 2, 0, 1, 2).int()
_OBSERVED = [
    _observed((4, 6, 5), None, False),
    _observed((6, 4, 5), 0, True),
    _observed((6, 4), 0, False),
]
EXAMPLES |= {
    "*fused_moving_avg_obs*": _OBSERVED,
    "fake_quantize_per_channel_affine.*": [
        (X, *_RANGES, 1, -8, 7),
        (r(6), *_RANGES, 0, 0, 15),
    ],
    "fake_quantize_per_tensor_affine.default": [(X, 0.1, 2, -8, 7)],
    "fake_quantize_per_tensor_affine.tensor_qparams": [(X, torch.tensor([0.1]), n(2).int(), -8, 7)],
    "_fake_quantize_learnable_per_tensor_affine.*": [
        (X, torch.tensor([0.1]), torch.tensor([2.0]), -8, 7, 0.3)
    ],
    "_fake_quantize_learnable_per_channel_affine.*": [
        (X, _RANGES[0], _RANGES[1].float(), 1, -8, 7, 0.3)
    ],
}
WITHOUT_VALUES = "zero_.* zeros_like.* empty_like.* zeros.* new_zeros.* empty*.* new_empty.*"


def matches(op: Any, names: str) -> bool:
    name = str(op).split(".", 1)[1]
    return any(fnmatch(name, some) for some in names.split())


def examples(op: Any) -> Iterator[Arguments]:
    for names, some in EXAMPLES.items():
        if matches(op, names):
            found = re.search(r"([123])d", str(op))
            for args in some(int(found[1])) if callable(some) else some:
                rest = args[-1] if isinstance(args[-1], dict) else {}
                yield args[: len(args) - bool(rest)], rest
            return
    yield from by_schema(op)


ROWS = {str(op): op for op in TABLE if op is not operator.getitem}


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    _check(ROWS[name])


def _check(op: Any) -> None:
    rule, given = rule_of(op), list(examples(op))
    assert rule is not None
    assert given, f"no example reaches {op}"
    torch.use_deterministic_algorithms("empty" in str(op))  # fills what is empty
    try:
        for args, kwargs in given:
            shapes = [shown(x) for x in pytree.tree_leaves((args, kwargs))]
            for static in ((), [False] + [True] * len(shapes), [True] * len(shapes)):
                trivial = matches(op, WITHOUT_VALUES)
                fault = check_rule(rule, op, args, kwargs, static, False, trivial)
                assert fault is None, f"{op} on {', '.join(shapes)}, {static}: {fault}"
    finally:
        torch.use_deterministic_algorithms(False)


def test_rows_by_name() -> None:
    """The op of a library has the rule of torch's own; it is run if this process has it."""
    assert {"transformers::grouped_mm_fallback": TABLE[torch.ops.aten._grouped_mm.default]} == NAMED
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        _check(torch.ops.transformers.grouped_mm_fallback.default)


def test_getitem() -> None:
    """It reads one of several results: those that the rule wrote, or that were spread again."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.stem(x).chunk(2, -1)
            return self.head(torch.cat([a * b, b.sort(-1)[0]], -1))

    report = gpdfx.expand(Halves(), 1.5, example_inputs=(r(3, 5),)).report()
    assert operator.getitem in TABLE
    assert {b.op for b in report.bridged} == {"aten.sort.default"}
    assert report.groups


@pytest.mark.parametrize(
    "name", ["relu_", "add_.Tensor", "mul.Tensor", "addcmul", "atan2_", "where.self"]
)
def test_pointwise_ops_by_their_tag(name: str) -> None:
    packet, _, overload = name.partition(".")
    _check(getattr(getattr(torch.ops.aten, packet), overload or "default"))


def test_how_many_rows_are_signatures() -> None:
    """The number that the table's docstring states."""
    assert f"Of the {len(TABLE)} rows {SIGNATURES} are signatures" in (rules.__doc__ or "")
