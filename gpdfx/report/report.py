"""What ``expand`` did: what widened, what did not and why, what it costs, how exact it is."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..algebra.axes import Axis, Leaf, leaves, paths
from ..algebra.solver import Solver
from ..algebra.widths import Widths
from ..control import Control
from ..kernels.fold import refusal
from ..passes.widen import Bridge, Widened
from .cost import Cost, cost
from .explain import Evidence, gather_evidence

if TYPE_CHECKING:
    from ..check.laws import Check
    from ..teacher.module import Teacher

ASKED = ("kept", "ratio 1")
# A weight that stays for these reasons could not have widened, or was not to (README).
CANNOT = frozenset(
    {"input", "output", "lookup", "kernel", "spatial", "stacked", "repeated", "positions", "unused"}
).union(ASKED)


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
        each = {
            r: [n for n, other in self.asked.items() if other == r] for r in self.asked.values()
        }
        text = "; ".join(f"{r:g} by {_some(tuple(names))}" for r, names in each.items())
        return f"{self.group.before} -> {self.group.after}: {text}; took {self.taken:g}"


@dataclass(frozen=True)
class Fixed:
    """A dimension of a parameter that did not widen."""

    parameter: str
    dim: int
    axis: str
    reason: str
    cannot: bool


@dataclass(frozen=True)
class Report:
    """Printed as a table; ``to_dict()`` for machines.

    ``widened``: the fraction of the student's weight elements (tensors of two or more
    dimensions) in tensors where every channel axis widened or cannot widen. ``macs``:
    multiply-adds of one sample. ``seconds``: by stage. ``inputs``: input -> which of its sizes
    may differ from the example's. ``apart``: modules that could not be captured -> why; they stay
    the user's Python, and the parts that were captured stand in ``inputs``. ``conflicts``: where
    the ratios asked for differ; ``unrounded``: widened dimensions of parameters that could not be
    made a multiple of ``round_to``. ``branches``: weight -> its branch set, by name;
    ``unbranched``: weights that got none of those asked for -> why; ``unfused``: weights whose
    branches no kernel folds on a GPU, where plain torch does -> why; ``scales``: of the branches;
    ``parameters``: of student and teacher, without the ``extra`` ones of branches.
    """

    name: str
    control: Control
    widened: float
    bridged: tuple[Bridge, ...]
    nodes: int
    groups: tuple[Group, ...]
    fixed: tuple[Fixed, ...]
    grown: tuple[str, ...]
    conflicts: tuple[Conflict, ...]
    unrounded: tuple[str, ...]
    branches: dict[str, str]
    unbranched: dict[str, str]
    unfused: dict[str, str]
    scales: str
    parameters: tuple[int, int]
    extra: int
    cost: Cost
    inputs: dict[str, str]
    apart: dict[str, str]
    seconds: dict[str, float]
    check: Check | None
    evidence: Evidence

    @property
    def ratio(self) -> float | dict[str, float]:
        """As asked for: one number, or by pattern."""
        return self.control.ratio

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-adds of one sample, student and teacher."""
        return self.cost.macs

    @property
    def error(self) -> dict[str, float]:
        """Relative error by ``"probe/eval"`` and so on; empty if the check was switched off."""
        return dict(self.check.error) if self.check else {}

    @property
    def dead(self) -> tuple[str, ...]:
        """Parameters that move no output of the probe."""
        return self.check.dead if self.check else ()

    def to_dict(self) -> dict[str, Any]:
        plain = dataclasses.asdict(self)
        plain["macs"] = self.macs
        plain["error"], plain["dead"] = self.error, list(self.dead)
        plain |= {"ratio": self.ratio, "keep": self.control.keep, "round_to": self.control.round_to}
        for name in ("check", "control", "evidence"):
            plain.pop(name)
        if self.check:
            plain["tolerance"] = self.check.tolerance
            plain["vacuous"] = list(self.check.vacuous)
            plain["unseen"] = dict(self.check.unseen)
            plain["checked_in"] = str(self.check.dtype).removeprefix("torch.")
        return plain

    def __str__(self) -> str:
        rows = [
            ("widened", f"{self.widened:.1%} of the weights, in {len(self.groups)} groups of axes"),
            ("parameters", _change(*self.parameters) + self._extra()),
            ("multiply-adds", _change(*self.macs) + " per sample"),
            ("one step", str(self.cost)),
            ("branches", self._branches()),
            ("inputs", "; ".join(f"{name}: {sizes}" for name, sizes in self.inputs.items())),
            ("bridged", f"{len(self.bridged)} of {self.nodes} nodes"),
            ("exact to", self._exact()),
            ("seconds", ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items())),
        ]
        if self.apart:
            rows.insert(6, ("in Python", ", ".join(path or self.name for path in self.apart)))
        vacuous = self.check.vacuous if self.check else ()
        rows += (
            [("vacuous", f"zero or not a number in the check: {_some(vacuous)}")] if vacuous else []
        )
        rows += [("dead", f"{len(self.dead)}: {_some(self.dead)}")] if self.dead else []
        kept = tuple(dict.fromkeys(f.parameter for f in self.fixed if f.reason.startswith(ASKED)))
        rows += [("kept", f"as asked, {len(kept)}: {_some(kept)}")] if kept else []
        rows += [("grown", f"beyond the ratio: {_some(self.grown)}")] if self.grown else []
        unit = self.control.round_to
        if self.unrounded:
            rows.append(("unrounded", f"no multiple of {unit}: {_some(self.unrounded)}"))
        width = max(len(k) for k, _ in rows)
        lines = [f"{self.name}, {self.control}", "-" * 60]
        lines += [f"{k:<{width}}  {v}" for k, v in rows]
        if self.bridged:
            lines.append("bridges (run at the student's width):")
            lines += [f"  {b.op}  {b.module}  {b.source}: {b.reason}" for b in self.bridged[:8]]
            lines += [f"  ... and {len(self.bridged) - 8} more"] if len(self.bridged) > 8 else []
        if self.apart:
            lines.append("not captured (runs as Python, at the student's width):")
            lines += [f"  {path or self.name}: {why}" for path, why in self.apart.items()]
        if self.conflicts:
            lines.append("ratios that differ for axes that widen together:")
            lines += [f"  {conflict}" for conflict in self.conflicts[:8]]
            more = len(self.conflicts) - 8
            lines += [f"  ... and {more} more"] if more > 0 else []
        held = [f for f in self.fixed if not f.cannot]
        if held:
            lines.append("held back:")
            lines += [f"  {f.parameter} dim {f.dim} ({f.axis}): {f.reason}" for f in held[:8]]
            lines += [f"  ... and {len(held) - 8} more"] if len(held) > 8 else []
        return "\n".join(lines)

    def _extra(self) -> str:
        return f", and {self.extra:,} in branches" if self.extra else ""

    def _branches(self) -> str:
        counts = Counter(self.branches.values())
        text = ", ".join(f"{name} on {n}" for name, n in counts.items()) or "none"
        text += f"; {len(self.unbranched)} weights got none" if self.unbranched else ""
        if self.unfused:
            text += f"; {len(self.unfused)} fold in plain torch on a GPU, too"
        return text

    def _exact(self) -> str:
        if self.check is None:
            return "not checked (verify=False)"
        dtype = str(self.check.dtype).removeprefix("torch.")
        text = f"{max(self.error.values()):.1e} relative in {dtype}"
        text += " (" + ", ".join(f"{k} {v:.1e}" for k, v in self.error.items()) + ")"
        if self.scales == "scratch":
            text += "; that was with scales at zero, live ones change the function, as asked"
        if self.check.tolerance > 1e-10:
            text += f"; rounding is amplified, allowed {self.check.tolerance:.1e}"
        text += "".join(
            f"; no gradients {of} in {mode} mode: the model has none"
            for mode, of in self.check.unseen.items()
        )
        return text


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} (x {after / max(before, 1):.2f})"


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


