"""What a run shows while it goes on, and leaves to look at: bars, log, TensorBoard, picture, table.

The history is a list of rows, one an epoch: ``epoch`` (from 1), ``step``, ``lr``, ``loss`` and its
terms, the validation accuracies ``student``, ``teacher`` and ``gap`` (teacher minus student),
``skipped`` steps and ``seconds``, both since the run began.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import InputError
from .state import Replacing, write_text

Row = Mapping[str, Any]
SERIES = ("student", "teacher", "static")
COLORS = {"student": "tab:blue", "teacher": "tab:orange", "static": "tab:gray"}
NAMES = {"student": "student", "teacher": "dynamic teacher", "static": "static teacher"}


def check_installed() -> None:
    """Raise ``InputError`` if what a run shows itself with is missing."""
    missing = [name for name in ("rich", "matplotlib") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"training needs {', '.join(missing)}", remedy="pip install 'gpdfx[train]'"
        )


class Watch:
    """Bars on a terminal, and else a line an epoch, on stderr; TensorBoard, if it is installed."""

    def __init__(
        self, out: Path, epochs: int, done: int, *, quiet: bool = False, board: bool = True
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self._console = Console(stderr=True, highlight=False)
        self._lines = not quiet and not self._console.is_terminal
        self._bars = Progress(
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            "{task.fields[text]}",
            console=self._console,
            disable=quiet or self._lines,
        )
        self._epochs = self._bars.add_task("epochs", total=epochs, completed=done, text="")
        self._steps = self._bars.add_task("steps", total=None, text="")
        self._bars.start()
        self._board: Any = None
        if not board:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)

    def say(self, text: str) -> None:
        """A line about what is going on."""
        if self._lines:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bars.print(text)

    def begin_epoch(self, steps: int, done: int) -> None:
        self._bars.reset(self._steps, total=steps, completed=done)

    def advance(self, values: Mapping[str, float] | None) -> None:
        """A step is done; ``None``: it was skipped."""
        text = "skipped: not finite" if values is None else f"loss {values['loss']:.3f}"
        self._bars.update(self._steps, advance=1, text=text)

    def end_epoch(self, row: Row) -> None:
        text = sentence(row)
        self._bars.update(self._epochs, advance=1, text=text)
        if self._lines:
            print(f"epoch {row['epoch']}: loss {row['loss']:.3f}, {text}", file=sys.stderr)
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    group = "accuracy" if name in (*SERIES, "gap") else "training"
                    self._board.add_scalar(f"{group}/{name}", value, row["epoch"])
            self._board.flush()

    def close(self) -> None:
        self._bars.stop()
        if self._board is not None:
            self._board.close()


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
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_text(path, text.getvalue())


def draw(path: Path, history: Sequence[Row], static: float | None, title: str) -> None:
    """Validation accuracies of student and teachers over epochs, and the gap below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    gap = any("gap" in row for row in history)
    figure = Figure(figsize=(7, 5.5 if gap else 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        1 + gap, 1, sharex=True, squeeze=False, height_ratios=(3, 1)[: 1 + gap]
    )
    top, last = panels[0, 0], panels[-1, 0]
    epochs = [row["epoch"] for row in history]
    style: dict[str, Any] = {"marker": "o" if len(epochs) < 3 else None}
    for name in ("teacher", "student"):
        if any(name in row for row in history):
            values = [100 * row[name] for row in history]
            top.plot(epochs, values, color=COLORS[name], label=NAMES[name], **style)
    if static is not None:
        top.axhline(100 * static, ls="--", color=COLORS["static"], label=NAMES["static"])
    top.set(ylabel="validation accuracy (%)", title=title)
    top.legend()
    if gap:
        last.plot(epochs, [100 * row["gap"] for row in history], color="tab:green", **style)
        last.axhline(0, lw=0.8, color="black")
        last.set_ylabel("gap (points)")
    last.set_xlabel("epoch")
    for one in {top, last}:
        one.grid(alpha=0.3)
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
    with Replacing(path) as fresh:
        figure.savefig(fresh, format="png", dpi=120)


# --------------------------------------------------------------------------- tables
def table(summary: Mapping[str, Any]) -> str:
    """A run's summary (see ``gpdfx.train.train``) as a table."""
    from rich.table import Table

    best = summary["validation"]["best"]
    rows = Table("", "parameters", "validation", "test", title=summary["title"])
    for column in rows.columns[1:]:
        column.justify = "right"
    for name in SERIES:
        if name in summary["test"]:
            validation, test = summary["validation"][name], summary["test"][name]
            count = f"{summary['parameters'][name]:,}"
            rows.add_row(NAMES[name], count, f"{validation:.2%}", f"{test:.2%}")
    lines = [_render(rows)]
    lines.append(f"best student on validation: {best['student']:.2%}, epoch {best['epoch']}")
    time = summary["step_time"]
    if time:
        lines.append(
            f"a step took {1e3 * time['step']:.1f} ms, {time['ratio']:.2f} times a step of the "
            f"plain student ({1e3 * time['plain']:.1f} ms)"
        )
    if summary["skipped"]:
        lines.append(f"{summary['skipped']} steps were skipped: their loss was not finite")
    lines.append(f"all files are in {summary['out']}")
    return "\n".join(lines)


def accuracies(result: Mapping[str, Any]) -> str:
    """What ``gpdfx eval`` found, as a table."""
    from rich.table import Table

    rows = Table("", "validation", "test", title=f"accuracy on {result['data']}")
    for name in SERIES:
        if name in result["test"]:
            cells = (f"{result[part][name]:.2%}" for part in ("validation", "test"))
            rows.add_row(NAMES[name], *cells)
    return _render(rows)


def _render(rows: Any) -> str:
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=100, highlight=False).print(rows)
    return text.getvalue().rstrip()
