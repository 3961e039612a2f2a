"""What a GPU has to reach, out of the files of ``benchmarks.gpu``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.tables import Table, markdown, read
from benchmarks.timing import Row

FIELDS = ("goal", "bound", "value", "reached", "of")
FILES = ("speed.csv", "gpu_kernels.csv", "jobs.csv")
BOTH = ("eager", "graph")
RATIOS: tuple[tuple[str, str, str, Sequence[str], Sequence[str], Callable[..., Row], str], ...] = (
    ("teacher step", "plain wide", "<= 1.1", ("auto",), BOTH, min, ""),
    ("GPD step", "plain wide + plain student", "<= 1.1", ("auto",), BOTH, min, ""),
    ("reference step", "GPD step", ">= 1.7", ("its own", "auto"), ("eager",), min, "eager"),
    ("reference step", "GPD step", ">= 1.15", ("its own", "auto"), ("default",), min, "compiled"),
    ("fold forward", "copy of its bytes", ">= 0.75", ("acnet",), BOTH, max, "no products"),
    (
        "fold forward + backward",
        "copy of its bytes",
        ">= 0.75",
        ("acnet",),
        BOTH,
        max,
        "no products",
    ),
)
"""Of ``speed.csv``: what, against, bound, branches, ways, which row counts, a remark."""


def figure(row: Row) -> float:
    return float(row["median"])


def goals(speed: Sequence[Row], kernels: Sequence[Row], jobs: Sequence[Row]) -> list[Row]:
    """Each goal, its value, whether it is reached. Steps are those of the first network; a fold
    without products is all elementwise; launches are those that are no products."""
    found = []
    worst = max(
        (float(r["ratio"]) for r in kernels), key=lambda x: (math.isnan(x), x), default=None
    )
    right = sum(row["ok"] == "True" for row in kernels)
    failed = sum((row["kind"], row["state"]) == ("kernels", "failed") for row in jobs)
    if failed:
        worst = math.nan
    of = f"{right} of {len(kernels) + failed} forms and types"
    found.append(judged("error of kernels / error of plain torch", "<= 1.5", worst, of))
    first = [r for r in speed if all(r[k] == speed[0][k] for k in ("network", "size", "batch"))]
    rows = [row for row in first if not row["error"]]
    for what, against, bound, branches, ways, pick, remark in RATIOS:
        some = [r for r in rows if (r["what"], r["against"]) == (what, against)]
        some = [r for r in some if r["branches"] in branches and r["way"] in ways]
        name = f"{what} / {against}{remark and f', {remark}'}"
        row = pick(some, key=figure) if some else None
        of = f"{row['branches']}, {row['way']}" if row else ""
        found.append(judged(name, bound, figure(row) if row else None, of))
    folds = {r["what"]: r for r in rows if r["branches"] == "auto" and r["way"] == "eager"}
    counts = [
        int(row["launches"]) - int(row["products"])
        for row in (folds.get(what, {}) for what in ("fold forward", "fold forward + backward"))
        if row.get("launches")
    ]
    most = max(counts[0], counts[1] - counts[0]) if len(counts) == 2 else None
    return [*found, judged("launches of a fold's direction beside products", "<= 3", most, "auto")]


def judged(goal: str, bound: str, value: float | None, of: str) -> Row:
    row: Row = {"goal": goal, "bound": bound, "value": "", "reached": "not measured in time"}
    if value is None:
        return row
    most, limit = bound.startswith("<="), float(bound.split()[1])
    reached = value <= limit if most else value >= limit
    return row | {"value": f"{value:.4g}", "reached": "yes" if reached else "no", "of": of}


def write(out: Path) -> str:
    """Write ``goals.csv``; the same as a table."""
    rows = goals(*(read(out / name) if (out / name).exists() else [] for name in FILES))
    Table(out / "goals.csv", FIELDS).write(rows)
    return markdown(FIELDS, ([row.get(k, "") for k in FIELDS] for row in rows))
