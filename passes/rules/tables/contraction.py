"""Ops that multiply and add: linear, convolutions, matrix products, attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ....algebra.axes import product
from ....algebra.solver import Reason
from ....kernels import copies
from ...program import shape, value
from ..op import Axes, Op, broadcast
from ..signature import Signature, apply_share, by, infer, layout, parse, rows, shared, sig
from ..writer import Rule, Writer, student_sizes


# --------------------------------------------------------------------------- convolutions
def _conv(plain: str, transposed: str = "") -> Rule:
    """``{s}`` and ``{t}`` in the pattern: the dimensions of image and result along which a kernel
    slides. A kernel of one element that goes nowhere is a linear layer: any axis may stand there.
    As a pattern has one star, these are dimensions before and behind all that slide."""

    def choose(op: Op) -> Signature:
        kernel = shape(op["weight"])[2:]
        slides = [d for d, size in enumerate(kernel) if size > 1 or _moves(op, d)]
        names = [f"n{d}" for d in range(len(kernel))]
        before, behind = (names[: slides[0]], names[slides[-1] + 1 :]) if slides else (names, [])
        pattern = transposed if op["transposed"] else plain
        stars = {x: " ".join([*before, *([f"*{x}"] if slides else []), *behind]) for x in "st"}
        return parse(pattern.format(**stars))

    return by(choose, "input weight bias", g="groups")


def _moves(op: Op, d: int) -> bool:
    """True if a convolution strides or pads in a dimension."""
    for name, still in (("stride", 1), ("padding", 0), ("output_padding", 0)):
        given = op[name]
        step = given[min(d, len(given) - 1)] if isinstance(given, list | tuple) else given
        if step not in (still, None, "valid", "same"):  # to the same size: a kernel of one does
            return True
    return False


# --------------------------------------------------------------------------- sums of products
def _einsum(op: Op) -> Any:
    equation = op["equation"].replace(" ", "")
    left, arrow, right = equation.partition("->")
    if not arrow:
        names = sorted(set(left) - set(",."))
        right = ("..." if "..." in left else "") + "".join(n for n in names if left.count(n) == 1)
    operands = left.split(",")
    if any(len(set(p)) < len(p.replace("...", ".")) for p in operands):
        op.conflict("einsum takes a diagonal")
    everywhere = set.intersection(*map(set, operands)) - {"."}  # batched: heads
    tensors = {f"operand{k}": x for k, x in enumerate(op["tensors"])}
    op.args |= tensors

    def spaced(part: str) -> str:
        words = " ".join(part.replace("...", ".")).split()
        return " ".join("..." if n == "." else n + "^" * (n in everywhere) for n in words)

    signature = parse(", ".join(map(spaced, operands)) + " -> " + spaced(right))
    return infer(op, signature, list(tensors), {})


def _widen_einsum(w: Writer) -> fx.Node:
    changes = shared(w)
    return w.copy(tensors=[changes.get(name, w[name]) for name in w.op.match.given])


def _added(operands: str, result: str, names: str) -> Rule:
    """``beta * self + alpha * (a @ b)``, where ``self`` broadcasts: it may lack leading axes."""
    axes = result.split()
    forms = [f"{operands}, {' '.join(axes[k:])} -> {result}" for k in range(len(axes) + 1)]
    return sig(" | ".join(forms), f"{names} self")


# --------------------------------------------------------------------------- matrices
def _solve(op: Op) -> Signature:
    """``A x = b`` with one right side or several, or ``X A = B``. A square matrix may have rows and
    columns that widen apart; the op sees both at the student's width."""
    matrix, right = (shape(op[name]) for name in ("A", "B"))
    if not op["left"]:
        return parse("... j! i!, ... k i! -> ... k j")
    one = right == matrix[:-1] or len(right) == 1
    return parse("... i! j!, ... i! -> ... j" if one else _SEVERAL)


_SEVERAL = "... i! j!, ... i! k -> ... j k"


# --------------------------------------------------------------------------- attention
_ATTENTION = parse("... q e, ... k e, ... k v -> ... q v")
_QKV = ("query", "key", "value")


