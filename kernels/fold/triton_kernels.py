"""The fold of many layers as Triton kernels; ``launch`` fills their tables, ``reference`` says what
they compute.

A program takes one output row of one layer and walks over its inputs and taps. What it has to know
of the layer stands in a row of a table of 64-bit integers: sizes, strides, and pointers (zero:
there is no such tensor). Sums over a row end in that program, sums over rows (of ``Separable``'s
depthwise kernels) take two stages, so that the result is the same every time. All sums are in
float32.

Loops are ``while``: the interpreter of Triton 3.6 refuses ranges with bounds of run time.
"""

from __future__ import annotations

import triton
import triton.language as tl

# --- columns of a layer's row, by what they hold
OUTPUTS = tl.constexpr(0)
INPUTS = tl.constexpr(1)
TAPS = tl.constexpr(2)
EXPAND = tl.constexpr(3)
HIDDEN = tl.constexpr(4)
CHANNELS = tl.constexpr(5)
ORIGIN = tl.constexpr(6)
SCALES = tl.constexpr(7)
MAIN = tl.constexpr(8)  # strides (groups, out, in, taps) of stored weights
SHARE = tl.constexpr(12)
WIDE = tl.constexpr(13)  # the teacher's weight, or its gradient
OWN = tl.constexpr(14)  # the student's
OWN_STRIDES = tl.constexpr(15)
CUT_G = tl.constexpr(19)  # each two numbers: wide, narrow
CUT_O = tl.constexpr(21)
CUT_I = tl.constexpr(23)
FILTER = tl.constexpr(25)  # two slots of w[o, i] f[o, x]: w, f, row stride of f, scale
FULL = tl.constexpr(33)  # two slots of w[o, i, x]: w, scale
MADE = tl.constexpr(37)  # the product (channels, taps, in)
MADE_SCALE = tl.constexpr(38)
LEFT = tl.constexpr(39)  # then its strides (channels, hidden, taps)
LEFT_STRIDES = tl.constexpr(40)
RIGHT = tl.constexpr(43)
FIRST = tl.constexpr(44)
EYE = tl.constexpr(45)
POINT = tl.constexpr(46)  # the two factors of a depthwise-separable kernel
DEPTH = tl.constexpr(47)
DEPTH_SCALE = tl.constexpr(48)
D_ORIGIN = tl.constexpr(49)  # gradients, by what they are of
D_SCALES = tl.constexpr(50)
D_FILTER = tl.constexpr(51)
D_FULL = tl.constexpr(53)
D_FLAT = tl.constexpr(55)  # of the weight as (channels, taps, in), plain and times a scale
D_SCALED = tl.constexpr(56)
D_MOVED = tl.constexpr(57)  # (channels, taps, hidden)
D_LEFT = tl.constexpr(58)
D_POINT = tl.constexpr(59)
D_PARTS = tl.constexpr(60)  # (splits, *depthwise kernel)
D_DEPTH = tl.constexpr(61)
SPLIT = tl.constexpr(62)
COPY = tl.constexpr(63)  # left in the type of products
WIDTH = tl.constexpr(64)  # how many numbers a row has


@triton.jit
def _int(t, column: tl.constexpr):
    return tl.load(t + column).to(tl.int32)


@triton.jit
def _pointer(t, column: tl.constexpr, dtype: tl.constexpr):
    return tl.load(t + column).to(tl.pointer_type(dtype))


@triton.jit
def _there(t, column: tl.constexpr):
    return tl.load(t + column) != 0


@triton.jit
def _scale(t, row, index, dtype: tl.constexpr):
    """A branch's scale of a row; 1 in a layer without scales."""
    at = _pointer(t, SCALES, dtype) + index * _int(t, CHANNELS) + row
    return tl.load(at, mask=_there(t, SCALES), other=1.0).to(tl.float32)


@triton.jit
def _line(t, strides: tl.constexpr, g, o):
    """By four strides: where the row (g, o) begins, the step of inputs, the step of taps."""
    start = g * tl.load(t + strides) + o * tl.load(t + strides + 1)
    return start, tl.load(t + strides + 2), tl.load(t + strides + 3)


