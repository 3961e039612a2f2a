"""From tensors to tables to launches of the Triton kernels."""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...branches.kinds import Average, Branch, Frequency, Full, LowRank, Product, Separable
from ...branches.layer import Layer
from ...torch_private import version
from ..copies import share
from . import triton_kernels as k
from .formula import some
from .reference import room
from .site import Site, load

BLOCK = 128
ROWS, SPLITS = 16, 64
"""Inputs of a program that sums a depthwise kernel's gradient, and rows that it sums over."""
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
Row = list[int]


def column(name: str) -> int:
    """Where a number stands in a layer's row."""
    found: int = getattr(k, name).value
    return found


# --------------------------------------------------------------------------- of one layer
class Layout:
    """The operands of one layer as the kernels want them, and the row that describes them."""

    def __init__(self, site: Site, tensors: Sequence[Tensor], made: torch.dtype) -> None:
        layer = self.layer = site.layer
        self.site, self.made = site, made
        self.row: Row = [0] * column("WIDTH")
        self.held: list[Tensor] = []  # what a pointer points to must live until the launch
        self.tensors = [t.detach() for t in tensors]
        self.origin = self.tensors[0]
        groups, outputs, inputs = layer.shape[:3]
        self.taps = math.prod(layer.kernel)
        self.put("OUTPUTS", outputs, inputs, self.taps)
        self.put("CHANNELS", layer.channels)
        self.put("ORIGIN", self.pointer(self.origin))
        if not site.unbranched:
            self.put("SCALES", self.pointer(self.tensors[1].contiguous()))
        self.put("MAIN", *load(layer, self.origin).stride())
        cut = site.cut
        for letter, size in zip("goi", (groups, outputs, inputs), strict=True):
            wide, narrow = (size, size) if cut is None else getattr(cut, letter)[1:]
            self.put(f"CUT_{letter.upper()}", wide, narrow)
        self.left: Tensor | None = None
        self.slots: list[tuple[int, str]] = []  # of the branches' weights: place, column of grads
        self.filters = self.fulls = 0
        at = site.first
        for number, (branch, names) in enumerate(zip(site.branches, site.names, strict=True), 1):
            own = dict(zip(names, range(at, at + len(names)), strict=True))
            self.add(branch, number, own)
            at += len(names)

    def put(self, name: str, *values: int) -> None:
        start = column(name)
        self.row[start : start + len(values)] = values

    def pointer(self, x: Tensor) -> int:
        self.held.append(x)
        return x.data_ptr()

    def dense(self, place: int) -> Tensor:
        """A branch's tensor in its plain order."""
        self.tensors[place] = self.tensors[place].contiguous()
        return self.tensors[place]

    def add(self, branch: Branch, number: int, own: dict[str, int]) -> None:
        """The columns of one branch, whose scales are row ``number``."""
        if isinstance(branch, Full):
            self.put_slot("FULL", self.fulls, 2, self.pointer(self.dense(own["weight"])), number)
            self.slots.append((own["weight"], f"D_FULL{self.fulls}"))
            self.fulls += 1
        elif isinstance(branch, Product | LowRank):
            residual = isinstance(branch, Product)
            first, second = ("first", "second") if residual else ("down", "up")
            self.products = own[first], own[second]
            left = self.tensors[own[second]]
            self.left = left.flatten(3) if residual else left.unsqueeze(3)
            self.first = self.dense(own[first])
            hidden = self.hidden = self.first.shape[1]
            self.put("HIDDEN", hidden)
            self.put("MADE_SCALE", number)
            rows = self.left.reshape(self.layer.channels, hidden, self.taps)
            self.put("LEFT", self.pointer(rows), *rows.stride())
            size = (self.layer.groups, hidden, self.layer.inputs)
            self.right = self.empty(size, self.made)
            self.put("RIGHT", self.pointer(self.right), self.pointer(self.first), int(residual))
        elif isinstance(branch, Separable):
            point, depth = self.dense(own["pointwise"]), self.dense(own["depthwise"])
            self.separable = own["pointwise"], own["depthwise"]
            self.put("EXPAND", branch.expand)
            self.put("POINT", self.pointer(point), self.pointer(depth), number)
        else:
            filters = TABLES.filters(branch, self.layer, self.origin.device)
            weight = self.pointer(self.dense(own["weight"]))
            step = self.taps if len(filters) > 1 else 0
            row = (weight, self.pointer(filters), step, number)
            self.put_slot("FILTER", self.filters, 4, *row)
            self.slots.append((own["weight"], f"D_FILTER{self.filters}"))
            self.filters += 1

    def put_slot(self, name: str, slot: int, width: int, *values: int) -> None:
        start = column(name) + slot * width
        self.row[start : start + len(values)] = values

    def empty(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.origin.device)

    def operand(self) -> Tensor:
        """``left`` as (groups, out * taps, hidden), in the type of products: to be filled by
        ``prepare`` if that is another one."""
        assert self.left is not None
        size = (self.layer.groups, self.layer.outputs * self.taps, self.hidden)
        if self.made == self.origin.dtype:
            return self.left.transpose(2, 3).reshape(size)
        copy = self.empty(size, self.made)
        self.put("COPY", self.pointer(copy))
        return copy

    def programs(self) -> list[tuple[int, int]]:
        """(row, kind) of the programs that prepare its product."""
        if self.left is None:
            return []
        found = [(row, 1) for row in range(self.layer.groups * self.hidden)]
        if self.made != self.origin.dtype:
            found += [(row, 2) for row in range(self.layer.channels)]
        return found


