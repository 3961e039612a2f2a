"""The methods of ``benchmarks.accuracy``, and how one run is trained.

Every method of one seed sees the same training samples, labels, batches and initial student. All
train with AdamW, gradients clipped, a linear warm-up and a cosine; the learning rate is the only
number that differs by row (``benchmarks.accuracy search``), and the number of steps where a row is
about that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpdfx
from benchmarks.accuracy_tasks import BATCH, HEAD, SHAPES, Part, Task, batches, load, network
from gpdfx.branches.layer import Layer
from gpdfx.branches.sets import Auto, BranchSet
from gpdfx.distill.gpd import GPD
from gpdfx.distill.losses import KD
from gpdfx.train.recipes import TrainingRecipe, make_optimizer, set_learning_rate

STATIC_SEED = 10_000  # added to the seed of a static teacher: it has an init of its own
Loss = Callable[[Tensor, Tensor], Tensor]
Rates = Mapping[tuple[str, str], float]
"""(task, method) -> learning rate."""


# --------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Plain:
    """One network: ``width`` times the student, cross entropy with labels smoothed by
    ``smoothing``, and ``KD()`` against a ``static`` teacher, the result of that method.

    ``branches``: on the student, at its own width.
    """

    width: int = 1
    smoothing: float = 0.0
    static: str = ""
    branches: bool = False


@dataclass(frozen=True)
class Gap:
    """GPD at ratio 2: arguments of ``gpdfx.GPD``; ``static`` as of ``Plain``."""

    lam: float = 3.0
    smoothing: float = 0.1
    static: str = ""
    unshared: str | tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """``steps``: times those of the task; ``None``: as many as take GPD's time. ``control``: what
    GPD has to beat; what is neither that nor GPD is a reference."""

    name: str
    text: str
    config: Plain | Gap
    control: bool = False
    steps: float | None = 1.0


class Narrow(Auto):
    """The default set with the narrowest products that it ever has."""

    def on(self, layer: Layer, positions: float = 1) -> BranchSet:
        return super().on(layer, 1)


METHODS = (
    Method("plain", "plain", Plain(), True),
    Method("wide", "plain, twice as wide (the static teacher)", Plain(2)),
    Method("plain-x3", "plain, three times the steps", Plain(), True, 3.0),
    Method("plain-clock", "plain, as much time as GPD", Plain(), True, None),
    Method("plain-smooth", "plain, labels smoothed by 0.1", Plain(smoothing=0.1), True),
    Method("born-again", "self-distillation (born again)", Plain(static="plain"), True),
    Method("kd", "KD from the wide network", Plain(static="wide"), True),
    Method("branches", "branches alone (ratio 1)", Plain(branches=True), True),
    Method("gpd", "GPD (defaults: random shares, lambda 3, smoothing 0.1)", Gap()),
    Method("gpd-kd", "GPD + KD from the wide network", Gap(static="wide")),
    Method("gpd-uniform", "GPD, uniform shares", Gap(options={"shares": "uniform"})),
    Method("gpd-mean", "GPD, student = mean of the copies", Gap(options={"extract": "mean"})),
    Method("gpd-lam1", "GPD, lambda 1, no smoothing", Gap(lam=1.0, smoothing=0.0)),
    Method("gpd-narrow", "GPD, products of 8 channels", Gap(options={"branches": Narrow()})),
    Method("gpd-bare", "GPD, no branches", Gap(options={"branches": None})),
    Method("gpd-head", "GPD, all but the last layer shared", Gap(unshared=HEAD)),
    Method("gpd-apart", "GPD, nothing shared", Gap(unshared="*")),
)
BY_NAME = {method.name: method for method in METHODS}


# --------------------------------------------------------------------------- one run
@dataclass(frozen=True)
class Run:
    """``module`` holds what trains by ``loss``; ``student`` and ``teacher`` are what comes out."""

    module: nn.Module
    loss: Loss
    student: Callable[[], nn.Module]
    teacher: nn.Module | None = None


def build(task: Task, config: Plain | Gap, seed: int, static: nn.Module | None = None) -> Run:
    """Networks and loss of a method; its student starts as every other method's of this seed."""
    student = network(task.source, getattr(config, "width", 1), seed)
    options: dict[str, Any] = {
        "example_inputs": (torch.zeros(2, *SHAPES[task.source]),),
        "dynamic": "batch",
        "verify": False,  # tests check these networks; here it would take most of the time
        "seed": seed,
    }
    if isinstance(config, Gap):
        gpd = GPD(
            student,
            static,
            lam=config.lam,
            smoothing=config.smoothing,
            unshared=config.unshared,
            **options,
            **config.options,
        )
        return Run(gpd, lambda x, y: gpd(x, y).loss, gpd.collapse, gpd.teacher)
    module, call = student, student.__call__
    if config.branches:
        # The student's call: the same function, and it is the student's statistics that count.
        module = teacher = gpdfx.expand(student, 1, **options)
        call = teacher.student
    kd = KD()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        logits = call(x)
        total = F.cross_entropy(logits, y, label_smoothing=config.smoothing)
        if static is not None:
            with torch.no_grad():
                soft = static(x)
            total = total + kd(logits, soft, y)
        return total

    return Run(module, loss, lambda: gpdfx.collapse(teacher) if config.branches else module)


