"""What Python does in a forward that a graph does not: state in attributes, draws from Python's
and NumPy's generators, functions that call modules in their backward.

A graph computes what the example's call computed. Where the user's forward does more, the module
that does so has to stay the user's Python; here it is found before the capture, and named.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import types
from collections import deque
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...calls import tree
from ...calls.examples import seed_all
from ...calls.held import holds_modules, reached
from ...passes.capture.modes import enter, modes_of
from ...passes.program import duplicate
from ...teacher.compiled import REGISTRIES, Python
from ...torch_private import functions
from ..facts import Inputs, difference, floating, identical
from ..observe import keep_rng, states
from ..visit import other_inputs

_PLAIN = (bool, int, float, complex, str, bytes, type(None), Tensor)
_CLOSED = (nn.Module, type, types.FunctionType, types.MethodType, types.ModuleType)
Attribute = tuple[str, str]
"""The path of a module, and a name."""
REMEDY = (
    "expand keeps modules that do so as your Python, and widens the others: there must be one that "
    "has parameters. Else let forward depend on nothing but its inputs, parameters and buffers"
)


def python_of(
    student: nn.Module, inputs: Inputs, seed: int, caches: Collection[Attribute]
) -> Python:
    """What a student's own code does that no graph does. ``caches``: see ``find_caches``."""
    kept, does, late = set[Attribute](), dict[str, set[Any]](), list[bool]()
    written, replaced, asks = dict[str, None](), set[Attribute](), dict[str, str]()

    def watch(run: nn.Module, kind: Any, args: Any, kwargs: Any) -> Any:
        arguments, given = tree.pattern((args, kwargs))
        if not kind.__module__.startswith("torch.") and holds_modules(arguments):
            late.append(True)
            if any(isinstance(x, nn.Parameter) for x in given):
                named = [m for m in reached(arguments.held) if isinstance(m, nn.Module)]
                inside = {id(part) for module in named for part in module.modules()}
                for path, module in run.named_modules():
                    if id(module) in inside:
                        asks[path] = f"{kind.__name__} asks for gradients of its parameters"
        return kind.apply(*args, **kwargs)

    modes = modes_of(student)
    runs = [partial(enter, mode=mode, modes=modes) for mode in modes]
    drawn = False
    for entered in runs:
        run = entered(duplicate(student))
        before = dict(run.named_parameters())
        with functions(partial(watch, run)):
            own, moved = _kept(run, inputs, seed, caches)
        kept, drawn = kept | own, drawn or moved
        after, given = dict(run.named_parameters()), dict(student.named_parameters())
        for name in before.keys() & after.keys():
            if after[name] is not before[name]:
                path, _, leaf = name.rpartition(".")
                replaced.add((path, leaf))
            if not identical(after[name], given[name]):
                written[name] = None
    for entered in runs if kept or replaced or drawn else ():
        for path, what in _does(entered(duplicate(student)), inputs, seed, kept | replaced):
            does.setdefault(path, set()).add(what)
    told = {path: _told(path, student, sorted(what, key=str)) for path, what in does.items()}
    caches = tuple(c for c in caches if c not in kept)
    return Python(caches, tuple(kept), any(late), asks | told, tuple(written))


def _told(path: str, student: nn.Module, does: list[tuple[str | None, str]]) -> str:
    """What the code of a module does, and where."""
    drawn = [name for owner, name in does if owner is None]
    held = [
        name if owner == path else f"{name} of {named(owner, student)}"
        for owner, name in does
        if owner is not None
    ]
    keeps = [f"keeps {', '.join(held)} from call to call"] if held else []
    text = " and ".join(keeps + [f"draws from {name}" for name in drawn])
    words = [rf"\.{name.split()[0]}\b" for name in held] or [r"\brandom\b|\bnp\.|\bnumpy\b"]
    line = _line(student.get_submodule(path), "|".join(words))
    return f"forward of {named(path, student)} {text}" + (f" ({line})" if line else "")


# --------------------------------------------------------------------------- state
def _kept(
    first: nn.Module, inputs: Inputs, seed: int, caches: Collection[Attribute]
) -> tuple[set[Attribute], bool]:
    """Attributes of a copy that are others after a call if another call was before; or all that
    changed, if only the result tells. A cache of what parameters give is none. And whether a call
    draws from Python's or NumPy's generator."""
    fresh, start = duplicate(first, ours=True), attributes(first)
    buffers = {name: x.clone() for name, x in first.named_buffers()}
    try:
        drawn = _call(first, inputs, seed)[1]
        with torch.no_grad():  # statistics are no such state: they are the graph's, too
            for name, x in first.named_buffers():
                if name in buffers and buffers[name].shape == x.shape:
                    x.copy_(buffers[name])
        results = [_call(run, other_inputs(inputs, 1), seed)[0] for run in (first, fresh)]
    except Exception:  # a model that takes no second call has nothing to keep
        return set(), True
    after = attributes(first)
    told, new = changed(after, attributes(fresh)), changed(start, after)
    if told:  # and what goes with it: a flag that says that something is there
        owners = {path for path, _ in told}
        return told | {key for key in new if key[0] in owners}, drawn
    return (new - set(caches) if _apart(*results) else set()), drawn


