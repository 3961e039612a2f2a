"""What a teacher is built from."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.frozen import Frozen
from ..calls import tree
from ..calls.sizes import Sizes, input_sizes
from ..control import ExpandOptions
from ..errors import InputError, suggest
from ..passes.capture.modes import enter, modes_of
from ..passes.capture.submodules import Calls, alike
from ..passes.program import CallSite, duplicate, source_line
from ..passes.shares import Shares
from ..passes.widen import Widened
from .hooked import ModuleCalls

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs of an example call."""

Caches = tuple[tuple[str, str], ...]
"""Module and attribute of what a student keeps outside its registries."""


@dataclass(frozen=True)
class Python:
    """What a student does outside any graph. ``caches``: see ``find_caches``; ``kept``: attributes
    that change from call to call; ``late``: it has functions that call modules in their backward;
    ``apart``: modules whose own code keeps something, or draws from Python's generators -> how;
    ``written``: parameters that forward writes to or replaces; ``left``: attributes in which it
    leaves results that others may read, a loss, say."""

    caches: Caches = ()
    kept: Caches = ()
    late: bool = False
    apart: Mapping[str, str] = field(default_factory=dict)
    written: frozenset[str] = frozenset()
    left: Caches = ()


@dataclass(frozen=True)
class Compiled:
    """``program``: the result of all passes; ``example``: the call it was captured with;
    ``sizes``: graph -> which input sizes it accepts; ``python``: what no graph does; ``calls``: of
    modules, so that their hooks can be run."""

    program: Widened
    example: Inputs
    sizes: Mapping[str, Sizes]
    python: Python
    calls: ModuleCalls = field(default_factory=dict)

    @staticmethod
    def of(program: Widened, example: Inputs, python: Python) -> Compiled:
        """With the sizes that capture left free."""
        sizes = {key: input_sizes(mode.graph) for key, mode in program.modes.items()}
        return Compiled(program, example, sizes, python)

    def unseen(self) -> Compiled:
        """As this, but no size is accepted for which a graph only may hold."""
        return replace(self, sizes={key: sizes.unseen() for key, sizes in self.sizes.items()})

    def takes(self, calls: Calls) -> bool:
        """Whether a graph of its mode accepts each call of a module that has graphs."""

        def taken(site: CallSite) -> bool:
            modes = self.program.modes.items()
            graphs = [key for key, mode in modes if alike(mode.site, site)]
            return any(self.sizes[key].takes(site.tensors) for key in graphs)

        return all(taken(site) for path in self.program.parts for site in calls.get(path, []))

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
    contraction is multiplied by; ``dtypes``: of the student's tensors when it was expanded."""

    maps: Mapping[str, tuple[Frozen, ...]]
    alias: Mapping[str, str]
    shares: Mapping[str, Shares]
    options: ExpandOptions
    example: Inputs
    dtypes: Mapping[str, torch.dtype]

    def maps_of(self, name: str) -> tuple[Frozen, ...]:
        """The maps of a tensor, by any of its names."""
        found = self.maps.get(self.alias.get(name, name))
        if found is None:
            text = f"the student has no parameter or buffer {name!r}"
            raise InputError(text, remedy=suggest(str(name), self.maps))
        return found


REGISTRIES = frozenset(nn.Module().__dict__)
"""The attributes of every module: what a student keeps elsewhere is its own."""


def find_caches(student: nn.Module, example: Inputs) -> Caches:
    """Where a student keeps tensors outside its registries (LeViT's bias cache), found by running
    a copy of it: a teacher puts these back after every call, so that new weights count.

    Raises ``InputError`` for a model that does not run on the example in both modes.
    """
    probe = duplicate(student)
    before = {
        (path, k): copy.copy(v)
        for path, module in probe.named_modules()  # its copies may have less than the student
        for k, v in module.__dict__.items()
        if isinstance(v, dict | list | Tensor | type(None)) and k not in REGISTRIES
    }
    modes = modes_of(student)
    for mode in modes:
        _try(enter(probe, mode, modes), example)
    found = []
    for (path, k), old in before.items():
        new = probe.get_submodule(path).__dict__.get(k)
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            changed = not new.is_leaf
        elif isinstance(old, dict | list) and isinstance(new, dict | list):
            changed = len(old) != len(new)
        elif old is None:  # what is not computed from parameters is no cache of them
            changed = any(isinstance(x, Tensor) and not x.is_leaf for x in tree.leaves(new))
        else:
            changed = new is None
        if changed:
            found.append((path, k))
    return tuple(found)


def _try(probe: nn.Module, example: Inputs) -> None:
    """Call it; where it does not run with gradients (it writes to a parameter), without."""
    failed = None
    for differentiable in (True, False):  # what is computed from parameters then says so
        args, kwargs = tree.fresh(example)
        try:
            with torch.set_grad_enabled(differentiable):
                result = probe(*args, **kwargs)
            break
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the user's forward raises
            failed = failed or error
    else:
        raise _failure(probe, f"{type(failed).__name__}: {failed}", failed) from failed
    if not any(isinstance(x, Tensor) for x in tree.leaves(result)):
        raise _failure(probe, f"it returns no tensor, but {type(result).__name__}")


def _failure(probe: nn.Module, why: str, error: Exception | None = None) -> InputError:
    mode, trace = "train" if probe.training else "eval", "".join(traceback.format_exception(error))
    return InputError(
        f"the model itself fails in {mode} mode: {why}",
        module_path=type(probe).__name__,
        source=source_line(trace) or None,
        remedy="if only the example inputs are at fault, pass others; else mend forward: it must "
        "run and return tensors in train and in eval mode, since a teacher has both",
    )
