"""x."""

from __future__ import annotations

from benchmarks.libraries.entry import Table

TABLE: Table = {}
