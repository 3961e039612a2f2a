"""The laws of the axis algebra, as properties of random axes, and the examples of the design."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpdfx.algebra.axes import ONE, Axis, Leaf, Product, Sum, leaves, paths, product, sum_
from gpdfx.algebra.frozen import Frozen, freeze, share_table
from gpdfx.algebra.gather import gather
from gpdfx.algebra.solver import Reason, Solver
from gpdfx.algebra.widths import choose_widths, width_of
from gpdfx.errors import AxisConflict
from gpdfx.kernels import copies

law = settings(max_examples=100, deadline=None)
HERE = Reason("here")


# --------------------------------------------------------------------------- random axes
class Spec(NamedTuple):
    """An axis as plain data, so that several solvers can build the same one."""

    size: int
    tag: int = 0  # leaves of equal size and tag are one leaf
    op: str = ""
    parts: tuple[Any, ...] = ()


def node(op: str, parts: list[Spec]) -> Spec:
    sizes = [p.size for p in parts]
    return Spec(math.prod(sizes) if op == "x" else sum(sizes), 0, op, tuple(parts))


def draw_spec(draw: Any, budget: int, depth: int, tag: Callable[[], int], least: int) -> Spec:
    """Leaves of ``least`` to 12, products and sums of two or three parts, within the budget."""
    op = draw(st.sampled_from(["", "x", "x", "+"])) if depth and budget >= 4 else ""
    if not op:
        return Spec(draw(st.integers(least, max(2, min(12, budget)))), tag())
    parts: list[Spec] = []
    for left in range(draw(st.integers(2, 3)), 0, -1):
        share = round(budget ** (1 / left)) if op == "x" else budget // left
        parts.append(draw_spec(draw, max(2, share), depth - 1, tag, least))
        budget = budget // parts[-1].size if op == "x" else budget - parts[-1].size
        if budget < 2:
            break
    return node(op, parts)


def draw_coarser(draw: Any, spec: Spec, tag: Callable[[], int]) -> Spec:
    """The same axis known less well: neighbouring factors or terms become one new leaf."""
    if not spec.parts or draw(st.integers(0, 3)) == 0:
        return Spec(spec.size, tag())
    parts, rest = [], list(spec.parts)
    while rest:
        k = draw(st.integers(1, len(rest))) if draw(st.booleans()) else 1
        merged = Spec(node(spec.op, rest[:k]).size, tag())
        parts.append(draw_coarser(draw, rest[0], tag) if k == 1 else merged)
        rest = rest[k:]
    return node(spec.op, parts)


@st.composite
def specs(draw: Any, budget: int = 500, depth: int = 3) -> Spec:
    """One axis, whose leaves may recur and may have size one."""
    return draw_spec(draw, budget, depth, lambda: draw(st.integers(0, 3)), 1)


@st.composite
def families(draw: Any, coarser: int) -> list[Spec]:
    """An axis of distinct leaves, then coarser forms of it: they unify, whatever the order."""
    tag = itertools.count().__next__
    fine = draw_spec(draw, 500, 3, tag, 2)
    return [fine, *(draw_coarser(draw, fine, tag) for _ in range(coarser))]


@st.composite
def pairs(draw: Any) -> list[Spec]:
    """Two axes of one size, the second of other factors or terms: they may unify or not."""
    few = st.integers(0, 5)
    fine = draw_spec(draw, 100, 3, lambda: draw(few), 1)
    other = node(fine.op, draw(st.permutations(fine.parts))) if fine.parts else fine
    return [draw_coarser(draw, spec, lambda: draw(few)) for spec in (fine, other)]


class Build:
    """A solver, and what was built in it."""

    def __init__(self, *these: Spec) -> None:
        self.solver, self.pool = Solver(), dict[Spec, Axis]()
        self.axes = [self(spec) for spec in these]

    def __call__(self, spec: Spec) -> Axis:
        if spec.parts:
            return (product if spec.op == "x" else sum_)(*map(self, spec.parts))
        if spec not in self.pool:
            self.pool[spec] = self.solver.leaf(spec.size)
        return self.pool[spec]

    def state(self) -> str:
        """All tables of the solver."""
        return repr([t for name, t in vars(self.solver).items() if not name.startswith("_")])

    def maps(self, *axes: Axis, seed: int = 0) -> list[list[int]]:
        """Maps of axes where free leaves get up to two more indices."""
        grow = dict.fromkeys(self.solver.reason, 0)
        frozen = [
            freeze(self.solver.resolve(a), lambda x: x.size + grow.get(x, (x.order + seed) % 3))
            for a in axes
        ]
        return [f.map.tolist() for f in frozen]

    def meaning(self, *axes: Axis) -> list[Any]:
        """What axes mean, whatever their leaves are called: for each free leaf its marks, and the
        maps of all axes if it alone widens."""
        s = self.solver
        every = [s.resolve(a) for a in axes]
        free = {x for a in every for x in leaves(a) if x not in s.reason}
        return sorted(
            (leaf.size, leaf in s.outer, leaf in s.inner)
            + tuple(tuple(freeze(a, lambda x, w=leaf: x.size + (x is w)).map) for a in every)
            for leaf in free
        )


def by_hand(spec: Spec, width: Callable[[Spec], int]) -> list[int]:
    """The Kronecker rule and concatenation, spelled out."""
    if not spec.parts:
        return [i % spec.size for i in range(width(spec))]
    own, sizes = [by_hand(p, width) for p in spec.parts], [p.size for p in spec.parts]
    if spec.op == "+":
        return [sum(sizes[:k]) + i for k, part in enumerate(own) for i in part]
    strides = [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
    return [int(np.dot(index, strides)) for index in itertools.product(*own)]


def is_normal(axis: Axis) -> bool:
    if isinstance(axis, Leaf) or axis == ONE:
        return axis == ONE or axis.size > 1
    parts = axis.factors if isinstance(axis, Product) else axis.terms
    first_is_leaf = isinstance(axis, Sum) or (isinstance(parts[0], Leaf) and ONE not in parts)
    flat = all(type(p) is not type(axis) and is_normal(p) for p in parts if p != ONE)
    return first_is_leaf and flat and len(parts) > 1


def first_of_blocks(frozen: Frozen) -> list[int]:
    outer, wide, narrow = frozen.blocks
    return np.arange(frozen.teacher).reshape(outer, wide)[:, :narrow].ravel().tolist()


# --------------------------------------------------------------------------- normal form, maps
@law
@given(specs())
def test_normal_form(spec: Spec) -> None:
    """Products and sums flatten, ones drop, sizes multiply and add."""
    build = Build(spec)
    assert build.axes[0].size == spec.size
    assert is_normal(build.axes[0])
    assert build.solver.resolve(build.axes[0]) == build.axes[0]


@law
@given(st.tuples(*[specs(12, 2)] * 3))
def test_operations(three: tuple[Spec, ...]) -> None:
    """Both are associative, 1 is neutral, an outer sum distributes and an inner one does not."""
    build = Build(*three)
    a, b, c = build.axes
    assert sum_(a, sum_(b, c)) == sum_(sum_(a, b), c) == sum_(a, b, c)
    assert product(product(a, b), c) == product(a, b, c)
    one, other = build.maps(product(a, product(b, c)), product(a, b, c))
    assert one == other
    assert product(a, ONE) == product(ONE, a) == product(a, Leaf(1, 99)) == a
    assert product(sum_(a, b), c) == sum_(product(a, c), product(b, c))
    leaf, ones = build.solver.leaf(5), sum_(ONE, ONE)
    assert sum_(a, build.solver.leaf(0)) == a
    assert product(leaf, ones, ones) == product(leaf, sum_(ones, ones))
    assert product(leaf, sum_(a, b)) == Product((leaf, sum_(a, b)))


@law
@given(specs(200), st.integers(0, 2))
def test_freeze(spec: Spec, seed: int) -> None:
    """The map of a product is the Kronecker rule, of a sum concatenation; both are onto."""
    build = Build(spec)
    grown = {s: s.size + (a.order + seed) % 3 for s, a in build.pool.items() if a != ONE}
    frozen = freeze(build.axes[0], lambda x: x.size + (x.order + seed) % 3)
    assert frozen.map.tolist() == by_hand(spec, lambda s: grown.get(s, 1))
    assert set(frozen.map) == set(range(spec.size))
    assert frozen.student == spec.size


surjections = st.lists(st.integers(1, 20), min_size=1, max_size=8).flatmap(
    lambda copies: st.permutations([i for i, n in enumerate(copies) for _ in range(n)])
)


@law
@given(surjections)
def test_frozen(index: list[int]) -> None:
    """Copies count, ranks number them, first copies come first, classes are (copies, rank)."""
    frozen = Frozen(max(index) + 1, np.array(index))
    own, sizes = frozen.classes
    for i, s in enumerate(index):
        assert frozen.rank[i] == index[:i].count(s)
        assert frozen.first[s] == index.index(s)
        assert sizes[own[i]] == frozen.copies[s] == index.count(s)
        assert np.array_equal(np.sort(own[frozen.map == s]), np.flatnonzero(sizes == sizes[own[i]]))
    assert frozen.even == (len(set(map(index.count, index))) == 1)
    assert frozen.wide == (len(index) > frozen.student)
    changes = [i for i in range(1, len(index)) if own[i] != own[i - 1]]
    assert frozen.run == math.gcd(len(index), *changes)
    assert frozen.blocks == (0, 0, 0) or first_of_blocks(frozen) == frozen.first.tolist()


@law
@given(st.tuples(surjections, surjections), st.sampled_from([0, 2**14]))
def test_gather(indices: tuple[list[int], list[int]], block: int) -> None:
    """By blocks or by index: the student's values at the teacher's indices, in its format."""
    own_order = [sorted(x) if len(x) == max(x) + 1 else x for x in indices]  # if nothing widens
    maps = [Frozen(max(index) + 1, np.array(index)) for index in own_order]
    own = torch.randn(*(m.student for m in maps), 2, 3)
    whole = [Frozen(n, np.arange(n)) for n in (2, 3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpdfx.algebra.gather.BLOCK", block)
        for x in (own, own.contiguous(memory_format=torch.channels_last)):
            wide = gather(x, (*maps, *whole))
            assert torch.equal(wide, own[np.ix_(*own_order)])
            assert wide.is_contiguous() == (x.is_contiguous() or wide.shape[1] == 1)


@law
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 3), st.integers(1, 9))
def test_blocks(sizes: list[int], which: int, more: int) -> None:
    """Where one factor widens, first copies are the first ``narrow`` of each ``wide`` indices, and
    whole copies come in turn: their mean then takes an op a copy."""
    factors = [*map(Solver().leaf, sizes)]
    wide = factors[which % len(sizes)]
    frozen = freeze(product(*factors), lambda x: x.size + more * (x is wide))
    assert first_of_blocks(frozen) == frozen.first.tolist()
    assert Frozen(3, np.array([0, 0, 1, 2])).blocks == (0, 0, 0)
    assert not Frozen(2, np.array([0, 1, 1, 0])).in_turn
    assert frozen.in_turn == (more % sizes[which % len(sizes)] == 0)
    if frozen.in_turn:
        merging = map(torch.from_numpy, frozen.merging.values())
        x = torch.randn(2, frozen.teacher, 3, dtype=torch.complex128)
        x, index = x * 9, list(merging)
        for own in (x, x.real, x.real.long()):
            mean = copies.narrow_turns(own, 1, *frozen.blocks)
            torch.testing.assert_close(mean, copies.narrow(own, 1, *index))


# --------------------------------------------------------------------------- unify and cut
@law
@given(st.integers(2, 4).flatmap(families), st.data())
def test_unify_order(family: list[Spec], data: st.DataObject) -> None:
    """Unifications, fixes and marks mean the same in any order, either way round, every time."""
    some = st.tuples(st.sampled_from(["fix", "mark"]), st.sampled_from([*Build(*family).pool]))
    steps: list[tuple[Any, ...]] = data.draw(st.lists(some, min_size=1, max_size=3))
    steps += itertools.combinations(family, 2)

    def run(order: list[tuple[Any, ...]]) -> Build:
        build = Build(*family)
        for first, second in order:
            if first == "fix":
                build.solver.fix(build(second), HERE)
            elif first == "mark":
                build.solver.mark(build.solver.outer, build(second))
            else:
                build.solver.unify(build(first), build(second))
        return build

    turned = data.draw(st.permutations(steps))
    turned = [(a, b) if isinstance(a, str) else (b, a) for a, b in turned]
    one, again, other = run(steps), run(steps), run(turned)
    assert one.state() == again.state()
    assert one.meaning(*one.axes) == other.meaning(*other.axes)
    same, *more = one.maps(*one.axes)
    assert all(m == same for m in more)


@law
@given(families(2))
def test_unify_is_symmetric(family: list[Spec]) -> None:
    """a = b is b = a."""
    one, other = Build(*family[1:]), Build(*family[1:])
    one.solver.unify(*one.axes)
    other.solver.unify(*other.axes[::-1])
    assert one.meaning(*one.axes) == other.meaning(*other.axes)


@law
@given(families(2))
def test_unify_is_idempotent(family: list[Spec]) -> None:
    """Said of one axis, or said twice, a = b changes nothing."""
    build = Build(*family[1:])
    a, b = build.axes
    assert build.solver.unify(a, a) == a
    assert not build.solver.bound
    assert build.solver.unify(a, b) == build.solver.resolve(a)
    before = build.state()
    build.solver.unify(a, b)
    build.solver.unify(b, a)
    assert build.state() == before


@law
@given(families(1))
def test_unify_refines_no_more_than_it_must(family: list[Spec]) -> None:
    """Meeting a coarser form leaves an axis as free as it was."""
    build = Build(*family)
    fine, coarse = build.axes
    before = build.meaning(fine)
    build.solver.unify(coarse, fine)
    assert build.meaning(fine) == before == build.meaning(coarse)


@law
@given(pairs(), st.booleans(), st.data())
def test_unify_or_conflict(pair: list[Spec], doomed: bool, data: st.DataObject) -> None:
    """Of any two axes ``unify`` makes one map, or it raises and leaves no trace."""
    build = Build(*pair)
    (a, b), s = build.axes, build.solver
    some = st.sampled_from([*build.pool.values()])
    start, point = build.state(), s.checkpoint()
    s.fix(data.draw(some), HERE)
    for marks in (s.outer, s.inner, s.contracted, s.symbolic):
        s.mark(marks, data.draw(some))
    if doomed:  # what comes first may unify, what comes last does not
        three, four, left, right = map(s.leaf, (3, 4, 3, 4))
        a, b = sum_(a, product(three, four)), sum_(b, product(right, left))
    before = build.state()
    try:
        s.unify(a, b)
    except AxisConflict:
        assert build.state() == before
    else:
        assert not doomed
        assert all(len(set(map(tuple, build.maps(a, b, seed=seed)))) == 1 for seed in range(3))
    s.rollback(point)
    assert build.state() == start


@law
@given(specs(100), st.data())
def test_cut(spec: Spec, data: st.DataObject) -> None:
    """The two sides have the sizes asked for and make up the axis; a failing cut does nothing."""
    build = Build(spec)
    axis, resolve = build.axes[0], build.solver.resolve
    at, fixed = data.draw(st.integers(0, spec.size)), data.draw(st.booleans())
    if fixed:
        build.solver.fix(axis, HERE)
    before = build.state()
    try:
        left, right = build.solver.cut(axis, at)
    except AxisConflict:
        assert spec.op
        assert build.state() == before
        return
    assert (left.size, right.size) == (at, spec.size - at)
    assert build.solver.is_fixed(sum_(left, right)) or not fixed
    for seed in range(3):
        whole, both, one, other = build.maps(axis, sum_(left, right), left, right, seed=seed)
        assert whole == both == one + [at + i for i in other]
    if "(" not in str(resolve(axis)):  # h x (a + b) x c has a second form, h x (a x c + b x c)
        assert resolve(sum_(left, right)) == resolve(axis)


# --------------------------------------------------------------------------- widths
ratios = st.sampled_from([1, 1.25, 1.5, 2, 2.6, 3])
factors = st.tuples(st.integers(2, 12), st.sets(st.sampled_from(["fixed", "outer", "inner"])))


@law
@given(st.lists(st.lists(factors, min_size=1, max_size=4), min_size=1, max_size=3), ratios)
def test_widths_of_independent_products(products: list[Any], ratio: float) -> None:
    """One free leaf widens in each: heads and groups first, else the innermost, ``inner`` last."""
    s, weights, chosen = Solver(), [], {}
    for drawn in products:
        made = [s.leaf(size, HERE if "fixed" in marks else None) for size, marks in drawn]
        for leaf, (_, marks) in zip(made, drawn, strict=True):
            for name in marks - {"fixed"}:
                s.mark(getattr(s, name), leaf)
        weights.append(product(*made))
        order = {x: (x in s.inner, x not in s.outer, -k) for k, x in enumerate(made)}
        if free := [x for x in made if x not in s.reason]:
            chosen[min(free, key=order.get)] = weights[-1]
    widths = choose_widths(s, weights, [], ratio)
    assert widths.size == {leaf: round(leaf.size * ratio) for leaf in chosen}
    assert not widths.grown
    for leaf, axis in chosen.items():
        teacher = freeze(axis, widths).teacher
        assert teacher == axis.size // leaf.size * widths(leaf)
        assert teacher <= round(axis.size * ratio) or leaf.size * ratio % 1  # the leaf's rounding


@law
@given(st.data())
def test_widths_of_products_that_share(data: st.DataObject) -> None:
    """heads x dim, heads' x dim, ... and some of them alone: one of each widens if that can be."""
    s = Solver()
    made, odd, weights = [s.leaf(4)], [False], list[Axis]()
    for k in range(data.draw(st.integers(1, 7))):  # a tree: each new leaf meets an older one
        old = data.draw(st.integers(0, k))
        made, odd = [*made, s.leaf(4)], [*odd, not odd[old]]
        weights.append(product(*data.draw(st.permutations([made[old], made[-1]]))))
    side = [x for x, o in zip(made, odd, strict=True) if o]
    weights += data.draw(st.lists(st.sampled_from(side)))
    s.mark(s.inner, data.draw(st.sampled_from(made)))
    s.mark(s.outer, data.draw(st.sampled_from(side)))  # groups elsewhere would go first: no choice
    widths = choose_widths(s, data.draw(st.permutations(weights)), [], 2)
    assert all(sum(x in widths.size for x in leaves(axis)) == 1 for axis in weights)
    assert all(freeze(axis, widths).teacher == 2 * axis.size for axis in weights)


