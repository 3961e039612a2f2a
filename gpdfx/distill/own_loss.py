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
from .outputs import find_logits
from .positions import Criterion, CrossEntropy

LABELS = "labels"


class OwnLoss:
    """A network's ``loss_function`` as a criterion; it takes what it names among ``logits``,
    ``pooled_logits``, ``labels``, ``vocab_size`` and ``config``."""

    def __init__(self, network: Any) -> None:
        self.function: Callable[..., Tensor] = network.loss_function
        self.config = copy.deepcopy(getattr(network, "config", None))
        self.names = tuple(inspect.signature(self.function).parameters)

    def __call__(self, logits: Tensor, labels: Any) -> Tensor:
        given = {"logits": logits, "pooled_logits": logits, "labels": labels}
        given |= {"vocab_size": logits.shape[-1], "config": self.config}
        return self.function(**{name: x for name, x in given.items() if name in self.names})


def takes_labels(network: nn.Module) -> bool:
    """Whether ``labels`` is an argument of a network."""
    return LABELS in inspect.signature(network.forward).parameters


@torch.no_grad()
def own_loss(network: nn.Module, example: tuple[Any, Any]) -> Criterion | None:
    """The criterion that gives what the forward of a network does with labels, which it takes;
    ``None`` if no way is known to come to the same number. The network is one to be thrown away:
    its mode and its configuration change."""
    ways: list[Criterion] = [CrossEntropy()]
    with contextlib.suppress(Exception):  # it does not say
        ways.insert(0, OwnLoss(network))
    args, kwargs = example
    given = {name: x for name, x in kwargs.items() if name != LABELS}
    with contextlib.suppress(Exception), keep_rng([]):  # another network's labels are other things
        logits = find_logits(network.eval()(*args, **given))
        labels = kwargs.get(LABELS)
        if labels is None:
            shape = logits.shape[:-1] if logits.ndim > 2 else logits.shape[:1]
            labels = torch.randint(logits.shape[-1], shape, device=logits.device)
        output = network(*args, **given, labels=labels)
        loss = output["loss"] if isinstance(output, Mapping) else output.loss
        for way in ways:
            tried = copy.deepcopy(way)  # which may take labels that were drawn for all to come
            with contextlib.suppress(Exception):
                if torch.allclose(tried(logits, labels), loss, rtol=1e-3, atol=1e-5):
                    return way
    return None