@triton.jit
def _cut(t, column: tl.constexpr, index):
    """The student's index of a teacher's, and whether there is one."""
    wide, narrow = _int(t, column), _int(t, column + 1)
    inner = index % wide
    return index // wide * narrow + inner, inner < narrow


@triton.jit
def _own(t, g, o):
    """``_line`` of the student's weight, and whether it has the row."""
    g_own, in_g = _cut(t, CUT_G, g)
    o_own, in_o = _cut(t, CUT_O, o)
    start, step_i, step_x = _line(t, OWN_STRIDES, g_own, o_own)
    return start, step_i, step_x, in_g & in_o & _there(t, OWN)


@triton.jit
def _full(t, slot: tl.constexpr, row, dtype: tl.constexpr):
    """A summand w[o, i, x]: w, whether it is there, its scale."""
    scale = _scale(t, row, _int(t, FULL + 2 * slot + 1), dtype)
    return _pointer(t, FULL + 2 * slot, dtype), _there(t, FULL + 2 * slot), scale


@triton.jit
def _filter(t, slot: tl.constexpr, row, dtype: tl.constexpr):
    """A summand w[o, i] f[o, x]: w, f of the row, whether it is there, its scale."""
    at: tl.constexpr = FILTER + 4 * slot
    taps = _pointer(t, at + 1, tl.float32) + row * _int(t, at + 2)
    scale = _scale(t, row, _int(t, at + 3), dtype)
    return _pointer(t, at, dtype), taps, _there(t, at), scale


@triton.jit
def _store_sum(t, row, index, sums, there, dtype: tl.constexpr):
    """The gradient of a row's scale."""
    to = _pointer(t, D_SCALES, dtype) + index * _int(t, CHANNELS) + row
    tl.store(to, tl.sum(sums).to(dtype), mask=there)


@triton.jit
def _steps(t, row):
    """Of ``left``: where a row begins, the steps of its hidden channels and of its taps."""
    start = row * tl.load(t + LEFT_STRIDES)
    return start, tl.load(t + LEFT_STRIDES + 1), tl.load(t + LEFT_STRIDES + 2)


@triton.jit
def _prepare(t, row, kind, dtype: tl.constexpr, made: tl.constexpr, BLOCK: tl.constexpr):
    """Operands of a product, in its type."""
    if kind == 1:
        _prepare_right(t, row, dtype, made, BLOCK)
    else:
        _prepare_left(t, row, dtype, made, BLOCK)


@triton.jit
def _prepare_right(t, row, dtype: tl.constexpr, made: tl.constexpr, BLOCK: tl.constexpr):
    """A row of ``right = first + eye``."""
    n = _int(t, INPUTS)
    first = _pointer(t, FIRST, dtype) + row.to(tl.int64) * n
    right = _pointer(t, RIGHT, made) + row.to(tl.int64) * n
    one = tl.where(_int(t, EYE) != 0, row % _int(t, HIDDEN) % n, -1)
    start = 0
    while start < n:
        i = start + tl.arange(0, BLOCK)
        value = tl.load(first + i, mask=i < n, other=0).to(tl.float32)
        value += tl.where(i == one, 1.0, 0.0)
        tl.store(right + i, value.to(made), mask=i < n)
        start += BLOCK