@law
@given(st.lists(specs(60), min_size=1, max_size=4), st.lists(specs(60), max_size=2), ratios)
def test_widths_of_anything(weights: list[Spec], others: list[Spec], ratio: float) -> None:
    """At most one leaf widens in a product, none that is fixed; candidates widen or are held."""
    build, again = Build(*weights, *others), Build(*weights, *others)
    for b in (build, again):
        b.solver.fix(next(iter(b.pool.values())), HERE)
    n = len(weights)
    widths, same = (choose_widths(b.solver, b.axes[:n], b.axes[n:], ratio) for b in (build, again))
    assert repr(widths) == repr(same)
    every = [path for axis in build.axes for path in paths(axis)]
    assert all(len(set(path) & set(widths.size)) <= 1 for path in every)
    assert bool(widths.grown) == any(path.count(x) > 1 for path in every for x in widths.size)
    free = {x for a in build.axes[:n] for x in leaves(a)} - set(build.solver.reason)
    assert sorted([*widths.size, *widths.held], key=str) == sorted(free, key=str)
    assert set(widths.held.values()) <= set(widths.size)
    assert all(wide == round(x.size * ratio) for x, wide in widths.size.items())
    assert ratio > 1 or all(freeze(a, widths).teacher == a.size for a in build.axes)


