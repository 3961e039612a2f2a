"""What branches cost: time of the student's step, memory of the teacher's.

    python -m benchmarks.branches              # both tables, about ten minutes on two cores
    python -m benchmarks.branches time --size 64 --batch 16
    python -m benchmarks.branches memory
    python -m benchmarks.branches summary --into docs/speed.md

``time``: forward and backward of ``teacher.student`` against those of the plain student, runs
interleaved, the ratio of each pair; ``derive`` is the fold and the extraction alone, forward and
backward; ``mean / first`` are student's steps by the two ways of extraction, one against the other;
``A/A`` is the plain student against itself, the noise of the machine. Freed memory is kept
(``gpdfx.keep_memory``), as ``gpdfx train`` does. ``memory``: the largest growth of the process in
one teacher step, each in a process of its own, with the system's allocator.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from rich.progress import track
from rich.table import Table as Grid

from benchmarks.tables import RESULTS, Table, command_line, markdown, read, write_between
from benchmarks.timing import Row, machine, paired, quantiles
from gpdfx import Teacher, expand, keep_memory

FIELDS = (
    *("table", "what", "branches", "extract", "size", "batch", "pairs", "median", "low", "high"),
    *("unit", "torch", "threads", "machine"),
)
WAYS = (
    (None, "first"),
    (None, "mean"),
    ("orepa", "first"),
    ("auto", "first"),
    ("auto", "mean"),
    ("mobileone", "first"),
)


def build(branches: Any, extract: str, size: int, batch: int) -> tuple[Any, Any, torch.Tensor]:
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    x = torch.randn(batch, 3, size, size)
    example = (torch.randn(2, 3, 64, 64),)
    teacher = expand(
        model, 2, example_inputs=example, branches=branches, extract=extract, verify=False
    )
    return model.train(), teacher.train(), x


def step(call: Callable[..., Any], module: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        module.zero_grad()
        call(x).square().mean().backward()

    return run


def derive(teacher: Teacher) -> Callable[[], None]:
    def run() -> None:
        teacher.zero_grad()
        sum(p.sum() for _, p in teacher.student_parameters()).backward()  # type: ignore[union-attr]

    return run


def time_rows(size: int, batch: int, pairs: int) -> list[Row]:
    rows: list[Row] = []
    model, _, x = build(None, "first", size, batch)
    both = paired(step(model, model, x), step(model, model, x), pairs)
    rows.append({"what": "plain student", "unit": "seconds"} | quantiles([b for _, b in both]))
    rows.append({"what": "A/A", "unit": "ratio"} | quantiles([a / b for a, b in both]))
    for branches, extract in track(WAYS, f"time, {size} px, batch {batch}"):
        model, teacher, x = build(branches, extract, size, batch)
        what = {"branches": branches or "none", "extract": extract}
        both = paired(step(teacher.student, teacher, x), step(model, model, x), pairs)
        ratios = quantiles([a / b for a, b in both])
        rows.append({"what": "student step", "unit": "ratio"} | what | ratios)
        alone = [a for a, _ in paired(derive(teacher), lambda: None, pairs)]
        rows.append({"what": "derive", "unit": "seconds"} | what | quantiles(alone))
    first, mean = (build(None, extract, size, batch)[1] for extract in ("first", "mean"))
    both = paired(step(mean.student, mean, x), step(first.student, first, x), pairs)
    ratios = quantiles([a / b for a, b in both])
    rows.append({"what": "mean / first", "branches": "none", "unit": "ratio"} | ratios)
    return [{"table": "time", "size": size, "batch": batch} | row for row in rows]


# --------------------------------------------------------------------------- memory
def peak(branches: Any, size: int, batch: int, answer: Any) -> None:
    """Bytes of parameters, and the largest resident memory of a training step."""
    torch.set_num_threads(os.cpu_count() or 1)
    _, teacher, x = build(branches, "first", size, batch)
    optimizer = torch.optim.SGD(teacher.parameters(), 0.01, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        teacher(x).square().mean().backward()
        optimizer.step()
    held = 4 * sum(p.numel() for p in teacher.parameters())
    answer.send((held, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def memory_rows(size: int, batch: int) -> list[Row]:
    """The peak of a step with branches over that without, plus parameters, gradients and momentum
    of the branches (three copies of each)."""
    context = multiprocessing.get_context("spawn")
    measured: dict[Any, tuple[int, int]] = {}
    for branches in track((None, "orepa", "auto"), f"memory, {size} px, batch {batch}"):
        near, far = context.Pipe(duplex=False)
        process = context.Process(target=peak, args=(branches, size, batch, far))
        process.start()
        measured[branches] = near.recv()
        process.join()
    base_held, base = measured[None]
    rows: list[Row] = []
    for branches, (held, most) in measured.items():
        what = {"table": "memory", "branches": branches or "none", "size": size, "batch": batch}
        allowed = base + 3 * (held - base_held)
        share = {"what": "peak / (without + the branches' own)", "unit": "ratio"}
        rows.append(what | {"what": "peak", "unit": "GiB", "median": f"{most / 2**30:.3f}"})
        rows.append(what | share | {"median": f"{most / allowed:.4f}"})
    return rows


COLUMNS = ("what", "branches", "extract", "size", "batch", "median", "low", "high", "unit")


def cells(row: Mapping[str, Any]) -> list[str]:
    return [str(row.get(c) or "") for c in COLUMNS]


def show(rows: list[Row]) -> None:
    grid = Grid(*COLUMNS)
    for row in rows:
        grid.add_row(*cells(row))
    Console().print(grid)


def main() -> None:
    parser = command_line("branches", __doc__)
    parser.add_argument(
        "table", nargs="?", choices=("all", "time", "memory", "summary"), default="all"
    )
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--into", type=Path, help="with summary: write the table there")
    parser.add_argument("--out", type=Path, default=RESULTS / "branches.csv")
    given = parser.parse_args()
    if given.table == "summary":
        text = markdown(COLUMNS, map(cells, read(given.out)))
        write_between(given.into, text, "branches") if given.into else print(text)
        return
    out = Table(given.out, FIELDS, ("table", "size", "batch"))
    rows: list[Row] = []
    if given.table in ("all", "memory"):  # first: a process begins with the peak of its parent
        rows += memory_rows(given.size, given.batch)
        out.replace(row | machine() for row in rows)
    if given.table in ("all", "time"):
        keep_memory()
        rows += time_rows(given.size, given.batch, given.pairs)
        out.replace(row | machine() for row in rows)
    show(rows)


if __name__ == "__main__":
    main()
