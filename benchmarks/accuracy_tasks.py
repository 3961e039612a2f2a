"""The tasks of ``benchmarks.accuracy``: data in memory, batches, and the network that learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from gpdfx.data.sources import load_data
from gpdfx.data.splits import Split, generator

BATCH = 64
SHAPES = {"mnist1d": (1, 40), "digits": (1, 8, 8)}
Part = tuple[Tensor, Tensor]
"""Inputs (N, C, ...) and labels (N,)."""


@dataclass(frozen=True)
class Task:
    """``labels``: training samples of every class; ``noise``: the part with a wrong label;
    ``grid``: learning rates that every row tries, two on either side of where a few plain runs were
    best on validation sets."""

    name: str
    source: str
    labels: int
    noise: float
    grid: tuple[float, ...]
    steps: int = 200


TASKS = (
    Task("mnist1d-few", "mnist1d", 50, 0.0, (3e-3, 1e-2, 3e-2, 1e-1)),
    Task("mnist1d-noise", "mnist1d", 50, 0.4, (1e-3, 3e-3, 1e-2, 3e-2)),
    Task("digits-few", "digits", 10, 0.0, (1e-3, 3e-3, 1e-2, 3e-2)),
    Task("digits-noise", "digits", 30, 0.4, (3e-4, 1e-3, 3e-3, 1e-2)),
)


@lru_cache(maxsize=32)
def load(task: Task, seed: int) -> dict[str, Part]:
    """All of a task in memory: ``train``, ``validation`` and ``test``, without augmentation."""
    data = load_data(task.source, seed=seed, labels=task.labels, noise=task.noise, augment=False)
    return {name: stack(getattr(data, name)) for name in ("train", "validation", "test")}


def stack(split: Split) -> Part:
    return torch.stack([split[i][0] for i in range(len(split))]), split.labels


def batches(data: Part, steps: int, seed: int) -> Iterator[Part]:
    """``steps`` batches, one permutation of the samples after the other."""
    x, y = data
    draw = generator("batches", seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < min(BATCH, len(x)):
            order = torch.cat([order, torch.randperm(len(x), generator=draw)])
        chosen, order = order[:BATCH], order[BATCH:]
        yield x[chosen], y[chosen]


# --------------------------------------------------------------------------- networks
class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> (N, C): the mean over positions."""
        return x.flatten(2).mean(2)


def network(source: str, width: int, seed: int) -> nn.Module:
    """A three-layer CNN: 2,142 parameters for mnist1d and 5,026 for digits at width 1."""
    torch.manual_seed(seed)
    if source == "mnist1d":
        sizes, conv, norm = (1, 12, 16, 24), nn.Conv1d, nn.BatchNorm1d
        shape = ((5, 2), (3, 2), (3, 2))
    else:
        sizes, conv, norm = (1, 8, 16, 24), nn.Conv2d, nn.BatchNorm2d
        shape = ((3, 1), (3, 2), (3, 2))
    channels = [1, *(width * s for s in sizes[1:])]
    layers: list[nn.Module] = []
    for i, (kernel, stride) in enumerate(shape):
        inputs, outputs = channels[i], channels[i + 1]
        layers.append(conv(inputs, outputs, kernel, stride, kernel // 2, bias=False))
        layers += [norm(outputs), nn.ReLU()]
    return nn.Sequential(*layers, Pool(), nn.Linear(channels[-1], 10))


HEAD = "10"  # the last layer's name
