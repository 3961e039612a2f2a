"""The fold of many layers as Triton kernels; ``launch`` fills their tables, ``reference`` says what
they compute.

Layers of one ``Form`` share kernels, in which all that the form says is constant. A program takes
some rows of the student's weight and some inputs of them, and for each copy of these one tile
(inputs, taps): a tensor is read as it lies in memory, 16 bytes a thread where rows begin at
multiples of 8 elements, and put in place on the chip. What differs from layer to layer stands in
tables: sizes and offsets (``SIZES``), the addresses of all tensors, where gradients go, and where
in a table of shares a row and an input begin. Sums over several programs are written apart and
added up by ``reduce``, in the same order every time; all sums are in float32.

Loops have constant bounds or are ``while``: the interpreter of Triton 3.6 refuses others.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

SIZES = (
    *("FIRST", "LAYER"),  # the number of its first tensor, and its own
    *("CHANNELS", "OUT", "IN", "OWN_OUT", "OWN_IN"),  # in all; of a group: the teacher's, student's
    *("NARROW_G", "WIDE_G", "NARROW_O", "WIDE_O", "NARROW_I", "WIDE_I"),  # of blocks
    *("STEP_G", "STEP_O", "STEP_I", "STEP_X"),  # strides of the teacher's weight
    *("OWN_STEP_G", "OWN_STEP_O", "OWN_STEP_I", "OWN_STEP_X"),  # and of the student's
    *("WIDE", "OWN"),  # where weights begin
    "MADE",  # and (channels, taps, inputs): the product, or the gradient
    *("ROWS", "COLUMNS", "SUMS", "PARTS"),  # what shares say; where sums of rows and kernels begin
)
"""Columns of a layer's table."""
ITEMS = (
    *("CARRIER", "FACTOR", "SCALES", "SCALE"),  # numbers of tensors; the scales' row
    *("CHANNELS", "HIDDEN", "IN", "LEFT", "RIGHT", "MOVED", "EYE"),
)
"""Columns of the table of products ``left (channels taps, hidden) @ right (hidden, inputs)``."""
_SIZES, _ITEMS = ({name: k for k, name in enumerate(names)} for names in (SIZES, ITEMS))
WIDTH, ITEM = tl.constexpr(len(SIZES)), tl.constexpr(len(ITEMS))
power = triton.next_power_of_2


@triton.constexpr_function
def get(form: Any, name: str) -> Any:
    return getattr(form, name)


@triton.constexpr_function
def copies(form: Any, k: int) -> int:
    """Of a group, output, input, at most."""
    return form.copies[k]


@triton.constexpr_function
def term(form: Any, k: int, name: str) -> Any:
    return getattr(form.terms[k], name)


@triton.constexpr_function
def count(form: Any, kind: str = "") -> int:
    return sum(kind in ("", one.kind) for one in form.terms)


@triton.constexpr_function
def expand(form: Any) -> int:
    """Of the depthwise kernel."""
    return max([one.width for one in form.terms if one.kind == "depth"], default=1)


@triton.constexpr_function
def column(name: str) -> int:
    return _SIZES[name]


@triton.constexpr_function
def item(name: str) -> int:
    return _ITEMS[name]


@triton.jit
def _size(s, name: tl.constexpr, UNIT: tl.constexpr = 1):
    """A number of a layer, a multiple of ``UNIT``."""
    return tl.load(s + column(name)).to(tl.int32) // UNIT * UNIT


@triton.jit
def _offset(s, name: tl.constexpr):
    """All regions begin at multiples of 16 elements."""
    return tl.load(s + column(name)) * 16


@triton.jit
def _pointer(addresses, k, dtype: tl.constexpr, UNIT: tl.constexpr):
    """Of tensor ``k``."""
    p = tl.load(addresses + k).to(tl.pointer_type(dtype))
    return tl.multiple_of(p, 16) if UNIT > 1 else p


