"""Statistics, table and picture of ``benchmarks.accuracy``.

Intervals are 95 % t intervals over seeds; differences are paired by seed. Two families of
comparisons are corrected for their number by Holm's method: every GPD row of every task against
plain, and against the task's best control, which is chosen on validation sets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import t as student_t

from benchmarks.accuracy_methods import METHODS, Gap
from benchmarks.accuracy_tasks import TASKS, Task
from benchmarks.tables import Table, markdown

Row = Mapping[str, str]
Scores = dict[int, float]
"""Seed -> accuracy in percent."""

GPD_ROWS = [method.name for method in METHODS if isinstance(method.config, Gap)]
LEVEL = 0.05
PAIRS = (
    *("task", "method", "other", "seeds", "difference", "low", "high", "p"),
    *("holm_plain", "holm_control"),
)


# --------------------------------------------------------------------------- statistics
@dataclass(frozen=True)
class Estimate:
    """A mean, its 95 % interval, the number of seeds, and the p value of a mean of 0."""

    mean: float
    low: float
    high: float
    count: int
    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def estimate(values: Sequence[float]) -> Estimate:
    """``mean +- t(0.975, n - 1) s / sqrt(n)``; NaN where there are fewer than two values."""
    n = len(values)
    if n < 2:
        return Estimate(fmean(values) if values else math.nan, math.nan, math.nan, n, math.nan)
    mean, error = fmean(values), stdev(values) / math.sqrt(n)
    half = float(student_t.ppf(1 - LEVEL / 2, n - 1)) * error
    if not error:
        return Estimate(mean, mean, mean, n, float(mean == 0))
    return Estimate(
        mean, mean - half, mean + half, n, 2 * float(student_t.sf(abs(mean) / error, n - 1))
    )


def paired(one: Scores, other: Scores) -> Estimate:
    """Of the differences one - other, on the seeds that both have."""
    return estimate([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p values."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, most = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = most
    return adjusted


def scores(rows: Iterable[Row], column: str = "student") -> dict[tuple[str, str], Scores]:
    """(task, method) -> accuracies by seed."""
    found: dict[tuple[str, str], Scores] = {}
    for row in rows:
        key = row["task"], row["method"]
        found.setdefault(key, {})[int(row["seed"])] = float(row[column])
    return found


def best_control(rates: Iterable[Row], task: str) -> str:
    """The control with the best mean on validation, at its frozen rate; the first of equals."""
    means = {r["method"]: float(r["validation"]) for r in rates if r["task"] == task}
    controls = [m.name for m in METHODS if m.control and m.name in means]
    return max(controls, key=lambda name: means[name])


Family = dict[tuple[str, str], tuple[Estimate, float]]
"""(task, GPD row) -> difference to another row, and its p value after Holm's correction."""


def family(students: Mapping[tuple[str, str], Scores], others: Mapping[str, str]) -> Family:
    """Every GPD row against the row that ``others`` names for its task."""
    keys = [key for key in students if key[1] in GPD_ROWS and (key[0], others[key[0]]) in students]
    estimates = [paired(students[key], students[key[0], others[key[0]]]) for key in keys]
    adjusted = holm([e.p for e in estimates])
    return dict(zip(keys, zip(estimates, adjusted, strict=True), strict=True))


def families(rows: Sequence[Row], rates: Sequence[Row]) -> dict[str, Family]:
    students = scores(rows)
    tasks = {task for task, _ in students}
    return {
        "plain": family(students, dict.fromkeys(tasks, "plain")),
        "best control": family(students, {task: best_control(rates, task) for task in tasks}),
    }


# --------------------------------------------------------------------------- text
def summary(rows: Sequence[Row], rates: Sequence[Row]) -> str:
    """A table per task, then what the two families of comparisons come to."""
    parts = [
        _table(task, rows, rates) for task in TASKS if any(r["task"] == task.name for r in rows)
    ]
    compared = families(rows, rates)
    parts.append("\n".join(_count(*item) for item in compared.items()))
    edges = [f"{r['task']} {r['method']} ({r['edge']})" for r in rates if r["edge"]]
    parts.append(f"Rates at an edge of the grid, {len(edges)} of {len(rates)}: {', '.join(edges)}.")
    return "\n\n".join(parts)


