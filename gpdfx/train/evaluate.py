"""How good networks are on a split of the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..data.loaders import eval_loader
from ..data.splits import Split
from ..distill.gpd import find_logits
from ..errors import InputError
from .step import Place


@torch.no_grad()
def accuracies(
    split: Split,
    networks: list[Callable[[Tensor], Any]],
    batch_size: int,
    place: Place,
    workers: int = 0,
) -> list[float]:
    """The fraction of right predictions of each network; all ranks share the work."""
    right = torch.zeros(len(networks), dtype=torch.int64, device=place.device)
    batches = eval_loader(split, batch_size, workers=workers, rank=place.rank, world=place.world)
    for x, y in batches:
        x, y = x.to(place.device), y.to(place.device)
        for k, network in enumerate(networks):
            right[k] += (find_logits(network(x)).argmax(1) == y).sum()
    return [count / len(split) for count in place.add(right).tolist()]


@torch.no_grad()
def check_logits(name: str, network: nn.Module, example: Tensor, classes: int) -> None:
    """Raise ``InputError`` if a network does not take the data, or has other classes."""
    mode = network.training
    try:
        logits = find_logits(network.eval()(example))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise InputError(
            f"{name} does not run on inputs {tuple(example.shape)}: {error}",
            remedy="name a network for inputs of this shape; one of your own may take num_classes "
            "and in_chans",
        ) from error
    finally:
        network.train(mode)
    if logits.shape != (len(example), classes):
        raise InputError(
            f"{name} gives {tuple(logits.shape)} for {len(example)} inputs of {classes} classes",
            remedy=f"name a network with {classes} logits, or one whose constructor takes "
            "num_classes",
        )