# --------------------------------------------------------------------------- making one
def make_report(
    widened: Widened,
    teacher: Teacher,
    control: Control,
    example: tuple[Any, Any],
    seconds: dict[str, float],
    check: Check | None,
    scales: str,
) -> Report:
    program, inference, widths = widened, widened.inference, widened.widths
    student = program.student
    matrices = widened.parameters(rank=2)
    fixed = _fixed(inference.solver, widths, widened.parameters())
    held = {f.parameter for f in fixed if not f.cannot}
    sizes = {name: program.tensors[name].numel() for name in matrices}
    total = sum(sizes.values())
    share = sum(n for name, n in sizes.items() if name not in held) / total if total else 1.0
    groups = _groups(inference.solver, widths, widened.parameters())
    nodes = {
        (mode.site.path, node.name)
        for mode in program.modes.values()
        for node in mode.nodes
        if node.op == "call_function"
    }
    extra = sum(_count(fold) for fold in teacher.folds())
    return Report(
        type(student).__name__,
        control,
        share,
        widened.bridges,
        len(nodes),
        tuple(group for leaf, group in groups.items() if widths(leaf) != leaf.size),
        fixed,
        widths.grown,
        tuple(
            Conflict(groups[leaf], asked, next(iter(asked.values())))
            for leaf, asked in widths.disputed.items()
        ),
        _unrounded(widened, control.round_to),
        {one.weight: one.chosen.name for one in widened.branched},
        widened.unbranched,
        _unfused(widened),
        scales,
        (_count(student), _count(teacher) - extra),
        extra,
        cost(teacher, student, example),
        _inputs(teacher),
        program.apart,
        seconds,
        check,
        gather_evidence(widened),
    )


