"""What takes its time says what it is at.

On a terminal one line shows it, once some seconds have passed; it goes when all is done. Elsewhere
(a file, a notebook, a progress bar of the caller's that has taken stderr) a library keeps silent:
there it is logged every half minute, as INFO of the logger ``gpdfx``, which the command line writes
to stderr, and anybody else who asks for it:

    logging.basicConfig(level="INFO")

A thread writes: what takes long is, as a rule, one call of torch's.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TextIO

AFTER = 5.0
"""Seconds in which nothing is shown on a terminal."""
EVERY = 0.2
LINES = 30.0
"""Seconds between lines where there is no terminal."""
LOG = logging.getLogger("gpdfx")
_CLEAR = "\r\x1b[K"
_AT = {"stage": "", "what": "", "whose": ""}
_WRITING = threading.Lock()
_INSIDE: list[None] = []  # what runs in another one that is shown


def at(stage: str = "", what: object = "") -> None:
    """Note the stage (that of before, if none is given), and what of the network it is at."""
    _AT.update(stage=stage or _AT["stage"], what=str(what), whose="")


def of(whose: str) -> None:
    """Note whose it is: the student's or the teacher's."""
    _AT["whose"] = f", {whose}"


@contextlib.contextmanager
def shown(after: float = AFTER, *, quiet: bool = False) -> Iterator[None]:
    """While it lasts, and has lasted for some seconds, what was noted last is shown or logged.
    ``quiet``: it is not, nor is what calls this inside."""
    writer, over = None if quiet or _INSIDE else _writer(), threading.Event()
    thread = threading.Thread(target=writer, args=(over, after), daemon=True) if writer else None
    _INSIDE.append(None)
    try:
        if thread:
            thread.start()
        yield
    finally:
        _INSIDE.pop()
        over.set()
        if thread:
            thread.join()


def say(text: str) -> None:
    """A line of its own on stderr, also while something is shown."""
    with _WRITING:
        print(_CLEAR + text if _INSIDE and _terminal() else text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def on_stderr() -> Iterator[None]:
    """Write what is logged to stderr, for programs that own it."""
    handler, level = logging.StreamHandler(), LOG.level
    handler.setFormatter(logging.Formatter("gpdfx: %(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.setLevel(level)
        LOG.removeHandler(handler)


def _terminal() -> TextIO | None:
    stream = sys.__stderr__
    own = stream is not None and stream is sys.stderr and stream.isatty()
    return stream if own else None


def _writer() -> Callable[[threading.Event, float], None] | None:
    if stream := _terminal():
        return partial(_show, stream)
    return _log if LOG.isEnabledFor(logging.INFO) else None


def _text(begun: float) -> str:
    text = f"{_AT['stage']} {_AT['what']}".rstrip() + _AT["whose"]
    return f"{text} ({time.monotonic() - begun:.0f} s)"


def _show(stream: TextIO, over: threading.Event, after: float) -> None:
    begun, wait = time.monotonic(), after
    while not over.wait(wait):
        line = f"gpdfx: {_text(begun)}"
        with _WRITING:
            stream.write(_CLEAR + line[: shutil.get_terminal_size().columns - 1])
            stream.flush()
        wait = EVERY
    if wait == EVERY:
        stream.write(_CLEAR)
        stream.flush()


def _log(over: threading.Event, _: float) -> None:
    begun = time.monotonic()
    while not over.wait(LINES):
        LOG.info(_text(begun))
