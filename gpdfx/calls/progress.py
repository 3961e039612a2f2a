"""What ``expand`` is at, on a terminal, once it has taken some seconds.

A thread writes the line: what takes long is, as a rule, one call of torch's. Where stderr is no
terminal, or somebody else has it (a progress bar of the caller's), nothing is written.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

AFTER = 5.0
"""Seconds in which nothing is shown."""
EVERY = 0.2
_CLEAR = "\r\x1b[K"
_AT = {"stage": "", "what": ""}


def at(stage: str = "", what: object = "") -> None:
    """Note the stage (that of before, if none is given), and what of the network it is at."""
    _AT.update(stage=stage or _AT["stage"], what=str(what))


@contextlib.contextmanager
def shown(after: float = AFTER) -> Iterator[None]:
    """While it lasts, and has lasted for some seconds, the terminal shows what was noted last."""
    stream, over = sys.__stderr__, threading.Event()
    if stream is None or stream is not sys.stderr or not stream.isatty():
        yield
        return
    writer = threading.Thread(target=_write, args=(stream, over, after), daemon=True)
    writer.start()
    try:
        yield
    finally:
        over.set()
        writer.join()


def _write(stream: TextIO, over: threading.Event, after: float) -> None:
    begun, wait = time.monotonic(), after
    while not over.wait(wait):
        text = f"gpdfx: {_AT['stage']} {_AT['what']}".rstrip()
        line = f"{text} ({time.monotonic() - begun:.0f} s)"
        stream.write(_CLEAR + line[: shutil.get_terminal_size().columns - 1])
        stream.flush()
        wait = EVERY
    if wait == EVERY:
        stream.write(_CLEAR)
        stream.flush()
