"""What a run shows while it goes on, and leaves to look at: bars, log, TensorBoard, picture, table.

The history is a list of rows, one an epoch: ``epoch`` (from 1), ``step``, ``lr``, ``loss`` and its
terms, the validation accuracies ``student``, ``teacher`` and ``gap`` (teacher minus student),
``skipped`` steps and ``seconds``, both since the run began.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..calls.progress import LINES
from ..errors import InputError, install
from ..files import replacing
from .state import BEST, STUDENT

Row = Mapping[str, Any]
COLORS = {"teacher": "tab:orange", "student": "tab:blue", "gap": "tab:green"}
TERM = "loss_"
MARKED = 30  # epochs up to which each has a dot
NAMES = {
    "student": "student",
    "best": "best student",
    "teacher": "dynamic teacher",
    "static": "static teacher",
}


def check_installed() -> None:
    """Raise ``InputError`` if what a run shows itself with is missing."""
    missing = [name for name in ("rich", "matplotlib") if find_spec(name) is None]
    if missing:
        raise InputError(f"training needs {', '.join(missing)}", remedy=install("train"))


class RunLog:
    """Bars on a terminal, and else a line an epoch, and every half minute, on stderr; TensorBoard,
    if it is installed."""

    def __init__(self, out: Path, epochs: int, done: int, *, quiet: bool, board: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self._console = Console(stderr=True, highlight=False)
        self._lines = not quiet and not self._console.is_terminal
        self._begun, self._ran = time.monotonic(), 0  # steps
        self._said = self._begun
        hidden = quiet or self._lines
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "{task.fields[text]}")
        self._bars = Progress("{task.description}", *columns, console=self._console, disable=hidden)
        self._epochs = self._bars.add_task("epochs", total=epochs, completed=done, text="")
        self._steps = self._bars.add_task("steps", total=None, text="")
        self._bars.start()
        self._board: Any = None
        if board:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)

    def say(self, text: str) -> None:
        """A line about what is going on."""
        self._said = time.monotonic()
        self._console.print(text, markup=False, soft_wrap=True)

    def begin_epoch(self, steps: int, done: int) -> None:
        self._bars.reset(self._steps, total=steps, completed=done)

    def end_step(self, values: Mapping[str, float] | None) -> None:
        """A step is done; ``None``: it was skipped."""
        text = "skipped: not finite" if values is None else f"loss {values['loss']:.3f}"
        self._bars.update(self._steps, advance=1, text=text)
        self._ran += 1
        if self._lines and time.monotonic() - self._said >= LINES:
            self.say(f"{self._place()}: {text}, about {roughly(self._left())} left")

    def _place(self) -> str:
        epochs, steps = self._bars.tasks
        return (
            f"epoch {epochs.completed + 1:.0f}, step {steps.completed:,.0f} of {steps.total:,.0f}"
        )

    def _left(self) -> float:
        """Seconds, if the steps to come take as long as those of this process."""
        epochs, steps = self._bars.tasks
        total, each = epochs.total or 0.0, steps.total or 0.0
        left = (total - epochs.completed) * each - steps.completed
        return left * (time.monotonic() - self._begun) / self._ran

    def end_epoch(self, row: Row) -> None:
        text = sentence(row)
        self._bars.update(self._epochs, advance=1, text=text)
        if self._lines:
            self.say(f"epoch {row['epoch']}: loss {row['loss']:.3f}, {text}")
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    group = "accuracy" if name in (*NAMES, "gap") else "training"
                    self._board.add_scalar(f"{group}/{name}", value, row["epoch"])
            self._board.flush()

    def close(self) -> None:
        self._bars.stop()
        if self._board is not None:
            self._board.close()


def roughly(seconds: float) -> str:
    """``50 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def sentence(row: Row) -> str:
    """``student 93.3 %, teacher 95.3 %, gap +2.0``."""
    text = f"student {row['student']:.1%}"
    if "teacher" in row:
        text += f", teacher {row['teacher']:.1%}, gap {100 * row['gap']:+.1f}"
    return text


# --------------------------------------------------------------------------- files
def write_log(path: Path, history: Sequence[Row]) -> None:
    """The history as CSV."""
    names = list(dict.fromkeys(name for row in history for name in row))
    with replacing(path) as fresh, fresh.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)


