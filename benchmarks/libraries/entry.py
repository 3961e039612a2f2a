"""One network of an optional package: where it is, its arguments, and what it is called with."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 4  # as in benchmarks.networks
Inputs = Callable[[], tuple[Any, ...]]
Table = dict[str, dict[str, "Entry"]]
"""Entries by name, by the name that their package is installed by."""


@dataclass(frozen=True)
class Entry:
    """How a network is made, its positional inputs, and its keyword inputs."""

    make: Callable[[], nn.Module]
    inputs: Inputs
    call: dict[str, Any] = field(default_factory=dict)


def net(
    path: str, inputs: Inputs, *args: Any, call: dict[str, Any] | None = None, **keywords: Any
) -> Entry:
    """What is at ``path`` (``package.module:name``), called with these arguments. Nothing is
    imported before it is made."""
    return Entry(lambda: pkgutil.resolve_name(path)(*args, **keywords), inputs, call or {})


def of(path: str, make: Callable[[Any], nn.Module], *inputs: Inputs, **call: Any) -> Entry:
    """What is made of the module at ``path``, imported only then; keywords are inputs."""
    return Entry(lambda: make(pkgutil.resolve_name(path)), join(*inputs), call)


def floats(*shape: int, count: int = 1) -> Inputs:
    """``count`` tensors of that shape, normal."""

    def make() -> tuple[Tensor, ...]:
        draw = torch.Generator().manual_seed(0)
        return tuple(torch.randn(shape, generator=draw) for _ in range(count))

    return make


def images(channels: int = 3, size: int = 64, batch: int = BATCH) -> Inputs:
    return floats(batch, channels, size, size)


def tokens(*shape: int, among: int = 100) -> Inputs:
    """Whole numbers below ``among``."""
    return lambda: (torch.randint(among, shape, generator=torch.Generator().manual_seed(0)),)


def given(*values: Any) -> Inputs:
    """These values, as they are."""
    return lambda: values


def join(*parts: Inputs) -> Inputs:
    """Inputs of several kinds, one after another."""
    return lambda: tuple(value for part in parts for value in part())
