"""Ops on widened axes: spread a tensor to copies, narrow copies to one, weigh a contraction.

Notation: an axis has ``n`` student indices and ``w`` teacher indices; ``map`` (w,) says which
student index a teacher index stands for. All functions are differentiable plain torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def spread(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Copy a student-wide axis to the teacher's width: ``y[i] = x[index[i]]``; (n,) -> (w,)."""
    return x.index_select(dim, index)


def narrow(
    x: Tensor, dim: int, first: Tensor, rest: Tensor, owner: Tensor, copies: Tensor
) -> Tensor:
    """Merge copies, (w,) -> (n,): ``x_first + sum_i (x_i - x_first) / copies_i``.

    Bit-exact while copies are equal, unlike a weighted sum, and with gradient to all of them.
    ``first`` (n,): each student index's first copy; ``rest`` (w - n,): all other teacher indices,
    their student index ``owner`` and its number of ``copies``. Integers and booleans take the
    first copy.
    """
    head = x.index_select(dim, first)
    if not (x.is_floating_point() or x.is_complex()):
        return head
    delta = x.index_select(dim, rest) - head.index_select(dim, owner)
    if x.is_floating_point():  # -inf - -inf, as in attention masks, is no difference
        delta = delta.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    return head.index_add(dim, owner, delta * _reciprocal(copies, delta, x.ndim - dim - 1))


