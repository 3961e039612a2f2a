"""The folder of a run belongs to one run at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch

from ..errors import InputError
from ..files import is_left_over
from .ranks import Ranks

LOCK = ".lock"


@contextlib.contextmanager
def hold(folder: Path, ranks: Ranks) -> Iterator[None]:
    """While it lasts, no other run has this folder, which is made; one that is still empty after it
    is taken away again. The first rank holds it for all of them. The system lets go of it when the
    process ends, however that ends.

    Raises ``InputError``, on all ranks, where another run holds it, or there can be no folder.
    """
    refused: InputError | None = None
    with contextlib.ExitStack() as stack:
        try:
            if ranks.rank == 0:
                stack.enter_context(_locked(folder))
        except InputError as error:
            refused = error
        if not ranks.all(torch.tensor(refused is None, device=ranks.device)):
            text = f"the first rank cannot have the folder {folder}"
            raise refused or InputError(text, remedy="see what that rank says")
        yield


def sweep(folder: Path) -> None:
    """Delete what runs left that were killed while they wrote a file."""
    for path in folder.glob("*"):
        if is_left_over(path):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / LOCK
    fresh = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        text = f"the folder {folder} cannot be written to: {error}"
        raise InputError(text, remedy="give another folder") from error
    try:
        with file:
            try:
                _lock(file)
                held = path.exists() and os.path.samestat(os.stat(path), os.fstat(file.fileno()))
            except (BlockingIOError, PermissionError):
                held = False
            except OSError:  # a file system without locks
                held = True
            if not held:
                raise InputError(
                    f"another run is training in the folder {folder}",
                    remedy="wait for it or stop it, or give another folder",
                )
            try:
                _HELD.add(file)
                yield
            finally:
                _HELD.discard(file)
                with contextlib.suppress(OSError):  # where what is open cannot be deleted
                    path.unlink()
    finally:
        with contextlib.suppress(OSError):  # there is something in it
            for made in fresh:
                made.rmdir()


_HELD = set[IO[str]]()


def _let_go() -> None:
    """In a process that this one forks: a lock is of all that have the file open."""
    for file in _HELD:
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _lock(file: IO[str]) -> None:
    """For this process, until the file is closed. Raises an ``OSError`` where another has it."""
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
