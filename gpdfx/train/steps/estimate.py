"""What a run costs, told before its first step.

    print(estimate(stepper, data))  # a step costs about 6.7 of a plain one (teacher 4.1, ...

Times are measured, for counts of operations do not tell them: a few forwards and backwards on
random inputs of the batch's size, and updates of tensors that are like the parameters. What trains
is as it was before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.splits import Data
from ..state import flatten_module
from .runner import AUTOCAST, Runner
from .step import Stepper, clip_gradients, make_plain, now

ROUNDS, SECONDS = 5, 20.0
"""How often everything is measured after a first time, and how long; once at least."""


@dataclass(frozen=True)
class Estimate:
    """``parameters`` that train, and bytes of a ``checkpoint``: all, and those that are there
    because of branches. Where times were measured: ``seconds`` of a step, and what it costs in
    steps of the plain student: ``ratio``, of which ``branches`` is for branches."""

    parameters: tuple[int, int]
    checkpoint: tuple[int, int]
    steps: int
    seconds: float | None = None
    ratio: float = 1.0
    branches: float = 0.0

    def __str__(self) -> str:
        branched = self.parameters[1] > 0
        parts = [f"{self.parameters[0]:,} parameters train"]
        parts += [f"a checkpoint takes {_megabytes(self.checkpoint[0])}"]
        less = [f"{self.parameters[0] - self.parameters[1]:,} parameters"]
        less += [_megabytes(self.checkpoint[0] - self.checkpoint[1])]
        if self.seconds is not None:
            own = f"teacher {max(self.ratio - self.branches - 1, 0):.1f}"
            own += f", branches {self.branches:.1f}" if branched else ""
            parts.insert(0, f"a step costs about {self.ratio:.1f} of a plain one ({own})")
            parts.append(f"{self.steps:,} steps take about {duration(self.steps * self.seconds)}")
            less.insert(0, f"about {self.ratio - self.branches:.1f} of a plain step")
        return ", ".join(parts) + (f"; --branches none: {', '.join(less)}" if branched else "")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.2g} MB"


def duration(seconds: float) -> str:
    """``40 s``, ``17 min``, ``3.5 h``."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            count = seconds / size
            return f"{count:,.0f} {unit}" if count >= 10 else f"{count:.1f} {unit}"
    return f"{max(seconds, 1):.0f} s"


# --------------------------------------------------------------------------- measured
def estimate(stepper: Stepper, data: Data) -> Estimate:
    """What the steps of a run cost; their times only if ``config.time_steps`` asks for such."""
    net, config = stepper.net, stepper.config
    folds = [] if net.teacher is None else [*net.teacher.folds()]
    trained = [p for group in stepper.optimizer.param_groups for p in group["params"]]
    branches = [p for fold in folds for p in fold.parameters() if p.requires_grad]
    held = [x for fold in folds for x in flatten_module(fold).values()]
    state, update = _updates(stepper)
    part = _bytes(branches) / max(_bytes(trained), 1)
    counts = Estimate(
        (_count(trained), _count(branches)),
        (_bytes(flatten_module(net).values()) + state, _bytes(held) + round(part * state)),
        config.numbers.epochs * stepper.steps,
    )
    if not config.time_steps or config.plain:
        return counts
    times = Probe(stepper, data).times()
    plain, step, fold = (statistics.median(seconds) for seconds in zip(*times, strict=True))
    ratio = statistics.median((b + update) / a for a, b, _ in times)
    own = (fold + part * update) / plain
    return replace(counts, seconds=step + update, ratio=ratio, branches=own)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() for x in tensors)


def _updates(stepper: Stepper) -> tuple[int, float]:
    """Bytes of an optimizer's state, and seconds of an update, of tensors like the parameters."""
    groups = [_twins(group) for group in stepper.optimizer.param_groups]
    optimizer, device = stepper.optimizer_of(groups), stepper.ranks.device
    rounds = ROUNDS if stepper.config.time_steps else 1
    seconds = [_seconds(optimizer.step, device) for _ in range(rounds)]
    held = [x for state in optimizer.state.values() for x in state.values()]
    size = _bytes(x for x in held if isinstance(x, Tensor))
    return size, statistics.median(seconds[1:] or seconds)


def _twins(group: dict[str, Any]) -> dict[str, Any]:
    twins = [nn.Parameter(torch.zeros_like(p)) for p in group["params"]]
    for p in twins:
        p.grad = torch.zeros_like(p)
    return {"params": twins, "weight_decay": group["weight_decay"]}


def _seconds(part: Callable[[], object], device: torch.device) -> float:
    start = now(device)
    part()
    return now(device) - start


class Probe:
    """Parts of a step, eager, to be run outside of it."""

    def __init__(self, stepper: Stepper, data: Data) -> None:
        config, ranks = stepper.config, stepper.ranks
        self.stepper, self.net, self.device = stepper, stepper.net, ranks.device
        eager = replace(config, compile="none", cuda_graph=False)
        alone = replace(ranks, world=1)
        self.run = Runner(self.net, eager, alone, torch.amp.GradScaler(enabled=False))
        batch = max(min(config.numbers.batch_size, len(data.train)) // ranks.world, 1)
        self.x = torch.randn(batch, *data.shape, device=self.device)
        self.y = torch.arange(batch, device=self.device) % data.classes
        if config.numbers.mixup or config.numbers.cutmix:
            self.y = F.one_hot(self.y, data.classes).float()
        self.fold = self.net.teacher._folding.of_branches() if self.net.teacher else dict
        half = AUTOCAST.get(config.amp)
        self.autocast = partial(torch.autocast, self.device.type, half, enabled=half is not None)

    def times(self) -> list[tuple[float, float, float]]:
        """Seconds of a plain student's step, of forward and backward of what trains, and of those
        of the branches alone, one after the other each time."""
        plain = make_plain(self.stepper, compile="none", cuda_graph=False)
        parts = (lambda: plain(self.x, self.y, 0), self.networks, self.branches)
        self.stepper.buffers.save()
        self.net.train()
        found, begun = list[tuple[float, float, float]](), time.perf_counter()
        while len(found) <= ROUNDS and (len(found) < 2 or time.perf_counter() - begun < SECONDS):
            a, b, c = (_seconds(part, self.device) for part in parts)
            found.append((a, b, c))
        self.stepper.buffers.restore()
        return found[1:]  # the first allocates

    def networks(self) -> None:
        """Forward and backward of what trains."""
        self.run.backward(self.run(self.x, self.y))
        clip_gradients(self.net, self.stepper.config.numbers.clip)
        self.net.zero_grad()

    def branches(self) -> None:
        """Forward and backward of what branches fold into."""
        with self.autocast():
            folded = self.fold()
        if made := [x for x in folded.values() if x.requires_grad]:
            torch.autograd.backward(made, [*map(torch.ones_like, made)])
        self.net.zero_grad()