def filters_of(branch: Branch, layer: Layer) -> Tensor:
    """f of a summand w[o, i] f[o, x]: (channels or 1, taps), on the CPU."""
    taps = math.prod(layer.kernel)
    if isinstance(branch, Frequency):
        filters = branch.constants(layer)["filters"].reshape(layer.channels, taps)
    elif isinstance(branch, Average):
        filters = torch.full((1, taps), 1 / taps)
    else:
        filters = torch.zeros(1, taps)
        filters[:, some(branch, layer)] = 1
    return filters.float().contiguous()


# --------------------------------------------------------------------------- of many
class Tables:
    """What stays from step to step: device copies of tables whose pointers did not change, lists
    of programs, shares as matrices (channels, in). Tables and lists are small and of a number that
    is bounded; a matrix ends with the table of shares that it is of.

    A CUDA graph under capture owns what is made meanwhile, and makes it again at every replay:
    nothing of that stays here but ``captured``, the host's memory that it copies from, and what it
    found made."""

    def __init__(self) -> None:
        self.made: OrderedDict[Any, Tensor] = OrderedDict()
        self.shares: OrderedDict[Any, Tensor] = OrderedDict()
        self.constants: OrderedDict[Any, Tensor] = OrderedDict()
        self.captured: dict[int, Tensor] = {}  # by address, as long as the process

    def upload(self, numbers: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``numbers``: a tuple of tuples."""
        key = numbers, dtype, device
        return self.get(
            self.made,
            key,
            device,
            lambda: self.copy(torch.tensor(numbers, dtype=dtype), device),
            256,
        )

    def filters(self, branch: Branch, layer: Layer, device: torch.device) -> Tensor:
        """``filters_of`` them, on the device."""
        key = branch, layer, device
        return self.get(
            self.constants, key, device, lambda: self.copy(filters_of(branch, layer), device), 4096
        )

    def copy(self, host: Tensor, device: torch.device) -> Tensor:
        if capturing(device):
            host = host.pin_memory()
            self.captured[host.data_ptr()] = host
        return host.to(device, non_blocking=True)

    def share(self, site: Site, tensors: Sequence[Tensor]) -> Tensor:
        table, classes = tensors[site.first - 2 : site.first]
        written = 0 if table.is_inference() else version(table)
        key = site, table.data_ptr(), classes.data_ptr(), written, table.device
        fresh = key not in self.shares and not capturing(table.device)
        make = partial(matrix, site, tensors[0], table, classes)
        found = self.get(self.shares, key, table.device, make, 1024)
        if fresh:  # until another may take the table's address
            weakref.finalize(table.untyped_storage(), self.shares.pop, key, None)
        return found

    def get(
        self,
        kept: OrderedDict[Any, Tensor],
        key: Any,
        device: torch.device,
        make: Callable[[], Tensor],
        limit: int,
    ) -> Tensor:
        """A tensor of ``kept``, which is made if it is not there."""
        if capturing(device):
            if key not in kept:
                return make()
            self.captured[kept[key].data_ptr()] = kept[key]
        elif key not in kept:
            kept[key] = beside(device, make)
            while len(kept) > limit:
                kept.popitem(last=False)
        return kept[key]


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what is launched."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@lru_cache
def stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def beside(device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """A tensor that outlives a call: on a stream and by a thread of its own, so that it takes no
    memory from the pool of a graph that warms up in this one (CUDA graph trees give their pool
    whatever the thread allocates)."""
    if device.type != "cuda":
        return make()
    own, current = stream(device), torch.cuda.current_stream(device)
    own.wait_stream(current)

    def work() -> Tensor:
        with torch.cuda.stream(own), torch.no_grad():
            return make()

    with ThreadPoolExecutor(1) as worker:
        made = worker.submit(work).result()
    current.wait_stream(own)
    made.record_stream(current)
    return made


def matrix(site: Site, origin: Tensor, table: Tensor, classes: Tensor) -> Tensor:
    """A site's shares as (channels, in)."""
    how = site.share
    assert how is not None
    split = list(how.split) if how.split else None
    ones = torch.ones_like(origin, dtype=torch.float32)
    shares = share(ones, table, classes, how.at, how.dim, split)
    return load(site.layer, shares)[..., 0].reshape(site.layer.channels, -1).contiguous()


TABLES = Tables()


def launch(
    kernel: Any,
    layouts: Sequence[Layout],
    programs: Sequence[tuple[int, int, int]],
    **constants: Any,
) -> None:
    """One program for each (layer, index, kind)."""
    if not programs:
        return
    origin = layouts[0].origin
    rows = tuple(tuple(one.row) for one in layouts)
    table = TABLES.upload(rows, torch.int64, origin.device)
    listed = TABLES.upload(tuple(programs), torch.int32, origin.device)
    kernel[(len(programs),)](table, listed, dtype=TYPES[origin.dtype], **constants)


def forward(
    sites: Sequence[Site], owned: Sequence[Sequence[Tensor]], student: bool, made: torch.dtype
) -> list[tuple[Tensor, Tensor | None]]:
    """The weights of teacher and student; see ``reference.forward``."""
    layouts, found, products = [], [], []
    for site, tensors in zip(sites, owned, strict=True):
        one = Layout(site, tensors, made)
        wide = torch.empty_like(one.origin)
        own = room(site, one.origin) if student and site.distinct else None
        one.put("WIDE", one.pointer(wide))
        _common(one, own)
        if one.left is not None:
            size = (site.layer.groups, site.layer.outputs * one.taps, site.layer.inputs)
            target = one.empty(size, made)
            one.put("MADE", one.pointer(target))
            products.append((one.operand(), one.right, target))
        layouts.append(one)
        found.append((wide, own))
    types = {"made": TYPES[made], "BLOCK": BLOCK}
    before = [(n, *p) for n, one in enumerate(layouts) for p in one.programs()]
    launch(k.prepare, layouts, before, **types)
    for left, right, target in products:
        torch.bmm(left, right, out=target)
    launch(k.combine, layouts, _rows(layouts), **types, EXPANDED=_expanded(layouts))
    return found


def backward(
    sites: Sequence[Site],
    owned: Sequence[Sequence[Tensor]],
    grads: Sequence[tuple[Tensor | None, Tensor | None]],
    made: torch.dtype,
) -> list[list[Tensor | None]]:
    """The gradients of all tensors, from those of the weights; see ``reference.backward``."""
    layouts, found, products = [], [], []
    after: list[tuple[int, int, int]] = []
    last: list[tuple[int, int, int]] = []
    for n, (site, tensors, (wide, own)) in enumerate(zip(sites, owned, grads, strict=True)):
        one = Layout(site, tensors, made)
        layer = site.layer
        if wide is not None:
            if wide.stride() != one.origin.stride():
                wide = torch.empty_like(one.origin).copy_(wide)
            one.put("WIDE", one.pointer(wide))
        _common(one, own)
        mine: list[Tensor | None] = [None] * site.size
        target = mine[0] = torch.empty_like(one.origin)
        one.put("D_ORIGIN", one.pointer(target))
        if not site.unbranched:
            target = mine[1] = one.empty(tensors[1].shape, tensors[1].dtype)
            one.put("D_SCALES", one.pointer(target))
        for place, name in one.slots:
            target = torch.empty_like(one.tensors[place])
            one.put_slot(name[:-1], int(name[-1]), 1, one.pointer(target))
            mine[place] = target
        flat = (layer.groups, layer.outputs * one.taps, layer.inputs)
        if one.left is not None or one.row[column("EXPAND")]:
            plain = one.empty(flat, made)
            one.put("D_FLAT", one.pointer(plain))
        if one.left is not None:
            scaled = one.empty(flat, made)
            moved = one.empty((*flat[:2], one.hidden), made)
            place_first, place = one.products
            target = mine[place] = torch.empty_like(one.tensors[place])
            one.put("D_SCALED", one.pointer(scaled))
            one.put("D_MOVED", one.pointer(moved), one.pointer(target))
            products.append((one, plain, scaled, moved, mine, place_first))
            after += [(n, row, 0) for row in range(layer.channels)]
        if expand := one.row[column("EXPAND")]:
            splits = triton.cdiv(layer.outputs, SPLITS)
            for name, place in zip(("D_POINT", "D_DEPTH"), one.separable, strict=True):
                target = mine[place] = torch.empty_like(one.tensors[place])
                one.put(name, one.pointer(target))
            size = layer.groups * layer.inputs * expand * one.taps
            one.put("D_PARTS", one.pointer(one.empty((splits, size), torch.float32)))
            one.put("SPLIT", splits)
            blocks = splits * layer.groups * triton.cdiv(layer.inputs, ROWS)
            after += [(n, block, 1) for block in range(blocks)]
            last += [(n, block, 0) for block in range(triton.cdiv(size, 8 * BLOCK))]
        layouts.append(one)
        found.append(mine)
    operands = [one.operand() for one, *_ in products]
    expanded = _expanded(layouts)
    types = {"made": TYPES[made], "BLOCK": BLOCK, "EXPANDED": expanded}
    first = [(n, *p) for n, one in enumerate(layouts) for p in one.programs()]
    launch(k.scatter, layouts, _rows(layouts) + first, **types | {"BLOCK": block(expanded)})
    for (one, plain, scaled, moved, mine, place), left in zip(products, operands, strict=True):
        torch.bmm(plain, one.right.transpose(1, 2), out=moved)
        mine[place] = torch.bmm(left.transpose(1, 2), scaled).to(one.origin.dtype)
    launch(k.finish, layouts, after, **types, ROWS=ROWS, SPLITS=SPLITS)
    launch(k.reduce, layouts, last, BLOCK=8 * BLOCK)
    return found


def _common(one: Layout, own: Tensor | None) -> None:
    """The columns of the student's weight or its gradient, and of shares."""
    if own is not None:
        one.put("OWN", one.pointer(own))
        one.put("OWN_STRIDES", *load(one.site.narrow, own).stride())
    if one.site.share is not None:
        one.put("SHARE", one.pointer(TABLES.share(one.site, one.tensors)))


def _rows(layouts: Sequence[Layout]) -> list[tuple[int, int, int]]:
    return [(n, row, 0) for n, one in enumerate(layouts) for row in range(one.layer.channels)]


def block(expanded: int) -> int:
    """Inputs at once in ``scatter``, which has no registers for more with a depthwise kernel."""
    return BLOCK if expanded == 1 else BLOCK // 2


def _expanded(layouts: Sequence[Layout]) -> int:
    """A power of two that holds the channels of every depthwise kernel."""
    return int(triton.next_power_of_2(max(1, *(one.row[column("EXPAND")] for one in layouts))))
