"""What ``expand`` did: what widened, what did not and why, what it costs, how exact it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from ..algebra.axes import Axis, leaves, paths
from ..algebra.solver import Reason
from ..check.certificate import Certified, Check
from ..control import Control
from ..kernels.fold import refusal
from ..kernels.regions import enter_recompute
from ..kernels.user_function import UserFunction
from ..passes.infer import FROM_PYTHON, TO_PYTHON
from ..passes.widen import Bridge, Widened
from ..teacher.compiled import Python
from ..teacher.module import Teacher
from .cost import Cost, cost
from .explain import Evidence, gather_evidence

ASKED = frozenset({"kept", "ratio 1"})
HELD = Reason("another factor of its product widens")
SMALL = Reason("too small to widen")
# A weight that stays for these kinds of reason could not have widened, or was not to (README).
CANNOT = ASKED | {HELD.kind, SMALL.kind, "input", "output", "lookup", "kernel", "spatial"}
CANNOT |= {"stacked", "repeated", "positions", "unused"}
# Nor can the edge of a captured part, at which Python sees the student's width; but had Python been
# captured, a weight that stays for nothing else would have widened.
EDGE = frozenset({FROM_PYTHON, TO_PYTHON})
SHOWN = 8
"""Lines of a list in the text; ``to_dict()`` has all."""


@dataclass(frozen=True)
class Group:
    """Axes that widen together: one leaf of the algebra."""

    before: int
    after: int
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Conflict:
    """Axes that widen together and were given different ratios. ``asked``: parameter -> ratio, of
    those whose ratio speaks for the group; the first one's was ``taken``."""

    group: Group
    asked: dict[str, float]
    taken: float

    def __str__(self) -> str:
        by: dict[float, list[str]] = {}
        for name, ratio in self.asked.items():
            by.setdefault(ratio, []).append(name)
        text = "; ".join(f"{ratio:g} by {_some(names)}" for ratio, names in by.items())
        return f"{self.group.before} -> {self.group.after}: {text}; took {self.taken:g}"


@dataclass(frozen=True)
class Fixed:
    """A dimension of a parameter that did not widen."""

    parameter: str
    dim: int
    axis: str
    reason: str
    cannot: bool