def _unfused(widened: Widened) -> dict[str, str]:
    whys = {n: refusal(one.site) for n, one in widened.lowered.items() if one.site.branches}
    return widened.unlowered | {name: why for name, why in whys.items() if why}


def _inputs(teacher: Teacher) -> dict[str, str]:
    """Input -> sizes; where the network was captured in parts, those of every part."""
    found: dict[str, str] = {}
    for path, part in teacher._parts.items():
        section = next((s for s in part.sections if not s.training), part.sections[0])
        described = section.sizes.describe(section.call.names)
        found |= {f"{path}({k})" if path else k: v for k, v in described.items()}
    return found


def _groups(
    solver: Solver, widths: Widths, parameters: dict[str, tuple[Axis, ...]]
) -> dict[Leaf, Group]:
    members: dict[Leaf, list[str]] = {}
    for name, axes in parameters.items():
        for leaf in dict.fromkeys(x for a in axes for x in leaves(solver.resolve(a))):
            members.setdefault(leaf, []).append(name)
    ordered = sorted(members.items(), key=lambda item: item[0].order)
    return {leaf: Group(leaf.size, widths(leaf), tuple(names)) for leaf, names in ordered}


def _unrounded(widened: Widened, unit: int) -> tuple[str, ...]:
    return tuple(
        f"{name} dim {dim} ({frozen.student} -> {frozen.teacher})"
        for name in widened.parameters()
        for dim, frozen in enumerate(widened.maps[name])
        if frozen.wide and frozen.teacher % unit
    )


def _fixed(
    solver: Solver, widths: Widths, parameters: dict[str, tuple[Axis, ...]]
) -> tuple[Fixed, ...]:
    found = []
    for name, axes in parameters.items():
        for dim, axis in enumerate(axes):
            axis = solver.resolve(axis)
            for path in paths(axis):
                if not path or any(leaf in widths.size for leaf in path):
                    continue
                asked = [widths.stays[leaf] for leaf in path if leaf in widths.stays]
                reasons = asked or [solver.reason[leaf] for leaf in path if leaf in solver.reason]
                inner = any(leaf in widths.held for leaf in path)
                bad = [r for r in reasons if r.kind not in CANNOT]
                text = "another factor of its product widens" if inner else ""
                text = text or ", ".join(map(str, (bad or reasons)[:1])) or "too small to widen"
                found.append(Fixed(name, dim, str(axis), text, inner or not bad))
    return tuple(dict.fromkeys(found))


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
