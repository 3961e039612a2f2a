"""What the process does with freed memory on a CPU, and how much there may be."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from .errors import InputError

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h


def keep_memory() -> bool:
    """Let the process keep memory that is freed, and use it again.

    By default glibc gives large tensors back to the system when they are freed, and the next one
    of that size is paid for page by page, which shows where a training step costs its weights.
    Numbers do not change; the process stays as large as it was at most. For the whole process and
    for good; best before the first step. ``gpdfx train`` does it on CPUs.

    Returns whether it could: False without glibc. It has no effect where another allocator
    (jemalloc, tcmalloc) is loaded.
    """
    mallopt = _glibc("mallopt")
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))


def give_back() -> None:
    """Give memory that is free, but lies between what is not, back to the system: copies of a
    network's weights leave as much of it as they were large."""
    if trim := _glibc("malloc_trim"):
        trim(0)


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name) if platform.libc_ver()[0] == "glibc" else None


# --------------------------------------------------------------------------- how much there may be
_MOST: ContextVar[tuple[int, str, str] | None] = ContextVar("most", default=None)
UNKNOWN = 2**40
"""Bytes of memory where the system does not say."""


@contextmanager
def at_most(size: int, why: str, remedy: str) -> Iterator[None]:
    """While it lasts, ``check_room`` refuses more bytes, too."""
    token = _MOST.set((size, why, remedy))
    try:
        yield
    finally:
        _MOST.reset(token)


def check_room(what: str, size: int, device: torch.device) -> None:
    """Raise ``InputError`` for so many bytes if the device has fewer in all, before they are
    allocated."""
    total = memory_of(device)
    why = f"the memory of {device.type} has {total / 2**30:.3g} GiB"
    own = total, why, "pass a smaller ratio, or keep= for the largest layers"
    for most, why, remedy in (_MOST.get() or own, own):
        if size > most:
            text = f"{what} would take {size / 2**30:.3g} GiB of parameters, and {why}"
            raise InputError(text, remedy=remedy)


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not a system of that kind
        return UNKNOWN
