"""The one family of errors. Every refusal says where it happened and what to do about it."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any


class GpdfxError(Exception):
    """Base of everything gpdfx raises on purpose.

    Fields (``None`` where they do not apply):
        node: name of the graph node.
        module_path: dotted path and class of the user's module, ``"layer1.0.conv1 (Conv2d)"``.
        source: the user's source line, ``"resnet.py:92 out = self.conv1(x)"``.
        remedy: what to do.
    """

    def __init__(
        self,
        message: str,
        *,
        remedy: str | None = None,
        node: str | None = None,
        module_path: str | None = None,
        source: str | None = None,
    ) -> None:
        self.node, self.module_path, self.source, self.remedy = node, module_path, source, remedy
        lines = [message]
        lines += [f"  {k}: {v}" for k, v in (("node", node), ("module", module_path)) if v]
        lines += [f"  at: {source}"] if source else []
        lines += [f"  what to do: {remedy}"] if remedy else []
        self.args = ("\n".join(lines),)  # the compiler cannot follow super().__init__ here


class InputError(GpdfxError):
    """A bad argument: not a module, a ratio below 1, example inputs that do not fit."""


class CaptureError(GpdfxError):
    """The model could not be turned into a graph."""


class LossyError(GpdfxError):
    """The teacher does not compute the student's function: a bug in a rule, or Python in forward
    that no graph does. ``apart``: the module that would have to stay the user's Python, if it is
    known (empty for the whole network)."""

    def __init__(self, message: str, *, apart: str | None = None, **where: str | None) -> None:
        super().__init__(message, **where)
        self.apart = apart


class TrainingError(GpdfxError):
    """Training cannot go on: the loss is not finite, step after step."""


class AxisConflict(GpdfxError):
    """Two axes cannot be the same. Passes catch it and bridge; users see it in reports only."""


def check_choice(what: str, given: Any, known: Iterable[str]) -> None:
    """Raise ``InputError`` for an argument that is none of those known."""
    known = tuple(known)
    if given not in known:
        raise InputError(f"{what} is {given!r}", remedy=f"pass one of {', '.join(known)}")


def check_place(path: Any) -> Path:
    """Where a file can be written. Raises ``InputError`` where it cannot."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"{path!r} is no path", remedy="pass the name of a file")
    target = Path(path)
    if target.is_dir():
        raise InputError(f"{target} is a folder", remedy="pass the name of a file in it")
    if not target.parent.is_dir():
        raise InputError(f"there is no folder {target.parent}", remedy="make it first")
    return target


def suggest(
    name: str, known: Iterable[str], otherwise: str = "see the model's named_parameters()"
) -> str:
    """A remedy that names what comes near, or else says what to do ``otherwise``."""
    close = nearest(name, known)
    return f"did you mean {', '.join(close)}?" if close else otherwise


def nearest(name: str, known: Iterable[str], count: int = 3, cutoff: float = 0.5) -> list[str]:
    """Known names that are like one that was typed, the nearest first: by common letters, and by
    beginning with it, letter by letter and number by number. A digit and the letter that looks like
    it are the same beside a digit.

    nearest("resnet1o", ["resnet18", "resnet101", "resnet10t"]) -> ["resnet10t", "resnet101", ...]
    """
    typed, words = _typed(name)
    scores = {}
    for other in known:
        text, found = _typed(other)
        begins = text.startswith(typed or " "), found[: len(words)] == (words or None)
        scores[other] = difflib.SequenceMatcher(None, typed, text).ratio() + sum(begins) / 4
    close = sorted((k for k, x in scores.items() if x >= cutoff), key=lambda k: (-scores[k], k))
    return close[:count]


def _typed(name: str) -> tuple[str, list[str]]:
    """A name without what is easily typed wrong, and its letters and numbers apart."""
    text = name.lower().replace("-", "_")
    for letter, digit in (("o", "0"), ("[li]", "1")):
        text = re.sub(rf"(?<=\d){letter}|{letter}(?=\d)", digit, text)
    return text, re.findall(r"\d+|[^\W\d_]+", text)


def near(name: str, known: Collection[str]) -> str:
    """A remedy that names what comes near, or else all that there is."""
    return suggest(name, known, f"choose from {', '.join(known)}")


def install(extras: str) -> str:
    """The remedy where what ``extras`` bring is missing; gpdfx is in no registry."""
    return f"in a checkout of gpdfx: pip install '.[{extras}]'"


def described(error: BaseException) -> str:
    """An error of other code in one line: ``"TypeError: 'x' is no number"``."""
    said = str(error).strip().partition("\n")[0]
    return type(error).__name__ + (f": {said}" if said else "")


@contextlib.contextmanager
def needs_extra(extra: str, why: str) -> Iterator[None]:
    """Around imports of what an extra of gpdfx brings: where they fail, name it."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"{why} ({error})", remedy=install(extra)) from error