@triton.jit
def _prepare_left(t, row, dtype: tl.constexpr, made: tl.constexpr, BLOCK: tl.constexpr):
    """A row of ``left`` as (taps, hidden)."""
    hidden = _int(t, HIDDEN)
    total = hidden * _int(t, TAPS)
    first, step_h, step_x = _steps(t, row)
    left = _pointer(t, LEFT, dtype) + first
    copy = _pointer(t, COPY, made) + row.to(tl.int64) * total
    start = 0
    while start < total:
        k = start + tl.arange(0, BLOCK)
        mask = k < total
        value = tl.load(left + k % hidden * step_h + k // hidden * step_x, mask=mask, other=0)
        tl.store(copy + k, value.to(made), mask=mask)
        start += BLOCK


@triton.jit
def prepare(table, programs, dtype: tl.constexpr, made: tl.constexpr, BLOCK: tl.constexpr):
    """Before the products of the forward."""
    at = programs + 3 * tl.program_id(0)
    t = table + tl.load(at).to(tl.int64) * WIDTH
    _prepare(t, tl.load(at + 1), tl.load(at + 2), dtype, made, BLOCK)


@triton.jit
def combine(
    table,
    programs,
    dtype: tl.constexpr,
    made: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPANDED: tl.constexpr,
):
    """After them: one row of the teacher's and of the student's weight."""
    program = programs + 3 * tl.program_id(0)
    t = table + tl.load(program).to(tl.int64) * WIDTH
    row = tl.load(program + 1)
    n, taps, expand = _int(t, INPUTS), _int(t, TAPS), _int(t, EXPAND)
    g, o = row // _int(t, OUTPUTS), row % _int(t, OUTPUTS)
    main_start, main_i, main_x = _line(t, MAIN, g, o)
    origin = _pointer(t, ORIGIN, dtype) + main_start
    wide = _pointer(t, WIDE, dtype) + main_start
    own_start, own_i, own_x, in_own = _own(t, g, o)
    own = _pointer(t, OWN, dtype) + own_start
    share, has_share = _pointer(t, SHARE, tl.float32), _there(t, SHARE)
    product, has_product = _pointer(t, MADE, made), _there(t, MADE)
    point, depth = _pointer(t, POINT, dtype), _pointer(t, DEPTH, dtype)
    full_0, has_full_0, s_full_0 = _full(t, 0, row, dtype)
    full_1, has_full_1, s_full_1 = _full(t, 1, row, dtype)
    filter_0, taps_0, has_0, s_0 = _filter(t, 0, row, dtype)
    filter_1, taps_1, has_1, s_1 = _filter(t, 1, row, dtype)
    s_origin = _scale(t, row, 0, dtype)
    s_product = _scale(t, row, _int(t, MADE_SCALE), dtype)
    s_depth = _scale(t, row, _int(t, DEPTH_SCALE), dtype)
    e = tl.arange(0, EXPANDED)
    start = 0
    while start < n:
        i = start + tl.arange(0, BLOCK)
        mask = i < n
        flat = row.to(tl.int64) * n + i
        to_own, in_i = _cut(t, CUT_I, i)
        to_own = to_own * own_i
        shares = tl.load(share + flat, mask=mask & has_share, other=1.0)
        pairs = mask[:, None] & (e < expand)[None, :]
        points = tl.load(point + flat[:, None] * expand + e[None, :], mask=pairs, other=0)
        points = points.to(tl.float32) * s_depth
        depths = ((g * n + i)[:, None] * expand + e[None, :]) * taps
        w_0 = tl.load(filter_0 + flat, mask=mask & has_0, other=0).to(tl.float32) * s_0
        w_1 = tl.load(filter_1 + flat, mask=mask & has_1, other=0).to(tl.float32) * s_1
        x = 0
        while x < taps:
            total = tl.load(origin + i * main_i + x * main_x, mask=mask, other=0)
            total = total.to(tl.float32) * s_origin
            at = flat * taps + x
            value = tl.load(full_0 + at, mask=mask & has_full_0, other=0)
            total += value.to(tl.float32) * s_full_0
            value = tl.load(full_1 + at, mask=mask & has_full_1, other=0)
            total += value.to(tl.float32) * s_full_1
            total += w_0 * tl.load(taps_0 + x, mask=has_0, other=0)
            total += w_1 * tl.load(taps_1 + x, mask=has_1, other=0)
            at = (row.to(tl.int64) * taps + x) * n + i
            value = tl.load(product + at, mask=mask & has_product, other=0)
            total += value.to(tl.float32) * s_product
            value = tl.load(depth + depths + x, mask=pairs, other=0)
            total += tl.sum(value.to(tl.float32) * points, axis=1)
            tl.store(wide + i * main_i + x * main_x, (total * shares).to(dtype), mask=mask)
            tl.store(own + to_own + x * own_x, total.to(dtype), mask=mask & in_i & in_own)
            x += 1
        start += BLOCK


@triton.jit
def scatter(
    table,
    programs,
    dtype: tl.constexpr,
    made: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPANDED: tl.constexpr,
):
    """Before the products of the backward: from one row of the weights' gradients those of all
    but products and depthwise kernels, and the row as (taps, in), plain and times its scale."""
    program = programs + 3 * tl.program_id(0)
    t = table + tl.load(program).to(tl.int64) * WIDTH
    row, kind = tl.load(program + 1), tl.load(program + 2)
    if kind == 0:
        _scatter(t, row, dtype, made, BLOCK, EXPANDED)
    else:
        _prepare(t, row, kind, dtype, made, BLOCK)


@triton.jit
def _scatter(
    t, row, dtype: tl.constexpr, made: tl.constexpr, BLOCK: tl.constexpr, EXPANDED: tl.constexpr
):
    n, taps, expand = _int(t, INPUTS), _int(t, TAPS), _int(t, EXPAND)
    g, o = row // _int(t, OUTPUTS), row % _int(t, OUTPUTS)
    main_start, main_i, main_x = _line(t, MAIN, g, o)
    origin = _pointer(t, ORIGIN, dtype) + main_start
    d_origin = _pointer(t, D_ORIGIN, dtype) + main_start
    wide, has_wide = _pointer(t, WIDE, dtype) + main_start, _there(t, WIDE)
    own_start, own_i, own_x, in_own = _own(t, g, o)
    own = _pointer(t, OWN, dtype) + own_start
    share, has_share = _pointer(t, SHARE, tl.float32), _there(t, SHARE)
    d_flat, has_flat = _pointer(t, D_FLAT, made), _there(t, D_FLAT)
    d_scaled, has_scaled = _pointer(t, D_SCALED, made), _there(t, D_SCALED)
    point, depth = _pointer(t, POINT, dtype), _pointer(t, DEPTH, dtype)
    d_point = _pointer(t, D_POINT, dtype)
    full_0, has_full_0, s_full_0 = _full(t, 0, row, dtype)
    full_1, has_full_1, s_full_1 = _full(t, 1, row, dtype)
    d_full_0, d_full_1 = _pointer(t, D_FULL, dtype), _pointer(t, D_FULL + 1, dtype)
    filter_0, taps_0, has_0, s_0 = _filter(t, 0, row, dtype)
    filter_1, taps_1, has_1, s_1 = _filter(t, 1, row, dtype)
    d_filter_0, d_filter_1 = _pointer(t, D_FILTER, dtype), _pointer(t, D_FILTER + 1, dtype)
    s_origin = _scale(t, row, 0, dtype)
    s_product = _scale(t, row, _int(t, MADE_SCALE), dtype)
    s_depth = _scale(t, row, _int(t, DEPTH_SCALE), dtype)
    e = tl.arange(0, EXPANDED)
    of_origin = tl.zeros((BLOCK,), tl.float32)
    of_full_0 = tl.zeros((BLOCK,), tl.float32)
    of_full_1 = tl.zeros((BLOCK,), tl.float32)
    of_filter_0 = tl.zeros((BLOCK,), tl.float32)
    of_filter_1 = tl.zeros((BLOCK,), tl.float32)
    of_depth = tl.zeros((BLOCK,), tl.float32)
    start = 0
    while start < n:
        i = start + tl.arange(0, BLOCK)
        mask = i < n
        flat = row.to(tl.int64) * n + i
        to_own, in_i = _cut(t, CUT_I, i)
        to_own = to_own * own_i
        shares = tl.load(share + flat, mask=mask & has_share, other=1.0)
        pairs = mask[:, None] & (e < expand)[None, :]
        depths = ((g * n + i)[:, None] * expand + e[None, :]) * taps
        sum_0 = tl.zeros((BLOCK,), tl.float32)
        sum_1 = tl.zeros((BLOCK,), tl.float32)
        sums = tl.zeros((BLOCK, EXPANDED), tl.float32)
        x = 0
        while x < taps:
            main = i * main_i + x * main_x
            grad = tl.load(wide + main, mask=mask & has_wide, other=0).to(tl.float32) * shares
            value = tl.load(own + to_own + x * own_x, mask=mask & in_i & in_own, other=0)
            grad += value.to(tl.float32)
            value = tl.load(origin + main, mask=mask, other=0)
            of_origin += grad * value.to(tl.float32)
            tl.store(d_origin + main, (grad * s_origin).to(dtype), mask=mask)
            at = flat * taps + x
            value = tl.load(full_0 + at, mask=mask & has_full_0, other=0)
            of_full_0 += grad * value.to(tl.float32)
            tl.store(d_full_0 + at, (grad * s_full_0).to(dtype), mask=mask & has_full_0)
            value = tl.load(full_1 + at, mask=mask & has_full_1, other=0)
            of_full_1 += grad * value.to(tl.float32)
            tl.store(d_full_1 + at, (grad * s_full_1).to(dtype), mask=mask & has_full_1)
            sum_0 += grad * tl.load(taps_0 + x, mask=has_0, other=0)
            sum_1 += grad * tl.load(taps_1 + x, mask=has_1, other=0)
            value = tl.load(depth + depths + x, mask=pairs, other=0)
            sums += grad[:, None] * value.to(tl.float32)
            at = (row.to(tl.int64) * taps + x) * n + i
            tl.store(d_flat + at, grad.to(made), mask=mask & has_flat)
            tl.store(d_scaled + at, (grad * s_product).to(made), mask=mask & has_scaled)
            x += 1
        value = tl.load(filter_0 + flat, mask=mask & has_0, other=0)
        of_filter_0 += sum_0 * value.to(tl.float32)
        tl.store(d_filter_0 + flat, (sum_0 * s_0).to(dtype), mask=mask & has_0)
        value = tl.load(filter_1 + flat, mask=mask & has_1, other=0)
        of_filter_1 += sum_1 * value.to(tl.float32)
        tl.store(d_filter_1 + flat, (sum_1 * s_1).to(dtype), mask=mask & has_1)
        at = flat[:, None] * expand + e[None, :]
        value = tl.load(point + at, mask=pairs, other=0)
        of_depth += tl.sum(sums * value.to(tl.float32), axis=1)
        tl.store(d_point + at, (sums * s_depth).to(dtype), mask=pairs)
        start += BLOCK
    _store_sum(t, row, 0, of_origin, _there(t, D_SCALES), dtype)
    _store_sum(t, row, _int(t, FULL + 1), of_full_0, has_full_0, dtype)
    _store_sum(t, row, _int(t, FULL + 3), of_full_1, has_full_1, dtype)
    _store_sum(t, row, _int(t, FILTER + 3), of_filter_0, has_0, dtype)
    _store_sum(t, row, _int(t, FILTER + 7), of_filter_1, has_1, dtype)
    _store_sum(t, row, _int(t, DEPTH_SCALE), of_depth, _there(t, POINT), dtype)


@triton.jit
def finish(
    table,
    programs,
    dtype: tl.constexpr,
    made: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPANDED: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """After them: a row of the gradient of ``left`` (kind 0), or a part of that of a depthwise
    kernel, summed over ``SPLITS`` rows of the weight (kind 1)."""
    program = programs + 3 * tl.program_id(0)
    t = table + tl.load(program).to(tl.int64) * WIDTH
    index, kind = tl.load(program + 1), tl.load(program + 2)
    if kind == 0:
        _finish_left(t, index, dtype, made, BLOCK)
    else:
        _finish_depth(t, index, dtype, made, EXPANDED, ROWS, SPLITS)


@triton.jit
def _finish_left(t, row, dtype: tl.constexpr, made: tl.constexpr, BLOCK: tl.constexpr):
    hidden = _int(t, HIDDEN)
    total = hidden * _int(t, TAPS)
    index = _int(t, MADE_SCALE)
    scale = _scale(t, row, index, dtype)
    first, step_h, step_x = _steps(t, row)
    left, d_left = _pointer(t, LEFT, dtype) + first, _pointer(t, D_LEFT, dtype) + first
    moved = _pointer(t, D_MOVED, made) + row.to(tl.int64) * total
    sums = tl.zeros((BLOCK,), tl.float32)
    start = 0
    while start < total:
        k = start + tl.arange(0, BLOCK)
        mask = k < total
        at = k % hidden * step_h + k // hidden * step_x
        grad = tl.load(moved + k, mask=mask, other=0).to(tl.float32)
        sums += grad * tl.load(left + at, mask=mask, other=0).to(tl.float32)
        tl.store(d_left + at, (grad * scale).to(dtype), mask=mask)
        start += BLOCK
    _store_sum(t, row, index, sums, True, dtype)


@triton.jit
def _finish_depth(
    t,
    index,
    dtype: tl.constexpr,
    made: tl.constexpr,
    EXPANDED: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """``index``: of (split, group, block of ``ROWS`` inputs)."""
    n, taps, expand, outputs = _int(t, INPUTS), _int(t, TAPS), _int(t, EXPAND), _int(t, OUTPUTS)
    channels = _int(t, CHANNELS)
    blocks = tl.cdiv(n, ROWS)
    i = index % blocks * ROWS + tl.arange(0, ROWS)
    g = index // blocks % (channels // outputs)
    split = index // blocks // (channels // outputs)
    e = tl.arange(0, EXPANDED)
    pairs = (i < n)[:, None] & (e < expand)[None, :]
    scales = _pointer(t, SCALES, dtype) + _int(t, DEPTH_SCALE) * channels
    size = (channels // outputs) * n * expand * taps
    parts = _pointer(t, D_PARTS, tl.float32) + split.to(tl.int64) * size
    flat, point = _pointer(t, D_FLAT, made), _pointer(t, POINT, dtype)
    x = 0
    while x < taps:
        sums = tl.zeros((ROWS, EXPANDED), tl.float32)
        o = split * SPLITS
        while o < tl.minimum(outputs, (split + 1) * SPLITS):
            row = (g * outputs + o).to(tl.int64)
            grad = tl.load(flat + (row * taps + x) * n + i, mask=i < n, other=0)
            grad = grad.to(tl.float32) * tl.load(scales + row).to(tl.float32)
            at = (row * n + i)[:, None] * expand + e[None, :]
            sums += grad[:, None] * tl.load(point + at, mask=pairs, other=0).to(tl.float32)
            o += 1
        at = ((g * n + i)[:, None] * expand + e[None, :]) * taps + x
        tl.store(parts + at, sums, mask=pairs)
        x += 1


@triton.jit
def reduce(table, programs, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """The parts of depthwise kernels' gradients -> their sum."""
    program = programs + 3 * tl.program_id(0)
    t = table + tl.load(program).to(tl.int64) * WIDTH
    at = tl.load(program + 1) * BLOCK + tl.arange(0, BLOCK)
    groups = _int(t, CHANNELS) // _int(t, OUTPUTS)
    size = groups * _int(t, INPUTS) * _int(t, EXPAND) * _int(t, TAPS)
    sums = tl.zeros((BLOCK,), tl.float32)
    parts, splits = _pointer(t, D_PARTS, tl.float32) + at, _int(t, SPLIT)
    split = tl.full([], 0, tl.int64)
    while split < splits:
        part = parts + split * size
        sums += tl.load(part, mask=at < size, other=0)
        split += 1
    tl.store(_pointer(t, D_DEPTH, dtype) + at, sums.to(dtype), mask=at < size)
