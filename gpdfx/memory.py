"""What the process does with freed memory on a CPU."""

from __future__ import annotations

import ctypes
import platform
from typing import Any

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
