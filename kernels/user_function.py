"""The user's ``torch.autograd.Function`` as one node of a graph: its own forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..calls.tree import Pattern, pattern


class UserFunction:
    """Calls ``kind.apply`` on tensors and sizes, with all its other arguments filled in, and gives
    the list of tensors that it returns.

    ``arguments``: with slots for what it is called on. ``rule``: how it treats axes, or ``why``
    that is not known; ``draws``: it moves the random state.
    """

    def __init__(self, kind: type[torch.autograd.Function], arguments: Pattern) -> None:
        self.kind, self.arguments = kind, arguments
        self.rule: Any = None
        self.why = "it was not tried"
        self.draws = False
        self.__name__ = self.__qualname__ = kind.__name__
        self.__module__ = __name__

    def apply(self, *given: Any) -> Any:
        """What the function itself returns."""
        args, kwargs = self.arguments.fill(given)
        return self.kind.apply(*args, **kwargs)

    def __call__(self, *given: Any) -> list[Tensor]:
        return pattern(self.apply(*given), (Tensor,))[1]

    def learn_from(self, other: UserFunction) -> None:
        """What is known of another call of the same."""
        self.rule, self.why, self.draws = other.rule, other.why, other.draws

    @property
    def tags(self) -> list[torch.Tag]:
        """As an operator has them."""
        return [torch.Tag.nondeterministic_seeded] if self.draws else []

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, UserFunction):
            return NotImplemented
        return self.kind is other.kind and self.arguments.same(other.arguments)

    def __hash__(self) -> int:
        return hash(self.kind)

    def __str__(self) -> str:
        return f"{self.kind.__name__}.apply"

    def __reduce__(self) -> tuple[Any, ...]:
        return UserFunction, (self.kind, self.arguments)


class Hooked(torch.autograd.Function):
    """A tensor whose gradient goes through a hook (``Tensor.register_hook``)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hook: Any) -> Tensor:
        ctx.hook = hook
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        changed = ctx.hook(gradients[0])
        return gradients[0] if changed is None else changed, None