def stepper(run: Run, lr: float, steps: int) -> Callable[[int, Tensor, Tensor], None]:
    """One optimizer step, given its number; the recipe counts every step as an epoch."""
    recipe = TrainingRecipe(
        epochs=steps,
        batch_size=BATCH,
        lr=lr,
        optimizer="adamw",
        weight_decay=0.05,
        warmup_epochs=steps // 10,
    )
    groups = decay_groups(run.module, recipe.weight_decay)
    parameters = [p for group in groups for p in group["params"]]
    optimizer = make_optimizer(recipe, groups)
    run.module.train()

    def step(number: int, x: Tensor, y: Tensor) -> None:
        set_learning_rate(optimizer, recipe, number, 1)
        optimizer.zero_grad()
        run.loss(x, y).backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()

    return step


def decay_groups(module: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Norms, biases and scales of branches do not decay, in no method."""
    if isinstance(module, gpdfx.Teacher | GPD):
        groups = gpdfx.param_groups(module, decay)
    else:
        parameters = list(module.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
    return [
        {"params": group["params"], "weight_decay": group["weight_decay"], "fused": True}
        for group in groups
        if group["params"]
    ]


def train(task: Task, method: Method, lr: float, seed: int, steps: int, rates: Rates) -> Run:
    """``rates``: where the rate of a static teacher is found."""
    name, static = method.config.static, None
    if name:
        static = static_teacher(task, name, rates[task.name, name], seed)
    run = build(task, method.config, seed, static)
    fit(run, batches(load(task, seed)["train"], steps, seed), lr, steps)
    return run


def fit(run: Run, data: Iterator[Part], lr: float, steps: int) -> None:
    step = stepper(run, lr, steps)
    for number, (x, y) in enumerate(data):
        step(number, x, y)
    run.module.eval()


@lru_cache(maxsize=16)
def static_teacher(task: Task, name: str, lr: float, seed: int) -> nn.Module:
    """A network trained beforehand on the samples of ``seed``, from another init."""
    run = build(task, BY_NAME[name].config, STATIC_SEED + seed)
    fit(run, batches(load(task, seed)["train"], task.steps, STATIC_SEED + seed), lr, task.steps)
    return run.student().eval().requires_grad_(False)


@torch.no_grad()
def accuracy(net: nn.Module | None, data: Part) -> float:
    """Percent; NaN without a network."""
    if net is None:
        return float("nan")
    x, y = data
    return 100 * int((net.eval()(x).argmax(1) == y).sum()) / len(y)


def step_times(task: Task, pairs: int = 100) -> tuple[float, float, float]:
    """Milliseconds of a plain and of a GPD step, and their ratio: medians of interleaved pairs."""
    data = load(task, 0)["train"]
    steps = [stepper(build(task, BY_NAME[k].config, 0), 1e-3, pairs + 3) for k in ("plain", "gpd")]
    times = []
    for number, (x, y) in enumerate(batches(data, pairs + 3, 0)):
        took = []
        for step in steps:
            start = time.perf_counter()
            step(number, x, y)
            took.append(1e3 * (time.perf_counter() - start))
        times.append(took)
    table = torch.tensor(times[3:])  # the first steps warm up
    plain, gpd = table.median(0).values.tolist()
    return plain, gpd, (table[:, 1] / table[:, 0]).median().item()