def _attention(op: Op) -> Any:
    env = op.env
    q, k, v = (op.axes(x) for x in _QKV)
    heads = broadcast(op, k[:-2], v[:-2])
    if op["enable_gqa"]:  # every key and value head serves as many query heads in a row
        times = op.fixed(q[-3].size // heads[-1].size, "repeated")
        heads = (*heads[:-1], product(heads[-1], times))
    heads = broadcast(op, q[:-2], heads)
    env["q"], env["e"], env["v"] = q[-2], op.unify(q[-1], k[-1]), v[-1]
    env["k"] = op.unify(k[-2], v[-2])
    for axis in heads:
        op.solver.mark(op.solver.outer, axis)
    for name in ("e", "k"):
        op.solver.mark(op.solver.contracted, env[name])
    op.solver.mark(op.solver.inner, env["k"], Reason("positions", op.where))
    if op["attn_mask"] is not None:
        broadcast(op, op.axes("attn_mask"), (*heads, env["q"], env["k"]))
    result = (*heads, env["q"], env["v"])
    if op["is_causal"]:
        for name, length in zip(_QKV, "qkk", strict=True):
            d = len(op.axes(name)) - 2
            out = len(result) - 2 if length == "q" else None
            if op.hold(op[name], d, "later positions are masked", out):
                env[length] = op.fixed(env[length].size)
    return result


def _widen_attention(w: Writer) -> fx.Node:
    op = w.op
    changes: dict[str, Any] = {}
    if w.wide(op.env["e"]):
        places = layout(_ATTENTION.inputs[0], len(op.axes("query")))
        changes["query"] = apply_share(w, w["query"], op["query"], places, "e", set())
        if op["scale"] is None:
            changes["scale"] = 1.0 / math.sqrt(w.frozen(op.env["e"]).student)
    if not w.frozen(op.env["k"]).even:  # uneven copies of a key would get uneven attention
        for name, back in (("key", 2), ("value", 2), ("attn_mask", 1)):
            x = op[name]
            if x is not None and (axes := op.axes(x))[-back].size != 1:
                changes[name] = w.narrow(w[name], axes, [len(axes) - back])
    result = w.target.axes[op.node]
    weights = (*result[:-2], op.env["q"], op.env["k"])
    if op["dropout_p"] and not w.target.independent and any(map(w.wide, weights)):
        return _widen_attention_dropout(w, weights, changes)
    return w.copy(**changes)


def _widen_attention_dropout(w: Writer, axes: Axes, changes: dict[str, Any]) -> fx.Node:
    """Attention spelled out, its mask drawn at the student's shape."""
    given = {name: changes.get(name, w[name]) for name in (*_QKV, "attn_mask", "scale")}
    even = w.frozen(w.op.env["k"]).even
    weights = w.call(
        copies.attention_weights,
        *(given[name] for name in ("query", "key", "attn_mask")),
        *(bool(w.op[name]) for name in ("is_causal", "enable_gqa")),
        given["scale"],
    )
    out = value(w.op.node).shape
    free = [*out[:-1], value(w.op["key"]).shape[-2]]
    sizes = student_sizes(w, weights, axes, free)
    mask = w.call(copies.dropout_mask, weights, sizes, "dropout", w.op["dropout_p"], None)
    spread = range(len(axes) if even else len(axes) - 1)
    weights = w.call(torch.ops.aten.mul.Tensor, weights, w.spread(mask, axes, list(spread)))
    return w.call(copies.attend, weights, given["value"], bool(w.op["enable_gqa"]))


# --------------------------------------------------------------------------- the table
_CONV = "b (g i) {s}, (g o) i *k, (g o)? -> b (g o) {t}"
_TRANSPOSED = "b (g i) {s}, (g i) o *k, (g o)? -> b (g o) {t}"
_EXPERTS = sig("s! i, *e i o, *e? -> s o")  # rows by expert; offs says where each expert's end
NAMED = {"transformers::grouped_mm_fallback": _EXPERTS}
"""Ops of libraries that may be absent, by name."""

TABLE: dict[Any, Rule] = rows(
    {
        "linear": "... i, o i, o? -> ... o",
        "conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding": _conv(_CONV),
        "convolution": _conv(_CONV, _TRANSPOSED),
        "conv_tbc": "*t b i, *k i o, o -> *u b o",
        "conv_transpose1d conv_transpose2d.input conv_transpose3d.input": _conv(_TRANSPOSED),
        "mm": "m k, k n -> m n",
        "bmm": "b^ m k, b k n -> b m n",
        "mv": "m k, k -> m",
        "dot vdot": "k, k ->",
        "matmul": (
            "k, k -> | k, ... k n -> ... n | ... m k, k -> ... m | ...^ m k, ... k n -> ... m n"
        ),
        "addmm": _added("m k, k n", "m n", "mat1 mat2"),
        "addmv": _added("m k, k", "m", "mat vec"),
        "baddbmm": _added("b m k, b k n", "b m n", "batch1 batch2"),
        "addbmm": _added("b m k, b k n", "m n", "batch1 batch2"),
        "addr": _added("m, n", "m n", "vec1 vec2"),
        "einsum": Rule(_einsum, _widen_einsum),
        "bilinear": "... i, ... j, o i j, o? -> ... o",
        "scaled_dot_product_attention": Rule(_attention, _widen_attention),
        "_grouped_mm": _EXPERTS,
        "linalg_inv inverse": "... i! j! -> ... j i",
        "linalg_inv_ex": "... i! j! -> ... j i, ...",
        "linalg_cholesky matrix_exp linalg_matrix_exp matrix_power linalg_matrix_power tril triu": (
            "... i! j! -> ... i j"
        ),
        "linalg_cholesky_ex": "... i! j! -> ... i j, ...",
        "linalg_det det logdet": "... i! j! -> ...",
        "linalg_slogdet slogdet": "... i! j! -> ..., ...",
        "trace": "i! j! ->",
        "linalg_solve": by(_solve, "A B"),
        "linalg_solve_triangular": by(
            lambda op: parse(_SEVERAL if op["left"] else "... j! i!, ... k i! -> ... k j"), "self B"
        ),
        "cholesky_solve": sig(_SEVERAL, "input2 self"),
    }
)