@triton.jit
def _read(p, y, there, first, last, N: tl.constexpr, INPUTS: tl.constexpr, UNIT: tl.constexpr):
    """(inputs, ...) of a tensor (inputs, N) at ``y`` where it is ``there``, else 0; as many inputs
    as there are in both ``first`` and ``last``."""
    i = tl.arange(0, INPUTS)[:, None]
    if UNIT == 1 or power(N) == N:
        return tl.load(p + i * N + y, mask=there & (i < first) & (i < last), other=0)
    k = tl.arange(0, power(INPUTS * N))
    some = (k < INPUTS * N) & (k < first * N) & (k < last * N)
    at = tl.where(there, i * N + y, 0)
    found = tl.gather(tl.load(p + k, mask=some, other=0), tl.ravel(at), 0)
    return tl.where(there, tl.reshape(found, at.shape), 0)


@triton.jit
def _write(
    p, value, y, there, first, last, START: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr,
    INPUTS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The inverse of ``_read``: a tile (inputs, taps), of which element n is tap START + n STEP."""
    i = tl.arange(0, INPUTS)[:, None]
    if UNIT == 1 or power(N) == N:
        tl.store(p + i * N + y, value, mask=there & (i < first) & (i < last))
    else:
        k = tl.arange(0, power(INPUTS * N))
        some = (k < INPUTS * N) & (k < first * N) & (k < last * N)
        taps: tl.constexpr = value.shape[1]
        at = tl.minimum(k // N * taps + START + k % N * STEP, INPUTS * taps - 1)
        tl.store(p + k, tl.gather(tl.ravel(value), at, 0), mask=some)


@triton.jit
def _weight(p, step_i, step_x, first, last, F: tl.constexpr):
    """A tile of a weight."""
    INPUTS: tl.constexpr = get(F, "inputs")
    TAPS: tl.constexpr = get(F, "taps")
    x = tl.arange(0, power(TAPS))[None, :]
    if get(F, "order") == "ix":
        return _read(p, x, x < TAPS, first, last, TAPS, INPUTS, get(F, "unit")).to(tl.float32)
    i = tl.arange(0, INPUTS)[:, None]
    some = (x < TAPS) & (i < first) & (i < last)
    return tl.load(p + i * step_i + x * step_x, mask=some, other=0).to(tl.float32)


@triton.jit
def _put(p, value, step_i, step_x, first, last, F: tl.constexpr):
    """Into a tile of a weight."""
    INPUTS: tl.constexpr = get(F, "inputs")
    TAPS: tl.constexpr = get(F, "taps")
    x = tl.arange(0, power(TAPS))[None, :]
    value = value.to(get(F, "dtype"))
    if get(F, "order") == "ix":
        _write(p, value, x, x < TAPS, first, last, 0, 1, TAPS, INPUTS, get(F, "unit"))
    else:
        i = tl.arange(0, INPUTS)[:, None]
        some = (x < TAPS) & (i < first) & (i < last)
        tl.store(p + i * step_i + x * step_x, value, mask=some)


@triton.jit
def _begin(s, OWN: tl.constexpr, g, o, i, F: tl.constexpr):
    """Where a tile of the teacher's weight or of the student's begins, its steps along inputs and
    taps."""
    inputs = _size(s, OWN + "IN", get(F, "unit"))
    row = (g * _size(s, OWN + "OUT") + o).to(tl.int64) * inputs * get(F, "taps")
    if get(F, "order") == "xi":
        return row + i, 1, inputs
    elif get(F, "order") == "ix":
        return row + i * get(F, "taps"), get(F, "taps"), 1
    else:
        start = g * tl.load(s + column(OWN + "STEP_G")) + o * tl.load(s + column(OWN + "STEP_O"))
        step = tl.load(s + column(OWN + "STEP_I"))
        return start + i * step, step, tl.load(s + column(OWN + "STEP_X"))


@triton.jit
def _copy(s, index, copy, NARROW: tl.constexpr, WIDE: tl.constexpr):
    """A copy of a student's index, whether there is one, and how many there are."""
    narrow, wide = _size(s, NARROW), _size(s, WIDE)
    inner = index % narrow
    found = inner + copy * narrow
    return index // narrow * wide + found, found < wide, (wide - inner + narrow - 1) // narrow


@triton.jit
def _inputs(s, tile, copy, F: tl.constexpr):
    """Of a tile of inputs: the student's first, that of a copy, and how many are left in the
    student's block and in the copy's."""
    narrow, wide = _size(s, "NARROW_I", get(F, "unit")), _size(s, "WIDE_I", get(F, "unit"))
    tiles = tl.cdiv(narrow, get(F, "inputs"))
    block, begin = tile // tiles, tile % tiles * get(F, "inputs")
    i = block * wide + copy * narrow + begin
    return block * narrow + begin, i, narrow - begin, wide - copy * narrow - begin


@triton.jit
def _columns(s, index, g, i, first, last, F: tl.constexpr):
    """(inputs, 1), or one for all: where in a row of shares inputs are."""
    k = tl.arange(0, get(F, "inputs"))[:, None]
    at = tl.load(s + column("COLUMNS")) + g * _size(s, "IN") + i
    if get(F, "share") == "":
        return k
    elif get(F, "uniform"):
        return tl.load(index + tl.where(last > 0, at, 0))
    else:
        return tl.load(index + at + k, mask=(k < first) & (k < last), other=0)


@triton.jit
def _share(s, addresses, index, columns, channel, first, last, F: tl.constexpr):
    """(inputs, 1)."""
    k = tl.arange(0, get(F, "inputs"))[:, None]
    some, found = (k < first) & (k < last), 1.0
    if get(F, "share") != "":
        kind: tl.constexpr = tl.int64 if get(F, "share") == "copies" else get(F, "dtype")
        p = _pointer(addresses, _size(s, "FIRST") + get(F, "table"), kind, 1)
        p += tl.load(index + tl.load(s + column("ROWS")) + channel)
        if get(F, "uniform"):
            found = tl.load(p + columns).to(tl.float32)
        else:
            found = tl.load(p + columns, mask=some, other=1).to(tl.float32)
    return tl.where(some, 1 / found if get(F, "share") == "copies" else found, 0.0)


@triton.jit
def _taps(F: tl.constexpr, n: tl.constexpr):
    """Of a term: which element of its carrier each tap is, and whether there is one."""
    x = tl.arange(0, power(get(F, "taps")))[None, :] - term(F, n, "start")
    y = x // term(F, n, "step")
    return y, (x >= 0) & (y < term(F, n, "size")) & (x % term(F, n, "step") == 0)


@triton.jit
def _profile(addresses, t, channel, F: tl.constexpr, n: tl.constexpr):
    """(1, taps): what a term that is (inputs) times (taps) has along the taps."""
    if term(F, n, "factor") < 0:
        return tl.where(_taps(F, n)[1], 1.0, 0.0)
    x = tl.arange(0, power(get(F, "taps")))[None, :]
    p = _pointer(addresses, t + term(F, n, "factor"), get(F, "dtype"), 1)
    return tl.load(p + channel * get(F, "taps") + x, mask=x < get(F, "taps"), other=0).to(
        tl.float32
    )


@triton.jit
def _points(p, first, last, F: tl.constexpr):
    """(inputs, channels) of the pointwise factor of a depthwise-separable kernel."""
    e = tl.arange(0, power(expand(F)))[None, :]
    found = _read(p, e, e < expand(F), first, last, expand(F), get(F, "inputs"), get(F, "unit"))
    return found.to(tl.float32)


@triton.jit
def _depths(s, addresses, g, i, first, last, F: tl.constexpr):
    """(inputs, channels, taps) of its depthwise one."""
    SIZE: tl.constexpr = expand(F) * get(F, "taps")
    p = _pointer(
        addresses, _size(s, "FIRST") + get(F, "depthwise"), get(F, "dtype"), get(F, "unit")
    )
    p += (g * _size(s, "IN", get(F, "unit")) + i).to(tl.int64) * SIZE
    k = tl.arange(0, power(expand(F)) * power(get(F, "taps")))[None, :]
    e, x = k // power(get(F, "taps")), k % power(get(F, "taps"))
    there = (e < expand(F)) & (x < get(F, "taps"))
    y = e * get(F, "taps") + x
    found = _read(p, y, there, first, last, SIZE, get(F, "inputs"), get(F, "unit"))
    shape: tl.constexpr = (get(F, "inputs"), power(expand(F)), power(get(F, "taps")))
    return tl.reshape(found.to(tl.float32), shape)


@triton.jit
def _carrier(s, addresses, targets, out, g, o, i, F: tl.constexpr, n: tl.constexpr):
    """Where the tile of a term's carrier begins, and that of its gradient."""
    t = _size(s, "FIRST") + term(F, n, "carrier")
    at = (g * _size(s, "OUT") + o).to(tl.int64) * _size(s, "IN", get(F, "unit")) + i
    p = _pointer(addresses, t, get(F, "dtype"), get(F, "unit"))
    return p + at * term(F, n, "width"), out + tl.load(targets + t) * 16 + at * term(F, n, "width")


@triton.jit
def _kernel(
    s, addresses, targets, out, staging, depths, g, o, i, first, last, F: tl.constexpr,
    n: tl.constexpr,
):  # fmt: skip
    """A tile of what term ``n`` adds to a weight, without its scale."""
    INPUTS: tl.constexpr = get(F, "inputs")
    KIND: tl.constexpr = term(F, n, "kind")
    channel, k = g * _size(s, "OUT") + o, tl.arange(0, INPUTS)[:, None]
    y, there = _taps(F, n)
    if KIND == "eye":
        return tl.where((k + i == o) & there, 1.0, 0.0)
    elif KIND == "made":
        inputs = _size(s, "IN", get(F, "unit"))
        p = staging + _offset(s, "MADE") + channel.to(tl.int64) * inputs * get(F, "taps")
        p += i + y * inputs + k
        return tl.load(p, mask=there & (k < first) & (k < last), other=0).to(tl.float32)
    else:
        p, _ = _carrier(s, addresses, targets, out, g, o, i, F, n)
        if KIND == "depth":
            return tl.sum(_points(p, first, last, F)[:, :, None] * depths, 1)
        elif KIND == "point":
            w = _read(p, 0, True, first, last, 1, INPUTS, get(F, "unit")).to(tl.float32)
            return w * _profile(addresses, _size(s, "FIRST"), channel, F, n)
        else:
            size: tl.constexpr = term(F, n, "width")
            return _read(p, y, there, first, last, size, INPUTS, get(F, "unit")).to(tl.float32)


@triton.jit
def _part(s, addresses, index, g_own, tile, copy, F: tl.constexpr):
    """Of a copy of groups and inputs: which group it is, whether there is one, and how many; what
    ``_inputs`` says; and what all of its rows read."""
    g, in_g, groups = _copy(s, g_own, copy // copies(F, 2), "NARROW_G", "WIDE_G")
    i_own, i, first, last = _inputs(s, tile, copy % copies(F, 2), F)
    last = tl.where(in_g, last, 0)
    columns, depths = _columns(s, index, g, i, first, last, F), 0.0
    if count(F, "depth") > 0:
        depths = _depths(s, addresses, g, i, first, last, F)
    return g, in_g, groups, i_own, i, first, last, columns, depths


@triton.jit
def combine(programs, sizes, addresses, targets, index, out, staging, F: tl.constexpr):
    """After the products of the forward: the weights."""
    MEAN: tl.constexpr = get(F, "student") == "mean"
    INPUT_COPIES: tl.constexpr = copies(F, 0) * copies(F, 2)
    AGAIN: tl.constexpr = MEAN and INPUT_COPIES > 1
    INNER: tl.constexpr = copies(F, 1) * (INPUT_COPIES if AGAIN else 1)
    program = programs + 4 * tl.program_id(0)
    s = sizes + tl.load(program) * WIDTH
    g_own, o_begin, tile = tl.load(program + 1), tl.load(program + 2), tl.load(program + 3)
    t = _size(s, "FIRST")
    origin = _pointer(addresses, t, get(F, "dtype"), get(F, "unit"))
    own = tl.zeros((get(F, "inputs"), power(get(F, "taps"))), tl.float32)
    whole = tl.zeros((get(F, "inputs"), 1), tl.float32)
    for outer in range(1 if AGAIN else INPUT_COPIES):
        if not AGAIN:
            g, in_g, _, i_own, i, first, last, columns, depths = _part(
                s, addresses, index, g_own, tile, outer, F
            )
        for step in range(get(F, "rows") * INNER):
            o_own, copy = o_begin + step // INNER, step % INNER
            if AGAIN:  # a mean needs all copies of a row at once
                g, in_g, _, i_own, i, first, last, columns, depths = _part(
                    s, addresses, index, g_own, tile, copy // copies(F, 1), F
                )
            o, in_o, _ = _copy(s, o_own, copy % copies(F, 1), "NARROW_O", "WIDE_O")
            live = o_own < _size(s, "OWN_OUT")
            if in_g & in_o & live:
                start, step_i, step_x = _begin(s, "", g, o, i, F)
                channel = g * _size(s, "OUT") + o
                total = _weight(origin + start, step_i, step_x, first, last, F)
                if count(F) > 0:
                    scales = _pointer(addresses, t + 1, get(F, "dtype"), 1) + channel
                    total *= tl.load(scales).to(tl.float32)
                for n in tl.static_range(count(F)):
                    scale = tl.load(scales + (n + 1) * _size(s, "CHANNELS")).to(tl.float32)
                    kernel = _kernel(
                        s, addresses, targets, out, staging, depths, g, o, i, first, last, F, n
                    )
                    total += scale * term(F, n, "gain") * kernel
                share = _share(s, addresses, index, columns, channel, first, last, F)
                if get(F, "teacher"):
                    p = out + _offset(s, "WIDE") + start
                    _put(p, total * share, step_i, step_x, first, last, F)
                if MEAN:  # a running mean: exact while copies are equal
                    whole = share + tl.where(copy > 0, whole, 0.0)
                    own = tl.where(copy > 0, own, 0.0)
                    own += (total - own) * (share / tl.maximum(whole, 1e-30))
                elif outer + copy == 0:
                    own = total
            if get(F, "student") != "":  # known to the compiler, unlike the next  # noqa: SIM102
                if live & (copy == INNER - 1) & (outer == 0):
                    start, step_i, step_x = _begin(s, "OWN_", g_own, o_own, i_own, F)
                    p = out + _offset(s, "OWN") + start
                    _put(p, own, step_i, step_x, first, first, F)


@triton.jit
def _gradient(
    s, addresses, index, columns, grads, g, o, i, g_own, o_own, i_own, first, last, copy, parts,
    F: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of the weight without shares."""
    pair = grads + 2 * _size(s, "LAYER")
    share = _share(s, addresses, index, columns, g * _size(s, "OUT") + o, first, last, F)
    found = tl.zeros((get(F, "inputs"), power(get(F, "taps"))), tl.float32)
    if tl.load(pair) != 0:
        start, step_i, step_x = _begin(s, "", g, o, i, F)
        p = _pointer(pair, 0, get(F, "dtype"), get(F, "unit")) + start
        found = share * _weight(p, step_i, step_x, first, last, F)
    if get(F, "student") == "mean":
        narrow, wide = _size(s, "NARROW_I"), _size(s, "WIDE_I")
        if get(F, "share") == "":
            k = i_own % narrow + tl.arange(0, get(F, "inputs"))[:, None]
            parts *= (wide - k + narrow - 1) // narrow
        share /= parts
    seen = tl.load(pair + 1) != 0
    if get(F, "student") != "mean":
        share, seen = 1.0, seen & (copy == 0)
    if seen:
        start, step_i, step_x = _begin(s, "OWN_", g_own, o_own, i_own, F)
        p = _pointer(pair, 1, get(F, "dtype"), get(F, "unit")) + start
        found += share * _weight(p, step_i, step_x, first, last, F)
    return found


@triton.jit
def _back(
    s, addresses, targets, out, grad, scale, depths, g, o, i, first, last, F: tl.constexpr,
    n: tl.constexpr,
):  # fmt: skip
    """The gradient of a term's carrier goes to its place. Returned are the carrier, and its
    gradient without scale."""
    KIND: tl.constexpr = term(F, n, "kind")
    y, there = _taps(F, n)
    if KIND == "eye":
        k = tl.arange(0, get(F, "inputs"))[:, None]
        return tl.where((k + i == o) & there, 1.0, 0.0), grad
    else:
        INPUTS: tl.constexpr = get(F, "inputs")
        UNIT: tl.constexpr = get(F, "unit")
        SIZE: tl.constexpr = term(F, n, "width")
        START: tl.constexpr = term(F, n, "start") if KIND == "taps" else 0
        STEP: tl.constexpr = term(F, n, "step") if KIND == "taps" else 1
        p, target = _carrier(s, addresses, targets, out, g, o, i, F, n)
        moved, at = grad, y
        if KIND == "point":
            profile = _profile(addresses, _size(s, "FIRST"), g * _size(s, "OUT") + o, F, n)
            moved, at, there = tl.sum(grad * profile, 1, keep_dims=True), 0, True
        elif KIND == "depth":
            moved = tl.sum(grad[:, None, :] * depths, 2)
            at = tl.arange(0, power(expand(F)))[None, :]
            there = at < expand(F)
        carrier = _read(p, at, there, first, last, SIZE, INPUTS, UNIT).to(tl.float32)
        value = (moved * scale).to(get(F, "dtype"))
        _write(target, value, at, there, first, last, START, STEP, SIZE, INPUTS, UNIT)
        return carrier, moved


@triton.jit
def scatter(programs, sizes, addresses, targets, grads, index, out, staging, sums, F: tl.constexpr):
    """Before the products of the backward: from the weights' gradients those of all but products,
    and the gradient as (channels, taps, inputs) for these. ``targets``: where gradients begin."""
    TAPS: tl.constexpr = get(F, "taps")
    program = programs + 4 * tl.program_id(0)
    s = sizes + tl.load(program) * WIDTH
    g_own, o_begin, tile = tl.load(program + 1), tl.load(program + 2), tl.load(program + 3)
    t, channels = _size(s, "FIRST"), _size(s, "CHANNELS")
    inputs = _size(s, "IN", get(F, "unit"))
    origin = _pointer(addresses, t, get(F, "dtype"), get(F, "unit"))
    d_origin = out + tl.load(targets + t) * 16
    k, x = tl.arange(0, get(F, "inputs"))[:, None], tl.arange(0, power(TAPS))[None, :]
    ex = tl.arange(0, power(expand(F)) * power(TAPS))[None, :]
    for outer in range(copies(F, 0) * copies(F, 2)):
        g, in_g, count_g, i_own, i, first, last, columns, depths = _part(
            s, addresses, index, g_own, tile, outer, F
        )
        rows = tile * copies(F, 2) + outer % copies(F, 2)
        total = sums + _offset(s, "SUMS") + rows.to(tl.int64) * channels * (count(F) + 1)
        d_depths = tl.zeros((get(F, "inputs"), power(expand(F)), power(TAPS)), tl.float32)
        for step in range(get(F, "rows") * copies(F, 1)):
            o_own, copy_o = o_begin + step // copies(F, 1), step % copies(F, 1)
            o, in_o, count_o = _copy(s, o_own, copy_o, "NARROW_O", "WIDE_O")
            if in_g & in_o & (o_own < _size(s, "OWN_OUT")):
                channel = g * _size(s, "OUT") + o
                grad = _gradient(
                    s, addresses, index, columns, grads, g, o, i, g_own, o_own, i_own, first,
                    last, outer + copy_o, count_g * count_o, F,
                )  # fmt: skip
                start, step_i, step_x = _begin(s, "", g, o, i, F)
                if count(F) == 0:
                    _put(d_origin + start, grad, step_i, step_x, first, last, F)
                else:
                    scales = _pointer(addresses, t + 1, get(F, "dtype"), 1) + channel
                    w = _weight(origin + start, step_i, step_x, first, last, F)
                    tl.store(total + channel, tl.sum(grad * w))
                    w = grad * tl.load(scales).to(tl.float32)
                    _put(d_origin + start, w, step_i, step_x, first, last, F)
                if count(F, "made") > 0:
                    p = staging + _offset(s, "MADE") + channel.to(tl.int64) * inputs * TAPS + i
                    value = grad.to(staging.dtype.element_ty)
                    some = (x < TAPS) & (k < first) & (k < last)
                    tl.store(p + x * inputs + k, value, mask=some)
                for n in tl.static_range(count(F)):
                    if term(F, n, "kind") != "made":
                        scale = tl.load(scales + (n + 1) * channels).to(tl.float32)
                        scale *= term(F, n, "gain")
                        carrier, moved = _back(
                            s, addresses, targets, out, grad, scale, depths, g, o, i, first, last,
                            F, n,
                        )  # fmt: skip
                        found = tl.sum(carrier * moved) * term(F, n, "gain")
                        tl.store(total + (n + 1) * channels + channel, found)
                        if term(F, n, "kind") == "depth":
                            d_depths += grad[:, None, :] * (carrier * scale)[:, :, None]
        if count(F, "depth") > 0:
            at = channels // _size(s, "OUT") * (o_begin // get(F, "rows")) + g
            at = (at.to(tl.int64) * inputs + i + k) * (expand(F) * TAPS)
            e, tap = ex // power(TAPS), ex % power(TAPS)
            some = (e < expand(F)) & (tap < TAPS) & (k < first) & (k < last) & in_g
            value = tl.reshape(d_depths, (get(F, "inputs"), power(expand(F)) * power(TAPS)))
            tl.store(sums + _offset(s, "PARTS") + at + e * TAPS + tap, value, mask=some)


@triton.jit
def prepare(
    programs, items, addresses, staging, dtype: tl.constexpr, TAPS: tl.constexpr,
    BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Operands of a product, in its type: a row of ``right``, or of ``left``."""
    at = programs + 3 * tl.program_id(0)
    m = items + tl.load(at) * ITEM
    row = tl.load(at + 1)
    hidden = tl.load(m + item("HIDDEN")).to(tl.int32) // UNIT * UNIT
    made = staging.dtype.element_ty
    begin = 0
    if tl.load(at + 2) == 0:
        inputs = tl.load(m + item("IN")).to(tl.int32) // UNIT * UNIT
        source = _pointer(addresses, tl.load(m + item("FACTOR")), dtype, UNIT)
        source += row.to(tl.int64) * inputs
        target = staging + tl.load(m + item("RIGHT")) * 16 + row.to(tl.int64) * inputs
        while begin < inputs:
            i = begin + tl.arange(0, BLOCK)
            value = tl.load(source + i, mask=i < inputs, other=0).to(tl.float32)
            eye = tl.where(tl.load(m + item("EYE")) != 0, row % hidden % inputs, -1)
            value += tl.where(i == eye, 1.0, 0.0)
            tl.store(target + i, value.to(made), mask=i < inputs)
            begin += BLOCK
    else:
        first, x, h = _left(row, hidden, TAPS, BLOCK)
        source = _pointer(addresses, tl.load(m + item("CARRIER")), dtype, UNIT) + first
        target = staging + tl.load(m + item("LEFT")) * 16 + first
        while begin < hidden:
            last = hidden - begin
            value = _read(source + begin * TAPS, x, x < TAPS, last, last, TAPS, h.shape[0], UNIT)
            tl.store(target + x * hidden + begin + h, value.to(made), mask=(x < TAPS) & (h < last))
            begin += h.shape[0]


@triton.jit
def _left(row, hidden, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """Where a row of ``left`` begins, in memory and as an operand; taps and channels of a block."""
    x = tl.arange(0, power(TAPS))[None, :]
    h = tl.arange(0, BLOCK // power(TAPS))[:, None]
    return row.to(tl.int64) * hidden * TAPS, x, h


@triton.jit
def finish(
    programs, items, addresses, targets, out, staging, dtype: tl.constexpr, TAPS: tl.constexpr,
    BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Between the products of the backward: a row of the gradient of ``left``, and of its scale;
    and ``left`` itself times the scale, as the gradient of ``right`` wants it."""
    at = programs + 3 * tl.program_id(0)
    m = items + tl.load(at) * ITEM
    row = tl.load(at + 1)
    hidden = tl.load(m + item("HIDDEN")).to(tl.int32) // UNIT * UNIT
    first, x, h = _left(row, hidden, TAPS, BLOCK)
    carrier = tl.load(m + item("CARRIER"))
    source = _pointer(addresses, carrier, dtype, UNIT) + first
    scaled = staging + tl.load(m + item("LEFT")) * 16 + first
    target = out + tl.load(targets + carrier) * 16 + first
    moved = staging + tl.load(m + item("MOVED")) * 16 + first
    scales = tl.load(m + item("SCALES"))
    k = tl.load(m + item("SCALE")) * tl.load(m + item("CHANNELS")) + row
    scale = tl.load(_pointer(addresses, scales, dtype, 1) + k).to(tl.float32)
    total = tl.zeros((BLOCK // power(TAPS), power(TAPS)), tl.float32)
    begin = 0
    while begin < hidden:
        last = hidden - begin
        y, some = x * hidden + begin + h, (x < TAPS) & (h < last)
        grad = tl.load(moved + y, mask=some, other=0).to(tl.float32)
        p, to = source + begin * TAPS, target + begin * TAPS
        value = _read(p, x, x < TAPS, last, last, TAPS, h.shape[0], UNIT).to(tl.float32)
        total += grad * value
        tl.store(scaled + y, (value * scale).to(staging.dtype.element_ty), mask=some)
        value = (grad * scale).to(dtype)
        _write(to, value, x, x < TAPS, last, last, 0, 1, TAPS, h.shape[0], UNIT)
        begin += h.shape[0]
    tl.store(out + tl.load(targets + scales) * 16 + k, tl.sum(total).to(dtype))


@triton.jit
def reduce(programs, table, targets, source, out, BLOCK: tl.constexpr):
    """``out[k] = sum over p of source[p * step + k]``; of the table: where a source begins, how
    many there are, the step between them, the number of the target and where in it, its size."""
    at = programs + 2 * tl.program_id(0)
    m = table + tl.load(at) * 6
    k = tl.load(at + 1) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(m + 5)
    step = tl.load(m + 2)
    p = source + tl.load(m)
    total = tl.zeros((BLOCK,), tl.float32)
    left = tl.load(m + 1)
    while left > 0:
        total += tl.load(p + k, mask=k < size, other=0).to(tl.float32)
        p += step
        left -= 1
    target = out + tl.load(targets + tl.load(m + 3)) * 16 + tl.load(m + 4)
    tl.store(target + k, total.to(out.dtype.element_ty), mask=k < size)