PAIR = node("x", [Spec(2, 3), Spec(2)])
BESIDE_ONE = node("x", [Spec(3), Spec(2), node("+", [Spec(1), Spec(2, 3)])])


@law
@given(st.lists(specs(60), min_size=1, max_size=4), ratios, st.integers(2, 16))
@example([BESIDE_ONE, PAIR], 1, 4)  # the sum is rounded by 3, the product by 2 or 4
def test_round_widths(weights: list[Spec], ratio: float, unit: int) -> None:
    """The same leaves widen, by little more; leaves and products become multiples, by as little
    as may be; a bare leaf that stands for heads (another factor is held by it) need not."""
    build = Build(*weights)
    plain, rounded = (
        choose_widths(build.solver, build.axes, [], ratio, round_to=n) for n in (1, unit)
    )
    assert rounded.held == plain.held
    assert list(rounded.size) == list(plain.size)
    holders, every = set(plain.held.values()), {*map(build.solver.resolve, build.axes)}
    for leaf, width in plain.size.items():
        own = [a for a in every if leaf in leaves(a)]
        assert width <= rounded.size[leaf] < width + unit * max(1, len(own))
        twice = any(path.count(leaf) > 1 for a in own for path in paths(a))
        if not twice and not any(
            isinstance(x, Sum) or leaf in holders for x in (*own, *sums_in(own))
        ):
            widths = [{leaf: w} for w in range(width, rounded.size[leaf] + 1)]
            fits = [not any(width_of(a, w) % unit for a in own) for w in widths]
            assert fits.index(True) == len(fits) - 1
    for axis in every:
        assert width_of(axis, rounded.size) == freeze(axis, rounded).teacher
        wide = rounded.size.keys() & set(leaves(axis))
        twice = any(path.count(x) > 1 for path in paths(axis) for x in path)
        if twice:  # a leaf times itself: left as it comes, the report names it
            continue
        if wide and not sums_in([axis]) and not (isinstance(axis, Leaf) and axis in holders):
            assert width_of(axis, rounded.size) % unit == 0


