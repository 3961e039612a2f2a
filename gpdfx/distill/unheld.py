"""A warning for parameters that train in name only: those that no optimizer holds."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


def warn_of_unheld(module: nn.Module) -> None:
    """At the first step of an optimizer over parameters of a module, name those trainable ones
    that neither it nor another optimizer holds."""
    there = weakref.ref(module)

    def stepped(optimizer: Optimizer, *_: Any) -> None:
        watched = there()
        if watched is None or torch.compiler.is_compiling():
            return
        trainable = {id(p): name for name, p in watched.named_parameters() if p.requires_grad}
        held = _held_by(optimizer)
        if held.isdisjoint(trainable):
            return  # of another network
        hook.remove()
        if trainable.keys() <= held:
            return
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
                stacklevel=3,
            )

    hook = register_optimizer_step_post_hook(stepped)
    weakref.finalize(module, hook.remove)


def _held_by(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
