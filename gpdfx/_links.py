"""``gpdfx.passes`` and ``gpdfx.kernels`` where the links to them are no folders.

A clone or archive without symbolic links, as on Windows, has small files in their place; the
folders themselves stand beside this package.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
MISSING = {f"gpdfx.{name}" for name in ("passes", "kernels") if not (HERE / name).is_dir()}


class Beside(MetaPathFinder):
    """Finds these two, and nothing else of the checkout."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(HERE.parent)]) if name in MISSING else None


if MISSING:
    sys.meta_path.insert(0, Beside())  # before that of another checkout, installed to be edited
