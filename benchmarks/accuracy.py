"""Does GPD give a better student than its controls? Small tasks, all rows by one protocol.

    python -m benchmarks.accuracy search                     # learning rates, on validation sets
    python -m benchmarks.accuracy final                      # 20 fresh seeds, on test sets
    python -m benchmarks.accuracy summary --into docs/accuracy.md # table, pairs and picture

``search`` trains every method of every task at the task's four learning rates with seeds 0 to 4 and
looks at validation sets alone. The best mean is frozen in
``results/accuracy_rates.csv``, and the control of the best validation mean is the one that GPD is
compared with. ``final`` trains seeds 100 to 119 at the frozen rates and looks at test sets, once.
A seed decides which samples are labeled, which labels are wrong, the init and the batches, the
same for every method; the test set is always the same, so intervals are over seeds, not over test
samples. Labels are wrong in training samples only.

Both commands append a row to a CSV as soon as it is known, and go on where they were stopped.
About two hours on one core: OMP_NUM_THREADS=1 keeps such small networks from waiting for threads.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks import accuracy_summary
from benchmarks.accuracy_methods import METHODS, Method, Rates, accuracy, step_times, train
from benchmarks.accuracy_tasks import TASKS, Task, load
from benchmarks.tables import RESULTS, Table, command_line, write_between

SEARCH_SEEDS, FINAL_SEEDS = range(5), range(100, 120)


@dataclass(frozen=True)
class Tables:
    """The files of a folder: measured step times, all runs of the search, what it chose, and the
    final runs. Accuracies are percent, seconds are processor time."""

    clock: Table
    search: Table
    rates: Table
    final: Table


def tables(folder: Path) -> Tables:
    def table(name: str, key: str, fields: str) -> Table:
        return Table(folder / f"{name}.csv", f"{key} {fields}".split(), key.split())

    run = "steps student teacher seconds"
    return Tables(
        table("accuracy_clock", "task", "plain_ms gpd_ms ratio torch machine"),
        table("accuracy_search", "task method lr seed", run),
        table("accuracy_rates", "task method", "lr steps seeds validation edge"),
        table("accuracy", "task method seed", f"lr {run}"),
    )


def steps_of(task: Task, method: Method, out: Tables) -> int:
    """Optimizer steps; GPD's time is measured once per task, and then kept."""
    if method.steps is not None:
        return round(method.steps * task.steps)
    if (task.name,) not in out.clock.done():
        plain, gpd, ratio = step_times(task)
        machine = f"{platform.machine()}, {os.cpu_count()} cores, 1 thread"
        row = {"plain_ms": plain, "gpd_ms": gpd, "ratio": ratio, "machine": machine}
        out.clock.append({"task": task.name, "torch": torch.__version__} | row)
    return round(float(out.clock.done()[task.name,]["ratio"]) * task.steps)


def measure(
    task: Task, method: Method, lr: float, seed: int, steps: int, rates: Rates, part: str
) -> dict[str, Any]:
    """One run: accuracies on ``part`` of the data, and processor time."""
    start = time.process_time()
    run = train(task, method, lr, seed, steps, rates)
    data = load(task, seed)[part]
    student, teacher = accuracy(run.student(), data), accuracy(run.teacher, data)
    seconds = time.process_time() - start
    print(
        f"{part:<10} {task.name:<13} {method.name:<12} lr {lr:<6g} seed {seed:<4} "
        f"student {student:5.1f} teacher {teacher:5.1f} {seconds:5.1f} s",
        flush=True,
    )
    return {"steps": steps, "student": student, "teacher": teacher, "seconds": seconds}


