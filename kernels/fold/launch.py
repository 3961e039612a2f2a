"""From layers to tables to launches of the Triton kernels.

A ``Plan`` holds all of a fold that does not depend on addresses, on the device: forms, programs,
sizes, and where in one flat allocation each result begins. A call compares the addresses of its
tensors with those of the call before, uploads those of incoming gradients, and launches.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from ...branches.layer import Layer
from . import triton_kernels as k
from .site import (
    KINDS,
    REGION,
    Regions,
    Site,
    places,
    room,
    rounded,
    sites_of,
    tensors_like,
    uniform,
)

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
TILE, DEPTH_TILE, ROWS, DEPTH_ROWS, BLOCK = 2048, 512, 8, 64, 1024
"""Bytes of a tile, elements of one with a depthwise kernel; rows of a program; elements of other
blocks."""
REGISTERS = 255
"""Of a thread, all that there are: left alone, the assembler spills to fit more programs."""
UNIT = 8
"""Elements that rows begin at multiples of where they are read 16 bytes a thread."""


@dataclass(frozen=True)
class Part:
    """A term as kernels see it. ``carrier``, ``factor``: which of the site's tensors they are;
    ``width``: elements of the carrier for each input; ``size``: how many taps it is not zero at,
    from ``start`` in a ``step``."""

    kind: str
    carrier: int
    factor: int
    width: int
    start: int
    step: int
    size: int
    gain: float


@dataclass(frozen=True)
class Form:
    """What layers that share a kernel have in common. ``order``: of inputs and taps in memory
    (``ix``, ``xi``, or ``any``); ``share``: none, a ``table``, or a table of ``copies``;
    ``uniform``: one for all inputs of a tile; ``student``: none, ``first`` copies, ``mean``;
    ``copies``: of a group, output, input, at most; ``unit``: of sizes and addresses; ``rows``,
    ``inputs``: of a program."""

    taps: int
    order: str
    terms: tuple[Part, ...]
    dtype: Any
    share: str
    uniform: bool
    table: int
    depthwise: int
    teacher: bool
    student: str
    copies: tuple[int, ...]
    unit: int
    rows: int
    inputs: int

    @cached_property
    def warps(self) -> int:
        """Of a program: 16 bytes of a tile a thread, or 32 elements of depthwise kernels."""
        deep = max((k.power(part.width) for part in self.terms if part.kind == "depth"), default=0)
        elements = self.inputs * k.power(self.taps)
        plain = elements * self.dtype.primitive_bitwidth // 4096
        found: int = max(1, min(4, elements * deep // 1024 if deep else plain))
        return found


def parts_of(site: Site, tensors: Sequence[Tensor]) -> Iterator[Part]:
    """The terms of a site."""
    at = site.first
    for term in site.terms:
        kind = KINDS[term.letters, term.others] if term.carrier else "eye"
        start, stop, step = term.taps or (0, site.layer.taps, 1)
        size = len(range(start, stop, step))
        width = tensors[at].shape[3] if kind == "depth" else size if kind == "taps" else 1
        factor = at + 1 if term.factor else -1
        yield Part(kind, at, factor, width, start, step, size, term.gain)
        at += len(term.names)


class Layout:
    """A site as kernels see it, from tensors like its ``own``."""

    def __init__(
        self, site: Site, own: Sequence[Tensor], teacher: bool, student: bool, aligned: bool
    ) -> None:
        layer = site.layer
        self.site, self.likes = site, tensors_like(site, own)
        student = student and (site.distinct or not teacher)
        narrow = self.narrow = site.narrow if student else layer
        self.steps = layer.by_taps(self.likes[0]).stride()
        self.own_steps = narrow.by_taps(room(narrow, self.likes[0])).stride()
        orders = {order_of(self.steps, layer), order_of(self.own_steps, narrow)}
        sizes = [(1, n, n) for n in layer.shape[:3]]
        self.blocks = list(site.blocks.values()) if student else sizes
        self.parts = tuple(parts_of(site, own))
        depth = next((part for part in self.parts if part.kind == "depth"), None)
        outer, wide, inputs = self.blocks[2]
        unit = UNIT if aligned and not any(n % UNIT for n in (layer.inputs, wide, inputs)) else 1
        tile = (DEPTH_TILE if depth else TILE // own[0].itemsize) // k.power(layer.taps)
        size, share = max(unit, min(tile, k.power(inputs))), site.share
        floating = share is not None and own[site.first - 2].is_floating_point()
        self.form = Form(
            taps=layer.taps,
            order=orders.pop() if len(orders) == 1 else "any",
            terms=self.parts,
            dtype=TYPES[own[0].dtype],
            share="" if share is None else "table" if floating else "copies",
            uniform=share is not None and uniform(self.blocks[2], size, share.run),
            table=site.first - 2,
            depthwise=depth.factor if depth else -1,
            teacher=teacher,
            student=("mean" if site.mean else "first") if student else "",
            copies=tuple(-(-wide // narrow) for _, wide, narrow in self.blocks),
            unit=unit,
            rows=min(DEPTH_ROWS if depth else ROWS, k.power(narrow.outputs)),
            inputs=size,
        )
        self.tiles = outer * -(-inputs // self.form.inputs)
        self.row_blocks = -(-narrow.outputs // self.form.rows)
        self.lines = self.tiles * self.form.copies[2]
        self.depths = layer.groups * layer.inputs * depth.width * layer.taps if depth else 0

    def shares(self, own: Sequence[Tensor]) -> list[Tensor]:
        """Where in the table of shares a channel begins, and where an input of a group does."""
        how, layer = self.site.share, self.site.layer
        if how is None:
            return [torch.zeros(0, dtype=torch.int32, device=own[0].device)] * 2
        table, classes = own[self.form.table : self.site.first]
        numbers = torch.arange(table.numel(), dtype=torch.float64, device=table.device)
        found = how.of_inputs(layer, numbers.view(table.shape), classes)[..., 0]
        rows = found[:, :, 0]
        return [x.reshape(-1).int() for x in (rows, found[:, 0] - rows[:, :1])]


def order_of(steps: Sequence[int], layer: Layer) -> str:
    """Of inputs and taps in memory, by the strides of (groups, out, in, taps)."""
    _, outputs, inputs, taps = shape = *layer.shape[:3], layer.taps
    for order, (i, x) in (("xi", (1, inputs)), ("ix", (taps, 1))):
        wanted = (outputs * inputs * taps, inputs * taps, i, x)
        if all(a == b or n == 1 for a, b, n in zip(steps, wanted, shape, strict=True)):
            return order
    return "any"


class Table:
    """Rows of numbers, and programs: the number of a row, and where in it."""

    def __init__(self) -> None:
        self.rows: list[Sequence[int]] = []
        self.programs: list[np.ndarray] = []

    def add(self, row: Sequence[int], *places: Any) -> None:
        axes = np.meshgrid([len(self.rows)], *places, indexing="ij")
        self.programs.append(np.stack([x.ravel() for x in axes], 1))
        self.rows.append(row)

    @property
    def count(self) -> int:
        """Of programs."""
        return sum(map(len, self.programs))

    def on(self, device: torch.device) -> tuple[int, Tensor, Tensor]:
        """How many programs, these, and the rows."""
        programs = np.concatenate(self.programs)
        return len(programs), upload(programs, device, torch.int32), upload(self.rows, device)


class Plan:
    """Of a fold of some sites, from tensors like these (in the order of the sites). ``aligned``:
    all of them begin at multiples of 16 bytes."""

    def __init__(
        self,
        sites: Sequence[Site],
        tensors: Sequence[Tensor],
        teacher: bool,
        student: bool,
        made: torch.dtype,
        aligned: bool,
    ) -> None:
        self.made, self.dtype, self.device = made, tensors[0].dtype, tensors[0].device
        self.firsts = [*accumulate((site.size for site in sites), initial=0)]
        owned = [tensors[a:b] for a, b in pairwise(self.firsts)]
        both = zip(sites, owned, strict=True)
        self.layers = [Layout(site, own, teacher, student, aligned) for site, own in both]
        likes = [like for one in self.layers for like in one.likes]
        pairs = enumerate(zip(tensors, likes, strict=True))
        self.copied = {n: like for n, (t, like) in pairs if not alike(t, like)}
        self.places = places(list(zip(sites, owned, strict=True)), teacher, student)
        self.views, d_views = (of.views for of in self.places)
        self.staging, self.sums = Scratch(made), Scratch(torch.float32)
        self.jobs: list[tuple[int, ...]] = []
        tables: dict[str, dict[Any, Table]] = defaultdict(lambda: defaultdict(Table))
        self._layers(owned, self._products(tables, aligned), tables)
        on = {
            name: {key: table.on(self.device) for key, table in some.items()}
            for name, some in tables.items()
        }
        self.forms, self.items, self.reduced = (
            on.get(name, {}) for name in ("forms", "items", "reduced")
        )
        self.lefts = {
            key: (count - self.rights[key], programs[self.rights[key] :].clone(), items)
            for key, (count, programs, items) in self.items.items()
        }
        for scratch in (self.staging, self.sums):
            scratch.make(self.device)
        self.matrices = [self._matrices(*job) for job in self.jobs]
        for scratch in (self.staging, self.sums):
            scratch.storage.resize_(0)
        targets = [view[2] // REGION if view else 0 for view in d_views]
        self.targets = upload(targets, self.device)

    def _matrices(self, batch: int, m: int, h: int, n: int, *begins: int) -> list[Tensor]:
        """Left, right, product or gradient, gradient of the left one and of the right one."""
        shapes = (m, h), (h, n), (m, n), (m, h), (h, n)
        return [self.staging.matrix(a, batch, *b) for a, b in zip(begins, shapes, strict=True)]

    def _products(self, tables: Any, aligned: bool) -> dict[int, int]:
        """Products of equal sizes are one batch, if all begin where regions may. By layer: where
        its product lies."""
        found: dict[tuple[int, ...], list[tuple[int, Layout, int, Part]]] = defaultdict(list)
        for n, one in enumerate(self.layers):
            for number, part in enumerate(one.parts):
                if part.kind == "made":
                    layer, hidden = one.site.layer, one.likes[part.factor].shape[1]
                    key = layer.outputs * layer.taps, hidden, layer.inputs
                    alone = any(layer.groups * math.prod(key) // x % REGION for x in key)
                    found[(*key, n) if alone else key].append((n, one, number, part))
        made_at: dict[int, int] = {}
        lefts: list[Any] = []
        for (m, hidden, inputs, *_), members in found.items():
            batch = sum(one.site.layer.groups for _, one, _, _ in members)
            sizes = m * hidden, hidden * inputs, m * inputs, m * hidden, hidden * inputs
            begins = [self.staging.take(batch * size) for size in sizes]
            self.jobs.append((batch, m, hidden, inputs, *begins))
            unit = UNIT if aligned and not any(x % UNIT for x in (hidden, inputs)) else 1
            for n, one, number, part in members:
                layer, carrier = one.site.layer, self.firsts[n] + part.carrier
                factor, scales = self.firsts[n] + part.factor, self.firsts[n] + 1
                left, right, made_at[n], moved, d_right = begins
                row = [carrier, factor, scales, number + 1, layer.channels, hidden, inputs]
                row += [left // REGION, right // REGION, moved // REGION]
                row += [one.site.terms[number].residual]
                table = tables["items"][layer.taps, unit]
                table.add(row, range(layer.groups * hidden), [0])
                lefts.append((table, row, range(layer.channels), [1]))
                size = layer.groups * hidden * inputs
                row = [d_right, 1, 0, factor, 0, size]
                tables["reduced"]["staging"].add(row, range(-(-size // BLOCK)))
                both = zip(begins, sizes, strict=True)
                begins = [begin + layer.groups * size for begin, size in both]
        self.rights = {key: table.count for key, table in tables["items"].items()}
        """How many programs are for right operands; those for left ones follow."""
        for table, *programs in lefts:
            table.add(*programs)
        return made_at

    def _layers(self, owned: Any, made_at: dict[int, int], tables: Any) -> None:
        index: list[Tensor] = []
        for n, (one, own) in enumerate(zip(self.layers, owned, strict=True)):
            layer, first, several = one.site.layer, self.firsts[n], len(one.parts) + 1
            sums = self.sums.take(one.lines * several * layer.channels)
            depths = self.sums.take(one.depths * one.row_blocks)
            row = [first, n, layer.channels, layer.outputs, layer.inputs]
            row += [one.narrow.outputs, one.narrow.inputs]
            row += [x for _, wide, narrow in one.blocks for x in (narrow, wide)]
            row += [*one.steps, *one.own_steps]
            row += [view[2] // REGION if view else 0 for view in self.views[2 * n : 2 * n + 2]]
            row += [made_at.get(n, 0) // REGION]
            for x in one.shares(own):
                row.append(sum(map(len, index)))
                index.append(x)
            row += [sums // REGION, depths // REGION]
            begins = range(0, one.narrow.outputs, one.form.rows)
            places = range(one.narrow.groups), begins, range(one.tiles)
            tables["forms"][one.form].add(row, *places)
            kinds = ["origin", *(part.kind for part in one.parts)] if one.parts else []
            for m, kind in enumerate(kinds):
                if kind != "made":
                    row = [sums + m * layer.channels, one.lines, several * layer.channels]
                    row += [first + 1, m * layer.channels, layer.channels]
                    tables["reduced"]["sums"].add(row, range(-(-layer.channels // BLOCK)))
            if one.depths:
                target = first + one.form.depthwise
                row = [depths, one.row_blocks, one.depths, target, 0, one.depths]
                tables["reduced"]["sums"].add(row, range(-(-one.depths // BLOCK)))
        self.index = torch.cat(index)

    # ---- calls
    def forward(self, addresses: Tensor, out: Tensor) -> None:
        """All weights, in one flat tensor."""
        with self.staging as staging:
            self._prepare(addresses, staging, left=True)
            for left, right, made, *_ in self.matrices:
                multiply(left, right, made)
            for form, (count, programs, sizes) in self.forms.items():
                shared = addresses, self.targets, self.index, out, staging
                launch(k.combine, count, programs, sizes, *shared, F=form, num_warps=form.warps)

    def backward(self, grads: Sequence[Tensor | None], addresses: Tensor, out: Tensor) -> None:
        """The gradients of all tensors, in one flat tensor, from those of the weights."""
        held, pointers = [], []
        for grad, view in zip(grads, self.views, strict=True):
            if grad is not None and view and (grad.stride() != view[1] or grad.data_ptr() % 16):
                grad = copied(grad, *view[:2])
                held.append(grad)
            pointers.append(0 if grad is None else grad.data_ptr())
        received = upload(pointers, self.device)
        with self.staging as staging, self.sums as sums:
            self._prepare(addresses, staging, left=False)
            for form, (count, programs, sizes) in self.forms.items():
                some = addresses, self.targets, received, self.index, out, staging, sums
                launch(k.scatter, count, programs, sizes, *some, F=form, num_warps=form.warps)
            for _, right, grad, moved, _ in self.matrices:
                multiply(grad, right.mT, moved)
            for key, table in self.lefts.items():
                shared = addresses, self.targets, out, staging
                launch(k.finish, *table, *shared, **self._constants(*key))
            for left, _, grad, _, d_right in self.matrices:
                multiply(left.mT, grad, d_right)
            for name, (count, programs, rows) in self.reduced.items():
                source = staging if name == "staging" else sums
                launch(k.reduce, count, programs, rows, self.targets, source, out, BLOCK=BLOCK)

    def _prepare(self, addresses: Tensor, staging: Tensor, left: bool) -> None:
        """``left``: both operands, and not the right ones alone."""
        for key, (count, *tables) in self.items.items():
            some = count if left else self.rights[key]
            launch(k.prepare, some, *tables, addresses, staging, **self._constants(*key))

    def _constants(self, taps: int, unit: int) -> dict[str, Any]:
        """Of kernels of products."""
        return {"dtype": TYPES[self.dtype], "BLOCK": BLOCK, "TAPS": taps, "UNIT": unit}


def launch(kernel: Any, count: int, *tensors: Tensor, **constants: Any) -> None:
    """So many programs of a kernel."""
    kernel[(count,)](*tensors, **constants, maxnreg=REGISTERS)


def multiply(x: Tensor, y: Tensor, out: Tensor) -> None:
    """A batch of products of matrices."""
    torch.bmm(x, y, out=out)


# --------------------------------------------------------------------------- addresses
KEPT: list[Any] = []
"""What a CUDA graph reads whenever it is replayed, as long as the process."""


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what is launched."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(numbers: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers on the device. A graph under capture copies again at every replay: the host's memory
    stays."""
    host = torch.as_tensor(numbers, dtype=dtype)
    if capturing(device):
        host = host.pin_memory()
        KEPT.append(host)
    return host.to(device, non_blocking=True)


