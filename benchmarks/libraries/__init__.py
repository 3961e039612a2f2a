"""Networks of optional packages, one module of rows a field: smallest configurations, random
weights or those that a package ships. ``requirements.txt`` and ``no_dependencies.txt`` install the
packages; rows of those that are not installed are skipped, and said.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pkgutil import iter_modules
from typing import Any

import torch
from torch import nn

from benchmarks.libraries.entry import Entry


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


_ALL: dict[str, dict[str, Entry]] = {}
for _field in sorted(module.name for module in iter_modules(__path__) if module.name != "entry"):
    for _package, _rows in import_module(f"{__name__}.{_field}").TABLE.items():
        _ALL.setdefault(_package, {}).update(_rows)
VERSIONS = {package: _version(package) for package in _ALL}
TABLE: dict[str, Entry] = {
    f"{package}/{name}": entry
    for package, rows in _ALL.items()
    if VERSIONS[package]
    for name, entry in rows.items()
}
SKIPPED = {package: len(_ALL[package]) for package, found in VERSIONS.items() if not found}


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The network ``package/name``, and its positional and keyword inputs."""
    entry = TABLE[name]
    torch.manual_seed(0)
    return entry.make(), entry.inputs(), dict(entry.call)


def package(name: str) -> str:
    """Package and version of a row ``libraries:package/name``; "" for other suites."""
    suite, _, row = name.partition(":")
    found = row.partition("/")[0]
    return f"{found} {VERSIONS[found]}" if suite == "libraries" else ""