def search(
    tasks: Iterable[Task], methods: Sequence[Method], seeds: Iterable[int], out: Tables
) -> None:
    """Every method at every rate; what is chosen stays chosen."""
    for task in tasks:
        for method in methods:  # static teachers come before the methods that use them
            if (task.name, method.name) in out.rates.done():
                continue
            steps, rates = steps_of(task, method, out), read_rates(out)
            done = out.search.done()
            for lr in task.grid:
                for seed in seeds:
                    key = {"task": task.name, "method": method.name, "lr": f"{lr:g}", "seed": seed}
                    if tuple(map(str, key.values())) not in done:
                        figures = measure(task, method, lr, seed, steps, rates, "validation")
                        out.search.append(key | figures)
            freeze(task, method, steps, list(seeds), out)


def freeze(task: Task, method: Method, steps: int, seeds: list[int], out: Tables) -> None:
    """The rate of the best mean on validation, the smaller of equals. ``edge``: whether it is the
    smallest or the largest of the grid, so that another grid might do better."""
    done = out.search.done()
    means = {
        lr: fmean(
            float(done[task.name, method.name, f"{lr:g}", str(seed)]["student"]) for seed in seeds
        )
        for lr in task.grid
    }
    best = max(task.grid, key=lambda lr: (means[lr], -lr))
    edge = {task.grid[0]: "low", task.grid[-1]: "high"}.get(best, "")
    key = {"task": task.name, "method": method.name, "lr": f"{best:g}", "steps": steps}
    out.rates.append(key | {"seeds": len(seeds), "validation": means[best], "edge": edge})


def read_rates(out: Tables) -> dict[tuple[str, str], float]:
    return {(row["task"], row["method"]): float(row["lr"]) for row in out.rates.rows()}


def final(
    tasks: Iterable[Task], methods: Sequence[Method], seeds: Iterable[int], out: Tables
) -> None:
    """Every method once per fresh seed, all methods of a seed before the next seed."""
    tasks, rates, frozen = list(tasks), read_rates(out), out.rates.done()
    missing = [(t.name, m.name) for t in tasks for m in methods if (t.name, m.name) not in frozen]
    if missing:
        raise SystemExit(f"no frozen learning rate for {missing}: run search first")
    done = out.final.done()
    for seed in seeds:
        for task in tasks:
            for method in methods:
                name = task.name, method.name
                if (*name, str(seed)) not in done:
                    steps = int(frozen[name]["steps"])
                    figures = measure(task, method, rates[name], seed, steps, rates, "test")
                    key = {"task": task.name, "method": method.name, "seed": seed}
                    out.final.append(key | {"lr": f"{rates[name]:g}"} | figures)


def left(tasks: Sequence[Task], methods: Sequence[Method], out: Tables) -> dict[str, int]:
    """Runs that are still to do."""
    rates = sum(len(task.grid) for task in tasks)
    return {
        "search": rates * len(methods) * len(SEARCH_SEEDS) - len(out.search.done()),
        "final": len(tasks) * len(methods) * len(FINAL_SEEDS) - len(out.final.done()),
    }


def main() -> None:
    parser = command_line("accuracy", __doc__)
    parser.add_argument("command", choices=("search", "final", "summary"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSVs")
    parser.add_argument("--into", type=Path, help="summary: a file with the marks of the table")
    given = parser.parse_args()
    out = tables(given.out)
    torch.set_num_threads(1)  # tensors this small gain nothing from threads, and wait for them
    print("runs left:", left(TASKS, METHODS, out), flush=True)
    if given.command == "search":
        search(TASKS, METHODS, SEARCH_SEEDS, out)
    elif given.command == "final":
        final(TASKS, METHODS, FINAL_SEEDS, out)
    else:
        rows, rates = out.final.rows(), out.rates.rows()
        text = accuracy_summary.summary(rows, rates)
        accuracy_summary.write_pairs(rows, rates, given.out / "accuracy_pairs.csv")
        accuracy_summary.draw(rows, rates, given.out / "accuracy.svg")
        if given.into:
            write_between(given.into, text, "accuracy")
        print(text)


if __name__ == "__main__":
    main()
