"""What a step costs beside one of the plain student, on the same batches.

clock = Clock(net, stepper)
clock(x, y, at)  # the stepper's step; the first ones are timed in pairs
clock.result()   # {"step": seconds, "plain": seconds, "ratio": ..., "pairs": ...}
"""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch
from torch import Tensor

from .step import Net, Place, Plain, Stepper, make_criterion

WARM_UP = 2  # steps before times count: the first compiles, captures and allocates


class Clock:
    """The stepper; its first ``config.time_steps`` steps (after ``WARM_UP``) have a step of the
    plain student after each, which runs in the same way: compiled, or as a graph."""

    def __init__(self, net: Net, stepper: Stepper) -> None:
        self.net, self.stepper, config = net, stepper, stepper.config
        asked = 0 if config.plain else config.time_steps
        self.left = asked + WARM_UP if asked else 0
        self.plain: Stepper | None = None
        self.times: list[tuple[float, float]] = []

    def __call__(self, x: Tensor, y: Tensor, at: int) -> dict[str, float] | None:
        """What the stepper returns."""
        if not self.left:
            return self.stepper(x, y, at)
        if self.plain is None:
            self.plain = self._make_plain()
        start = self._now()
        values = self.stepper(x, y, at)
        middle = self._now()
        self.plain(x, y, at)
        self.times.append((middle - start, self._now() - middle))
        self.left -= 1
        if not self.left:
            self.plain = None
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
        config, device = self.stepper.config, self.stepper.place.device
        copy = Plain(self.net.collapse(), make_criterion(config.numbers)).train()
        patient = dataclasses.replace(config, patience=2**62)  # its loss decides nothing
        return Stepper(copy, patient, Place(device), self.stepper.steps)

    def _now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.stepper.place.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
