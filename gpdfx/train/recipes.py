"""Training recipes: every number of a training run, and the schedule as a function of the step.

    recipe = with_changes(RECIPES["digits"], epochs=5, lr=0.05)
    optimizer = make_optimizer(recipe, gpdfx.param_groups(teacher, recipe.weight_decay))
    set_learning_rate(optimizer, recipe, step, steps_per_epoch)  # before every step

A schedule without a state: a run that resumes needs the step alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, near

CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "schedule": ("cosine", "step"),
    "kd": ("none", "kd", "dkd", "reviewkd"),
}


@dataclass(frozen=True)
class TrainingRecipe:
    """All numbers of a run. ``lr``, ``warmup_epochs`` and ``milestones`` count in epochs.

    Fields:
        batch_size: of all processes together.
        optimizer: ``"sgd"`` (with ``momentum``) or ``"adamw"``.
        lr: the highest learning rate.
        schedule: ``"cosine"`` to 0, or ``"step"``: times ``gamma`` at each of ``milestones``.
        warmup_epochs: linear, from 0; part of ``epochs``.
        label_smoothing: of the task's cross entropy.
        mixup, cutmix: alphas, 0 for off (see ``gpdfx.data.loaders.mix``).
        clip: largest norm of the gradient, or ``None``.
        kd: the loss against a static teacher, if there is one: ``"none"``, ``"kd"`` (Hinton et al.
            2015), ``"dkd"`` (Zhao et al. 2022) or ``"reviewkd"`` (Chen et al. 2021).
        kd_alpha, kd_beta, temperature: of that loss; ``kd_beta`` is DKD's alone.
        lam: weight of the student's cross entropy with the dynamic teacher (arXiv 2410.04140,
            section 3.4).
    """

    epochs: int
    batch_size: int
    lr: float
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_epochs: int = 0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    clip: float | None = None
    kd: str = "dkd"
    kd_alpha: float = 1.0
    kd_beta: float = 0.5
    temperature: float = 1.0
    lam: float = 3.0

    def __post_init__(self) -> None:
        if isinstance(self.milestones, list):
            object.__setattr__(self, "milestones", tuple(self.milestones))
        wrong = [
            f"{name} is {getattr(self, name)!r}, not {wanted}"
            for name, (good, wanted) in RULES.items()
            if not good(getattr(self, name))
        ]
        if not wrong and self.warmup_epochs > self.epochs:
            wrong.append(f"warmup_epochs is {self.warmup_epochs}, more than epochs ({self.epochs})")
        if not wrong and self.schedule == "step" and not self.milestones:
            wrong.append("schedule is 'step', but there are no milestones")
        if wrong:
            raise InputError("; ".join(wrong), remedy="change these values of the recipe")


Rule = tuple[Callable[[Any], bool], str]


def _whole(low: int) -> Rule:
    return lambda v: type(v) is int and v >= low, f"a whole number of at least {low}"


def _number(low: float, high: float = math.inf, *, open_below: bool = False) -> Rule:
    def good(v: Any) -> bool:
        fits = type(v) in (int, float) and math.isfinite(v) and low <= v <= high
        return fits and not (open_below and v == low)

    upper = f" and at most {high:g}" if high < math.inf else ""
    return good, f"a number {'above' if open_below else 'of at least'} {low:g}{upper}"


def _choice(field: str) -> Rule:
    return lambda v: v in CHOICES[field], f"one of {', '.join(CHOICES[field])}"


_POSITIVE, _NOT_NEGATIVE = _number(0, open_below=True), _number(0)
RULES: dict[str, Rule] = {
    "epochs": _whole(1),
    "batch_size": _whole(1),
    "lr": _POSITIVE,
    "optimizer": _choice("optimizer"),
    "momentum": _number(0, 1),
    "weight_decay": _NOT_NEGATIVE,
    "schedule": _choice("schedule"),
    "milestones": (
        lambda v: (
            isinstance(v, tuple)
            and all(type(m) is int and m > 0 for m in v)
            and list(v) == sorted(set(v))
        ),
        "epochs in ascending order",
    ),
    "gamma": _number(0, 1, open_below=True),
    "warmup_epochs": _whole(0),
    "label_smoothing": _number(0, 1),
    "mixup": _NOT_NEGATIVE,
    "cutmix": _NOT_NEGATIVE,
    "clip": (lambda v: v is None or _POSITIVE[0](v), "None or a number above 0"),
    "kd": _choice("kd"),
    "kd_alpha": _NOT_NEGATIVE,
    "kd_beta": _NOT_NEGATIVE,
    "temperature": _POSITIVE,
    "lam": _NOT_NEGATIVE,
}

# ImageNet, arXiv 2410.04140, section 4 and appendix. The paper takes over the recipes of the
# distillation papers (DKD, ReviewKD; RVT for transformers); where its text leaves a number open it
# is the default of the authors' released code. That code also keeps a moving average of the
# weights, which is not part of a recipe.
_IMAGENET_CNN = TrainingRecipe(
    epochs=100,
    batch_size=256,  # the released scripts: 512 at the same lr
    lr=0.1,
    weight_decay=1e-4,  # for MobileNet too
    schedule="step",
    milestones=(30, 60, 90),
    clip=5.0,  # the released code; the paper's text does not name it
)
RECIPES: dict[str, TrainingRecipe] = {
    "resnet18": _IMAGENET_CNN,
    "mobilenet": dataclasses.replace(_IMAGENET_CNN, kd_beta=2.0),
    "vit": TrainingRecipe(
        epochs=300,
        batch_size=1024,  # ours; the released scripts: 2048, at lr = 5e-4 * batch_size / 512
        lr=1e-3,  # by that rule
        optimizer="adamw",
        weight_decay=0.05,
        warmup_epochs=5,
        label_smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
    ),
    # The small sources: all numbers are ours.
    "digits": TrainingRecipe(
        epochs=30, batch_size=64, lr=0.1, weight_decay=5e-4, warmup_epochs=1, clip=5.0, lam=1.0
    ),
    "mnist1d": TrainingRecipe(
        epochs=60,
        batch_size=128,
        lr=3e-3,
        optimizer="adamw",
        weight_decay=0.05,
        warmup_epochs=2,
        clip=5.0,
        lam=1.0,
    ),
}


def get_recipe(name: str) -> TrainingRecipe:
    """A named recipe.

    Raises ``InputError`` with what comes near.
    """
    if name not in RECIPES:
        raise InputError(f"there is no recipe {name!r}", remedy=near(name, RECIPES))
    return RECIPES[name]


def with_changes(recipe: TrainingRecipe, **changes: Any) -> TrainingRecipe:
    """The recipe with other values: ``with_changes(recipe, epochs=5, clip=None)``.

    Raises ``InputError`` for names that are no fields and for values that do not fit, all at once.
    """
    names = [field.name for field in dataclasses.fields(TrainingRecipe)]
    unknown = [name for name in changes if name not in names]
    if unknown:
        raise InputError(
            f"a recipe has no {', '.join(unknown)}",
            remedy="; ".join(f"{name}: {near(name, names)}" for name in unknown),
        )
    return dataclasses.replace(recipe, **changes)


def lr_factor(recipe: TrainingRecipe, step: int, steps_per_epoch: int) -> float:
    """The part of the learning rate, 0 to 1, that holds at ``step`` (0 is the first of the run).

    Linear warm-up: (step + 1) / warm-up steps. Then a cosine that would reach 0 one step after the
    last, or steps at the milestones, which count from the start of the run.
    """
    if step < 0 or steps_per_epoch < 1:
        raise InputError(
            f"step is {step}, steps_per_epoch {steps_per_epoch}", remedy="count steps from 0"
        )
    warmup, total = recipe.warmup_epochs * steps_per_epoch, recipe.epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / warmup
    if recipe.schedule == "step":
        passed = sum(step >= milestone * steps_per_epoch for milestone in recipe.milestones)
        return float(recipe.gamma**passed)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * done))


def learning_rate(recipe: TrainingRecipe, step: int, steps_per_epoch: int) -> float:
    """The recipe's learning rate at ``step``: ``recipe.lr * lr_factor(...)``."""
    return recipe.lr * lr_factor(recipe, step, steps_per_epoch)


def make_optimizer(
    recipe: TrainingRecipe, groups: Iterable[Tensor] | Iterable[dict[str, Any]]
) -> torch.optim.Optimizer:
    """SGD or AdamW over ``groups`` (as of ``gpdfx.param_groups``, or plain parameters).

    A group keeps the ``lr`` and ``weight_decay`` that it brings; the others are the recipe's.
    """
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            groups, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def set_learning_rate(
    optimizer: torch.optim.Optimizer, recipe: TrainingRecipe, step: int, steps_per_epoch: int
) -> None:
    """Give every group of ``make_optimizer``'s result its own learning rate times the factor."""
    factor = lr_factor(recipe, step, steps_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
