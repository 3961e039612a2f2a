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
from functools import partial
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ..errors import InputError, near


# --------------------------------------------------------------------------- what values there are
def _number(v: Any, high: float = math.inf) -> bool:
    return type(v) in (int, float) and math.isfinite(v) and 0 <= v <= high


def _ascend(v: Any) -> bool:
    whole = isinstance(v, tuple) and all(type(m) is int and m > 0 for m in v)
    return whole and list(v) == sorted(set(v))


DOMAINS: dict[str, Callable[[Any], bool]] = {
    "a whole number of at least 0": lambda v: type(v) is int and v >= 0,
    "a whole number of at least 1": lambda v: type(v) is int and v >= 1,
    "a number of at least 0": _number,
    "a number above 0": lambda v: _number(v) and v > 0,
    "a number of at least 0 and at most 1": lambda v: _number(v, high=1),
    "a number above 0 and at most 1": lambda v: _number(v, high=1) and v > 0,
    "None or a number above 0": lambda v: v is None or (_number(v) and v > 0),
    "epochs in ascending order": _ascend,
}
"""Words for what a field's values are, as its type is annotated with -> whether one is of them."""

Count = Annotated[int, "a whole number of at least 1"]
Positive = Annotated[float, "a number above 0"]
NotNegative = Annotated[float, "a number of at least 0"]
Fraction = Annotated[float, "a number of at least 0 and at most 1"]


# --------------------------------------------------------------------------- the recipe
@dataclass(frozen=True)
class TrainingRecipe:
    """All numbers of a run. ``lr``, ``warmup_epochs`` and ``milestones`` count in epochs.

    ``schedule`` ``"cosine"`` falls to 0, ``"step"`` is times ``gamma`` at each of ``milestones``.
    ``kd``: Hinton et al. 2015, ``dkd``: Zhao et al. 2022, ``reviewkd``: Chen et al. 2021; ``lam``:
    arXiv 2410.04140, section 3.4; ``mixup``, ``cutmix``: see ``gpdfx.data.loaders.mix``.

    Fields, as ``gpdfx train --help`` tells them:

    the recipe:
        batch_size: of all processes together
        lr: the highest learning rate
        momentum: of SGD
        milestones: epochs of schedule step
        gamma: factor of schedule step
        warmup_epochs: linear, part of the epochs
        mixup: alpha; 0: off
        cutmix: alpha; 0: off
        clip: largest norm of the gradient, or none
        kd: loss against the static teacher; auto: dkd if there is one
        kd_alpha: weight of kd, or dkd's alpha
        kd_beta: dkd's beta
        temperature: of kd
        lam: weight of the dynamic teacher's soft target
    """

    epochs: Count
    batch_size: Count
    lr: Positive
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Fraction = 0.9
    weight_decay: NotNegative = 1e-4
    schedule: Literal["cosine", "step"] = "cosine"
    milestones: Annotated[tuple[int, ...], "epochs in ascending order"] = ()
    gamma: Annotated[float, "a number above 0 and at most 1"] = 0.1
    warmup_epochs: Annotated[int, "a whole number of at least 0"] = 0
    label_smoothing: Fraction = 0.0
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    clip: Annotated[float | None, "None or a number above 0"] = None
    kd: Literal["auto", "none", "kd", "dkd", "reviewkd"] = "auto"
    kd_alpha: NotNegative = 1.0
    kd_beta: NotNegative = 0.5
    temperature: Positive = 1.0
    lam: NotNegative = 3.0

    def __post_init__(self) -> None:
        if isinstance(self.milestones, list):
            object.__setattr__(self, "milestones", tuple(self.milestones))
        wrong = []
        for name, kind in get_type_hints(TrainingRecipe, include_extras=True).items():
            value, choices = getattr(self, name), get_args(kind)
            if get_origin(kind) is Literal:
                words, fits = f"one of {', '.join(choices)}", value in choices
            else:
                words = kind.__metadata__[0]
                fits = DOMAINS[words](value)
            if not fits:
                wrong.append(f"{name} is {value!r}, not {words}")
        if not wrong and self.warmup_epochs > self.epochs:
            wrong.append(f"warmup_epochs is {self.warmup_epochs}, more than epochs ({self.epochs})")
        if not wrong and self.schedule == "step" and not self.milestones:
            wrong.append("schedule is 'step', but there are no milestones")
        if wrong:
            raise InputError("; ".join(wrong), remedy="change these values of the recipe")


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
_small = partial(TrainingRecipe, clip=5.0, lam=1.0)  # the small sources: all numbers are ours
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
    "digits": _small(epochs=30, batch_size=64, lr=0.1, weight_decay=5e-4, warmup_epochs=1),
    "mnist1d": _small(
        epochs=60, batch_size=128, lr=3e-3, optimizer="adamw", weight_decay=0.05, warmup_epochs=2
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
    recipe: TrainingRecipe,
    groups: Iterable[Tensor] | Iterable[dict[str, Any]],
    *,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """SGD or AdamW over ``groups`` (as of ``gpdfx.param_groups``, or plain parameters).

    A group keeps the ``lr`` and ``weight_decay`` that it brings; the others are the recipe's.
    ``fused``: PyTorch's form of one pass over memory, for dense gradients on CPUs and GPUs.
    """
    sgd = partial(torch.optim.SGD, momentum=recipe.momentum)
    make: Callable[..., torch.optim.Optimizer]
    make = sgd if recipe.optimizer == "sgd" else torch.optim.AdamW
    make = partial(make, fused=True) if fused else make
    optimizer = make(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    if fused and recipe.optimizer == "sgd":
        optimizer.register_step_pre_hook(_begin_momenta)
    return optimizer


def _begin_momenta(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """At zero, where they would be missing: the fused form has momenta of all gradients, or of
    none, and those of a layer that some batches leave out begin later."""
    for group in optimizer.param_groups:
        for p in group["params"] if group["momentum"] else ():
            if p.grad is not None and not optimizer.state.get(p):
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, recipe: TrainingRecipe, step: int, steps_per_epoch: int
) -> None:
    """Give every group of ``make_optimizer``'s result its own learning rate times the factor."""
    factor = lr_factor(recipe, step, steps_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