def sums_in(these: list[Axis]) -> list[Axis]:
    """The sums among some axes and their factors."""
    parts = [x for a in these for x in (a, *(a.factors if isinstance(a, Product) else ()))]
    return [x for x in parts if isinstance(x, Sum)]


# --------------------------------------------------------------------------- shares
@law
@given(surjections, st.sampled_from([(), (9,), (3, 4)]), st.integers(0, 99))
def test_shares(index: list[int], rows: tuple[int, ...], seed: int) -> None:
    """Positive, exactly one in all for each student index, exact in bfloat16; rows differ."""
    frozen = Frozen(max(index) + 1, np.array(index))
    table = share_table(frozen, rows, np.random.default_rng(seed))
    assert table.shape == (*rows, len(frozen.classes[1]))
    assert (table > 0).all()
    assert (table[..., frozen.classes[0]] @ np.eye(frozen.student)[frozen.map] == 1).all()
    if frozen.copies.max() <= 16:
        assert np.array_equal(torch.tensor(table).bfloat16().double(), table)
    if frozen.wide and rows:
        assert len(np.unique(table.reshape(-1, table.shape[-1]), axis=0)) > 1
    counts = share_table(frozen, rows, None)
    assert counts.shape == (1,) * len(rows) + table.shape[-1:]
    own = counts.ravel()[frozen.classes[0]]
    for s in range(frozen.student):
        assert sum(Fraction(1, int(n)) for n in own[frozen.map == s]) == 1


