"""Batches whose order is a function of seed and epoch, so that a run can go on in the middle."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import GpdfxError, InputError, described
from .splits import Data, Split, generator, permutation


def epoch_order(
    length: int, seed: int, epoch: int, rank: int = 0, world: int = 1, start: int = 0
) -> list[int]:
    """The order of one epoch: a permutation that depends on (seed, epoch) alone.

    Rank r of ``world`` takes every ``world``-th sample from r on, so that the k-th batches of all
    ranks together are the k-th batch of a single process. A tail that does not go round is left
    out. ``start``: samples of the epoch that all ranks together have had before; ranks may have
    been more or fewer then.
    """
    order = permutation(length, "order", seed, epoch)[start:]
    return order[rank : len(order) // world * world : world].tolist()


def train_loader(
    data: Data,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    start: int = 0,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
) -> DataLoader[tuple[Tensor, int]]:
    """One epoch's training batches: x (batch_size / world, ...), labels (batch_size / world,).

    Batches depend on (seed, epoch) alone: not on ``workers``, not on ``world`` (see
    ``epoch_order``), not on what ran before. All have the same size; the tail is left out, unless
    there is not even one whole batch.

    Args:
        batch_size: of all ranks together.
        start: samples of this epoch that are done: steps * batch_size.

    Raises:
        InputError: a batch size that the ranks cannot share equally.
    """
    options = _checked_options(batch_size, workers, rank, world)
    if batch_size % world:
        raise InputError(
            f"a batch of {batch_size} cannot be shared equally by {world} processes",
            remedy=f"pass a multiple of {world}",
        )
    if start < 0:
        raise InputError(f"start is {start}", remedy="pass a number of samples")
    return Loader(
        Told(replace(data.train, epoch=(seed, epoch))),
        batch_size // world,
        sampler=epoch_order(len(data.train), seed, epoch, rank, world, start),
        drop_last=len(data.train) >= batch_size,
        **options,
    )


def steps_per_epoch(data: Data, batch_size: int) -> int:
    """Batches that ``train_loader`` gives in an epoch from its start."""
    return max(1, len(data.train) // batch_size)


def eval_loader(
    samples: Split, batch_size: int, *, workers: int = 0, rank: int = 0, world: int = 1
) -> DataLoader[tuple[Tensor, int]]:
    """Batches of ``data.validation`` or ``data.test``, in order and with nothing left out.

    Every rank gets its own samples, ``rank::world``, in batches of ``batch_size``; their numbers
    may differ by one, so ranks add up counts, not means.
    """
    options = _checked_options(batch_size, workers, rank, world)
    return Loader(Told(samples), batch_size, sampler=range(rank, len(samples), world), **options)


def _checked_options(batch_size: int, workers: int, rank: int, world: int) -> dict[str, Any]:
    """What all loaders have in common."""
    good = {
        f"batch_size is {batch_size}": batch_size > 0,
        f"workers is {workers}": workers >= 0,
        f"world is {world}": world > 0,
        f"rank is {rank}": 0 <= rank < max(world, 1),
    }
    bad = [text for text, fine in good.items() if not fine]
    if bad:
        raise InputError("; ".join(bad), remedy="batch_size > 0, workers >= 0, 0 <= rank < world")
    draw = generator("workers")  # else every epoch draws from the global one
    options = {"num_workers": workers, "generator": draw, "pin_memory": torch.cuda.is_available()}
    return options | {"collate_fn": collate}


@dataclass(frozen=True)
class Told(Dataset[Any]):
    """Samples, or the refusal to give one, as a value: what a process that loads data raises would
    come as the text of a traceback."""

    samples: Split

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.samples[index]
        except GpdfxError as error:
            return error


def collate(samples: list[Any]) -> Any:
    """A batch, or the first refusal."""
    refused = (x for x in samples if isinstance(x, GpdfxError))
    return next(refused, None) or default_collate(samples)


class Loader(DataLoader[tuple[Tensor, int]]):
    """Raises what was refused, and ``InputError`` where a process that loads data is gone."""

    def __iter__(self) -> Any:
        try:
            for batch in super().__iter__():
                if isinstance(batch, GpdfxError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise InputError(
                f"a process that loads data is gone: {described(error)}",
                remedy="fewer workers=, or more memory, shared memory (/dev/shm) too",
            ) from error


# --------------------------------------------------------------------------- mixup and cutmix
def mix(
    x: Tensor,
    y: Tensor,
    classes: int,
    *,
    generator: torch.Generator,
    mixup: float = 0.0,
    cutmix: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mix every sample of a batch with another one of it.

    From x (N, C, ...) and labels y (N,) to x and soft targets (N, classes).

    ``mixup`` (Zhang et al. 2018, arXiv 1710.09412) adds lam * x and (1 - lam) * other, ``cutmix``
    (Yun et al. 2019, arXiv 1905.04899) puts a box of the other in; each is the alpha of
    lam ~ Beta(alpha, alpha), 0 for off. Where both are on, a batch gets one or the other, evenly.
    The targets are lam and 1 - lam, for cutmix by the box's true size. One lam per batch, drawn
    like all else from ``generator``, which is on the CPU.
    """
    targets = F.one_hot(y, classes).float()
    if min(mixup, cutmix) < 0:
        raise InputError(f"mixup is {mixup}, cutmix {cutmix}", remedy="pass numbers of at least 0")
    if not mixup and not cutmix:
        return x, targets
    cut = bool(cutmix) and (not mixup or bool(torch.rand((), generator=generator) < 0.5))
    alpha = cutmix if cut else mixup
    number = int(torch.randint(2**62, (), generator=generator))
    lam = float(np.random.default_rng(number).beta(alpha, alpha))
    other = torch.randperm(len(x), generator=generator).to(x.device)
    if cut:
        sizes = x.shape[2:]
        side = (1 - lam) ** (1 / len(sizes))
        box = []
        for size in sizes:
            middle, length = int(torch.randint(size, (), generator=generator)), round(size * side)
            low = middle - length // 2
            box.append(slice(max(low, 0), min(low + length, size)))
        mixed = x.clone()
        inside: tuple[Any, ...] = (..., *box)
        mixed[inside] = x[other][inside]
        lam = 1 - math.prod(b.stop - b.start for b in box) / math.prod(sizes)
    else:
        mixed = lam * x + (1 - lam) * x[other]
    return mixed, lam * targets + (1 - lam) * targets[other]
