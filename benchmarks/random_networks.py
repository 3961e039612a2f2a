"""The laws of the random networks (tests/test_random_networks.py) on thousands of them.

    python -m benchmarks.random_networks --count 1000
    python -m benchmarks.random_networks --count 10000 --jobs 4
    python -m benchmarks.random_networks summary

A rerun goes on where the CSV ends. A failure is a row that holds the network's source.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.progress import track

from benchmarks.tables import RESULTS, Table, command_line, read
from tests.random_networks import BRANCHES, RATIOS, SHARES, check, networks

CHUNK = 50  # networks drawn with one seed, in one go
FIELDS = (
    *("seed", "number", "ratio", "shares", "branches", "status", "error", "worst", "widened"),
    *("nodes", "bridged", "seconds", "special", "source"),
)
SPECIAL = {
    "own gradient": (".apply(", ".register_hook("),
    "checkpoint": ("checkpoint(",),
    "state in Python": (" = 0\n", "random.random()"),
    "state in a buffer": ("register_buffer",),
    "condition on sizes": ("if x.shape",),
    "part in eval mode": (".eval()",),
}
"""What no graph of one call has -> what it looks like in the source."""
Row = dict[str, Any]


def chunk(number: int) -> list[Row]:
    """Draw one chunk of networks and check the laws on each."""
    torch.set_num_threads(1)
    rows: list[Row] = []

    @seed(number)
    @settings(
        max_examples=CHUNK,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(networks(), RATIOS, SHARES, BRANCHES)
    def run(code: str, ratio: float, shares: str, branches: str | None) -> None:
        start = time.perf_counter()
        row: Row = {"seed": number, "number": len(rows), "ratio": ratio, "shares": shares}
        row["branches"] = branches or "none"
        body = code.partition("class Net")[2]
        kinds = [k for k, words in SPECIAL.items() if any(word in body for word in words)]
        row["special"] = "; ".join(kinds)
        try:
            report = check(code, ratio, shares, branches)
        except Exception as error:  # a failure of any kind is a row
            text = " ".join(str(error).split())[:300]
            row |= {"status": "failed", "error": f"{type(error).__name__}: {text}", "source": code}
        else:
            row |= {
                "status": "ok",
                "worst": f"{max(report.error.values()):.1e}",
                "widened": f"{report.widened:.3f}",
                "nodes": report.nodes,
                "bridged": len(report.bridged),
            }
        rows.append(row | {"seconds": f"{time.perf_counter() - start:.2f}"})

    run()
    return rows


def sweep(out: Path, count: int, first: int, jobs: int) -> None:
    """Check ``count`` networks from the seed ``first`` on, appending rows as they come."""
    table = Table(out, FIELDS, end="\r\n")
    done = {int(row["seed"]) for row in table.rows()}
    todo = [k for k in range(first, first + -(-count // CHUNK)) if k not in done]
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs) as pool:
        for rows in track(pool.imap_unordered(chunk, todo), total=len(todo)):
            table.append(*rows)
        pool.close()
        pool.join()


def summary(path: Path) -> str:
    """The CSV in a few lines of markdown."""
    rows = read(path)
    ok = [r for r in rows if r["status"] == "ok"]
    ratios = Counter(r["ratio"] for r in rows)
    branches = {r["branches"] for r in rows}
    bridged = sum(int(r["bridged"]) for r in ok) / max(sum(int(r["nodes"]) for r in ok), 1)
    lines = [
        f"{len(rows)} random networks (ratios {', '.join(sorted(ratios))}; branches "
        f"{', '.join(sorted(branches))}): {len(ok)} keep every law; largest "
        f"error {max(float(r['worst']) for r in ok):.1e}; widened "
        f"{fmean(float(r['widened']) for r in ok):.1%} on average; {bridged:.1%} of their nodes "
        f"bridged; {fmean(float(r['seconds']) for r in rows):.1f} s each."
    ]
    special = Counter(kind for r in rows for kind in r["special"].split("; ") if kind)
    lines += [", ".join(f"{count} have a {kind}" for kind, count in special.items()) + "."]
    lines += [f"- seed {r['seed']}, {r['number']}: {r['error']}" for r in rows if r not in ok]
    return "\n".join(lines)


def main() -> None:
    parser = command_line("random_networks", __doc__)
    parser.add_argument("command", nargs="?", choices=("sweep", "summary"), default="sweep")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first 50 networks")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "random_networks.csv")
    given = parser.parse_args()
    if given.command == "sweep":
        sweep(given.out, given.count, given.seed, given.jobs)
    print(summary(given.out))


if __name__ == "__main__":
    main()