def _call(run: nn.Module, inputs: Inputs, seed: int) -> tuple[list[Tensor], bool]:
    """The floating results of a call, as in training, and whether Python's generators moved."""
    args, kwargs = tree.fresh(inputs)
    with keep_rng(), torch.enable_grad():
        seed_all(seed)
        before = _pythons()
        results = tree.leaves(run(*args, **kwargs))
        moved = bool(changed(before, _pythons()))
    return [y.detach() for y in results if isinstance(y, Tensor) and floating(y)], moved


def _pythons() -> dict[Any, Any]:
    """The states of Python's and NumPy's generators."""
    return {(None, name): x for name, x in states().items() if name[0] != "t"}


def _apart(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) != len(b) or any(difference(x, y) > 1e-4 for x, y in zip(a, b, strict=True))


def attributes(
    module: nn.Module, only: Collection[Attribute] | None = None
) -> dict[Attribute, Any]:
    """What modules keep in plain attributes: numbers, strings, tensors, containers, objects;
    parameters if they are named."""
    return {
        (path, name): _frozen(value)
        for path, part in module.named_modules()
        for name, value in (vars(part) if only is None else vars(part) | part._parameters).items()
        if name not in REGISTRIES and (only is None or (path, name) in only)
    }


def _frozen(value: Any, depth: int = 4) -> Any:
    """A copy that later changes do not reach; of what has no plain state, the type."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, np.ndarray):
        return [type(value), value.shape, value.tobytes()]
    if isinstance(value, _CLOSED) or not depth:
        return type(value)
    if isinstance(value, list | tuple | set | deque):
        return [type(value), *(_frozen(x, depth - 1) for x in value)]
    if isinstance(value, Mapping):
        return [type(value), *value, *(_frozen(x, depth - 1) for x in value.values())]
    return [type(value), *(_frozen(x, depth - 1) for x in getattr(value, "__dict__", {}).items())]


def changed(before: dict[Attribute, Any], after: dict[Attribute, Any]) -> set[Attribute]:
    """The attributes that differ."""
    return {k for k in before.keys() | after.keys() if not _same(before.get(k), after.get(k))}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and identical(a, b)
    try:
        return type(a) is type(b) and bool(a == b or a != a)
    except Exception:  # what cannot be compared
        return True


# --------------------------------------------------------------------------- who does it
def _does(
    run: nn.Module, inputs: Inputs, seed: int, kept: set[Attribute]
) -> list[tuple[str, tuple[str | None, str]]]:
    """Which module's own code changes one of these attributes, or draws, in a copy: module, and
    what (an attribute, or a generator)."""
    found, running, before = list[Any](), [""], dict[Any, Any]()

    def look(enter: str | None, *_: Any) -> None:
        now = _pythons()
        now |= attributes(run, kept) if kept else {}
        found.extend((running[-1], what) for what in changed(before, now) if before)
        before.clear()
        before.update(now)
        running.pop() if enter is None else running.append(enter)

    with contextlib.suppress(Exception), keep_rng(), contextlib.ExitStack() as hooks:
        for path, module in run.named_modules():
            for handle in (
                module.register_forward_pre_hook(partial(look, path), prepend=True),
                module.register_forward_hook(partial(look, None)),
            ):
                hooks.callback(handle.remove)
        for k in range(2):
            seed_all(seed)
            args, kwargs = tree.fresh(other_inputs(inputs, k))
            before.clear()
            run(*args, **kwargs)
            look("")
    return found


def _line(module: nn.Module, pattern: str) -> str | None:
    """The first line of a module's own code that a pattern matches in or under ``forward``."""
    with contextlib.suppress(Exception):
        file = os.path.basename(inspect.getsourcefile(type(module)) or "")
        lines, first = inspect.getsourcelines(type(module))
        hits = [(k, line) for k, line in enumerate(lines) if re.search(pattern, line)]
        start = next((k for k, line in enumerate(lines) if re.search(r"def forward\b", line)), 0)
        k, line = next((hit for hit in hits if hit[0] >= start), hits[0])
        return f"{file}:{first + k} {line.strip()}"
    return None


def named(path: str, student: nn.Module) -> str:
    return f"{path or '(root)'} ({type(student.get_submodule(path)).__name__})"
