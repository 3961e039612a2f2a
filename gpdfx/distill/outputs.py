"""What goes into networks that are distilled, and what comes out of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..calls import tree
from ..errors import InputError


class Distilled(NamedTuple):
    """One step. ``loss``: the sum to differentiate; ``terms``: its summands by name, as they went
    into it; ``static_logits``: ``None`` without a static teacher."""

    loss: Tensor
    student_logits: Tensor
    teacher_logits: Tensor
    static_logits: Tensor | None
    terms: dict[str, Tensor]


class Outputs(NamedTuple):
    """Of one network on one batch."""

    logits: Tensor
    features: list[Tensor]


def find_logits(output: Any) -> Tensor:
    """The logits in what a network returns."""
    for name in ("logits", "out"):
        if isinstance(output, Mapping) and name in output:
            output = output[name]
        elif not isinstance(output, Tensor) and hasattr(output, name):
            output = getattr(output, name)
    logits = next((x for x in tree.leaves(output) if isinstance(x, Tensor)), None)
    if logits is None:
        raise InputError(
            f"there are no logits in a {type(output).__name__}",
            remedy="pass logits=, a function that picks them out of the network's output",
        )
    return logits


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a tuple of positional or a dict of keyword inputs, for a call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}