def narrow_turns(x: Tensor, dim: int, outer: int, wide: int, narrow: int) -> Tensor:
    """``narrow`` where copies come in turn in each of the ``outer`` blocks, for finite numbers: a
    running mean, which takes an op for each copy."""
    mean, *others = x.unflatten(dim, (outer, wide // narrow, narrow)).unbind(dim + 1)
    for k, part in enumerate(others if x.is_floating_point() or x.is_complex() else ()):
        mean = mean.lerp(part, 1 / (k + 2))
    merged: Tensor = mean.flatten(dim, dim + 1)
    return merged


def _reciprocal(copies: Tensor, like: Tensor, right: int = 0) -> Tensor:
    """1 / copies, with ``right`` dimensions of one after it. Counts are stored, not quotients:
    they are exact in every dtype that the teacher may be moved to."""
    dtype = like.real.dtype if like.is_complex() else like.dtype
    one_over: Tensor = torch.reciprocal(copies.to(dtype))
    for _ in range(right):
        one_over = one_over.unsqueeze(-1)
    return one_over


def share(
    x: Tensor,
    table: Tensor,
    classes: Tensor,
    at: int,
    dim: int = 0,
    split: list[int] | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply a contracted axis by its shares, so that copies count once.

    ``table``: small, one number per (row and) share class, broadcasting against ``x`` once its
    dimension ``at`` is expanded by ``classes`` (one for every run of teacher indices). An integer
    table holds the number of copies: uniform shares. ``split``: the sizes into which dimension
    ``dim`` of ``x`` is split first, so that runs, or a factor of it, have their own dimension.
    ``out``: of the shape of ``x``, which it may be.
    """
    table = table.to(x.dtype) if table.is_floating_point() else _reciprocal(table, x)
    shares = table.index_select(at, classes)
    parts = x if split is None else x.unflatten(dim, split)
    if out is x:
        parts.mul_(shares)
        return x
    if out is not None:
        torch.mul(parts, shares, out=out if split is None else out.unflatten(dim, split))
        return out
    product: Tensor = parts * shares
    return product if split is None else product.flatten(dim, dim + len(split) - 1)


def dropout_mask(
    like: Tensor, shape: list[int], draw: str, p: float, orders: list[list[int]] | None
) -> Tensor:
    """One dropout mask (zeros and 1 / (1 - p)), drawn at the student's shape and in its memory
    order (``orders``: dimensions from the outermost, the last for float64; None: as they stand), in
    which random numbers are dealt out."""
    order = _order(like, orders or [list(range(len(shape)))])
    ones = torch.empty_permuted(shape, order, dtype=like.dtype, device=like.device).fill_(1)
    return _DROPOUT[draw](ones, p, True)


def in_order(x: Tensor, orders: list[list[int]]) -> Tensor:
    """The same values in a given memory order (``orders``: the last for float64)."""
    order = _order(x, orders)
    return torch.empty_permuted(x.shape, order, dtype=x.dtype, device=x.device).copy_(x)


def _order(x: Tensor, orders: list[list[int]]) -> list[int]:
    return orders[-1 if x.dtype is torch.float64 else 0]


_DROPOUT = {"dropout": torch.dropout, "feature_dropout": torch.feature_dropout}


def average(x: Tensor, dims: list[int], copies: Tensor, gain: float, keepdim: bool) -> Tensor:
    """Mean over ``dims`` in which every student index weighs the same.

    ``copies`` broadcasts against ``x``; ``gain``: teacher indices per student index on average.
    """
    return (x * (_reciprocal(copies, x) * gain)).mean(dims, keepdim=keepdim)


def weight_norm(v: Tensor, g: Tensor, dims: list[int], copies: Tensor) -> Tensor:
    """``g * v / |v|`` with the student's norm over ``dims`` (Salimans and Kingma, 2016)."""
    square = v.square() * _reciprocal(copies, v)
    return v * (g / square.sum(dims, keepdim=True).sqrt())


def variance(
    x: Tensor,
    dims: list[int],
    copies: Tensor,
    gain: float,
    correction: float,
    keepdim: bool,
    root: bool,
    mean: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The student's variance (``root``: standard deviation; ``mean``: and mean) over ``dims``:
    the biased one times n / (n - correction), n the student's number of indices."""
    center = average(x, dims, copies, gain, keepdim=True)
    biased = average((x - center) ** 2, dims, copies, gain, keepdim)
    n = math.prod(x.shape[d] for d in dims) / gain
    result = biased * (n / (n - correction) if n > correction else math.nan)
    if root:  # a deviation of zero has the gradient zero, as in torch.std, not infinity
        zero = result == 0
        result = result.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
    return (result, center if keepdim else center.squeeze(dims)) if mean else result


def attention_weights(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, gqa: bool, scale: float | None
) -> Tensor:
    """``softmax(q k^T scale + mask)``, (..., q, k), as ``scaled_dot_product_attention`` has it."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3) if gqa else k
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    masked = (scores == -torch.inf).all(-1, keepdim=True)  # entirely: such a row attends to nothing
    return scores.softmax(-1).masked_fill(masked, 0)


def attend(weights: Tensor, v: Tensor, gqa: bool) -> Tensor:
    """``weights @ v``, heads of ``v`` repeated where several query heads share them."""
    return weights @ (v.repeat_interleave(weights.shape[-3] // v.shape[-3], -3) if gqa else v)


def log_share(x: Tensor, copies: Tensor) -> Tensor:
    """``x + log(1 / copies)``: what ``logsumexp`` adds up then counts every student index once."""
    return x + _reciprocal(copies, x).log()


def root_share(x: Tensor, copies: Tensor, p: float) -> Tensor:
    """Scale an axis that a vector p-norm contracts: ``x * (1 / copies) ** (1 / p)``."""
    return x * _reciprocal(copies, x) ** (1.0 / p)


def softmax(x: Tensor, dim: int, copies: Tensor, log: bool = False) -> Tensor:
    """Softmax over a widened axis, each copy with the student's full probability:
    ``softmax(x + log(share)) / share`` with share = 1 / copies, ``copies`` (w,)."""
    share = _reciprocal(copies, x, x.ndim - dim - 1)
    if log:
        return torch.log_softmax(x + share.log(), dim) - share.log()
    return torch.softmax(x + share.log(), dim) / share


def standardize(
    x: Tensor, dims: list[int], copies: Tensor, gain: float, eps: float | None, center: bool
) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` over ``dims`` as the student's statistics would be.

    Without ``center``, by the root mean square (RMSNorm); ``eps=None`` is the dtype's own. Half
    types are computed in float32, as PyTorch's own norms do.
    """
    y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if center:
        y = y - average(y, dims, copies, gain, keepdim=True)
    variance = average(y * y, dims, copies, gain, keepdim=True)
    eps = torch.finfo(y.dtype).eps if eps is None else eps
    return (y * torch.rsqrt(variance + eps)).to(x.dtype)
