"""The coverage CSVs as markdown, for the README."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median

from benchmarks.tables import markdown, read
from benchmarks.uses import UNTRIED, USES

Row = dict[str, str]

HEAD = (
    *("suite", "ratio", "networks", "captured", "lossless", "by every law"),
    *("batch free", "collapse identical"),
    *("widened, mean", "median", "worst error", "bridged nodes"),
    *("seconds: capture", "transform", "verify", "parameters"),
)
USED = ("suite", "packages", "lossless", "another batch", "deepcopy", "save and load", "joint step")
CHECKS = ("probe/eval", "probe/train", "real/eval", "real/train")
STRICT = 1e-10
SINGLE = 1e-5


def summary(paths: Iterable[Path]) -> str:
    """One line per suite and ratio; then every network that is not ok, that widened less than 90
    per cent, or that was allowed more than the usual tolerance."""
    rows = [row for path in paths for row in read(path)]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["suite"], row["ratio"]), []).append(row)
    ok = [r for r in rows if r["status"] == "ok"]
    low = [r for r in ok if float(r["widened"]) < 0.9]
    wide = [r for r in ok if STRICT < float(r["tolerance"]) < SINGLE]
    casting = [r for r in ok if float(r["tolerance"]) >= SINGLE]
    lines = [
        markdown(HEAD, ([*key, *_figures(group)] for key, group in groups.items())),
        *_list("Not ok", [(r, _failure(r)) for r in rows if _failure(r)]),
        *_list("Widened below 90 %", [(r, _why(r)) for r in low]),
        *_list(
            f"Allowed more than {STRICT:.0e}: rounding is amplified",
            [(r, f"allowed {float(r['tolerance']):.0e}") for r in wide],
        ),
        *_casting(casting),
        *_used([r for r in ok if r.get("deepcopy")]),
    ]
    return "\n".join(lines)


def _figures(rows: list[Row]) -> list[str]:
    ok = [r for r in rows if r["status"] == "ok"]
    captured = [r for r in rows if r["status"] in ("ok", "lossy")]
    counts = [str(len(rows)), str(len(captured)), f"{len(ok)} of {len(captured)}"]
    if not ok:
        return counts + ["-"] * (len(HEAD) - 2 - len(counts))
    told = [r for r in ok if r["inputs"]]
    widened = [float(r["widened"]) for r in ok]
    bridged = sum(int(r["bridged"]) for r in ok) / max(sum(int(r["nodes"]) for r in ok), 1)
    factors = [int(r["parameters_after"]) / max(int(r["parameters_before"]), 1) for r in ok]
    return [
        *counts,
        f"{sum(bool(r.get('laws')) for r in ok)} of {len(ok)}",
        f"{sum(_batch_is_free(r) for r in told)} of {len(told)}",
        f"{sum(r['collapse'] == 'True' for r in ok)} of {len(ok)}",
        f"{fmean(widened):.1%}",
        f"{median(widened):.1%}",
        f"{max(map(_worst, ok)):.1e}",
        f"{bridged:.2%}",
        *(_median(ok, f"seconds_{stage}") for stage in ("capture", "transform", "verify")),
        f"x {fmean(factors):.2f}",
    ]


def _batch_is_free(row: Row) -> bool:
    """The check ran the network at another batch, too, and the answers agreed; of one in parts,
    each of them."""
    return all("batch" in part for part in row["inputs"].split("; "))


def _worst(row: Row) -> float:
    return max(float(row[k] or math.nan) for k in CHECKS)


def _median(rows: list[Row], column: str) -> str:
    return f"{median(float(r[column]) for r in rows):.1f}"


def _failure(row: Row) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['error']}" + (f" ({row['where']})" if row["where"] else "")
    return "" if row["collapse"] == "True" else "collapse gives another state_dict or type"


def _why(row: Row) -> str:
    return f"{float(row['widened']):.1%}: {(row['held'] or row['bridged_reasons']).split(';')[0]}"


def _casting(rows: list[Row]) -> list[str]:
    """Those that compute in float32 whatever their parameters are: many, so their names alone."""
    names = dict.fromkeys(row["name"].partition(":")[2] for row in rows)
    return ["", f"Casting to float32, allowed {SINGLE:.0e}: {len(names)}", "", ", ".join(names)]


def _used(rows: list[Row]) -> list[str]:
    """What people do with a teacher besides calling it, of the suites that tried."""
    if not rows:
        return []
    suites: dict[str, list[Row]] = {}
    for row in rows:
        suites.setdefault(row["suite"], []).append(row)
    lines = []
    for suite, group in suites.items():
        packages = {row["package"] for row in group if row["package"]}
        tried = [[r[use] for r in group if r[use] not in UNTRIED] for use in USES]
        counts = (f"{sum(x == 'yes' for x in xs)} of {len(xs)}" for xs in tried)
        lines.append([suite, str(len(packages) or 1), str(len(group)), *counts])
    other = [(r, f"{u}: {r[u]}") for r in rows for u in USES if r[u] not in ("yes", *UNTRIED)]
    return ["", markdown(USED, lines), *_list("Used, but not as the student is", other)]


def _list(title: str, found: Sequence[tuple[Row, str]]) -> list[str]:
    """One item per network and text, with the ratios that it holds for."""
    ratios: dict[tuple[str, str], list[str]] = {}
    for row, text in found:
        ratios.setdefault((row["name"], text), []).append(row["ratio"])
    items = [f"- `{name}`, ratio {', '.join(rs)}: {text}" for (name, text), rs in ratios.items()]
    return ["", f"{title}: {len(items)}", "", *items] if items else []
