"""Regions without gradients or under autocast, entered and left as graphs call it."""

from __future__ import annotations

import torch

from ..torch_private import enter_autocast, exit_autocast, set_grad_enabled


def enter_grad(enabled: bool) -> bool:
    """Switch gradients on or off; returns what was before."""
    before = torch.is_grad_enabled()
    set_grad_enabled(enabled)
    return before


def exit_grad(before: bool) -> None:
    """Back to what was before the region."""
    set_grad_enabled(before)


REGION = frozenset({enter_grad, exit_grad, enter_autocast, exit_autocast})