# --------------------------------------------------------------------------- its parts
@dataclass(frozen=True, kw_only=True)
class Widening:
    """What became of the axes.

    ``widened``: of the elements of the student's weights (tensors of two or more dimensions) that
    could widen along some axis, the fraction in those that did, along every axis that can; zero if
    there are none. ``kept``: parameters that stay,
    along some axis, because the user asked for it; ``grown``: axes that grow beyond the ratio;
    ``conflicts``: where the ratios asked for differ; ``unrounded``: widened dimensions of
    parameters that could not be made a multiple of ``round_to``.
    """

    widened: float
    groups: tuple[Group, ...]
    fixed: tuple[Fixed, ...]
    kept: tuple[str, ...]
    grown: tuple[str, ...]
    conflicts: tuple[Conflict, ...]
    unrounded: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What became of the code. ``inputs``: input -> which of its sizes may differ from the
    example's. ``apart``: modules that could not be captured -> why; they stay the user's Python,
    and the parts that were captured stand in ``inputs``. ``bridged``: of the ``nodes`` those that
    run at the student's width. ``functions``: the user's own (``torch.autograd.Function``, hooks on
    activations) -> how many calls there are, and how many of them widen; ``recomputed``: regions of
    which no activation is saved, as the user's checkpoints say; ``left``: attributes in which
    forward leaves results for others to read (a loss, say), which no graph does."""

    nodes: int
    bridged: tuple[Bridge, ...]
    inputs: dict[str, str]
    apart: dict[str, str]
    functions: dict[str, tuple[int, int]]
    recomputed: int
    left: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Branching:
    """``branches``: weight -> its branch set, by name; ``unbranched``: weights that got none of
    those asked for -> why; ``unfused``: weights whose branches no kernel folds on a GPU, where
    plain torch does -> why; ``hidden``: weights whose product branches are narrower than the
    paper's -> their hidden channels; ``scales``: of the branches."""

    branches: dict[str, str]
    unbranched: dict[str, str]
    unfused: dict[str, str]
    hidden: dict[str, int]
    scales: str


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """``parameters``: of student and teacher, without the ``extra`` ones of branches."""

    parameters: tuple[int, int]
    extra: int
    cost: Cost

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-adds of one sample, student and teacher."""
        return self.cost.macs


@dataclass(frozen=True, kw_only=True)
class Report(Footprint, Branching, Capture, Widening):
    """Its four parts in one. Printed as a table; ``to_dict()`` for machines. ``seconds``: by
    stage, the wall time of ``expand`` in all."""

    name: str
    control: Control
    seconds: dict[str, float]
    check: Check | None
    evidence: Evidence

    @property
    def ratio(self) -> float | dict[str, float]:
        """As asked for: one number, or by pattern."""
        return self.control.ratio

    @property
    def error(self) -> dict[str, float]:
        """Relative error by ``"probe/eval"`` and so on; empty if the check was switched off."""
        return dict(self.check.error) if self.check else {}

    @property
    def certificate(self) -> tuple[Certified, ...]:
        """What the check saw, law by law; empty if it was switched off."""
        return self.check.certificate if self.check else ()

    @property
    def dead(self) -> tuple[str, ...]:
        """Parameters that move no output of the probe."""
        return self.check.dead if self.check else ()

    def to_dict(self) -> dict[str, Any]:
        rest = replace(self, check=None, evidence=None)  # type: ignore[arg-type]
        plain = {"name": self.name} | asdict(rest)
        del plain["check"], plain["control"], plain["kept"], plain["evidence"]
        plain |= {"macs": self.macs, "error": self.error, "dead": list(self.dead)}
        plain |= {"ratio": self.ratio, "keep": self.control.keep, "round_to": self.control.round_to}
        if self.check:
            plain["tolerance"] = self.check.tolerance
            plain["vacuous"] = list(self.check.vacuous)
            plain["unseen"] = dict(self.check.unseen)
            plain["checked_in"] = _dtype(self.check)
            plain["certificate"] = [asdict(one) for one in self.certificate]
            plain["left_out"] = list(self.check.left_out)
        return plain

    # ---- as text
    def __str__(self) -> str:
        rows = list(self._rows())
        width = max(len(title) for title, _ in rows)
        lines = [f"{self.name}, {self.control}", "-" * 60]
        lines += [f"{title:<{width}}  {text}" for title, text in rows]
        for title, items, shown in self._lists():
            lines += [f"{title}:"] if items else []
            lines += [f"  {item}" for item in items[:shown]]
            lines += [f"  ... and {len(items) - shown} more"] if len(items) > shown else []
        return "\n".join(lines)

    def _rows(self) -> Iterator[tuple[str, str]]:
        extra = f", and {self.extra:,} in branches" if self.extra else ""
        yield "widened", self._widened()
        yield "parameters", _change(*self.parameters) + extra
        yield "multiply-adds", _change(*self.macs) + " per sample"
        yield "one step", str(self.cost)
        yield "branches", self._branches()
        yield "inputs", "; ".join(f"{name}: {sizes}" for name, sizes in self.inputs.items())
        if self.apart:
            yield "in Python", ", ".join(path or self.name for path in self.apart)
        calls = (f"{k} ({wide} of {n} widen)" for k, (n, wide) in self.functions.items())
        if self.functions:
            yield "own gradients", ", ".join(calls)
        if self.recomputed:
            yield "recomputed", f"{self.recomputed} regions, as under the student's checkpoints"
        yield "bridged", f"{len(self.bridged)} of {self.nodes} nodes"
        yield "exact to", self._exact()
        yield "seconds", ", ".join(f"{stage} {s:.2f}" for stage, s in self.seconds.items())
        vacuous = self.check.vacuous if self.check else ()
        for title, about, names in (
            ("vacuous", "zero or not a number in the check", vacuous),
            ("dead", str(len(self.dead)), self.dead),
            ("kept", f"as asked, {len(self.kept)}", self.kept),
            ("grown", "beyond the ratio", self.grown),
            ("not left", "what is read after a call has to be returned by forward", self.left),
            ("unrounded", f"no multiple of {self.control.round_to}", self.unrounded),
        ):
            if names:
                yield title, f"{about}: {_some(names)}"

    def _lists(self) -> Iterator[tuple[str, list[str], int]]:
        """Title, items, how many of them to show."""
        yield "certificate (largest relative errors)", list(map(str, self.certificate)), SHOWN + 2
        yield "not certified", list(self.check.left_out) if self.check else [], SHOWN
        bridges = [f"{b.op}  {b.module}  {b.source}: {b.reason}" for b in self.bridged]
        yield "bridges (run at the student's width)", bridges, SHOWN
        apart = [f"{path or self.name}: {why}" for path, why in self.apart.items()]
        yield "not captured (runs as Python, at the student's width)", apart, len(apart)
        conflicts = [str(conflict) for conflict in self.conflicts]
        yield "ratios that differ for axes that widen together", conflicts, SHOWN
        held = [f for f in self.fixed if not f.cannot]
        lines = [f"{f.parameter} dim {f.dim} ({f.axis}): {f.reason}" for f in held]
        yield "held back", lines, SHOWN

    def _widened(self) -> str:
        if not self.groups:
            return "0.0% of the weights: the teacher is no wider than the student"
        return f"{self.widened:.1%} of the weights, in {len(self.groups)} groups of axes"

    def _branches(self) -> str:
        counts = Counter(self.branches.values())
        text = ", ".join(f"{name} on {n}" for name, n in counts.items()) or "none"
        text += f"; {len(self.unbranched)} weights got none" if self.unbranched else ""
        if self.hidden:
            least, most = min(self.hidden.values()), max(self.hidden.values())
            text += f"; products have {least}" + (f" to {most}" if most > least else "")
            text += " hidden channels, to cost no more than an eighth of their layers at batch 64"
        if self.unfused:
            text += f"; {len(self.unfused)} fold in plain torch on a GPU, too"
        return text

    def _exact(self) -> str:
        if self.check is None:
            return "not checked (verify=False)"
        text = f"{max(self.error.values()):.1e} relative in {_dtype(self.check)}"
        text += " (" + ", ".join(f"{k} {v:.1e}" for k, v in self.error.items()) + ")"
        if self.scales == "scratch":
            text += "; that was with scales at zero, live ones change the function, as asked"
        if self.check.tolerance > 1e-10:
            text += f"; rounding is amplified, allowed {self.check.tolerance:.1e}"
        for mode, of in self.check.unseen.items():
            text += f"; no gradients {of} in {mode} mode: the model has none"
        return text


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} (x {after / max(before, 1):.2f})"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _dtype(check: Check) -> str:
    return str(check.dtype).removeprefix("torch.")


# --------------------------------------------------------------------------- making one
def make_report(
    widened: Widened,
    teacher: Teacher,
    control: Control,
    example: tuple[Any, Any],
    seconds: Callable[[], dict[str, float]],
    check: Check | None,
    scales: str,
    python: Python,
) -> Report:
    """``seconds``: of all stages, this one, too: asked last."""
    parts = (
        _widening(widened, control.round_to),
        _capture(widened, teacher, python.left),
        _branching(widened, scales),
        _footprint(widened.student, teacher, example, borrow=not python.written),
    )
    fields = {name: value for part in parts for name, value in vars(part).items()}
    evidence = gather_evidence(widened)
    return Report(
        name=type(widened.student).__name__,
        control=control,
        seconds=seconds(),
        check=check,
        evidence=evidence,
        **fields,
    )


def _widening(widened: Widened, unit: int) -> Widening:
    """Goes back to the leaves: only they know what widens together, and why something stays."""
    widths = widened.widths
    parameters = widened.parameters()
    grown = {name for name in parameters if any(m.wide for m in widened.maps[name])}
    fixed = {
        Fixed(name, dim, str(axis), str(reason), _cannot(reason, name in grown)): reason
        for name, axes in parameters.items()
        for dim, axis in enumerate(axes)
        for reason in _reasons(widened, axis)
    }
    held = {f.parameter for f in fixed if not f.cannot}
    sizes = {name: widened.tensors[name].numel() for name in widened.parameters(rank=2)}
    could, did = (
        sum(size for name, size in sizes.items() if name in some)
        for some in (grown | held, grown - held)
    )
    made_of = {name: {x for a in axes for x in leaves(a)} for name, axes in parameters.items()}
    chosen = (widths.size.keys() | widths.disputed.keys()) & set().union(*made_of.values())
    groups = {
        leaf: Group(leaf.size, widths(leaf), tuple(n for n in made_of if leaf in made_of[n]))
        for leaf in sorted(chosen)
    }
    return Widening(
        widened=did / could if could else 0.0,
        groups=tuple(group for group in groups.values() if group.before != group.after),
        fixed=tuple(fixed),
        kept=tuple(dict.fromkeys(f.parameter for f, r in fixed.items() if r.kind in ASKED)),
        grown=widths.grown,
        conflicts=tuple(
            Conflict(groups[leaf], asked, next(iter(asked.values())))
            for leaf, asked in widths.disputed.items()
        ),
        unrounded=tuple(
            f"{name} dim {dim} ({frozen.student} -> {frozen.teacher})"
            for name in parameters
            for dim, frozen in enumerate(widened.maps[name])
            if frozen.wide and frozen.teacher % unit
        ),
    )


def _cannot(reason: Reason, grown: bool) -> bool:
    """``grown``: the parameter widens along some axis."""
    return reason.kind in CANNOT or (grown and reason.kind in EDGE)


def _reasons(widened: Widened, axis: Axis) -> Iterator[Reason]:
    """For each product of an axis in which nothing widens, why: something that might have been
    otherwise, if there is such a reason."""
    solver, widths = widened.inference.solver, widened.widths
    for path in paths(axis):
        if path and not any(leaf in widths.size for leaf in path):
            asked = [widths.stays[leaf] for leaf in path if leaf in widths.stays]
            reasons = asked or [solver.reason[leaf] for leaf in path if leaf in solver.reason]
            avoidable = [reason for reason in reasons if reason.kind not in CANNOT]
            held = [HELD for leaf in path if leaf in widths.held]
            yield [*held, *avoidable, *reasons, SMALL][0]


def _capture(widened: Widened, teacher: Teacher, left: Iterable[tuple[str, str]]) -> Capture:
    modes = widened.modes.values()
    nodes = {(m.site.path, n.name): n for m in modes for n in m.nodes if n.op == "call_function"}
    bridged = {bridge.node for bridge in widened.bridges}
    functions: dict[str, tuple[int, int]] = {}
    for node in nodes.values():
        if isinstance(node.target, UserFunction):
            count, wide = functions.get(str(node.target), (0, 0))
            wide += node.target.rule is not None and node.name not in bridged
            functions[str(node.target)] = count + 1, wide
    inputs: dict[str, str] = {}
    for path, part in teacher._parts.items():  # of every part, if it was captured in parts
        section = next((s for s in part.sections if not s.site.training), part.sections[0])
        sizes = section.sizes.describe(section.call.names)
        inputs |= {f"{path}({name})" if path else name: text for name, text in sizes.items()}
    return Capture(
        nodes=len(nodes),
        bridged=widened.bridges,
        inputs=inputs,
        apart=widened.apart,
        functions=functions,
        recomputed=sum(n.target is enter_recompute for n in nodes.values()),
        left=tuple(".".join(filter(None, place)) for place in left),
    )


def _branching(widened: Widened, scales: str) -> Branching:
    fused = {n: refusal(one.site) for n, one in widened.lowered.items() if one.site.terms}
    return Branching(
        branches={one.weight: one.chosen.name for one in widened.branched},
        unbranched=widened.unbranched,
        unfused=widened.unlowered | {name: why for name, why in fused.items() if why},
        hidden={
            one.weight: hidden
            for one in widened.branched
            if one.chosen.name != "own"
            for b in one.chosen.branches
            if (hidden := getattr(b, "hidden", None) or getattr(b, "rank", None))
        },
        scales=scales,
    )


def _footprint(
    student: nn.Module, teacher: Teacher, example: tuple[Any, Any], *, borrow: bool
) -> Footprint:
    extra = sum(map(_count, teacher.folds()))
    return Footprint(
        parameters=(_count(student), _count(teacher) - extra),
        extra=extra,
        cost=cost(teacher, student, example, borrow=borrow),
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
