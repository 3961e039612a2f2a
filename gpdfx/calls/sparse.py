"""Sparse tensors: an adjacency, as a rule, which is data and never widens.

At the boundary one is three dense tensors: where its values stand, in the order of its layout, the
values, and an empty tensor that has its size. Tensors without data cannot be sparse; so while a
network is traced one is a ``Sparse``, whose products are spelled out in its parts: rows of the
other operand are taken, weighted and added up, whatever their width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..torch_private import in_transform, is_fake, version, wrapper

COO, CSR, CSC = torch.sparse_coo, torch.sparse_csr, torch.sparse_csc
LAYOUTS = {"sparse_coo": COO, "sparse_csr": CSR, "sparse_csc": CSC}
NAMES = ("indices", "values", "size")
"""What the parts of one are called."""


def is_sparse(x: Any) -> bool:
    """Whether it is a tensor that is taken apart."""
    return isinstance(x, Tensor) and x.layout in (COO, CSR, CSC)


def is_size(part: Tensor) -> bool:
    """Whether it only holds the size of a sparse tensor; it is another one whenever asked for."""
    return part.dtype == torch.bool and part.ndim > 1 and part.shape[0] == 0


def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (dimensions x entries), values, and the size, behind a dimension of nothing."""
    size = torch.empty((0, *x.shape), dtype=torch.bool, device=x.device)
    if isinstance(x, Sparse):
        return x.at, x.of, size
    if x.layout == COO:
        x = x.coalesce()
        return x.indices(), x.values(), size
    if x.layout == CSR:
        columns = x.col_indices()
        at = torch.stack([_expanded(x.crow_indices(), columns), columns])
    else:
        rows = x.row_indices()
        at = torch.stack([rows, _expanded(x.ccol_indices(), rows)])
    return at, x.values(), size


def made(layout: torch.layout, inside: list[Tensor]) -> Tensor:
    """A sparse tensor of its parts, which may be repeated or cut: entries are put in order, those
    outside of the size are left out, and none is added to another."""
    at, of, size = inside
    shape = tuple(size.shape[1:])
    if at.shape[0] != len(shape):  # while it is traced, this is known from then on
        raise ValueError(f"a sparse tensor of {len(shape)} dimensions has {at.shape[0]} indices")
    if is_fake(of):
        return Sparse(layout, at, of, shape, ordered=True)
    inner = (at < torch.tensor(shape, device=at.device)[:, None]).all(0)
    if not bool(inner.all()):
        at, of = at[:, inner], of[inner]
    order = _order(at, layout)
    at, of = at[:, order], of[order]
    if layout == COO:
        return torch.sparse_coo_tensor(at, of, shape, is_coalesced=True, check_invariants=False)
    major = int(layout == CSC)
    ends = _ends(at[major], shape[major])
    return torch.sparse_compressed_tensor(
        ends, at[1 - major], of, shape, layout=layout, check_invariants=False
    )


def _order(at: Tensor, layout: torch.layout = COO) -> Tensor:
    """Which entry comes first, second, ... in a layout."""
    order = torch.arange(at.shape[1], device=at.device)
    for row in at.unbind() if layout == CSC else at.unbind()[::-1]:  # the last one decides
        order = order[torch.argsort(row[order], stable=True)]
    return order


def _expanded(ends: Tensor, others: Tensor) -> Tensor:
    """Compressed rows as one number for each entry."""
    places = torch.arange(others.shape[0], dtype=ends.dtype, device=ends.device)
    return (torch.searchsorted(ends, places, right=True) - 1).to(ends.dtype)


def _ends(rows: Tensor, count: Any) -> Tensor:
    """The inverse of ``_expanded``, for rows in order."""
    bounds = torch.arange(count + 1, dtype=rows.dtype, device=rows.device)
    return torch.searchsorted(rows.contiguous(), bounds).to(rows.dtype)


