"""The compiler's passes: each takes a program and returns another; ``PASSES`` is their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

if __name__ != "gpdfx.passes":
    raise ImportError("import gpdfx.passes, not passes")

from ..calls import progress
from .assign import assign
from .branch import branch
from .canonicalize import canonicalize
from .capture.inline import inline
from .features import add_features
from .follow import follow_device, follow_dtype, follow_norms
from .infer import infer
from .lower import lower
from .rules.decompose import decompose
from .widen import widen

Pass = Callable[[Any], Any]

PASSES: tuple[Pass, ...] = (
    inline,  # regions without gradients and under autocast become nodes
    decompose,  # ops without a rule become those that they are composed of
    follow_dtype,  # a baked dtype becomes the parameters'
    follow_device,  # so does a baked device
    canonicalize,  # fewer spellings, no in-place op where a functional one will do
    infer,  # an axis for every dimension of every tensor
    assign,  # a width for every axis
    widen,  # the teacher's graphs, maps and shares
    branch,  # other ways to write a weight
    lower,  # layers that one fold computes together
    follow_norms,  # a baked momentum becomes the batch norm's
    add_features,  # results of inner modules become outputs
)
"""From what capture gives to what a teacher is built from."""


def run(program: Any, passes: tuple[Pass, ...] = PASSES) -> Any:
    """The program that comes out of the last pass; legality is checked after each."""
    for pass_ in passes:
        progress.at("widening", pass_.__name__)
        program = pass_(program)
        program.check()
    return program
