"""What makes a check fail that is no fault of the teacher: the user's forward does not repeat
itself."""

from __future__ import annotations

import contextlib

from torch import nn

from ...passes.program import duplicate
from ..facts import Inputs, Law, identical
from ..observe import keep_rng, observe


def blame(student: nn.Module, inputs: Inputs, seed: int) -> str | None:
    """Of a check that failed: two equal calls of two copies that differ, if there are."""
    for mode in ("train", "eval"):
        seen = []
        with contextlib.suppress(Exception), keep_rng():
            for _ in range(2):
                run = duplicate(student, ours=True).train(mode == "train")
                seen.append(observe(run, inputs, seed))
            for fact, x in seen[0].items():
                if fact.law is Law.OUTPUTS and not identical(x, seen[1][fact]):
                    text = f"the model does not repeat itself: {fact} differs in {mode} mode "
                    return text + "between two equal calls, all generators seeded"
    return None
