"""The loss that a network computes itself where it is given ``labels``, as those of Hugging Face
do: tried on the network before it is believed."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..check.observe import keep_rng
from ..passes.program import duplicate
from .outputs import find_logits
from .positions import Criterion, CrossEntropy

LABELS = "labels"


class OwnLoss:
    """A network's ``loss_function`` as a criterion; it takes what it names among ``logits``,
    ``pooled_logits``, ``labels``, ``vocab_size`` and ``config``."""

    def __init__(self, network: Any) -> None:
        self.function: Callable[..., Tensor] = network.loss_function
        self.config = copy.deepcopy(getattr(network, "config", None))
        self.names = inspect.signature(self.function).parameters.keys()

    def __call__(self, logits: Tensor, labels: Any) -> Tensor:
        given = {"logits": logits, "pooled_logits": logits, "labels": labels}
        given |= {"vocab_size": logits.shape[-1], "config": self.config}
        return self.function(**{name: x for name, x in given.items() if name in self.names})


def takes_labels(network: nn.Module) -> bool:
    """Whether ``labels`` is an argument of a network."""
    return LABELS in inspect.signature(network.forward).parameters


@torch.no_grad()
def own_loss(network: nn.Module, example: tuple[Any, Any]) -> Criterion | None:
    """The criterion that gives what a network's forward does with labels; ``None`` if there is
    none, or no way is known to come to the same number."""
    if not takes_labels(network):
        return None
    args, kwargs = example
    given = {name: x for name, x in kwargs.items() if name != LABELS}
    with contextlib.suppress(Exception), keep_rng([]):  # another network's labels are other things
        twin = duplicate(network).eval()
        logits = find_logits(twin(*args, **given))
        labels = kwargs.get(LABELS)
        if labels is None:
            shape = logits.shape[:-1] if logits.ndim > 2 else logits.shape[:1]
            labels = torch.randint(logits.shape[-1], shape, device=logits.device)
        output = twin(*args, **given, labels=labels)
        loss = output["loss"] if isinstance(output, Mapping) else output.loss
        ways: list[Callable[[], Criterion]] = [lambda: OwnLoss(network), CrossEntropy]
        for way in ways:  # made again, for what it learns of labels that were drawn
            with contextlib.suppress(Exception):
                if torch.allclose(way()(logits, labels), loss, rtol=1e-3, atol=1e-5):
                    return way()
    return None
