"""Is the check itself any good? Faults are planted by rule in the teachers of 30 networks, and
the check has to catch each that a longer comparison tells from the original.

    python -m benchmarks.mutations --jobs 2
    python -m benchmarks.mutations --networks 5 --per-operator 3 --seconds 300
    python -m benchmarks.mutations summary

Operators are in ``mutation_operators``, networks in ``mutation_networks``, the comparison that
judges what the check lets pass in ``mutation_comparison``. A rerun goes on where the CSV ends.
A row is a mutant; its outcome is

    caught       the check refuses it, or finds that fewer input sizes are free
    equivalent   it passes, and the longer comparison sees no difference either
    survived     it passes, but is another function: a hole in the check
    crash        the check ends with an error that is not one of gpdfx's
    invalid      no teacher can be built of it
"""

from __future__ import annotations

import multiprocessing
import random
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks.mutation_comparison import Comparison
from benchmarks.mutation_networks import NETWORKS, Call
from benchmarks.mutation_operators import OPERATORS, Mutant, Subject
from benchmarks.tables import RESULTS, Table, command_line, markdown, read
from gpdfx.check import laws
from gpdfx.errors import GpdfxError
from gpdfx.passes.widen import Widened
from gpdfx.teacher.compiled import Compiled, Python, find_caches
from tests.helpers import program_of, teacher_of

FIELDS = ("network", "operator", "mode", "node", "op", "source", "outcome", "reason", "seconds")
OUTCOMES = ("caught", "equivalent", "survived", "crash", "invalid")
Row = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One network, compiled and checked. ``draws``: inputs of the longer comparison."""

    name: str
    subject: Subject
    call: Call
    free: Any
    draws: int

    @staticmethod
    def of(name: str, draws: int = 30) -> Trial:
        """Raises ``GpdfxError`` if the check refuses the network as it is."""
        network = NETWORKS[name]
        model, call = network.build()
        program = program_of(model, call, network.ratio, **network.options)
        free = _checked(program, call)
        return Trial(name, Subject.of(program, call), call, free, draws)

    @cached_property
    def comparison(self) -> Comparison:
        return Comparison(self.subject.program, self.call, self.draws)

    def mutants(self, operator: str, most: int) -> list[Mutant]:
        """At most so many of an operator's, spread over all of them, the same at every call."""
        every = list(OPERATORS[operator](self.subject))
        draw = random.Random(f"{self.name} {operator}")
        if len(every) <= most:
            return every
        step = len(every) / most
        return [every[int((k + draw.random()) * step)] for k in range(most)]

    def rows(self, operator: str, most: int) -> Iterator[Row]:
        """The outcome of each."""
        for mutant in self.mutants(operator, most):
            start = time.perf_counter()
            outcome, reason = self.outcome(mutant)
            seconds = time.perf_counter() - start
            place = {k: getattr(mutant, k) for k in ("mode", "node", "op", "source")}
            row = {"network": self.name, "operator": operator, **place, "outcome": outcome}
            yield row | {"reason": reason[:200], "seconds": f"{seconds:.2f}"}

    def outcome(self, mutant: Mutant) -> tuple[str, str]:
        """One of ``OUTCOMES``, and what was seen."""
        try:
            program = mutant.make()
            teacher_of(program, self.call)
        except Exception as error:  # whatever a graph that is wrong raises
            return "invalid", _first_line(error)
        try:
            free = _checked(program, self.call)
        except GpdfxError as error:
            return "caught", _first_line(error)
        except Exception as error:  # a fault of the check
            return "crash", _first_line(error)
        if free != self.free:
            return "caught", f"free sizes: {free} instead of {self.free}"
        found = self.comparison.difference(program)
        return ("survived" if found else "equivalent"), found


def _checked(program: Widened, call: Call) -> Any:
    """Which input sizes the check found to be free."""
    python = Python(find_caches(program.student, call))
    return laws.verify(Compiled.of(program, call, python), seed=0).sizes


def _first_line(error: Exception) -> str:
    kind = "" if isinstance(error, GpdfxError) else f"{type(error).__name__}: "
    return f"{kind}{error}".partition("\n")[0]


# --------------------------------------------------------------------------- the sweep
@lru_cache(maxsize=1)
def _trial(name: str, draws: int) -> Trial:
    return Trial.of(name, draws)


def _task(most: int, draws: int, task: tuple[str, str]) -> list[Row]:
    """The rows of one operator on one network; one without an outcome if there is no mutant."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name, operator = task
    rows = list(_trial(name, draws).rows(operator, most))
    return rows or [{"network": name, "operator": operator}]


def sweep(given: Any) -> None:
    """Append rows as they come, until all is done or the time is over."""
    table = Table(given.out, FIELDS, ("network", "operator"))
    done, end = table.done(), time.monotonic() + given.seconds
    names = list(NETWORKS)[: given.networks]
    todo = [(n, op) for n in names for op in OPERATORS if (n, op) not in done]
    task = partial(_task, given.per_operator, given.draws)
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        for rows in track(pool.imap_unordered(task, todo), total=len(todo)):
            table.append(*rows)
            if time.monotonic() > end:
                pool.terminate()
                break
        else:
            pool.close()
        pool.join()


# --------------------------------------------------------------------------- the score
def summary(path: Path) -> str:
    """The score by operator, then every survivor and crash."""
    rows = [row for row in read(path) if row["outcome"]]
    lines = []
    for operator in (*OPERATORS, "all"):
        own = [row for row in rows if operator in (row["operator"], "all")]
        counts = Counter(row["outcome"] for row in own)
        different = counts["caught"] + counts["survived"] + counts["crash"]
        score = f"{counts['caught'] / different:.1%}" if different else ""
        lines.append((operator, *(counts[o] for o in OUTCOMES), score))
    seconds = sum(float(row["seconds"]) for row in rows)
    title = f"{len(rows)} mutants of {len({row['network'] for row in rows})} networks"
    parts = [f"{title}, {seconds / max(len(rows), 1):.2f} s each.", ""]
    parts += [markdown(("operator", *OUTCOMES, "score"), lines), ""]
    for row in rows:
        if row["outcome"] in ("survived", "crash"):
            where = ", ".join(filter(None, (row["mode"], row["node"], row["op"], row["source"])))
            parts.append(f"- {row['outcome']}: {row['network']}, {row['operator']}, {where}")
            parts.append(f"  ({row['reason']})")
    return "\n".join(parts)


def main() -> None:
    parser = command_line("mutations", __doc__)
    parser.add_argument("command", nargs="?", choices=("sweep", "summary"), default="sweep")
    parser.add_argument("--networks", type=int, help="only the first ones of the table")
    parser.add_argument("--per-operator", type=int, default=10, help="mutants, of each network")
    parser.add_argument("--draws", type=int, default=30, help="inputs of the longer comparison")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "mutations.csv")
    given = parser.parse_args()
    if given.command == "sweep":
        sweep(given)
    print(summary(given.out))


if __name__ == "__main__":
    main()
