"""What trains: the student with its teachers, or alone; and its parameters and buffers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import models
from ..access.groups import Group, param_groups
from ..data.splits import Data, generator
from ..distill.gpd import GPD, Criterion, Distillation, Distilled, find_logits
from ..distill.losses import DKD, KD
from ..errors import GpdfxError, InputError, described
from ..passes.capture.modes import flags_of, set_flags
from ..passes.program import raised_at
from ..teacher.module import Teacher
from .config import TrainConfig, refuse
from .recipes import TrainingRecipe

# What the configuration calls as GPD does, and as expand does.
SAME_IN_GPD = (
    *("ratio", "branches", "teacher_weight", "start_epoch", "unshared"),
    *("shares", "extract", "seed"),
)


class Plain(nn.Module):
    """The student alone, with the face of ``GPD``: CE(S, y), and KD(S, static) if there is one."""

    teacher: Teacher | None = None
    _static: nn.Module | None
    epoch = 0
    gap_counts = False

    def __init__(
        self, student: nn.Module, criterion: Criterion, static: Any = None, kd: Any = None
    ) -> None:
        super().__init__()
        self.student, self.criterion, self.kd = student, criterion, kd
        object.__setattr__(self, "_static", static)  # no part of the state_dict

    def forward(self, inputs: Tensor, targets: Tensor) -> Distilled:
        logits = find_logits(self.student(inputs))
        terms = {"student": self.criterion(logits, targets)}
        static_logits = None
        if self._static is not None:
            with torch.no_grad():
                static_logits = find_logits(self._static(inputs))
            terms["student_kd"] = self.kd(logits, static_logits, targets)
        loss = torch.stack([*terms.values()]).sum()
        return Distilled(loss, logits, logits, static_logits, terms)

    def collapse(self, *, average: bool | None = None) -> nn.Module:
        """The student."""
        return self.student


Net = GPD | Plain


# --------------------------------------------------------------------------- made for a run
def load_network(name: str, data: Data, seed: int, weights: str | None = None) -> nn.Module:
    """A network by its name, for the classes and inputs of the data; checked that it takes them."""
    network = models.load(name, classes=data.classes, shape=data.shape, seed=seed)
    if weights:
        models.load_weights(network, weights)
    check_logits(name, network, data, seed)
    return network


def fine_tune(student: nn.Module, config: TrainConfig, data: Data) -> list[str]:
    """Give a student the weights of the run, but for a classifier of other classes; a note on
    that."""
    if config.weights is None:
        return []
    more = partial(models.load, config.student, classes=data.classes + 1, shape=data.shape)
    left = models.load_weights(student, config.weights, more)
    sizes = ", ".join(f"{name} {tuple(size)}" for name, size in left.items())
    note = f"{sizes} of {config.weights} are left out: the data has {data.classes} classes"
    return [note] if left else []


def example_inputs(data: Data, seed: int) -> Tensor:
    """Two random inputs."""
    return torch.randn(2, *data.shape, generator=generator("example", seed))


@torch.no_grad()
def check_logits(name: str, network: nn.Module, data: Data, seed: int) -> None:
    """Raise ``InputError`` if a network does not take the data, or has other classes."""
    flags, example = flags_of(network), example_inputs(data, seed)
    try:
        logits = find_logits(network.eval()(example))
    except (GpdfxError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the network's own
        raise InputError(
            f"{name} does not run on inputs {tuple(example.shape)}: {described(error)}",
            source=raised_at(error),
            remedy="name a network for inputs of this shape; one of your own may take num_classes "
            "and in_chans",
        ) from error
    finally:
        set_flags(network, flags)
    refuse(
        logits.shape != (2, data.classes),
        f"{name} gives {tuple(logits.shape)} for 2 inputs of {data.classes} classes",
        f"name a network with {data.classes} logits, or one whose constructor takes num_classes",
    )


def make_net(
    config: TrainConfig, student: nn.Module, static: Any, example: Tensor, verify: bool
) -> Net:
    """What trains: ``GPD``, or ``Plain`` if the run asks for it."""
    recipe, criterion = config.numbers, make_criterion(config.numbers)
    kd = None if static is None else make_kd(recipe)
    static = None if kd is None else static
    if config.plain:
        return Plain(student, criterion, static, kd)
    return GPD(
        student,
        static,
        kd=kd,
        lam=recipe.lam,
        temperature=config.gap_temperature,
        smoothing=config.gap_smoothing,
        criterion=criterion,
        **{name: getattr(config, name) for name in SAME_IN_GPD},
        example_inputs=(example,),
        dynamic="batch",
        verify=verify,
    )


def make_criterion(recipe: TrainingRecipe) -> Criterion:
    """Cross entropy; targets are classes (N,) or, when mixed, soft (N, C)."""
    return partial(F.cross_entropy, label_smoothing=recipe.label_smoothing)


def make_kd(recipe: TrainingRecipe) -> Distillation | None:
    """The loss against a static teacher's logits."""
    if recipe.kd == "kd":
        return KD(recipe.temperature, recipe.kd_alpha)
    if recipe.kd == "dkd":
        return DKD(recipe.kd_alpha, recipe.kd_beta, recipe.temperature)
    return None


# --------------------------------------------------------------------------- parameters and buffers
def make_groups(net: Net, weight_decay: float) -> list[Group]:
    """Parameter groups: those of ``param_groups``, or, for a student alone, weights and vectors;
    vectors do not decay."""
    if net.teacher is not None:
        return param_groups(net, weight_decay)
    groups = []
    for decay, vectors in ((weight_decay, False), (0.0, True)):
        held = {n: p for n, p in net.named_parameters() if (p.ndim < 2) is vectors}
        held = {name: p for name, p in held.items() if p.requires_grad}
        named = {"params": [*held.values()], "param_names": [*held]}
        groups += [{**named, "weight_decay": decay}] if held else []
    return groups


def freeze_idle(net: Net, x: Tensor, y: Tensor) -> None:
    """Freeze parameters that no loss depends on: distributed training would wait for their
    gradients."""
    buffers = SavedBuffers(net)
    net.train()(x, y).loss.backward()
    buffers.restore()
    for p in net.parameters():
        p.requires_grad_(p.grad is not None)
    net.zero_grad()


class SavedBuffers:
    """Copies of a network's buffers, such as batch norm's statistics, to be put back."""

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._copies = {name: buffer.clone() for name, buffer in net.named_buffers()}

    @torch.no_grad()
    def save(self) -> None:
        for name, copy in self._copies.items():
            copy.copy_(self._net.get_buffer(name))

    @torch.no_grad()
    def restore(self) -> None:
        for name, copy in self._copies.items():
            self._net.get_buffer(name).copy_(copy)

    def forget_constants(self) -> None:
        """Keep those that have changed. By value: batch norm does not count as a change in
        place."""
        now = dict(self._net.named_buffers())
        self._copies = {n: x for n, x in self._copies.items() if not torch.equal(x, now[n])}