def _table(task: Task, rows: Sequence[Row], rates: Sequence[Row]) -> str:
    students, teachers = scores(rows), scores(rows, "teacher")
    rate = {(r["task"], r["method"]): r for r in rates}
    control = best_control(rates, task.name)
    noise = f", {task.noise:.0%} of them wrong" if task.noise else ""
    head = ("method", "learning rate", "steps", "student", "teacher", "- plain", f"- {control}")
    lines = []
    for method in METHODS:
        key = task.name, method.name
        if key not in students:
            continue
        student, teacher = estimate([*students[key].values()]), fmean(teachers[key].values())
        against = (
            str(paired(students[key], students[task.name, other])) if other != method.name else ""
            for other in ("plain", control)
        )
        lines.append(
            [
                f"{method.name}: {method.text}",
                f"{float(rate[key]['lr']):g}",
                rate[key]["steps"],
                f"{student.mean:.1f} +- {student.high - student.mean:.1f}",
                "" if math.isnan(teacher) else f"{teacher:.1f}",
                *against,
            ]
        )
    title = f"**{task.name}**: {task.labels} labels per class{noise}. Best control on validation: "
    return f"{title}{control}.\n\n{markdown(head, lines)}"


def _count(name: str, differences: Family) -> str:
    def counts(low: Iterable[bool], high: Iterable[bool]) -> str:
        return f"{sum(low)} above zero, {sum(high)} below"

    raw = counts(
        (e.low > 0 for e, _ in differences.values()), (e.high < 0 for e, _ in differences.values())
    )
    sure = [e for e, p in differences.values() if p < LEVEL]
    corrected = counts((e.mean > 0 for e in sure), (e.mean < 0 for e in sure))
    return (
        f"- GPD rows against {name}, {len(differences)} comparisons: {raw} by their own intervals; "
        f"{corrected} after Holm's correction."
    )


# --------------------------------------------------------------------------- files
def write_pairs(rows: Sequence[Row], rates: Sequence[Row], path: Path) -> None:
    """All pairs of methods of every task; ``holm_*`` where a pair is in that family."""
    students, compared = scores(rows), families(rows, rates)
    pairs = []
    for task in dict.fromkeys(task for task, _ in students):
        control = best_control(rates, task)
        names = [m.name for m in METHODS if (task, m.name) in students]
        for other, name in itertools.combinations(names, 2):
            e = paired(students[task, name], students[task, other])
            corrected = [
                f"{compared[title][task, name][1]:.4g}"
                if other == against and name in GPD_ROWS
                else ""
                for title, against in (("plain", "plain"), ("best control", control))
            ]
            numbers = [f"{v:.4g}" for v in (e.mean, e.low, e.high, e.p)]
            cells = [task, name, other, e.count, *numbers, *corrected]
            pairs.append(dict(zip(PAIRS, cells, strict=True)))
    Table(path, PAIRS).write(pairs)


def draw(rows: Sequence[Row], rates: Sequence[Row], path: Path) -> None:
    """Students' paired differences to plain with intervals, and the mean of the teachers'."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    students, teachers = scores(rows), scores(rows, "teacher")
    tasks = [task.name for task in TASKS if (task.name, "plain") in students]
    with plt.rc_context({"svg.hashsalt": "gpdfx", "font.size": 8}):
        figure, panels = plt.subplots(1, len(tasks), figsize=(3 * len(tasks) + 1, 4), sharey=True)
        for panel, task in zip(panels if len(tasks) > 1 else [panels], tasks, strict=True):
            plain, control = students[task, "plain"], best_control(rates, task)
            for y, method in enumerate(METHODS):
                if (task, method.name) not in students:
                    continue
                e = paired(students[task, method.name], plain)
                colour = "tab:blue" if method.name in GPD_ROWS else "0.5"
                colour = "tab:orange" if method.name == control else colour
                panel.plot([e.low, e.high], [y, y], color=colour)
                panel.plot(e.mean, y, "o", color=colour, markersize=4)
                if method.name in GPD_ROWS:
                    teacher = paired(teachers[task, method.name], plain).mean
                    panel.plot(teacher, y, "d", color="tab:blue", fillstyle="none", markersize=5)
            panel.axvline(0, color="0.8", zorder=0)
            panel.set(title=task, xlabel="points above plain")
        panels = figure.axes
        panels[0].set_yticks(range(len(METHODS)), [method.name for method in METHODS])
        panels[0].invert_yaxis()
        figure.suptitle(
            "Test accuracy of students (dots, 95 %; blue GPD, orange the best control on "
            "validation) and dynamic teachers (diamonds)"
        )
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
