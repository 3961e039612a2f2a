"""What a teacher is built from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.frozen import Frozen
from ..calls.sizes import Sizes, input_sizes
from ..control import ExpandOptions
from ..passes.program import duplicate
from ..passes.shares import Shares
from ..passes.widen import Widened

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs of an example call."""


@dataclass(frozen=True)
class Compiled:
    """``program``: the result of all passes; ``example``: the call it was captured with;
    ``sizes``: graph -> which input sizes it accepts; ``caches``: module and attribute of tensors
    that the student keeps outside its registries."""

    program: Widened
    example: Inputs
    sizes: Mapping[str, Sizes]
    caches: tuple[tuple[str, str], ...]

    @staticmethod
    def of(program: Widened, example: Inputs) -> Compiled:
        """With the sizes that capture left free."""
        sizes = {key: input_sizes(mode.graph) for key, mode in program.modes.items()}
        return Compiled(program, example, sizes, find_caches(program.student, example))

    def pinned(self, levels: Mapping[str, str]) -> Compiled:
        """As this, but part by part only the example's input sizes are accepted, except for those
        of a level of ``LEVELS``."""
        sizes = {
            key: self.sizes[key].pinned(mode.site.call.shapes, levels[mode.site.path])
            for key, mode in self.program.modes.items()
        }
        return replace(self, sizes=sizes)


@dataclass(frozen=True)
class Facts:
    """What a teacher knows of its making. ``maps``: parameter or buffer -> one frozen axis for each
    dimension; ``alias``: other name of a tied tensor -> its name; ``shares``: weight -> what its
    contraction is multiplied by."""

    maps: Mapping[str, tuple[Frozen, ...]]
    alias: Mapping[str, str]
    shares: Mapping[str, Shares]
    options: ExpandOptions
    example: Inputs

    def maps_of(self, name: str) -> tuple[Frozen, ...]:
        """The maps of a tensor, by any of its names."""
        return self.maps[self.alias.get(name, name)]


_REGISTRIES = frozenset(nn.Module().__dict__)


def find_caches(student: nn.Module, example: Inputs) -> tuple[tuple[str, str], ...]:
    """Where a student keeps tensors outside its registries (LeViT's bias cache), found by running
    a copy of it: a teacher puts these back after every call, so that new weights count."""
    before = {
        (path, k): copy.copy(v)
        for path, module in student.named_modules()
        for k, v in module.__dict__.items()
        if isinstance(v, dict | list | Tensor | type(None)) and k not in _REGISTRIES
    }
    probe = duplicate(student)
    with torch.enable_grad():  # what is computed from parameters then says so
        for training in (True, False):
            probe.train(training)(*example[0], **example[1])
    found = []
    for (path, k), old in before.items():
        new = probe.get_submodule(path).__dict__.get(k)
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            changed = not new.is_leaf
        elif isinstance(old, dict | list) and isinstance(new, dict | list):
            changed = len(old) != len(new)
        else:
            changed = (old is None) != (new is None)
        if changed:
            found.append((path, k))
    return tuple(found)
