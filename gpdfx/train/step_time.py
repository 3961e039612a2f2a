"""What a step costs beside one of the plain student, on the same batches.

timed = TimedStepper(stepper)
timed(x, y, at)  # the stepper's step; the first ones are timed in pairs
timed.result()   # {"step": seconds, "plain": seconds, "ratio": ..., "pairs": ...}
"""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch
from torch import Tensor

from .networks import Plain, make_criterion
from .ranks import Ranks
from .step import Stepper

WARM_UP = 2  # steps before times count: the first compiles, captures and allocates


class TimedStepper:
    """The stepper; its first ``config.time_steps`` steps (after ``WARM_UP``) have a step of the
    plain student after each, which runs in the same way: compiled, or as a graph."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper, config = stepper, stepper.config
        self.left = config.time_steps + WARM_UP if config.time_steps and not config.plain else 0
        self.plain: Stepper | None = None
        self.times: list[tuple[float, float]] = []

    def __call__(self, x: Tensor, y: Tensor, at: int) -> dict[str, float] | None:
        """What the stepper returns."""
        if not self.left:
            return self.stepper(x, y, at)
        self.plain = self.plain or self._make_plain()
        start = self._now()
        values = self.stepper(x, y, at)
        middle = self._now()
        self.plain(x, y, at)
        self.times.append((middle - start, self._now() - middle))
        self.left -= 1
        if not self.left:
            self.plain = None  # frees its memory
        return values

    def result(self) -> dict[str, float] | None:
        """Medians over the pairs; ``None`` if there are none."""
        pairs = self.times[WARM_UP:]
        if not pairs:
            return None
        step, plain = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        return {"step": step, "plain": plain, "ratio": ratio, "pairs": len(pairs)}

    def _make_plain(self) -> Stepper:
        stepper = self.stepper
        student = Plain(stepper.net.collapse(), make_criterion(stepper.config.numbers)).train()
        patient = dataclasses.replace(stepper.config, patience=2**62)  # its loss decides nothing
        return Stepper(student, patient, Ranks(stepper.ranks.device), stepper.steps)

    def _now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.stepper.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
