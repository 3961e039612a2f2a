"""Ops that multiply and add: linear, convolutions, matrix products, attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ...algebra.axes import product
from ...algebra.solver import Reason
from ...kernels import copies
from ..program import shape, value
from .base import Axes, Op, Rule, Writer, broadcast, student_sizes
from .signature import Signature, apply_share, infer, parse, sig, widen

aten = torch.ops.aten

_OPERANDS = ("input", "weight", "bias")
_GROUPS = (("g", "groups"),)


# --------------------------------------------------------------------------- convolutions
def _conv(pattern: str) -> Rule:
    """``s``, ``k`` and ``t`` in the pattern: the dimensions of image, kernel and result."""

    def signature(op: Op) -> Signature:
        s, k, t = _sliding(op)
        return parse(pattern.format(s=s, k=k, t=t))

    return Rule(
        lambda op: infer(signature(op), _OPERANDS, _GROUPS, op),
        lambda w: widen(signature(w.op), _OPERANDS, _GROUPS, w),
    )


def _sliding(op: Op) -> tuple[str, str, str]:
    """A kernel of one element that goes nowhere is a linear layer: any axis may stand there. As a
    pattern has one star, these are dimensions before and behind all that slide."""
    slides = [d for d, size in enumerate(shape(op["weight"])[2:]) if size > 1 or _moves(op, d)]
    names = [f"n{d}" for d in range(len(shape(op["weight"])) - 2)]
    before, behind = (names[: slides[0]], names[slides[-1] + 1 :]) if slides else (names, [])

    def around(star: str) -> str:
        return " ".join([*before, *([star] if slides else []), *behind])

    return around("*s"), "*k", around("*t")


def _moves(op: Op, d: int) -> bool:
    """True if a convolution strides or pads in a dimension."""
    for name, still in (("stride", 1), ("padding", 0), ("output_padding", 0)):
        given = op[name]
        by = given[min(d, len(given) - 1)] if isinstance(given, list | tuple) else given
        if by not in (still, None, "valid", "same"):  # to the same size: a kernel of one does
            return True
    return False


_CONV = _conv("b (g i) {s}, (g o) i {k}, (g o)? -> b (g o) {t}")
_TRANSPOSED = _conv("b (g i) {s}, (g i) o {k}, (g o)? -> b (g o) {t}")


# --------------------------------------------------------------------------- matmul and einsum
def _matmul_signature(op: Op) -> Signature:
    a, b = (len(op.axes(x)) for x in ("self", _second(op)))
    left, right = ("k", "m k", "... m k"), ("k", "k n", "... k n")
    result = {(1, 1): "", (1, 2): "n", (2, 1): "m", (1, 3): "... n", (3, 1): "... m"}
    shape = (min(a, 3), min(b, 3))
    out = result.get(shape, "... m n")
    return parse(f"{left[shape[0] - 1]}, {right[shape[1] - 1]} -> {out}")


def _second(op: Op) -> str:
    return next(name for name in ("other", "mat2", "vec", "tensor") if name in op.args)


def _matmul(op: Op) -> Any:
    result = infer(_matmul_signature(op), ("self", _second(op)), (), op)
    for axis in result[:-2]:  # heads, as a rule: the first to widen
        op.solver.mark(op.solver.outer, axis)
    return result


def _widen_matmul(w: Writer) -> fx.Node:
    return widen(_matmul_signature(w.op), ("self", _second(w.op)), (), w)


def _einsum_parts(op: Op) -> tuple[Signature, list[fx.Node]]:
    equation, operands = op["equation"].replace(" ", ""), op["tensors"]
    left, arrow, right = equation.partition("->")
    if not arrow:
        names = sorted(set(left) - set(",."))
        right = ("..." if "..." in left else "") + "".join(n for n in names if left.count(n) == 1)

    def spaced(part: str) -> str:
        return " ".join(part.replace("...", ".")).replace(".", "...")

    if any(len(set(p)) < len(p.replace("...", ".")) for p in left.split(",")):
        op.conflict("einsum takes a diagonal")
    return parse(", ".join(map(spaced, left.split(","))) + " -> " + spaced(right)), operands


def _einsum(op: Op) -> Any:
    signature, operands = _einsum_parts(op)
    op.args |= {f"operand{k}": x for k, x in enumerate(operands)}
    result = infer(signature, tuple(f"operand{k}" for k in range(len(operands))), (), op)
    everywhere = [n for n in op.env if all((n,) in dims for dims in signature.inputs)]
    for name in everywhere:  # batched: heads
        op.solver.mark(op.solver.outer, op.env[name])
    return result


def _widen_einsum(w: Writer) -> fx.Node:
    signature, operands = _einsum_parts(w.op)
    new = [w.map(x) for x in operands]
    outputs = {n for dim in signature.outputs[0] for n in dim}
    for name in signature.contracted:
        if w.wide(w.op.env[name]):
            holders = [k for k, dims in enumerate(signature.inputs) if (name,) in dims]
            weights = [k for k in holders if w.op.is_static(operands[k])]
            k = (weights or holders)[-1]
            rows = outputs if weights else set()
            new[k] = apply_share(w, new[k], operands[k], signature.inputs[k], name, rows)
    return w.copy(tensors=new)


# --------------------------------------------------------------------------- addmm and friends
def _add_product(operands: tuple[str, str], pattern: str) -> Rule:
    """``beta * self + alpha * (a @ b)``, where ``self`` broadcasts."""
    signature = parse(pattern)

    def infer_(op: Op) -> Any:
        result = infer(signature, operands, (), op)
        return broadcast(op, op.axes("self"), result)

    return Rule(infer_, lambda w: widen(signature, operands, (), w))


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
    return (*heads, env["q"], env["v"])


def _widen_attention(w: Writer) -> fx.Node:
    op = w.op
    changes: dict[str, Any] = {}
    if w.wide(op.env["e"]):
        changes["query"] = apply_share(w, w["query"], op["query"], _ATTENTION.inputs[0], "e", set())
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
    weights = w.call(aten.mul.Tensor, weights, w.spread(mask, axes, list(spread)))
    return w.call(copies.attend, weights, given["value"], bool(w.op["enable_gqa"]))


# --------------------------------------------------------------------------- mixtures of experts
_GROUPED = sig("s i, *e i o, *e? -> s o")  # rows by expert; offs says where each expert's end

NAMED = {"transformers::grouped_mm_fallback": _GROUPED}
"""Ops of libraries that may be absent, by name."""

# --------------------------------------------------------------------------- the table
TABLE: dict[Any, Rule] = {
    aten._grouped_mm.default: _GROUPED,
    aten.linear.default: sig("... i, o i, o? -> ... o"),
    aten.conv1d.default: _CONV,
    aten.conv2d.default: _CONV,
    aten.conv3d.default: _CONV,
    aten.conv1d.padding: _CONV,
    aten.conv2d.padding: _CONV,
    aten.conv3d.padding: _CONV,
    aten.conv_transpose1d.default: _TRANSPOSED,
    aten.conv_transpose2d.input: _TRANSPOSED,
    aten.conv_transpose3d.input: _TRANSPOSED,
    aten.matmul.default: Rule(_matmul, _widen_matmul),
    aten.mm.default: Rule(_matmul, _widen_matmul),
    aten.bmm.default: Rule(_matmul, _widen_matmul),
    aten.mv.default: Rule(_matmul, _widen_matmul),
    aten.dot.default: Rule(_matmul, _widen_matmul),
    aten.vdot.default: Rule(_matmul, _widen_matmul),
    aten.einsum.default: Rule(_einsum, _widen_einsum),
    aten.addmm.default: _add_product(("mat1", "mat2"), "m k, k n -> m n"),
    aten.addmv.default: _add_product(("mat", "vec"), "m k, k -> m"),
    aten.baddbmm.default: _add_product(("batch1", "batch2"), "b m k, b k n -> b m n"),
    aten.bilinear.default: sig("... i, ... j, o i j, o? -> ... o"),
    aten.scaled_dot_product_attention.default: Rule(_attention, _widen_attention),
}
