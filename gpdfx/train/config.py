"""``TrainConfig``: everything that a training run is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..data.sources import load_data, usage_of
from ..data.splits import Data
from ..errors import InputError, check_choice
from ..models import DEFAULTS
from .recipes import RECIPES, TrainingRecipe
from .state import as_json

Amp = Literal["none", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda"]
Compile = Literal[
    "none", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
]
OWN_GRAPHS = ("reduce-overhead", "max-autotune")  # on GPUs they make CUDA graphs themselves
# What a run that is continued may change: where, how fast and how carefully, not what.
CHANGEABLE = (
    *("out", "device", "compile", "cuda_graph", "workers", "checkpoint_every", "patience"),
    *("verify", "time_steps", "static_random"),
)


DATA = "digits"
"""What a run without a name for anything trains on."""


@dataclass(frozen=True)
class TrainConfig:
    """A run of ``gpdfx.train``. Networks are named as in ``gpdfx.models``, data as in
    ``gpdfx.data``.

    For ``ratio``, ``branches``, ``shares`` and ``extract`` see ``gpdfx.expand``, for ``unshared``,
    ``teacher_weight`` and ``start_epoch`` ``gpdfx.GPD``, for ``labels``, ``noise`` and ``size``
    ``gpdfx.data.load_data``. ``recipe`` is all numbers of the training: the source's own, or else
    ``"resnet18"``. ``verify`` checks the expanded teacher. ``time_steps`` of the plain student are
    interleaved, to compare the time of a step with.

    Fields, as ``gpdfx train --help`` tells them:

    networks and data:
        student: timm:NAME, torchvision:NAME or package.module:CALLABLE; digits and mnist1d have
            one of their own
        weights: fine-tune these: a state_dict as safetensors, or of torch.save
        static_teacher: a trained network to distil from as well
        static_weights: its weights
        static_random: distil from it as it is built, without weights
        data: digits, mnist1d, cifar10:PATH, imagefolder:PATH; digits if no student is named
        labels: keep this many training samples of a class
        noise: the part of the training labels to make wrong
        size: height and width of the images of imagefolder
    the method:
        plain: train the student alone, as a baseline
        shares: of the copies of a weight
        extract: the student out of the copies
        unshared: parameters that student and teacher have each for itself
        gap_temperature: of the dynamic teacher's soft target
        gap_smoothing: of the dynamic teacher's soft target
        teacher_weight: of the dynamic teacher's own losses
        start_epoch: the first epoch with the dynamic teacher's target
    the run:
        out: its folder; one that holds this run is gone on with
        seed: of all randomness
        amp: the type of autocast
        device: where to train
        compile: torch.compile forward and backward; MODE: default (if left out), reduce-overhead,
            max-autotune, max-autotune-no-cudagraphs
        cuda_graph: forward and backward as one CUDA graph
        workers: processes that load data
        checkpoint_every: steps; 0: every epoch alone
        patience: bad steps in a row after which training stops
        time_steps: steps to time against the plain student's
    """

    student: str = ""
    weights: str | None = None
    static_teacher: str | None = None
    static_weights: str | None = None
    static_random: bool = False
    data: str = ""
    labels: int | None = None
    noise: float = 0.0
    size: int | None = None
    plain: bool = False
    ratio: float | Mapping[str, float] = 2.0
    branches: str | Mapping[str, str | None] | None = "auto"
    shares: Literal["random", "uniform"] = "random"
    extract: Literal["first", "mean"] = "first"
    unshared: tuple[str, ...] = ()
    gap_temperature: float = 1.0
    gap_smoothing: float = 0.1
    teacher_weight: float = 1.0
    start_epoch: int = 0
    recipe: TrainingRecipe | None = None
    amp: Amp = "none"
    out: str = "run"
    seed: int = 0
    device: Device = "auto"
    compile: Compile = "none"
    cuda_graph: bool = False
    workers: int = 0
    checkpoint_every: int = 0
    patience: int = 10
    verify: bool = True
    time_steps: int = 10

    def __post_init__(self) -> None:
        refuse(
            self.student and not self.data,
            f"the student {self.student} has no data",
            "name it, too: data='imagefolder:PATH'",
        )
        object.__setattr__(self, "data", self.data or DATA)
        kind = usage_of(self.data).partition(":")[0]
        object.__setattr__(self, "out", str(self.out))
        object.__setattr__(self, "unshared", tuple(self.unshared))
        object.__setattr__(self, "student", self.student or DEFAULTS.get(kind, ""))
        recipe = self.recipe or default_recipe(self.data)
        if recipe.kd == "auto":
            recipe = dataclasses.replace(recipe, kd="dkd" if self.static_teacher else "none")
        object.__setattr__(self, "recipe", recipe)
        # What does not fit is refused.
        alone = f"{self.data} has no student of its own"
        refuse(not self.student, alone, "name one: timm:resnet18")
        check_choice("amp", self.amp, get_args(Amp))
        device = f"device is {self.device!r}"
        refuse(self.device not in get_args(Device), device, "pass auto, cpu or cuda")
        check_choice("compile", self.compile, get_args(Compile))
        refuse(
            self.cuda_graph and self.compile in OWN_GRAPHS,
            f"compile={self.compile!r} makes CUDA graphs of its own",
            "leave out cuda_graph, or pass compile='max-autotune-no-cudagraphs'",
        )
        refuse(
            self.static_weights and not self.static_teacher,
            "there are static weights, but no static teacher",
            "name it: static_teacher='torchvision:resnet34'",
        )
        refuse(
            self.static_random and (self.static_weights or not self.static_teacher),
            "static_random is for a static teacher without weights",
            "leave out static_random",
        )
        refuse(
            self.static_teacher and not self.static_weights and not self.static_random,
            f"the static teacher {self.static_teacher} has no weights: it would be random",
            "give static_weights='FILE'; static_random=True distils from it as it is built",
        )
        refuse(
            self.numbers.kd != "none" and not self.static_teacher,
            f"kd is {self.numbers.kd!r}, and there is no static teacher",
            "name it: static_teacher='torchvision:resnet34', or leave out kd",
        )
        refuse(
            self.numbers.kd == "reviewkd",
            "training distils logits, and reviewkd is a loss of features",
            "take kd='kd' or 'dkd', or write the loop with gpdfx.features.ReviewKD",
        )
        refuse(self.patience < 1, f"patience is {self.patience}", "pass at least 1")
        refuse(
            min(self.workers, self.checkpoint_every, self.time_steps) < 0,
            "workers, checkpoint_every or time_steps is negative",
            "pass numbers of at least 0",
        )
        refuse(
            self.plain and self.unshared,
            "a plain run shares nothing: unshared has no meaning",
            "leave out plain or unshared",
        )

    @property
    def numbers(self) -> TrainingRecipe:
        """The recipe."""
        assert self.recipe is not None
        return self.recipe

    def identity(self) -> dict[str, Any]:
        """What a run that is continued must have in common with its beginning."""
        return {k: v for k, v in as_json(self).items() if k not in CHANGEABLE}

    def open_data(self) -> Data:
        """The data of the run."""
        return load_data(
            self.data, seed=self.seed, labels=self.labels, noise=self.noise, size=self.size
        )


def refuse(wrong: object, message: str, remedy: str) -> None:
    """Raise ``InputError`` if something is wrong."""
    if wrong:
        raise InputError(message, remedy=remedy)


def notes_on(config: TrainConfig, data: Data) -> list[str]:
    """What a person should know before the run begins: sentences."""
    batch, samples = config.numbers.batch_size, len(data.train)
    few = f"{samples} training samples" + (f" for a batch of {batch}" if samples < batch else "")
    notes = {
        f"an epoch is one step: there are {few}": samples < 2 * batch,
        f"{config.data} has no test set: test accuracies are those of the validation set": (
            data.test is data.validation
        ),
        f"the static teacher has no weights: it is as {config.static_teacher} builds it, untrained "
        "unless that loads some": config.static_random,
    }
    return [text for text, holds in notes.items() if holds]


def default_recipe(source: str) -> TrainingRecipe:
    """The recipe of a source of data."""
    return RECIPES.get(source.partition(":")[0] or DATA, RECIPES["resnet18"])


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
