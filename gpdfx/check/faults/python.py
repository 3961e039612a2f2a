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
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...calls import tree
from ...calls.examples import seed_all
from ...calls.held import holds_modules, reached
from ...calls.tree import Pattern
from ...errors import InputError
from ...passes.capture.modes import enter, modes_of
from ...passes.program import duplicate
from ...teacher.compiled import REGISTRIES, Python
from ...torch_private import aliases, functions
from ..facts import Inputs, difference, floating, identical
from ..observe import keep_rng
from ..visit import other_inputs
from .state import HOOKS, Attribute, Watch, attributes, changed, frozen, generators

REMEDY = (
    "expand keeps modules that do so as your Python, and widens the others: there must be one that "
    "has parameters. Else let forward and its hooks depend on nothing but its inputs, parameters "
    "and buffers; take hooks off that only count or record"
)


def python_of(
    student: nn.Module, inputs: Inputs, seed: int, caches: Collection[Attribute]
) -> Python:
    """What a student's own code does that no graph does. ``caches``: see ``find_caches``."""
    kept, does, late = set[Attribute](), dict[str, set[Any]](), list[list[str]]()
    written, replaced, asks = set[str](), set[Attribute](), dict[str, str]()
    left, drawn = set[Attribute](), False

    def watch(run: nn.Module, kind: Any, args: Any, kwargs: Any) -> Any:
        arguments, given = tree.pattern((args, kwargs))
        if not kind.__module__.startswith("torch.") and holds_modules(arguments):
            inside = _reached_in(run, arguments)
            late.append(inside)
            if any(isinstance(x, nn.Parameter) for x in given):
                why = f"{kind.__name__} asks for gradients of its parameters"
                asks.update(dict.fromkeys(inside, why))
        return kind.apply(*args, **kwargs)

    modes = modes_of(student)
    runs = [partial(enter, mode=mode, modes=modes) for mode in modes]
    for entered in runs:
        run = entered(duplicate(student))
        before = dict(run.named_parameters())
        with functions(partial(watch, run)), aliases(_refuse_alias):
            own, results, moved = _kept(run, inputs, seed, caches, late)
        kept, left, drawn = kept | own, left | results, drawn or moved
        after, given = dict(run.named_parameters()), dict(student.named_parameters())
        for name in before.keys() & after.keys():
            if after[name] is not before[name]:
                path, _, leaf = name.rpartition(".")
                replaced.add((path, leaf))
            if not identical(after[name], given[name]):
                written.add(name)
    for entered in runs if kept or replaced or drawn else ():
        for path, what in _does(entered(duplicate(student)), inputs, seed, kept | replaced):
            does.setdefault(path, set()).add(what)
    told = {path: _told(path, student, sorted(what, key=str)) for path, what in does.items()}
    lost = tuple(c for c in caches if c not in kept)
    apart, shown = asks | told, tuple(sorted(left))
    return Python(lost, tuple(kept), bool(late), apart, frozenset(written), shown)


def _reached_in(run: nn.Module, arguments: Pattern) -> list[str]:
    """The modules of a network that the arguments of a call name, and all inside them."""
    named = [m for m in reached(arguments.held) if isinstance(m, nn.Module)]
    inside = {id(part) for module in named for part in module.modules()}
    return [path for path, module in run.named_modules() if id(module) in inside]


def _refuse_alias(kind: Any, args: tuple[Any, ...]) -> None:
    """Raise ``InputError`` for a function by another name that calls modules in its backward:
    there is no way to give them the tensors of the call."""
    if holds_modules(tree.pattern(args)[0]):
        raise InputError(
            f"{kind.__name__}.apply, which is given modules, is called by another name",
            remedy=f"write {kind.__name__}.apply(...) where it is called",
        )