# --------------------------------------------------------------------------- while it is traced
class Sparse(Tensor):
    """A sparse tensor without data: values ``of`` entries ``at`` places. ``ordered``: they are in
    the order of the layout, and distinct; ``distinct``: they are that."""

    at: Tensor
    of: Tensor
    kind: torch.layout
    full: torch.Size
    ordered: bool
    distinct: bool

    @staticmethod
    def __new__(
        cls,
        kind: torch.layout,
        at: Tensor,
        of: Tensor,
        full: tuple[Any, ...],
        ordered: bool = False,
        distinct: bool = False,
    ) -> Sparse:
        """Its shape is told by us, not by what it wraps."""
        x: Sparse = wrapper(cls, full, of)
        vars(x).update(at=at, of=of, kind=kind, full=torch.Size(full))
        vars(x).update(ordered=ordered, distinct=ordered or distinct)
        return x

    def with_(self, of: Tensor) -> Sparse:
        """Other values in the same places."""
        return Sparse(self.kind, self.at, of, self.full, self.ordered, self.distinct)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        if name in _SEVERAL:
            return _SEVERAL[name](*args, **(kwargs or {}))
        self = args[0]
        if isinstance(self, Sparse):
            if name in _OWN:
                return _OWN[name](*args, **(kwargs or {}))
            if name in _VALUES and not any(isinstance(y, Sparse) for y in args[1:]):
                return self.with_(func(self.of, *args[1:], **(kwargs or {})))
            if name in _SCALES and len(args) == 2 and not isinstance(args[1], Sparse):
                return self.with_(func(self.of, _beside(self, args[1])))
        raise NotImplementedError(f"no graph can say {name} of a sparse tensor")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} of a sparse tensor")


def _times(a: Sparse, x: Tensor) -> Tensor:
    row, column = a.at.unbind()
    taken = x.index_select(0, column)
    taken = taken * a.of.reshape(-1, *[1] * (x.ndim - 1))
    zeros: Tensor = taken.new_zeros((a.full[0], *x.shape[1:]))
    return zeros.index_add(0, row, taken)


def _turned(a: Sparse) -> Sparse:
    kind = {CSR: CSC, CSC: CSR}.get(a.kind, COO)
    turned = Sparse(kind, a.at.flip(0), a.of, (a.full[1], a.full[0]), distinct=a.distinct)
    turned.ordered = a.ordered and kind != COO
    return turned