# --------------------------------------------------------------------------- examples
def test_qkv() -> None:
    """576 = 3 x 3 x 64, unbound along the first: heads widen, 3 and 64 stay."""
    s = Solver()
    rows, three, heads, dim = map(s.leaf, (576, 3, 3, 64))
    s.unify(rows, product(three, heads, dim))
    assert s.resolve(rows) == product(three, heads, dim)
    s.mark(s.outer, heads)
    s.cut(s.cut(rows, 192)[1], 192)
    assert s.is_fixed(three)
    widths = choose_widths(s, [rows], [], 2)
    assert (widths.size, widths.held) == ({heads: 6}, {dim: heads})
    frozen, block = freeze(s.resolve(rows), widths), np.tile(np.arange(192), 2)
    assert frozen.map.tolist() == [*block, *block + 192, *block + 384]
    assert frozen.blocks == (3, 384, 192)


def test_cat_chunk_and_groups() -> None:
    """96 = 64 + 32; 512 = 256 + 256 whose halves meet; 256 = 32 x 8: groups first, though the 8
    has a weight of its own."""
    s = Solver()
    norm, a, b, glu, channels, groups, each = map(s.leaf, (96, 64, 32, 512, 256, 32, 8))
    s.unify(norm, sum_(a, b))
    gate = s.unify(*s.cut(glu, 256))
    s.unify(channels, product(groups, each))
    s.mark(s.outer, groups)
    assert [*map(s.resolve, (norm, glu))] == [Sum((a, b)), Sum((gate, gate))]
    widths = choose_widths(s, [each, norm, glu, channels], [], 2)
    assert widths.size == {a: 128, b: 64, gate: 512, groups: 64}


