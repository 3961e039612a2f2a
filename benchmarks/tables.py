"""What the benchmarks share: CSVs that a rerun goes on with, tables, and command lines."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A CSV that grows by whole rows; ``key`` says which rows are the same measurement."""

    path: Path
    columns: Sequence[str]
    key: Sequence[str] = ()
    end: str = "\n"
    """Of a line."""

    def rows(self) -> list[dict[str, str]]:
        """All rows; what a kill left of a last one is cut off."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        rows = list(csv.DictReader(io.StringIO(whole, newline="")))
        if whole != text:
            self.write(rows)
        return rows

    def done(self) -> dict[tuple[str, ...], dict[str, str]]:
        """Rows by their key."""
        return {self._name(row): row for row in self.rows()}

    def append(self, *rows: Row) -> None:
        """Add rows at the end; numbers that are floats get six digits."""
        if not self.path.exists() or not self.path.stat().st_size:
            self.write([])
        with self.path.open("a", newline="") as file:
            self._writer(file).writerows(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                for row in rows
            )

    def write(self, rows: Iterable[Row]) -> None:
        """Write the whole file, which appears whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        with part.open("w", newline="") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(rows)
        part.replace(self.path)

    def replace(self, rows: Iterable[Row]) -> None:
        """Write rows in place of those with the same key, or at the end."""
        fresh: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            fresh.setdefault(self._name(row), []).append(row)
        whole: list[Row] = []
        for row in self.rows():
            name = self._name(row)
            whole += fresh.get(name, [row])
            if name in fresh:
                fresh[name] = []
        self.write([*whole, *(row for group in fresh.values() for row in group)])

    def _name(self, row: Row) -> tuple[str, ...]:
        values = (row.get(k) for k in self.key)
        return tuple("" if value is None else str(value) for value in values)

    def _writer(self, file: Any) -> csv.DictWriter[str]:
        return csv.DictWriter(file, self.columns, lineterminator=self.end, extrasaction="ignore")


def read(path: Path) -> list[dict[str, str]]:
    """All rows of a CSV."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------- text
def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table."""
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write_between(readme: Path, text: str, name: str) -> None:
    """Put a text between its marks in the README."""
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = readme.read_text().split(first)
    readme.write_text(f"{before}{first}\n{text}\n{last}{rest.split(last)[1]}")


def command_line(module: str, text: str | None) -> argparse.ArgumentParser:
    """A parser with the module's docstring as its help."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