def draw(path: Path, history: Sequence[Row], best: Row, static: float | None, title: str) -> None:
    """Over epochs: validation accuracies of student and teachers, with the ``best`` student's; the
    gap between them; and the training loss with its terms."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    heights = {"accuracy": 3.0, "gap": 1.2, "loss": 2.4}
    if "gap" not in history[0]:
        del heights["gap"]
    figure = Figure(figsize=(7, 1.4 + sum(heights.values())), layout="constrained")
    panels = figure.subplots(len(heights), sharex=True, height_ratios=[*heights.values()])
    panel = dict(zip(heights, panels, strict=True))

    def plot(where: str, name: str, label: str | None = None, scale: int = 1, **style: Any) -> None:
        rows = [row for row in history if name in row]
        points = [row["epoch"] for row in rows], [scale * row[name] for row in rows]
        marker = "." if len(rows) < MARKED else None
        panel[where].plot(*points, label=label, marker=marker, **style)

    for name in ("teacher", "student"):
        if name in history[0]:
            plot("accuracy", name, NAMES[name], 100, color=COLORS[name])
    if static is not None:
        panel["accuracy"].axhline(100 * static, ls="--", color="tab:gray", label=NAMES["static"])
    label = f"{NAMES['best']}: {best['student']:.1%}, epoch {best['epoch']}"
    star = {"ls": "", "marker": "*", "ms": 13, "color": COLORS["student"], "label": label}
    panel["accuracy"].plot(best["epoch"], 100 * best["student"], **star)
    panel["accuracy"].set(ylabel="validation accuracy (%)", title=title)
    if "gap" in panel:
        panel["gap"].axhline(0, lw=0.8, color="black")
        plot("gap", "gap", scale=100, color=COLORS["gap"])
        panel["gap"].set_ylabel("gap (points)")
    plot("loss", "loss", "all terms", color="black")
    for name in dict.fromkeys(n for row in history for n in row if n.startswith(TERM)):
        term = name.removeprefix(TERM)
        plot("loss", name, term.replace("_", ", "), color=COLORS.get(term), lw=1)
    losses = [x for line in panel["loss"].lines for x in line.get_ydata() if math.isfinite(x)]
    if losses and 0 < 10 * min(losses) < max(losses):
        panel["loss"].set_yscale("log")
        axis = panel["loss"].yaxis
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    panel["loss"].set(ylabel="training loss", xlabel="epoch")
    for one in panels:
        one.axvline(best["epoch"], lw=0.8, ls=":", color="tab:gray")
        one.grid(alpha=0.3)
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name in ("accuracy", "loss"):
        panel[name].legend(fontsize="small")
    with replacing(path) as fresh:
        figure.savefig(fresh, format="png", dpi=120)


# --------------------------------------------------------------------------- tables
PARTS = "parameters", "validation", "test"
SHOWN = "title", *PARTS, "best_epoch", "step_time", "skipped", "out"


def table(summary: Mapping[str, Any]) -> str:
    """A run's summary (see ``gpdfx.train.train``) as a table."""
    time = summary["step_time"]
    columns = {part: summary[part] for part in PARTS}
    columns["parameters"] = {"best": columns["parameters"]["student"], **columns["parameters"]}
    lines = [_table(summary["title"], columns, justify="right")]
    lines.append(
        f"the student is that of the last epoch ({STUDENT}); the best one on validation is that of "
        f"epoch {summary['best_epoch']} ({BEST})"
    )
    if time:
        lines.append(
            f"a step took {1e3 * time['step']:.1f} ms, {time['ratio']:.2f} times a step of the "
            f"plain student ({1e3 * time['plain']:.1f} ms)"
        )
    if summary["skipped"]:
        lines.append(f"{summary['skipped']} steps were skipped: their loss was not finite")
    lines.append(f"all files are in {summary['out']}")
    return "\n".join(lines)


def accuracy_table(measured: Mapping[str, Any]) -> str:
    """What ``gpdfx eval`` measured, as a table."""
    columns = {part: measured[part] for part in ("validation", "test")}
    return _table(f"accuracy on {measured['data']}", columns, justify="left")


def _table(title: str, columns: Mapping[str, Row], justify: Any) -> str:
    """Networks by columns: accuracies as percentages, and counts."""
    from rich.console import Console
    from rich.table import Column, Table

    rows = Table("", *(Column(name, justify=justify) for name in columns), title=title)
    for name in NAMES:
        if name in columns["test"]:
            values = [column[name] for column in columns.values()]
            cells = (f"{x:,}" if isinstance(x, int) else f"{x:.2%}" for x in values)
            rows.add_row(NAMES[name], *cells)
    text = io.StringIO()
    Console(file=text, width=100, highlight=False).print(rows)
    return text.getvalue().rstrip()
