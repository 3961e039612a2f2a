"""A warning for parameters that train in name only: those that no optimizer holds."""

from __future__ import annotations

import functools
import gc
import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_WATCHED: WeakSet[nn.Module] = WeakSet()
"""Modules of which no optimizer has stepped yet."""


def warn_of_unheld(module: nn.Module) -> None:
    """At the first step of an optimizer over parameters of a module, name those trainable ones
    that neither it nor another optimizer holds."""
    _listen()
    _WATCHED.add(module)


@functools.lru_cache(maxsize=1)
def _listen() -> None:
    """Once a process: hooks that end while optimizers step would disturb them."""
    register_optimizer_step_post_hook(_stepped)


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling() or not _WATCHED:
        return
    held = _held_by(optimizer)
    for module in list(_WATCHED):
        trainable = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
        if held.isdisjoint(trainable):
            continue  # of another network
        _WATCHED.discard(module)
        if trainable.keys() <= held:
            continue
        for other in gc.get_objects():
            if issubclass(type(other), Optimizer):  # isinstance would ask a module's proxies
                held |= _held_by(other)
        left = [name for k, name in trainable.items() if k not in held]
        if left:
            some = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            warnings.warn(
                f"no optimizer holds {some}: they do not train. Make it of "
                "gpdfx.param_groups(gpd, weight_decay) or gpd.parameters(), or freeze them "
                "(requires_grad_(False))",
                stacklevel=4,
            )


def _held_by(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
