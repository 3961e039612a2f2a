"""Hooks that only a backward runs: no graph has them.

One on a parameter goes on to the teacher's, which stays as wide as the student's and has no
branches: so its gradient is the student's, and what the hook makes of it counts. A module that has
one stays the user's Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ...calls.held import reached
from ...errors import InputError
from ...torch_private import accumulation_hooks, gradient_hooks


def hooked_modules(model: nn.Module) -> dict[str, str]:
    """Paths of modules with backward hooks -> what they have."""
    return {
        path: f"{path or '(root)'} ({type(module).__name__}) has a backward hook"
        for path, module in model.named_modules()
        if module._backward_hooks or module._backward_pre_hooks
    }


def hooked_parameters(model: nn.Module) -> dict[str, list[Callable[..., Any]]]:
    """Parameters -> the hooks of their gradients. Raises ``InputError`` for what a teacher's
    parameter cannot take over."""
    own = {id(x) for x in (*model.modules(), *model.parameters(), *model.buffers())}
    found = {name: hooks for name, p in model.named_parameters() if (hooks := gradient_hooks(p))}
    for name, hooks in found.items():
        if any(id(x) in own for x in reached(hooks)):
            raise InputError(
                f"the gradient hook of {name} names a module or a tensor of the model",
                remedy="a hook that goes on to the teacher's parameter must use its argument "
                f"alone; or remove it, and register one on teacher.get_parameter({name!r})",
            )
    for name, p in model.named_parameters():
        if accumulation_hooks(p):
            raise InputError(
                f"{name} has a hook that runs when its gradient is complete, which is about a "
                "parameter that does not train",
                remedy="remove it, expand the model, and register it on "
                f"teacher.get_parameter({name!r}), which is wider: teacher.widen({name!r}, mask) "
                "widens what it needs",
            )
    return found
