"""One step of training: what runs in it, on which device and ranks, and what a bad step does.

with join("auto") as place:
    step = Stepper(net, config, place, steps)
    for at, (x, y) in enumerate(batches):
        values = step(x, y, at)  # the loss and its terms; None if the step was skipped
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.splits import generator
from ..distill.gpd import GPD, Distillation, Distilled, find_logits
from ..distill.losses import DKD, KD
from ..errors import InputError, TrainingError
from ..teacher.groups import Group, param_groups
from ..teacher.module import Teacher
from .config import TrainConfig
from .recipes import TrainingRecipe, make_optimizer, set_learning_rate
from .runner import buffers_kept, make_runner


# --------------------------------------------------------------------------- where
@dataclass(frozen=True)
class Place:
    """The device of this process, and its rank among ``world`` processes."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def add(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def agree(self, flag: Tensor) -> bool:
        """True if it is true on every rank."""
        if self.world > 1:
            flag = flag.to(torch.int32)
            dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    def share(self, tensors: list[Tensor]) -> None:
        """Give all ranks the first one's values."""
        if self.world > 1:
            for x in tensors:
                dist.broadcast(x, 0)

    def wait(self) -> None:
        """Go on when all ranks are here."""
        if self.world > 1:
            self.agree(torch.ones((), device=self.device))


@contextlib.contextmanager
def join(device: str = "auto") -> Iterator[Place]:
    """This process's place; under ``torchrun`` it joins the others (gloo on CPUs, nccl on GPUs)."""
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise InputError("there is no GPU that torch can use", remedy="pass device='cpu'")
    where = torch.device("cpu")
    if cuda:
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(where)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized():
        yield Place(where)
        return
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Place(where, dist.get_rank(), dist.get_world_size())
    finally:
        if mine:
            dist.destroy_process_group()


# --------------------------------------------------------------------------- what
class Plain(nn.Module):
    """The student alone, with the face of ``GPD``: CE(S, y), and KD(S, static) if there is one."""

    teacher: Teacher | None = None
    student: nn.Module
    _static: nn.Module | None
    epoch = 0
    gap_counts = False

    def __init__(
        self,
        student: nn.Module,
        criterion: Callable[[Tensor, Any], Tensor],
        static: nn.Module | None = None,
        kd: Distillation | None = None,
    ) -> None:
        super().__init__()
        self.student, self.criterion, self.kd = student, criterion, kd
        object.__setattr__(self, "_static", static)

    def forward(self, inputs: Tensor, targets: Tensor) -> Distilled:
        own = find_logits(self.student(inputs))
        terms = {"student": self.criterion(own, targets)}
        static = None
        if self._static is not None and self.kd is not None:
            with torch.no_grad():
                static = find_logits(self._static(inputs))
            terms["student_kd"] = self.kd(own, static, targets)
        return Distilled(torch.stack([*terms.values()]).sum(), own, own, static, terms)

    def collapse(self) -> nn.Module:
        """The student."""
        return self.student

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Plain:
        super()._apply(fn, recurse)
        if self._static is not None:
            self._static._apply(fn, recurse)
        return self


Net = GPD | Plain


def make_criterion(recipe: TrainingRecipe) -> Callable[[Tensor, Any], Tensor]:
    """Cross entropy; targets are classes (N,) or, when mixed, soft (N, C)."""
    return partial(F.cross_entropy, label_smoothing=recipe.label_smoothing)


def make_kd(recipe: TrainingRecipe) -> Distillation | None:
    """The loss against a static teacher's logits."""
    if recipe.kd == "kd":
        return KD(recipe.temperature, recipe.kd_alpha)
    if recipe.kd == "dkd":
        return DKD(recipe.kd_alpha, recipe.kd_beta, recipe.temperature)
    return None


def make_net(
    config: TrainConfig, student: nn.Module, static: nn.Module | None, example: Tensor, verify: bool
) -> Net:
    """What trains: ``GPD``, or ``Plain`` if the run asks for it."""
    recipe = config.numbers
    kd = make_kd(recipe) if static is not None else None
    static = static if kd is not None else None
    criterion = make_criterion(recipe)
    if config.plain:
        if static is not None:
            static.eval().requires_grad_(False)
        return Plain(student, criterion, static, kd)
    return GPD(
        student,
        static,
        ratio=config.ratio,
        branches=config.branches,
        kd=kd,
        lam=recipe.lam,
        temperature=config.gap_temperature,
        smoothing=config.gap_smoothing,
        teacher_weight=config.teacher_weight,
        start_epoch=config.start_epoch,
        criterion=criterion,
        unshared=config.unshared,
        shares=config.shares,
        extract=config.extract,
        seed=config.seed,
        example_inputs=(example,),
        dynamic="batch",
        verify=verify,
    )


