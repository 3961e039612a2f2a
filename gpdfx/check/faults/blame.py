"""What Python does in a forward that a graph does not: state in attributes, draws from Python's
and NumPy's generators, whatever makes two equal calls differ.

A graph computes what the example's call computed. Where the user's forward does more, the module
that does so has to stay the user's Python; here it is found and named.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...passes.program import duplicate
from ..facts import Inputs, Law, identical
from ..observe import keep_rng, observe, states

_PLAIN = (bool, int, float, complex, str, bytes, type(None), Tensor)
_REGISTRIES = frozenset((*nn.Module().__dict__, "training"))
Attribute = tuple[str, str]
"""The path of a module, and a name."""


@dataclass(frozen=True)
class Blame:
    """``path``: of the module whose Python does what no graph does; ``text``: what; ``source``:
    where, as far as it is known."""

    path: str
    text: str
    source: str | None = None


def blame(
    student: nn.Module, inputs: Inputs, seed: int, caches: Collection[Attribute]
) -> Blame | None:
    """The first thing that is found, if there is one."""
    found = state(student, inputs, seed, caches) or _draws(student, inputs, seed)
    return found or _unsteady(student, inputs, seed)


# --------------------------------------------------------------------------- state
def state(
    student: nn.Module, inputs: Inputs, seed: int, caches: Collection[Attribute]
) -> Blame | None:
    """An attribute, beside parameters and buffers, that one call after the other changes: it is
    another after the second of two equal calls."""
    for training in (True, False):
        run, after = duplicate(student, ours=True).train(training), list[dict[Attribute, Any]]()
        with contextlib.suppress(Exception), keep_rng():
            for _ in range(2):
                observe(run, inputs, seed)
                after.append(attributes(run))
        if len(after) == 2:
            for path, name in changed(*after) - set(caches):
                module = student.get_submodule(path)
                where = _named(path, module)
                text = f"forward changes the attribute {name} of {where} from call to call"
                return Blame(path, text, _line(module, rf"self\.{name}\b"))
    return None


def attributes(module: nn.Module) -> dict[Attribute, Any]:
    """What modules keep in plain attributes: numbers, strings, tensors, and containers of them."""
    found: dict[Attribute, Any] = {}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in _REGISTRIES and isinstance(value, (*_PLAIN, list, tuple, dict, set)):
                found[path, name] = _frozen(value)
    return found


def _frozen(value: Any, depth: int = 3) -> Any:
    """A copy that later changes do not reach; of what is not plain, the type."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple | set) and depth:
        return [type(value), *(_frozen(x, depth - 1) for x in value)]
    if isinstance(value, dict) and depth:
        return [dict, *value, *(_frozen(x, depth - 1) for x in value.values())]
    return value if isinstance(value, _PLAIN) else type(value)


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


# --------------------------------------------------------------------------- draws
def _draws(student: nn.Module, inputs: Inputs, seed: int) -> Blame | None:
    """A module that draws from Python's or NumPy's generator: the innermost."""
    found: list[Blame] = []

    def before(stack: list[Any], *_: Any) -> None:
        stack.append(states())

    def after(stack: list[Any], path: str, module: nn.Module, *_: Any) -> None:
        moved = [n for n, x in states().items() if n[0] != "t" and x != stack[-1][n]]
        stack.pop()
        if moved:
            where = _named(path, module)
            text = f"forward of {where} draws from {moved[0]}"
            found.append(Blame(path, text, _line(module, r"\brandom\b|\bnp\.|\bnumpy\b")))

    for training in (True, False):
        run, stack = duplicate(student, ours=True).train(training), list[Any]()
        with contextlib.suppress(Exception), keep_rng(), contextlib.ExitStack() as hooks:
            for path, module in run.named_modules():
                pre = module.register_forward_pre_hook(partial(before, stack))
                post = module.register_forward_hook(partial(after, stack, path))
                hooks.callback(pre.remove)
                hooks.callback(post.remove)
            observe(run, inputs, seed)
    return found[0] if found else None


def _unsteady(student: nn.Module, inputs: Inputs, seed: int) -> Blame | None:
    """Two equal calls of two copies that differ."""
    for mode in ("train", "eval"):
        seen = []
        with contextlib.suppress(Exception), keep_rng():
            for _ in range(2):
                run = duplicate(student, ours=True).train(mode == "train")
                seen.append(observe(run, inputs, seed))
            for fact, x in seen[0].items():
                if fact.law is Law.OUTPUTS and not identical(x, seen[1][fact]):
                    text = f"the model does not repeat itself: {fact} differs in {mode} mode "
                    return Blame("", text + "between two equal calls, all generators seeded")
    return None


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


def _named(path: str, module: nn.Module) -> str:
    return f"{path or '(root)'} ({type(module).__name__})"
