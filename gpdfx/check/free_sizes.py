"""The law of sizes: at which other input sizes than the example's the teacher is still the student.

Capture says which sizes are free, and on which conditions. Each graph is run, beside the module
that it came from, at other sizes, with one sample, and across every condition that may be an
operation's and not the model's: where both agree the condition is none, else it holds from then on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..calls import tree
from ..calls.held import has_gradient
from ..calls.sizes import Sizes, evaluate, names_in, numbers
from ..passes.capture.limits import LEVELS, quiet
from ..passes.capture.modes import set_flags
from ..passes.program import CallSite
from ..teacher.captured import Section
from .facts import Fact, Inputs, Law, Observed, difference, floating
from .faults.locate import call_of, calls_of, run_section
from .observe import GRADIENTS, drew, keep_rng, observe
from .visit import Pair, nudged

VISITS, SEEDS = 8, 5
"""Sizes at which one graph is tried across its conditions; how often, where it draws."""
LARGEST = 4096
"""What a condition names is tried up to here; who asks for more may mean a limit of memory."""
FAR = 1e-6
"""What differs by more is no rounding, even amplified."""


def free_sizes(pair: Pair, floor: float) -> dict[str, tuple[Sizes, str]]:
    """Graph -> the sizes that it holds for, and their level of ``LEVELS``: what one mode of a
    module refuses, the other one does, too. ``floor``: what rounding may make without being
    amplified."""
    teacher, found = pair.teacher, dict[str, tuple[Sizes, str]]()
    for mode in teacher._modes.captured:
        student = pair.copy_in(mode)
        teacher._enter(mode)
        calls = calls_of(pair.copy_in(mode), list(teacher._parts), pair.inputs)
        for key, section in teacher.sections.items():
            if section.site.mode == mode:
                path = section.site.path
                module = set_flags(student.get_submodule(path), section.site.flags)
                flat = call_of(section, calls.get(path, []))
                flat = call_of(section, [_as(pair, section.site)]) if flat is None else flat
                visits = _Visits(pair, student, module, section, path, flat, min(floor, FAR))
                found[key] = visits.found()
    pair.reload()
    lowest: dict[str, str] = {}
    for key, (_, level) in found.items():
        path = teacher.sections[key].site.path
        lowest[path] = max(lowest.get(path, level), level, key=LEVELS.index)
    return {
        key: (sizes.pinned(site.call.shapes, lowest[site.path]), lowest[site.path])
        for key, (sizes, _) in found.items()
        if (site := teacher.sections[key].site)
    }


def _as(pair: Pair, site: CallSite) -> CallSite:
    """The call that a module was captured with, in the student's dtype; other weights may take
    another branch, and not come to it."""
    dtype = next((p.dtype for p in pair.student.parameters() if floating(p)), torch.float32)
    cast = tuple(x.to(dtype) if floating(x) else x for x in site.tensors)
    return replace(site, tensors=cast)


@dataclass(frozen=True)
class _Visits:
    """One graph beside its module, at other sizes. ``flat``: the tensors of the example's call;
    ``levels``: of ``GRADIENTS``, those that the module may have."""

    pair: Pair
    student: nn.Module
    module: nn.Module
    section: Section
    path: str
    flat: Any
    floor: float
    levels: list[str] = field(default_factory=lambda: list(GRADIENTS))

    def found(self) -> tuple[Sizes, str]:
        """The sizes that were seen to hold, and the level of ``LEVELS`` that was."""
        sizes, level = self.section.sizes, self._level()
        if level == LEVELS[-1]:
            return replace(sizes, assumed=()), level
        sizes = replace(sizes, assumed=sizes.doubts)
        needed = self._across(sizes)
        return replace(sizes, conditions=(*sizes.conditions, *needed), assumed=()), level

    def _level(self) -> str:
        """The first level at which both agree in the first size that the student can have."""
        sizes, names = self.section.sizes, self.section.call.names
        for level in LEVELS[:-1] if self.flat else ():
            verdicts = (
                self._agree(moved)
                for moved in sizes.elsewhere(self.flat, level, names)
                if all(evaluate(c, sizes.read(moved)) for c in sizes.assumed)
            )
            if next((agree for agree in verdicts if agree is not None), False):
                return level
        return LEVELS[-1]

    def _across(self, sizes: Sizes) -> list[str]:
        """The conditions across which they were not seen to agree."""
        innocent, seen = set[str](), set[frozenset[str]]()
        visits, runs = 0, 0
        for values, degenerate in _candidates(self.flat, sizes):
            open_ = set(sizes.assumed) - innocent
            broken = frozenset(c for c in open_ if not evaluate(c, values))
            broken -= frozenset(c for c in broken if degenerate and not _unit(c))
            if 0 in values.values():  # of nothing all is the same
                broken &= {f"{name} != 0" for name in values}
            if broken in seen or visits == VISITS or runs == 3 * VISITS:
                continue
            moved = sizes.moved(self.flat, values, self.section.call.names)
            if not broken or moved is None:
                continue
            seen.add(broken)
            verdict = self._agree(moved)
            runs, visits = runs + 1, visits + (verdict is not None)
            innocent |= broken if verdict else frozenset()
        return [c for c in sizes.assumed if c not in innocent]

    def _agree(self, flat: list[Any]) -> bool | None:
        """Whether the teacher follows; ``None`` if the student does not run on these tensors. What
        draws may drop what differs: it has to agree for several seeds."""
        for seed in range(self.pair.seed, self.pair.seed + SEEDS):
            self.pair.reload()
            with torch.no_grad(), keep_rng(), quiet():
                self._restore()
                verdict, by_chance = self._agree_once(flat, seed)
            if not (verdict and by_chance):
                return verdict
        return True

    def _restore(self) -> None:
        """Give the student its buffers again."""
        before = dict(self.pair.student.named_buffers())
        for name, buffer in self.student.named_buffers():
            if name in before and before[name].shape == buffer.shape:
                buffer.copy_(before[name])

    def _agree_once(self, flat: list[Any], seed: int) -> tuple[bool | None, bool]:
        """``_agree`` for one seed, and whether random numbers were drawn."""
        inputs = self.section.call.unflatten(flat)
        expected = self._student(inputs, seed)
        if expected is None:  # a size that the student cannot have: try another
            return None, False
        try:
            got = self._teacher(inputs, seed)
        except Exception:  # the graph is not free in this size, whatever capture said
            return False, False
        far, allowed = _distance(expected, got), self.floor
        if allowed < far <= FAR:
            self._restore()
            other = observe(nudged(self.module, seed), inputs, seed)
            allowed = 50 * _distance(expected, other)
        return far <= allowed and self._reach_alike(expected, got, seed), drew(expected, seed)

    def _student(self, inputs: Inputs, seed: int) -> Observed | None:
        """What the module shows, and what its gradients come to, if it runs."""
        own = dict(self.module.named_parameters())
        for level in dict.fromkeys((*self.levels, "none")):
            try:
                for p in own.values():
                    p.requires_grad_(level != "none" and has_gradient(p))
                seen = observe(self.module, inputs, seed, level, parameters=own, reach=True)
                self.levels[:] = [level]
                return seen
            except Exception:
                self._restore()
            finally:
                for p in own.values():  # other copies borrow them
                    p.requires_grad_(False)
        return None

    def _teacher(self, inputs: Inputs, seed: int) -> Observed:
        """What the graph shows of the same."""
        teacher = self.pair.teacher
        sources = teacher.sources_of(self.path, self.module)
        run, level = partial(run_section, teacher, self.section), self.levels[0]
        with teacher.saving():
            return observe(
                run, inputs, seed, level, parameters=sources, reach=True, copy=tree.copied
            )

    def _reach_alike(self, expected: Observed, got: Observed, seed: int) -> bool:
        """Gradients come to as much of both, or what is another was so for the example."""
        apart = _gradients_of(expected) ^ _gradients_of(got)
        if not apart:
            return True
        self._restore()
        example = self.section.call.unflatten(self.flat)
        before = self._student(example, seed)
        return before is not None and apart == _gradients_of(before) ^ _gradients_of(
            self._teacher(example, seed)
        )


def _gradients_of(seen: Observed) -> set[Fact]:
    return {fact for fact in seen if fact.law in (Law.INPUTS, Law.PARAMETERS)}


def _distance(expected: Observed, got: Observed) -> float:
    outputs = (fact for fact in expected if fact.law is Law.OUTPUTS)
    return max((difference(expected[fact], got.get(fact)) for fact in outputs), default=0.0)


def _candidates(flat: Any, sizes: Sizes) -> Iterator[tuple[dict[str, int], bool]]:
    """Values of the symbols across conditions, and whether they are so small that much is the same
    by chance: one sample; all small; one symbol alone at the numbers that conditions name, or at
    nothing."""
    now = sizes.read(flat)
    batch = sizes.free("batch", [tuple(x.shape) for x in flat])
    named = {n for c in sizes.assumed for n in numbers(c) if n <= LARGEST}
    yield now | dict.fromkeys(batch, 1), True
    for size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
        yield {n: v if n in batch else min(v, size) for n, v in now.items()}, True
    near = sorted({n + d for n in (*named, *now.values()) for d in (-1, 0, 1) if n + d > 0})
    for name in now:
        for size in near:
            yield now | {name: size}, False
    for name in now:
        yield now | {name: 0}, True


def _unit(condition: str) -> bool:
    """True for a condition that all large sizes fulfil."""
    draw, names = np.random.default_rng(0), sorted(names_in(condition))
    sizes = draw.integers(64, 512, (16, len(names))).tolist()
    return all(evaluate(condition, dict(zip(names, row, strict=True))) for row in sizes)