def make_groups(net: Net, weight_decay: float) -> list[Group]:
    """Parameter groups: the teacher's, and those of the student alone; vectors do not decay."""
    groups = [] if net.teacher is None else param_groups(net.teacher, weight_decay)
    own = [(n, p) for n, p in net.named_parameters() if not n.startswith("teacher.")]
    for decay, chosen in (
        (weight_decay, [(n, p) for n, p in own if p.requires_grad and p.ndim > 1]),
        (0.0, [(n, p) for n, p in own if p.requires_grad and p.ndim < 2]),
    ):
        if chosen:
            names, params = [n for n, _ in chosen], [p for _, p in chosen]
            groups.append({"params": params, "param_names": names, "weight_decay": decay})
    return groups


def freeze_idle(net: Net, x: Tensor, y: Tensor) -> list[str]:
    """Freeze parameters that no loss depends on: distributed training would wait for their
    gradients. Returns their names."""
    with buffers_kept(net):
        net.train()(x, y).loss.backward()
    idle = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
    for name in idle:
        net.get_parameter(name).requires_grad_(False)
    net.zero_grad()
    return idle


# --------------------------------------------------------------------------- how
class Statistics:
    """The buffers that steps change, such as batch norm's, as they were before the last step.

    ``keep`` before a step, then ``settle``, which finds out which buffers there are: all are kept
    before the first step, and then those that it changed.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._held = {name: b.clone() for name, b in net.named_buffers()}
        self._found = False

    @torch.no_grad()
    def keep(self) -> None:
        for name, copy in self._held.items():
            copy.copy_(self._net.get_buffer(name))

    @torch.no_grad()
    def settle(self, *, undo: bool) -> None:
        """The step is done; ``undo``: it was bad."""
        if not self._found:  # by value: batch norm does not count as a change in place
            now = dict(self._net.named_buffers())
            self._held = {n: x for n, x in self._held.items() if not torch.equal(x, now[n])}
            self._found = True
        if undo:
            for name, copy in self._held.items():
                self._net.get_buffer(name).copy_(copy)


class Stepper:
    """One optimizer step on a network: learning rate, randomness, autocast, clipping.

    A step whose loss or gradients are not finite is skipped: no parameter and no buffer changes,
    on any rank. ``skipped`` counts them, ``in_row`` those since the last good one.
    """

    def __init__(self, net: Net, config: TrainConfig, place: Place, steps: int) -> None:
        self.net, self.config, self.place, self.steps = net, config, place, steps
        recipe = config.numbers
        self.optimizer = make_optimizer(recipe, make_groups(net, recipe.weight_decay))
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=config.amp == "fp16")
        self.skipped = self.in_row = 0
        self.statistics = Statistics(net)
        self.run = make_runner(net, config, place, self.scaler)

    def __call__(self, x: Tensor, y: Tensor, at: int) -> dict[str, float] | None:
        """Step ``at`` of the whole run, on a batch: the loss and its terms, or ``None`` if it was
        skipped. Raises ``TrainingError`` after ``patience`` skipped in a row."""
        recipe = self.config.numbers
        set_learning_rate(self.optimizer, recipe, at, self.steps)
        # Randomness is a function of seed and step, so that a run that resumes needs no more.
        torch.manual_seed(generator("step", self.config.seed, at, self.place.rank).initial_seed())
        self.statistics.keep()
        self.optimizer.zero_grad()
        result = self.run(x, y)
        good = self.place.agree(result.loss.detach().isfinite())
        overflow = False
        if good:
            self.run.backward(result)
            self.scaler.unscale_(self.optimizer)
            clip = math.inf if recipe.clip is None else recipe.clip
            good = bool(nn.utils.clip_grad_norm_(self.net.parameters(), clip).isfinite())
            overflow = not good and self.scaler.is_enabled() and self.scaler.get_scale() > 1
            if good or self.scaler.is_enabled():
                self.scaler.step(self.optimizer)  # skips by itself what overflowed
                self.scaler.update()
        self.statistics.settle(undo=not good)
        if good:
            self.in_row = 0
            names, terms = ["loss", *result.terms], [result.loss, *result.terms.values()]
            values = torch.stack([t.detach().float() for t in terms]).tolist()
            return dict(zip(names, values, strict=True))
        self.skipped += 1
        self.in_row += not overflow  # a scale that is still too large is no fault of the run
        if self.in_row >= self.config.patience:
            raise TrainingError(
                f"the loss or its gradient was not finite in {self.in_row} steps in a row, the "
                f"last of them step {at} (epoch {at // self.steps + 1})",
                remedy="train in another folder with a lower learning rate, with clip, or with "
                f"amp bf16 or none; the last good checkpoint is still in {self.config.out}",
            )
        return None
