"""Files that appear whole or not at all, their hashes, and where two descriptions differ first."""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import InputError, check_place

AsPath = str | os.PathLike[str]
Tensors = dict[str, Tensor]
UNWRITTEN = "make room there, or give another place; what stood there before is as it was"


# --------------------------------------------------------------------------- whole or not at all
@contextmanager
def replacing(path: AsPath) -> Iterator[Path]:
    """``with replacing(path) as fresh:`` a path beside it to write to, of this call alone, which
    then takes its place: after a flush to the disk, in one step, and not at all after an error."""
    target = check_place(path)
    fresh = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        fresh.touch()
        mode = fresh.stat().st_mode  # as the user's umask has it, which some writers pass over
        yield fresh
        fresh.chmod(mode)
        _flush(fresh)
        os.replace(fresh, target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        fresh.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{target} cannot be written: {why}", remedy=UNWRITTEN) from error
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def is_left_over(path: Path) -> bool:
    """Whether a file is what a process left that was killed while it was ``replacing`` one, by its
    name: ours, or safetensors' own beside it."""
    return _LEFT_OVER.fullmatch(path.name) is not None and path.is_file()


_LEFT_OVER = re.compile(r".+\.[0-9a-f]{8}\.tmp|\.tmp[0-9A-Za-z]{6}")


def write_text(path: AsPath, text: str) -> None:
    """A text file that appears whole or not at all."""
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def write_tensors(path: AsPath, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that appears whole or not at all; see ``cpu_copies``."""
    with replacing(path) as fresh:
        try:
            save_file(tensors, fresh, metadata)
        except KeyError as error:
            text = f"a safetensors file cannot hold tensors of {error}"
            raise InputError(text, remedy="convert them first, or use torch.save") from error


def cpu_copies(tensors: Mapping[str, Tensor]) -> Tensors:
    """On the CPU, contiguous, in memory of their own, as safetensors wants them."""
    return {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}


def read_tensors(path: AsPath) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file, in memory of their own, and its metadata."""
    open(path, "rb").close()  # safetensors calls every file missing that it cannot open
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


# --------------------------------------------------------------------------- with a checksum
@dataclass(frozen=True)
class Format:
    """A kind of safetensors file: tensors by name, and in the metadata, as ``key``, facts as JSON
    with a SHA-256 over these and all tensors. Nothing in it is code.

    The checksum costs one pass over all bytes, when a file is written and when it is read: a third
    of a second for 500 MB where the processor has instructions for it, else one or two.

    ``name``: with its version; ``what``: how errors call such a file, and its ``remedy``.
    """

    name: str
    key: str
    what: str
    remedy: str

    def write(self, path: AsPath, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Whole or not at all: whoever is killed meanwhile leaves the file that was there."""
        text, copies = json.dumps(dict(facts)), cpu_copies(tensors)
        sha256 = checksum(text, copies)
        write_tensors(path, copies, {"format": self.name, self.key: text, "sha256": sha256})

    def read(self, path: AsPath) -> tuple[Tensors, Any]:
        """What was written: tensors on the CPU, and the facts.

        Raises ``InputError``: no such file; cut short or changed since; of another kind.
        """
        named = f"the {self.what} {path}"
        try:
            tensors, metadata = read_tensors(path)
        except FileNotFoundError:
            raise InputError(f"{named} is not there", remedy=self.remedy) from None
        except OSError as error:
            text = f"{named} cannot be read: {error.strerror or error}"
            raise InputError(text, remedy=self.remedy) from error
        except Exception as error:  # whatever a damaged header may lead to
            text = f"{named} is corrupt or no safetensors file: {error}"
            raise InputError(text, remedy=self.remedy) from error
        if not {self.key, "format", "sha256"} <= metadata.keys():
            old = " with a checksum, as gpdfx writes it now" if self.key in metadata else ""
            raise InputError(f"{path} holds no {self.what}{old}", remedy=self.remedy)
        if metadata["format"] != self.name:
            text = f"{named} is of the format {metadata['format']!r}, not {self.name!r}"
            raise InputError(text, remedy=self.remedy)
        if checksum(metadata[self.key], tensors) != metadata["sha256"]:
            text = f"{named} is corrupt: its checksum does not fit"
            raise InputError(text, remedy=self.remedy)
        try:
            return tensors, json.loads(metadata[self.key])
        except (ValueError, RecursionError) as error:
            raise InputError(f"{named} holds no JSON: {error}", remedy=self.remedy) from error


def checksum(text: str, tensors: Tensors) -> str:
    """SHA-256 of a text, and of contiguous tensors on the CPU with their names and sizes."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        x = tensors[name]
        sha.update(f"\n{name} {x.dtype} {tuple(x.shape)}\n".encode())
        sha.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


# --------------------------------------------------------------------------- what is in a file
def hash_file(path: AsPath) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def first_misfit(value: Any, kind: Any, name: str) -> str | None:
    """What is wrong first with a value that JSON gave, ``None`` if it is of a kind: a type, or
    several; ``[kind]``: a list of such; ``{str: kind}``: a dict of such; ``{"a": kind, ...}``: a
    dict with exactly these keys.

        first_misfit({"a": [1, "x"]}, {"a": [int]}, "header")    "header.a[1] is 'x'"
        first_misfit({"b": 1}, {"a": int}, "header")             "header.b is unknown"
    """
    if isinstance(kind, list) and isinstance(value, list):
        inner = [(f"{name}[{k}]", x, kind[0]) for k, x in enumerate(value)]
    elif isinstance(kind, dict) and isinstance(value, dict):
        known = dict.fromkeys(value, kind[str]) if str in kind else kind
        for key in (*value, *known):
            if key not in known or key not in value:
                return f"{name}.{key} is {'missing' if key in known else 'unknown'}"
        inner = [(f"{name}.{k}", x, known[k]) for k, x in value.items()]
    else:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        flag = isinstance(value, bool) and bool not in kinds  # which is an int to Python
        plain = all(isinstance(k, type) for k in kinds)
        fits = plain and isinstance(value, kinds) and (object in kinds or not flag)
        return None if fits else f"{name} is {reprlib.repr(value)}"
    return next(filter(None, (first_misfit(x, k, n) for n, x, k in inner)), None)
