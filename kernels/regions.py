"""Regions of a graph: without gradients, under autocast, computed again in the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..torch_private import (
    enter_autocast,
    exit_autocast,
    recomputed,
    reentrant,
    set_grad_enabled,
)


def enter_grad(enabled: bool) -> bool:
    """Switch gradients on or off; returns what was before."""
    before = torch.is_grad_enabled()
    set_grad_enabled(enabled)
    return before


def exit_grad(before: bool) -> None:
    """Back to what was before the region."""
    set_grad_enabled(before)


def require_grad(x: Tensor) -> None:
    """What is made of a tensor from here on has a gradient by it."""
    if torch.is_grad_enabled():
        x.requires_grad_()


def enter_recompute(given: Sequence[Any], like_reentrant: bool, preserve: bool) -> None:
    """Here begins what the user has under ``torch.utils.checkpoint``; a marker. ``given``: the
    tensors that it is called with; ``preserve``: the random state."""


def exit_recompute(token: None) -> None:
    """Here it ends."""


def recompute(
    body: Callable[..., Any], count: int, like_reentrant: bool, preserve: bool, *inputs: Any
) -> Any:
    """Run what stands between these two, saving no activations. The first ``count`` inputs are
    those of ``enter_recompute``. The compiler, which plans memory itself, is not told."""
    given, rest = inputs[:count], inputs[count:]
    if like_reentrant and not any(x.requires_grad for x in given):
        with torch.no_grad():
            return body(*inputs)
    if torch.compiler.is_compiling():
        return body(*inputs)
    again = reentrant if like_reentrant else recomputed
    return again(lambda *given: body(*given, *rest), preserve, given)


REGION = frozenset(
    {enter_grad, exit_grad, enter_autocast, exit_autocast}
    | {enter_recompute, exit_recompute, require_grad}
)