@pytest.mark.parametrize(("k", "n"), [(2, 58), (3, 58), (4, 6)])
def test_channel_shuffle(k: int, n: int) -> None:
    """k parts of n viewed as (k, n) are one axis and k is fixed; n x k is cut at multiples of k."""
    s = Solver()
    parts, outer, inner = [s.leaf(n) for _ in range(k)], s.leaf(k), s.leaf(n)
    s.unify(sum_(*parts), product(outer, inner))
    assert s.is_fixed(outer)
    assert len({s.resolve(x) for x in (*parts, inner)}) == 1
    for axis, at in ((product(inner, outer), k * n // 2 + 1), (inner, -1), (inner, n + 1)):
        with pytest.raises(AxisConflict):
            s.cut(axis, at)
    s.cut(product(inner, outer), k * n // 2)
    assert [x.size for x in s.resolve(inner).terms] == [n // 2, n // 2]


def test_widths_by_example() -> None:
    """The table of ``choose_widths``: who goes first, who is held, who has no choice."""
    for heads, weights, wide in (
        ("a", ["ab"], "a"),
        ("", ["ab"], "b"),
        ("", ["ab", "bc", "c"], "ca"),
        ("a", ["ab", "b"], "a"),
    ):
        s = Solver()
        leaf = {name: s.leaf(size) for name, size in zip("abc", (4, 5, 6), strict=True)}
        for name in heads:
            s.mark(s.outer, leaf[name])
        axes = [product(*(leaf[name] for name in weight)) for weight in weights]
        assert choose_widths(s, axes, [], 2).size == {leaf[x]: 2 * leaf[x].size for x in wide}


def test_conflicts() -> None:
    """12 = 3 x 4 = 4 x 3 unless one side is fixed; 64 x 2 = 2 x 64 would make all factors one;
    8 = 3 + 5 = 2 x 4 is none."""
    s = Solver()
    a, b, c, d, dim, two = map(s.leaf, (3, 4, 4, 3, 64, 2))
    three_four, four_three = product(a, b), product(c, d)
    wrong = (three_four, four_three), (product(dim, two), product(two, dim)), (a, b)
    for one, other in wrong:
        with pytest.raises(AxisConflict):
            s.unify(one, other)
    s.fix(three_four, HERE)
    s.unify(four_three, three_four)
    assert not s.bound
    assert s.is_fixed(four_three)
    inner = s.leaf(4)
    s.unify(sum_(s.leaf(3), s.leaf(5)), product(two, inner))
    assert [x.size for x in s.resolve(inner).terms] == [3, 1]


def test_round_to() -> None:
    """Heads make whole rows a multiple, alone they need not be one; of a concatenation one part
    takes what is missing; 12 + 1 with 12 a multiple itself is none."""
    s = Solver()
    heads, dim, a, b, c = map(s.leaf, (3, 20, 5, 7, 12))
    s.mark(s.outer, heads)
    weights = [product(heads, dim), heads, sum_(a, b, b), c, sum_(c, ONE)]
    widths = choose_widths(s, weights, [], 1.5, round_to=8)
    assert widths.size == {heads: 4, a: 12, b: 10, c: 24}
    assert widths.held == {dim: heads}


def test_fractional_ratio() -> None:
    """9 heads x 1.5 = 14, halves to even: the first five have one copy more."""
    s = Solver()
    heads, dim = s.leaf(9), s.leaf(64)
    s.mark(s.outer, heads)
    widths = choose_widths(s, [product(heads, dim)], [], 1.5)
    assert widths.size == {heads: 14}
    assert freeze(product(heads, dim), widths).copies.tolist() == [2] * 320 + [1] * 256
