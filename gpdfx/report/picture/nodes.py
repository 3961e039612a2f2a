"""What there is to see: the nodes of a teacher, with their widths, groups and words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from string import ascii_uppercase

from ...algebra.axes import Leaf, leaves
from ...algebra.widths import width_of
from ...teacher.module import Teacher
from ..explain import Evidence, explain
from ..flow import Step

NAME, WORD, CHIP = 7.3, 6.6, 20.0
"""Pixels that a letter of a name takes, one of other text at most, and a group's."""
SHOWN = 6
"""Layers of a group that are named."""


@dataclass(frozen=True)
class Node:
    """A step of the flow as it is drawn. ``widths``: of student and teacher; ``letters``: of the
    groups that it widens with; ``more``: what else there is to say, line by line."""

    step: Step
    widths: tuple[int, int] | None
    letters: tuple[str, ...]
    more: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The step's, or ``stays`` for a layer that does."""
        stays = self.step.kind == "layer" and self.widths and len({*self.widths}) == 1
        return "stays" if stays else self.step.kind

    @property
    def text(self) -> str:
        """What it does, and its width: ``conv 3x3: 64 → 128``."""
        if self.step.kind != "layer" or self.widths is None:
            return ("bridge: " if self.kind == "bridge" else "") + self.step.op
        before, after = self.widths
        return f"{self.step.op}: {before} " + ("stays" if before == after else f"→ {after}")

    def size(self, name: str) -> tuple[float, float]:
        """Width and height in pixels."""
        chips = CHIP * len(self.letters)
        if self.kind == "merge":
            return 22 + WORD * len(self.text) + chips, 24
        width = max(NAME * len(name), WORD * len(self.text) + chips) + 20
        return max(width + 16 * (self.kind == "bridge"), 60), 42 if self.text else 26


def read(teacher: Teacher) -> dict[str, Node]:
    """All nodes, in the order of the flow, by the names that they are shown by. Groups of two
    layers or more have a letter."""
    evidence = teacher.report().evidence
    steps: dict[str, Step] = dict(evidence.layers.nodes(data="step"))
    layers: dict[Leaf, dict[str, None]] = {}
    for step in steps.values():
        for leaf in _grown(evidence, step) if step.kind == "layer" else ():
            layers.setdefault(leaf, {})[step.weight.removesuffix(".weight")] = None
    groups = [leaf for leaf, names in layers.items() if len(names) > 1]
    letters = {leaf: _letter(k) for k, leaf in enumerate(groups)}
    nodes = {}
    for name, step in steps.items():
        grown = _grown(evidence, step)
        widths = None
        if step.axis is not None:
            widths = step.axis.size, width_of(step.axis, evidence.widths.size)
        together = [n for leaf in grown for n in layers.get(leaf, ()) if n != name]
        more = (*_weight(evidence, step), *_reason(teacher, step, bool(grown), together))
        own = tuple(letters[leaf] for leaf in grown if leaf in letters)
        nodes[name] = Node(step, widths, own, more)
    return nodes


def _grown(evidence: Evidence, step: Step) -> list[Leaf]:
    """What of a step's axis widens."""
    found = dict.fromkeys(leaves(step.axis)) if step.axis else ()
    return [leaf for leaf in found if evidence.widths(leaf) != leaf.size]


def _letter(k: int) -> str:
    """A ... Z, AA, AB ..."""
    return (_letter(k // 26 - 1) if k >= 26 else "") + ascii_uppercase[k % 26]


def _weight(evidence: Evidence, step: Step) -> list[str]:
    """Shape and size of a weight, student and teacher."""
    if not step.weight:
        return []
    axes = [axis for _, axis in evidence.axes[step.weight]]
    sizes = [a.size for a in axes], [width_of(a, evidence.widths.size) for a in axes]
    shapes = dict.fromkeys(" x ".join(map(str, shape)) for shape in sizes)
    counts = dict.fromkeys(f"{math.prod(shape):,}" for shape in sizes)
    return [f"{step.weight}: {' → '.join(shapes)}", f"parameters: {' → '.join(counts)}"]


def _reason(teacher: Teacher, step: Step, grown: bool, together: list[str]) -> list[str]:
    """What widens with it, or why it does not."""
    if step.kind == "bridge":
        return [f"a bridge, at the student's width: {step.why}"]
    if grown and step.kind == "layer" and not together:
        return ["output channels widen, together with no other layer's"]
    if together:
        more = f" and {len(together) - SHOWN} more" if len(together) > SHOWN else ""
        return [f"widens together with {', '.join(together[:SHOWN])}{more}"]
    if step.kind != "layer" or step.axis is None:
        return []
    axes = [axis for _, axis in teacher.report().evidence.axes[step.weight]]
    reason = explain(teacher, step.weight).dimensions[axes.index(step.axis)].reason
    return [f"output channels stay: {reason}"]
