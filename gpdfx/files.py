"""Files that appear whole or not at all, their hashes, and where two descriptions differ first."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import check_place

AsPath = str | os.PathLike[str]
Tensors = dict[str, Tensor]


# --------------------------------------------------------------------------- whole or not at all
@contextmanager
def replacing(path: AsPath) -> Iterator[Path]:
    """``with replacing(path) as fresh:`` a path beside it to write to, which then takes its place:
    after a flush to the disk, in one step, and not at all after an error."""
    target = check_place(path)
    fresh = target.with_name(f"{target.name}.tmp")
    try:
        yield fresh
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    _flush(fresh)
    os.replace(fresh, target)
    _flush(target.parent)


def write_text(path: AsPath, text: str) -> None:
    """A text file that appears whole or not at all."""
    with replacing(path) as fresh:
        fresh.write_text(text)


def write_tensors(path: AsPath, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that appears whole or not at all; see ``cpu_copies``."""
    with replacing(path) as fresh:
        save_file(tensors, fresh, metadata)


def cpu_copies(tensors: Mapping[str, Tensor]) -> Tensors:
    """On the CPU, contiguous, in memory of their own, as safetensors wants them."""
    return {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}


def read_tensors(path: AsPath) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file, in memory of their own, and its metadata."""
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return tensors, dict(file.metadata() or {})


def _flush(path: Path) -> None:
    if os.name == "nt":  # where this needs a file that is open for writing, and never a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --------------------------------------------------------------------------- what is in a file
def hash_file(path: AsPath) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of anything JSON-able, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def first_difference(
    one: Any, other: Any, *, absent: Any = None, name: str = ""
) -> tuple[str, Any, Any] | None:
    """Where two trees of dicts differ first, in the order of ``one``'s keys: the dotted name, and
    both values; ``absent`` for a missing one."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return None if one == other else (name, one, other)
    for key in dict.fromkeys((*one, *other)):
        values = one.get(key, absent), other.get(key, absent)
        inner = f"{name}.{key}" if name else key
        difference = first_difference(*values, absent=absent, name=inner)
        if difference is not None:
            return difference
    return None
