"""Splits of a data set, and randomness that is a pure function of a key such as (seed, epoch,
sample), not of a state that workers, ranks and restarts would have to share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError


class Samples(Protocol):
    """What a source gives: ``samples[i]`` begins with the input; labels are kept apart."""

    def __getitem__(self, index: int, /) -> Sequence[Any]: ...


@dataclass(frozen=True, eq=False)
class Split(Dataset[tuple[Tensor, int]]):
    """Some samples of a source, with labels of their own: item i is (x, int label).

    ``indices`` and ``labels``: (N,) int64. ``epoch``: (seed, number of the epoch). With it, the
    augmentation of item i depends on (seed, epoch, i) alone: it runs under a seed of its own for
    torch's CPU randomness, which is put back afterwards. Without it, on the global state.
    """

    samples: Samples
    indices: Tensor
    labels: Tensor
    epoch: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with torch.random.fork_rng(devices=[], enabled=self.epoch is not None):
            if self.epoch is not None:  # the CPU's state alone, not the GPUs'
                torch.set_rng_state(generator("sample", *self.epoch, index).get_state())
            return self.samples[int(self.indices[index])][0], int(self.labels[index])

    def subset(self, chosen: Tensor) -> Split:
        """These samples, in this order; ``chosen``: (M,) positions in this split."""
        return replace(self, indices=self.indices[chosen], labels=self.labels[chosen])


@dataclass(frozen=True)
class Data:
    """Splits that yield (x, int label). ``shape`` of one x: (C, H, W), or (C, L) for signals."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    shape: tuple[int, ...]


# --------------------------------------------------------------------------- randomness
def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by ``key`` alone, for example ("mix", seed, epoch, step)."""
    digest = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=6).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


def permutation(length: int, *key: int | str) -> Tensor:
    return torch.randperm(length, generator=generator(*key))


# --------------------------------------------------------------------------- parts and labels
def few_labels(train: Split, count: int, classes: int, seed: int) -> Split:
    per_class = torch.bincount(train.labels, minlength=classes)
    short = (per_class < count).nonzero().flatten().tolist()
    if short:
        raise InputError(
            f"labels is {count}, but of class {', '.join(map(str, short))} there are only "
            f"{', '.join(str(int(per_class[c])) for c in short)} training samples",
            remedy=f"pass at most labels={int(per_class.min())}",
        )
    order = permutation(len(train), "labels", seed)
    chosen = [order[train.labels[order] == c][:count] for c in range(classes)]
    return train.subset(torch.cat(chosen).sort().values)


def noisy_labels(train: Split, part: float, classes: int, seed: int) -> Split:
    draw = generator("noise", seed)
    wrong = torch.randperm(len(train), generator=draw)[: round(part * len(train))]
    labels = train.labels.clone()
    labels[wrong] += torch.randint(1, classes, (len(wrong),), generator=draw)
    return replace(train, labels=labels % classes)
