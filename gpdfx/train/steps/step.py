"""One step of training, and what a bad one does: nothing.

with join("auto") as ranks:
    step = Stepper(net, config, ranks, steps)
    for at, (x, y) in enumerate(batches):
        values = step(x, y, at)  # the loss and its terms; None if the step was skipped

A ``TimedStepper`` tells what a step costs beside one of the plain student, on the same batches.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from ...access.groups import Group
from ...data.splits import generator
from ...errors import TrainingError
from ...files import Tensors
from .. import state as states
from ..config import TrainConfig
from ..networks import Net, Plain, SavedBuffers, make_criterion, make_groups
from ..ranks import Ranks
from ..recipes import make_optimizer, set_learning_rate
from .runner import GraphRunner, Runner


class Stepper:
    """One optimizer step on a network: learning rate, randomness, autocast, clipping.

    A step whose loss or gradients are not finite is skipped: no parameter and no buffer changes,
    on any rank. ``skipped`` counts them, ``in_row`` those since the last good one.
    """

    def __init__(self, net: Net, config: TrainConfig, ranks: Ranks, steps: int) -> None:
        self.net, self.config, self.ranks, self.steps = net, config, ranks, steps
        recipe = config.numbers
        self.optimizer = self.optimizer_of(make_groups(net, recipe.weight_decay))
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.amp == "fp16")
        self.skipped = self.in_row = 0
        self.buffers, self.first_step = SavedBuffers(net), True
        runner = GraphRunner if config.cuda_graph else Runner
        self.run = runner(net, config, ranks, self.scaler)

    def __call__(self, x: Tensor, y: Tensor, at: int) -> dict[str, float] | None:
        """Step ``at`` of the whole run, on a batch: the loss and its terms, or ``None`` if it was
        skipped. Raises ``TrainingError`` after ``patience`` skipped in a row."""
        recipe = self.config.numbers
        set_learning_rate(self.optimizer, recipe, at, self.steps)
        # Randomness is a function of seed and step, so that a run that resumes needs no more.
        torch.manual_seed(generator("step", self.config.seed, at, self.ranks.rank).initial_seed())
        self.buffers.save()
        self.optimizer.zero_grad()
        result = self.run(x, y)
        good = self.ranks.all(result.loss.detach().isfinite())
        overflow = False
        if good:
            self.run.backward(result)
            self.scaler.unscale_(self.optimizer)
            good = clip_gradients(self.net, recipe.clip)
            overflow = not good and self.scaler.is_enabled() and self.scaler.get_scale() > 1
            if good or self.scaler.is_enabled():
                self.scaler.step(self.optimizer)  # skips by itself what overflowed
                self.scaler.update()
        if self.first_step:
            self.buffers.forget_constants()
            self.first_step = False
        if not good:
            self.buffers.restore()
            self._skip(at, overflow)
            return None
        self.in_row = 0
        terms = {"loss": result.loss, **result.terms}
        values = torch.stack([t.detach().float() for t in terms.values()]).tolist()
        return dict(zip(terms, values, strict=True))

    def optimizer_of(self, groups: list[Group]) -> torch.optim.Optimizer:
        """The recipe's, over groups of parameters: fused, if no layer makes sparse gradients."""
        dense = not any(getattr(module, "sparse", False) for module in self.net.modules())
        return make_optimizer(self.config.numbers, groups, fused=dense)

    def _skip(self, at: int, overflow: bool) -> None:
        self.skipped += 1
        self.in_row += not overflow  # a scale that is still too large is no fault of the run
        if self.in_row >= self.config.patience:
            raise TrainingError(
                f"the loss or its gradient was not finite in {self.in_row} steps in a row, the "
                f"last of them step {at} (epoch {at // self.steps + 1})",
                remedy="train in another folder with a lower learning rate, with clip, or with "
                f"amp bf16 or none; the last good checkpoint is still in {self.config.out}",
            )

    # ---- checkpoints
    def flatten(self) -> tuple[Tensors, states.Facts]:
        """All that the next step depends on, as tensors and JSON."""
        tensors, optimizer = states.flatten_optimizer(self.optimizer)
        counts = {"skipped": self.skipped, "in_row": self.in_row}
        facts = {"scaler": self.scaler.state_dict(), "optimizer": optimizer}
        return tensors | states.flatten_module(self.net), counts | facts

    def restore(self, tensors: Tensors, facts: states.Facts) -> None:
        """The way back from ``flatten``."""
        states.restore_module(self.net, tensors)
        states.restore_optimizer(self.optimizer, tensors, facts["optimizer"])
        if facts["scaler"]:
            self.scaler.load_state_dict(facts["scaler"])
        self.skipped, self.in_row = facts["skipped"], facts["in_row"]


def clip_gradients(net: nn.Module, clip: float | None) -> bool:
    """Clip the norm of all gradients together; whether they are finite."""
    held = [p for p in net.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in held if p.grad is not None])
    if clip is not None and not norm < clip:
        nn.utils.clip_grads_with_norm_(held, clip, norm)
    return bool(norm.isfinite())


def make_plain(stepper: Stepper, **changes: Any) -> Stepper:
    """A stepper of the plain student, whose loss decides nothing; ``changes`` of the
    configuration."""
    student = Plain(stepper.net.collapse(average=False), make_criterion(stepper.config.numbers))
    patient = dataclasses.replace(stepper.config, patience=2**62, **changes)
    return Stepper(student.train(), patient, Ranks(stepper.ranks.device), stepper.steps)


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


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
        self.plain, device = self.plain or make_plain(self.stepper), self.stepper.ranks.device
        start = now(device)
        values = self.stepper(x, y, at)
        middle = now(device)
        self.plain(x, y, at)
        self.times.append((middle - start, now(device) - middle))
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
