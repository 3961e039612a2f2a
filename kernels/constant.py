"""What compilers take as a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")


def constant(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """``torch.compiler.assume_constant_result`` without its import of ``torch._dynamo``, which
    costs as much as half of torch: dynamo looks for this mark (torch 2.11 to 2.14)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
