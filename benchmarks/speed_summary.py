"""The CSVs of ``benchmarks.speed`` as tables and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.tables import markdown, read, write_between
from benchmarks.timing import Row

HEAD = ("row", "branches", "way", "ratio", "20 %", "80 %", "multiply-adds", "seconds", "ops")


def name(row: Row) -> str:
    """``teacher step / plain wide``; of a fold the ratio is a share of the copy's bandwidth."""
    if row["what"].startswith("fold"):
        return f"{row['what']}, of copy bandwidth"
    return f"{row['what']} / {row['against']}" if row.get("against") else str(row["what"])


def cells(row: Row) -> list[str]:
    """By ``HEAD``."""
    if row.get("error"):
        return [name(row), row.get("branches") or "", row["way"], "failed", *[""] * 5]
    seconds = f"{float(row['seconds']):.3g} / {float(row['against_seconds']):.3g}"
    ops = f"{row['ops']} / {row['against_ops']}" if row.get("against_ops") else f"{row['ops']}"
    figures = [row["median"], row["low"], row["high"], row.get("macs") or ""]
    return [name(row), row.get("branches") or "", row["way"], *map(str, figures), seconds, ops]


def sentence(row: Row) -> str:
    """A row on one line."""
    what, branches, way, median, low, high, macs, seconds, _ = cells(row)
    if row.get("error"):
        return f"{what} failed: {row['error']}"
    told = f"{what} [{branches or '-'}, {way}]".replace("[", "(").replace("]", ")")
    return f"{told}: {median} ({low} to {high}), multiply-adds {macs or '-'}, {seconds} s"


def setting(row: Row) -> str:
    """What rows of a table share."""
    shown = ("torch", "triton", "cuda", "driver", "allocator")
    tools = ", ".join(f"{k} {row[k]}" for k in shown if row.get(k))
    return (
        f"{row['network']} x{row['width']}, {row['size']} px, batch {row['batch']}, "
        f"{row['dtype']}; {row['machine']}, {row['threads']} threads, {tools}"
    )


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(setting(row), []).append(row)
    return found


def show(rows: Sequence[Row]) -> None:
    """Print the tables."""
    console = Console(width=150)
    for title, group in groups(rows).items():
        table = Table(*HEAD, title=title)
        for column in table.columns[3:]:
            column.justify = "right"
        for row in group:
            table.add_row(*cells(row))
        console.print(table)


def write(readme: Path, folder: Path) -> None:
    """All devices' tables between the marks of a README."""
    rows = [row for path in sorted(folder.glob("speed_*.csv")) for row in read(path)]
    texts = [f"{title}\n\n{markdown(HEAD, map(cells, g))}" for title, g in groups(rows).items()]
    write_between(readme, "\n\n".join(texts), "speed")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Ratios of time with their quantiles, beside the ratios of multiply-adds."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    shown = [r for r in rows if not r.get("error") and not r["what"].startswith("fold")]
    if not shown:
        return
    figure = Figure(figsize=(9, 1.4 + 0.27 * len(shown)), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    places = range(len(shown), 0, -1)
    middle, low, high = ([float(r[k]) for r in shown] for k in ("median", "low", "high"))
    spread = [
        [max(m - x, 0) for m, x in zip(middle, low, strict=True)],
        [max(x - m, 0) for m, x in zip(middle, high, strict=True)],
    ]
    axes.errorbar(middle, places, xerr=spread, fmt="o", capsize=3, label="time, 20 % to 80 %")
    macs = [(float(r["macs"]), y) for r, y in zip(shown, places, strict=True) if r.get("macs")]
    if macs:
        axes.plot(*zip(*macs, strict=True), "|", ms=12, color="tab:orange", label="multiply-adds")
    axes.axvline(1, color="black", lw=0.8)
    labels = [f"{name(r)}  {' '.join(filter(None, (r['branches'], r['way'])))}" for r in shown]
    axes.set_yticks(list(places), labels, fontsize=8)
    axes.set(xlabel="ratio", xlim=(0, None), title="\n".join(groups(shown)).replace("; ", "\n"))
    axes.title.set_fontsize(8)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
