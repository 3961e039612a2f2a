"""``TrainConfig``: everything that a training run is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..models import DEFAULTS
from .recipes import RECIPES, TrainingRecipe
from .runner import COMPILE, OWN_GRAPHS
from .state import as_json

AMP = ("none", "bf16", "fp16")
# What a run that is continued may change: where, how fast and how carefully, not what.
FREE = (
    *("out", "device", "compile", "cuda_graph", "workers", "checkpoint_every", "patience"),
    *("verify", "time_steps"),
)


@dataclass(frozen=True)
class TrainConfig:
    """A run of ``gpdfx.train``. Networks are named as in ``gpdfx.models``, data as in
    ``gpdfx.data``.

    Fields:
        student, weights: the network, and a file with its ``state_dict`` to begin with (from
            scratch if none). Data in memory have a student of their own.
        static_teacher, static_weights: a trained network to distil from as well.
        data, labels, noise, size: the source, and see ``gpdfx.data.load_data``.
        plain: train the student alone (with the static teacher, if there is one): a baseline.
        ratio, branches, shares, extract: see ``gpdfx.expand``.
        unshared, teacher_weight, start_epoch: see ``gpdfx.gpd.GPD``.
        gap_temperature, gap_smoothing: of the dynamic teacher's soft target.
        recipe: all numbers of the training; the source's own, or else ``"resnet18"``.
        amp: ``"none"``, ``"bf16"`` or ``"fp16"``, the type of autocast.
        out: the folder of the run.
        seed: of weights, data, order and all else.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        compile: ``"none"``, or a mode of ``torch.compile`` for forward and backward.
        cuda_graph: run forward and backward as one captured CUDA graph.
        workers: processes that load data.
        checkpoint_every: steps; 0: at the end of every epoch only.
        patience: steps in a row without a finite loss after which training stops.
        verify: check the expanded teacher (see ``gpdfx.expand``).
        time_steps: steps of the plain student, interleaved, to compare the time of a step with;
            0: none.
    """

    student: str = ""
    weights: str | None = None
    static_teacher: str | None = None
    static_weights: str | None = None
    data: str = "digits"
    labels: int | None = None
    noise: float = 0.0
    size: int | None = None
    plain: bool = False
    ratio: float | Mapping[str, float] = 2.0
    branches: str | Mapping[str, str | None] | None = "auto"
    shares: str = "random"
    extract: str = "first"
    unshared: tuple[str, ...] = ()
    gap_temperature: float = 1.0
    gap_smoothing: float = 0.1
    teacher_weight: float = 1.0
    start_epoch: int = 0
    recipe: TrainingRecipe | None = None
    amp: str = "none"
    out: str = "run"
    seed: int = 0
    device: str = "auto"
    compile: str = "none"
    cuda_graph: bool = False
    workers: int = 0
    checkpoint_every: int = 0
    patience: int = 10
    verify: bool = True
    time_steps: int = 10

    def __post_init__(self) -> None:
        kind = self.data.partition(":")[0]
        object.__setattr__(self, "out", str(self.out))
        object.__setattr__(self, "unshared", tuple(self.unshared))
        object.__setattr__(self, "student", self.student or DEFAULTS.get(kind, ""))
        if self.recipe is None:
            object.__setattr__(self, "recipe", default_recipe(self.data))
        kd = self.numbers.kd
        for wrong, message, remedy in (
            (not self.student, f"{self.data} has no student of its own", "name one: timm:resnet18"),
            (self.amp not in AMP, f"amp is {self.amp!r}", f"pass one of {', '.join(AMP)}"),
            (
                self.device not in ("auto", "cpu", "cuda"),
                f"device is {self.device!r}",
                "pass auto, cpu or cuda",
            ),
            (
                self.compile not in COMPILE,
                f"compile is {self.compile!r}",
                f"pass one of {', '.join(COMPILE)}",
            ),
            (
                self.cuda_graph and self.compile in OWN_GRAPHS,
                f"compile={self.compile!r} makes CUDA graphs of its own",
                "leave out cuda_graph, or pass compile='max-autotune-no-cudagraphs'",
            ),
            (
                self.static_weights and not self.static_teacher,
                "there are static weights, but no static teacher",
                "name it: static_teacher='torchvision:resnet34'",
            ),
            (
                self.static_teacher and kd == "reviewkd",
                "training distils logits, and reviewkd is a loss of features",
                "take kd='kd' or 'dkd', or write the loop with gpdfx.features.ReviewKD",
            ),
            (self.patience < 1, f"patience is {self.patience}", "pass at least 1"),
            (
                min(self.workers, self.checkpoint_every, self.time_steps) < 0,
                "workers, checkpoint_every or time_steps is negative",
                "pass numbers of at least 0",
            ),
            (
                self.plain and self.unshared,
                "a plain run shares nothing: unshared has no meaning",
                "leave out plain or unshared",
            ),
        ):
            if wrong:
                raise InputError(message, remedy=remedy)

    @property
    def numbers(self) -> TrainingRecipe:
        """The recipe."""
        assert self.recipe is not None
        return self.recipe

    def identity(self) -> dict[str, Any]:
        """What a run that is continued must have in common with its beginning."""
        return {k: v for k, v in as_json(self).items() if k not in FREE}


def default_recipe(source: str) -> TrainingRecipe:
    """The recipe of a source of data."""
    return RECIPES.get(source.partition(":")[0], RECIPES["resnet18"])


def read_config(plain: Mapping[str, Any]) -> TrainConfig:
    """The way back from JSON.

    Raises ``InputError`` for fields that are none.
    """
    try:
        recipe = TrainingRecipe(**plain["recipe"])
        return dataclasses.replace(TrainConfig(), **{**plain, "recipe": recipe})
    except (TypeError, KeyError) as error:
        raise InputError(
            f"this is not the configuration of a run: {error}",
            remedy="use the version of gpdfx that wrote it",
        ) from error