def _told(path: str, student: nn.Module, does: list[tuple[str | None, str]]) -> str:
    """What the code of a module does, and where."""
    drawn = [name for owner, name in does if owner is None]
    held = [
        HOOKS.get(name, name) + ("" if owner == path else f" of {named(owner, student)}")
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
    first: nn.Module,
    inputs: Inputs,
    seed: int,
    caches: Collection[Attribute],
    late: Collection[list[str]],
) -> tuple[set[Attribute], set[Attribute], bool]:
    """Attributes of a copy that are others after a call if another call was before; or all that
    changed, if only the result tells. A cache of what parameters give is none. Of modules that a
    backward calls (``late``) all that a forward leaves is such: it may be left for the backward, as
    the state of the generator is. Then those in which
    a call leaves results that train, and whether it draws from Python's or NumPy's generator."""
    fresh, start = duplicate(first, ours=True), attributes(first)
    made = dict(first.named_modules(remove_duplicate=False)), dict(first.named_parameters())
    buffers = {name: x.clone() for name, x in first.named_buffers()}
    try:
        drawn = _call(first, inputs, seed)[1]
        _refuse_made(first, *made)
        with torch.no_grad():  # statistics are no such state: they are the graph's, too
            for name, x in first.named_buffers():
                if name in buffers and buffers[name].shape == x.shape:
                    x.copy_(buffers[name])
        shown = _trained(first)
        results = [_call(run, other_inputs(inputs, 1), seed)[0] for run in (first, fresh)]
        if _apart(*results):
            _refuse_resized(first, buffers)
    except InputError:
        raise
    except Exception:  # a model that takes no second call has nothing to keep
        return set(), set(), True
    after = attributes(first)
    told, new = changed(after, attributes(fresh)), changed(start, after)
    told |= {key for key in new - set(caches) if any(key[0] in inside for inside in late)}
    left = (changed(shown, _trained(first)) & shown.keys()) - told
    if told:  # and what goes with it: a flag that says that something is there
        owners = {path for path, _ in told}
        return told | {key for key in new if key[0] in owners}, left, drawn
    return (new - set(caches) if _apart(*results) else set()), left, drawn


def _trained(run: nn.Module) -> dict[Attribute, Any]:
    """What modules keep of the last call's results, with gradients: a loss, an attention map."""
    return {
        (path, name): frozen(value)
        for path, part in run.named_modules()
        for name, value in vars(part).items()
        if name not in REGISTRIES
        and any(isinstance(x, Tensor) and x.grad_fn is not None for x in tree.leaves(value))
    }


def _refuse_resized(run: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Raise ``InputError`` if calls gave a buffer, which the next call reads, another size."""
    for name, x in run.named_buffers():
        old, (path, _, leaf) = buffers.get(name), name.rpartition(".")
        if old is not None and old.shape != x.shape:
            raise InputError(
                f"a call gives the buffer {leaf} another size ({_sizes(old)}, then {_sizes(x)}), "
                "and the next one goes on from there",
                module_path=named(path, run),
                remedy="let forward begin anew in every call (reset the state in it), or call the "
                "model once on a batch like the example's, under torch.no_grad(), then expand it",
            )


def _sizes(x: Tensor) -> str:
    return " x ".join(map(str, x.shape)) or "none"


def _refuse_made(
    run: nn.Module, modules: Mapping[str, nn.Module], parameters: Collection[str]
) -> None:
    """Raise ``InputError`` if a call gave a network other modules or more parameters."""
    now = dict(run.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        if now.get(path) is not module:
            raise InputError(
                "forward puts another module into the place of one, whose parameters the name of "
                "the place no longer tells",
                module_path=f"{path} ({type(module).__name__})",
                remedy="leave modules where they are, and choose by an index in a plain attribute",
            )
    for name, _ in run.named_parameters():
        if name not in parameters:
            raise InputError(
                f"forward makes the parameter {name}",
                remedy="if it does so in its first call, run the model once, then expand it; else "
                "let it be a buffer",
            )


def _call(run: nn.Module, inputs: Inputs, seed: int) -> tuple[list[Tensor], bool]:
    """The floating results of a call, as in training, and whether Python's generators moved."""
    args, kwargs = tree.fresh(inputs)
    with keep_rng(), torch.enable_grad():
        seed_all(seed)
        before = generators()
        results = tree.leaves(run(*args, **kwargs))
        moved = bool(changed(before, generators()))
    return [y.detach() for y in results if isinstance(y, Tensor) and floating(y)], moved


def _apart(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) != len(b) or any(difference(x, y) > 1e-4 for x, y in zip(a, b, strict=True))


# --------------------------------------------------------------------------- who does it
def _does(
    run: nn.Module, inputs: Inputs, seed: int, kept: set[Attribute]
) -> list[tuple[str, tuple[str | None, str]]]:
    """Which module's own code changes one of these attributes, or draws, in a copy: module, and
    what (an attribute, or a generator)."""
    watch = Watch(run, kept)
    with contextlib.suppress(Exception), keep_rng(), contextlib.ExitStack() as hooks:
        for path, module in run.named_modules():
            for handle in (
                module.register_forward_pre_hook(partial(watch.look, path), prepend=True),
                module.register_forward_hook(partial(watch.look, None)),
            ):
                hooks.callback(handle.remove)
        for k in range(2):
            seed_all(seed)
            args, kwargs = tree.fresh(other_inputs(inputs, k))
            watch.before.clear()
            run(*args, **kwargs)
            watch.look("")
    return watch.found


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