def alike(x: Tensor, like: Tensor) -> bool:
    """Whether the elements of two tensors of a shape lie in the same order."""
    steps = zip(x.stride(), like.stride(), like.shape, strict=True)
    return all(a == b or n == 1 for a, b, n in steps)


class Scratch:
    """Memory for the time of a call, in regions, and matrices in it that are made once: it is the
    storage that comes and goes."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.size = dtype, 0

    def take(self, elements: int) -> int:
        """Where a new region begins."""
        start = self.size
        self.size += rounded(elements)
        return start

    def make(self, device: torch.device) -> None:
        """When all regions are known."""
        self.flat = torch.empty(self.size, dtype=self.dtype, device=device)
        self.storage = self.flat.untyped_storage()

    def matrix(self, start: int, batch: int, rows: int, columns: int) -> Tensor:
        """One of (batch, rows, columns)."""
        return self.flat.as_strided((batch, rows, columns), (rows * columns, columns, 1), start)

    def __enter__(self) -> Tensor:
        self.storage.resize_(self.size * self.dtype.itemsize)
        return self.flat

    def __exit__(self, *error: object) -> None:
        self.storage.resize_(0)


def copied(x: Tensor, shape: Sequence[int], steps: Sequence[int]) -> Tensor:
    """A copy in another order."""
    return torch.empty_strided(shape, steps, dtype=x.dtype, device=x.device).copy_(x)


@dataclass(frozen=True, eq=False)
class Call:
    """A plan with the tensors of a call: their ``addresses`` on the device; ``held``: what has to
    live until the launch."""

    plan: Plan
    addresses: Tensor
    held: Sequence[Tensor]


PLANS: OrderedDict[Any, Plan] = OrderedDict()
"""By all that a plan depends on."""
CALLS: dict[Any, Call] = {}
"""By fold, strides and addresses, as long as the storage of the first tensor."""


def prepared(
    tensors: Sequence[Tensor], key: str, teacher: bool, student: bool, half: torch.dtype | None
) -> Call:
    """The plan and the addresses of a call. What is made while a CUDA graph is captured is the
    graph's, which makes it again at every replay: nothing of it stays but in ``KEPT``, where
    everything stays that the graph reads."""
    origin = tensors[0]
    device, made = origin.device, half or origin.dtype
    pointers, strides = tuple(map(Tensor.data_ptr, tensors)), tuple(map(Tensor.stride, tensors))
    name = key, teacher, student, made, origin.dtype, device, strides
    call = CALLS.get((name, pointers))
    if call is None:
        aligned = not any(pointer % 16 for pointer in pointers)
        make = partial(Plan, sites_of(key), tensors, teacher, student, made, aligned)
        plan = PLANS.get((name, aligned)) or beside(device, make)
        held = {n: copied(tensors[n], like.shape, like.stride()) for n, like in plan.copied.items()}
        read = [held[n].data_ptr() if n in held else p for n, p in enumerate(pointers)]
        call = Call(plan, beside(device, partial(upload, read, device)), list(held.values()))
        if not capturing(device):
            PLANS[name, aligned] = plan
            while len(PLANS) > 64:
                PLANS.popitem(last=False)
            if not held:
                CALLS[name, pointers] = call
                weakref.finalize(origin.untyped_storage(), CALLS.pop, (name, pointers), None)
    if capturing(device) and call not in KEPT:
        KEPT.append(call)
    return call


def run(
    grads: Sequence[Tensor | None] | None, tensors: Sequence[Tensor], *asked: Any
) -> tuple[Tensor, Regions]:
    """All weights that are asked for; or, from their gradients, those of all tensors: in one flat
    tensor, and where."""
    call = prepared(tensors, *asked)
    plan = call.plan
    where = plan.places[grads is not None]
    out = tensors[0].new_empty(where.size)
    if grads is None:
        plan.forward(call.addresses, out)
    else:
        plan.backward(grads, call.addresses, out)
    return out, where


@lru_cache
def stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def beside(device: torch.device, make: Callable[[], Any]) -> Any:
    """Something that outlives a call: on a stream and by a thread of its own, so that it takes no
    memory from the pool of a graph that warms up in this one (CUDA graph trees give their pool
    whatever the thread allocates). What a graph under capture needs is the graph's."""
    if device.type != "cuda" or capturing(device):
        return make()
    own, current = stream(device), torch.cuda.current_stream(device)
    own.wait_stream(current)

    def work() -> Any:
        with torch.cuda.stream(own), torch.no_grad():
            return make()

    with ThreadPoolExecutor(1) as worker:
        found = worker.submit(work).result()
    current.wait_stream(own)
    return found