def _product(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    """Of a sparse matrix and a dense one, or a vector, in any order."""
    if isinstance(a, Sparse) and isinstance(b, Sparse):
        raise NotImplementedError(
            "a product of two sparse tensors has as many entries as values say"
        )
    if isinstance(a, Sparse) and len(a.full) == 2 and b.ndim < 3 and not rest:
        return _times(a, b)
    if isinstance(b, Sparse) and len(b.full) == 2 and a.ndim < 3 and not rest:
        turned = _times(_turned(b), a.t())
        return turned.t() if a.ndim == 2 else turned
    raise NotImplementedError("a product of a sparse tensor with a batch, or a reduction")


def _added(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    added: Tensor = beta * bias + alpha * _product(a, b)
    return added


def _coalesced(a: Sparse) -> Sparse:
    if a.ordered:
        return a
    if not a.distinct:
        raise NotImplementedError("how many entries coalesce leaves depends on values")
    order = _order(a.at, a.kind)
    return Sparse(a.kind, a.at[:, order], a.of[order], a.full, ordered=True)


def _sum(a: Sparse, dim: Any = None, **options: Any) -> Tensor:
    """Along one dimension of several, or all of them."""
    if options or (isinstance(dim, list | tuple) and len(dim) != 1) or a.kind != COO:
        raise NotImplementedError("sum of a sparse tensor, with options")
    if dim is None:
        return a.of.sum()
    gone = (dim[0] if isinstance(dim, list | tuple) else dim) % len(a.full)
    kept = [d for d in range(len(a.full)) if d != gone]
    return Sparse(COO, a.at[kept], a.of, tuple(a.full[d] for d in kept))


def _dense(a: Sparse) -> Tensor:
    zeros: Tensor = a.of.new_zeros(tuple(a.full))
    return zeros.index_put(a.at.long().unbind(), a.of, accumulate=True)


def _beside(a: Sparse, other: Any) -> Any:
    """What every value of one meets in a dense tensor of its size."""
    if not isinstance(other, Tensor) or other.ndim == 0:
        return other
    return other.expand(tuple(a.full))[a.at.long().unbind()]


def _compressed(layout: torch.layout, part: int) -> Callable[[Sparse], Tensor]:
    """The ends of its rows (or columns), or the number of the other dimension of every entry."""
    major = int(layout == CSC)

    def read(a: Sparse) -> Tensor:
        if a.kind != layout:
            raise NotImplementedError(f"indices of {layout}, of a tensor that is {a.kind}")
        a = _coalesced(a)
        return a.at[1 - major] if part else _ends(a.at[major], a.full[major])

    return read


def _in_layout(layout: torch.layout) -> Callable[[Sparse], Sparse]:
    def turned(a: Sparse) -> Sparse:
        if a.kind == layout:
            return a
        return _coalesced(Sparse(layout, a.at, a.of, a.full, distinct=a.distinct))

    return turned


def _size(a: Sparse, dim: int | None = None) -> Any:
    return a.full if dim is None else a.full[dim]


_SEVERAL: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("mm", "matmul", "__matmul__", "spmm", "_sparse_mm", "mv"), _product),
    "__rmatmul__": lambda a, b: _product(b, a),
    "addmm": _added,
}
"""Calls in which it may stand first or second."""
_OWN: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("shape", "size"), _size),
    **dict.fromkeys(("ndim", "dim"), lambda a: len(a.full)),
    "__len__": lambda a: a.full[0],
    "dtype": lambda a: a.of.dtype,
    "device": lambda a: a.of.device,
    "layout": lambda a: a.kind,
    "requires_grad": lambda a: a.of.requires_grad,
    "is_floating_point": lambda a: a.of.is_floating_point(),
    "is_complex": lambda a: a.of.is_complex(),
    "is_cuda": lambda a: a.of.is_cuda,
    "is_nested": lambda a: False,
    "is_quantized": lambda a: False,
    "is_meta": lambda a: False,
    "is_sparse": lambda a: a.kind == COO,
    "is_sparse_csr": lambda a: a.kind == CSR,
    "is_coalesced": lambda a: a.ordered,
    "_version": lambda a: version(a.of),
    "numel": lambda a: a.full.numel(),
    "_nnz": lambda a: a.of.shape[0],
    "sparse_dim": lambda a: len(a.full),
    "dense_dim": lambda a: 0,
    "coalesce": _coalesced,
    **dict.fromkeys(("indices", "_indices"), lambda a: a.at),
    "values": lambda a: a.of,
    "_values": lambda a: a.of.detach(),
    "crow_indices": _compressed(CSR, 0),
    "col_indices": _compressed(CSR, 1),
    "ccol_indices": _compressed(CSC, 0),
    "row_indices": _compressed(CSC, 1),
    **dict.fromkeys(("t", "T", "mT"), _turned),
    "transpose": lambda a, x, y: a if x % 2 == y % 2 else _turned(a),
    "to_dense": _dense,
    **dict.fromkeys(("to_sparse_coo", "to_sparse"), _in_layout(COO)),
    "to_sparse_csr": _in_layout(CSR),
    "to_sparse_csc": _in_layout(CSC),
    **dict.fromkeys(("sum", "_sparse_sum"), _sum),
}
_CASTS = frozenset(("to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu"))
_VALUES = _CASTS | {"clone", "detach", "requires_grad_", "neg", "__neg__", "abs", "sqrt", "relu"}
"""What is done to its values alone."""
_SCALES = frozenset(("mul", "multiply", "__mul__", "__rmul__", "div", "true_divide", "__truediv__"))


class SparseTensors(TorchFunctionMode):
    """While it lasts, what makes a sparse tensor of tensors without data makes a ``Sparse``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = _MAKERS.get(getattr(func, "__name__", ""))
        if not count or in_transform() or not any(map(is_fake, args[:count])):
            return func(*args, **kwargs)
        *at, of = args[:count]
        full = args[count] if len(args) > count else kwargs.get("size")
        if full is None:
            raise NotImplementedError(
                "a sparse tensor without a size has one that depends on values"
            )
        layout = kwargs.get("layout", _LAYOUTS.get(func.__name__))
        of = of.to(kwargs["dtype"]) if kwargs.get("dtype") else of
        if layout == COO:
            ordered = bool(kwargs.get("is_coalesced"))
            return Sparse(COO, at[0], of, tuple(full), ordered)
        if layout not in (CSR, CSC):
            raise NotImplementedError(f"forward makes a {layout} tensor")
        rows = [_expanded(*at), at[1]]
        places = torch.stack(rows if layout == CSR else rows[::-1])
        return Sparse(layout, places, of, tuple(full), ordered=True)


_LAYOUTS = {f"{name}_tensor": layout for name, layout in LAYOUTS.items()}
_MAKERS = {**dict.fromkeys(_LAYOUTS, 3), "sparse_compressed_tensor": 3, "sparse_coo_tensor": 2}
"""Name -> how many tensors it is made of."""
