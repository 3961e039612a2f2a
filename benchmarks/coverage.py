"""Proof by breadth: expand every network of a suite, one CSV row per (network, ratio).

    python -m benchmarks.coverage torchvision --ratio 2 1.5
    python -m benchmarks.coverage timm-files
    python -m benchmarks.coverage timm-sample --count 250 --seed 0
    python -m benchmarks.coverage transformers --dynamic batch
    python -m benchmarks.coverage tasks
    python -m benchmarks.coverage libraries      # packages: libraries/requirements.txt
    python -m benchmarks.coverage names timm:convnext_atto torchvision:resnet18
    python -m benchmarks.coverage summary --into docs/breadth.md

Each network runs in a process of its own: a crash, a hang or a leak costs only its row. A rerun
does what is missing in the CSV; ``--redo timeout error`` also repeats rows of those statuses.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import re
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks import libraries, networks
from benchmarks.coverage_summary import summary
from benchmarks.tables import RESULTS, Table, command_line, write_between
from benchmarks.uses import USES, uses
from gpdfx import CaptureError, GpdfxError, InputError, LossyError, collapse, expand
from gpdfx.passes.capture.limits import LEVELS

Row = dict[str, Any]

CHECKS = ("probe/eval", "probe/train", "real/eval", "real/train")
STAGES = ("capture", "transform", "verify", "report")
FIELDS = (
    *("suite", "name", "ratio", "status", "error", "where"),
    *(*CHECKS, "tolerance", "collapse", "widened", "nodes", "bridged", "bridged_ops"),
    *("bridged_reasons", "held", "grown", *(f"seconds_{s}" for s in STAGES)),
    *("parameters_before", "parameters_after", "macs_before", "macs_after", "size", "inputs"),
    *("laws", "left_out", "torch", "package", *USES),
)
STATUSES = ("ok", "lossy", "capture", "input", "timeout", "memory", "error")
KINDS = ((LossyError, "lossy"), (CaptureError, "capture"), (InputError, "input"))
# Every network starts from a process that has imported everything once.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["benchmarks.networks"])


# --------------------------------------------------------------------------- one network
def work(
    rows: Connection, name: str, ratios: tuple[float, ...], size: int, dynamic: str, threads: int
) -> None:
    """Expand one network at every ratio, in a process of its own, and send a row for each. Only
    the first has all input sizes free."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # the parent shows a progress bar
        os.dup2(quiet, stream)
    _killed_first()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        model, *call = networks.build(name, size)
        state = digest(model)
    except Exception as error:  # a constructor may raise anything
        for ratio in ratios:
            rows.send({"ratio": ratio} | failure(error))
        return
    for k, ratio in enumerate(ratios):
        row: Row = {"ratio": ratio, "size": pytree.tree_leaves(call)[0].shape[-1]}
        level = "batch" if k and dynamic == "sizes" else dynamic  # free sizes cost most of capture
        try:
            row |= measure(model, state, call, ratio, level)
        except Exception as error:  # a failure of any kind is a row
            row |= failure(error)
        rows.send(row)


def measure(
    model: nn.Module, state: dict[str, str], call: list[Any], ratio: float, dynamic: str
) -> Row:
    """What ``expand`` reports about one network, and whether ``collapse`` gives it back."""
    args, kwargs = call
    teacher = expand(
        model,
        ratio,
        example_inputs=args,
        example_kwargs=kwargs,
        branches=None,
        dynamic=dynamic,
    )
    report = teacher.report()
    assert report.check is not None
    plain = collapse(teacher)
    held = [f"{f.parameter} {f.dim}: {f.reason}" for f in report.fixed if not f.cannot]
    ops = Counter(b.op for b in report.bridged)
    reasons = dict.fromkeys(_short(b.reason, 90) for b in report.bridged)
    return {
        "status": "ok",
        **{k: f"{report.error[k]:.2e}" for k in CHECKS},
        "tolerance": f"{report.check.tolerance:.0e}",
        "collapse": type(plain) is type(model)
        and list(state.items()) == list(digest(plain).items()),
        "widened": f"{report.widened:.4f}",
        "nodes": report.nodes,
        "bridged": len(report.bridged),
        "bridged_ops": "; ".join(f"{op} {n}" for op, n in ops.most_common()),
        "bridged_reasons": "; ".join(reasons),
        "held": "; ".join(_short(h, 160) for h in held[:3]) if report.widened < 1 else "",
        "grown": "; ".join(report.grown),
        **{f"seconds_{s}": f"{report.seconds[s]:.2f}" for s in STAGES},
        "parameters_before": report.parameters[0],
        "parameters_after": report.parameters[1],
        "macs_before": report.macs[0],
        "macs_after": report.macs[1],
        "inputs": "; ".join(f"{name}: {sizes}" for name, sizes in report.inputs.items()),
        "laws": len(report.certificate),
        "left_out": "; ".join(_short(text, 160) for text in report.check.left_out),
        **{use: _short(text, 160) for use, text in uses(model, teacher, call).items()},
    }


def digest(model: nn.Module) -> dict[str, str]:
    """What stands for a state bit for bit, and is small: dtype, shape and hash of every tensor;
    of what else is in it, its text."""

    def of(x: Any) -> str:
        if not isinstance(x, Tensor):
            return repr(x)
        data = x.detach().contiguous().flatten().view(torch.uint8).numpy()
        return f"{x.dtype} {list(x.shape)} {hashlib.sha256(data).hexdigest()}"

    return {name: of(x) for name, x in model.state_dict().items()}


def failure(error: Exception) -> Row:
    """Status, the first line of the message, and the place."""
    status = next((s for kind, s in KINDS if isinstance(error, kind)), "error")
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        status = "memory"
    if isinstance(error, GpdfxError):
        text, places = "", [error.node, error.module_path, error.source]
    else:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "gpdfx" in Path(f.filename).parts] or frames
        text = f"{type(error).__name__}: "
        places = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in ours[-1:]]
    first = next(iter(str(error).splitlines()), "")
    where = _short(", ".join(p for p in places if p), 300)
    return {"status": status, "error": _short(text + first, 300), "where": where}


def _short(text: str, length: int) -> str:
    """One line, without the directories of this machine."""
    text = re.sub(r"(?<![\w.])(/[\w.+-]+)+/", "", " ".join(text.split()))
    return text if len(text) <= length else text[: length - 4] + " ..."


def _killed_first() -> None:
    """Where memory runs out, the kernel should take this process and no other."""
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# --------------------------------------------------------------------------- many networks
@dataclass
class Worker:
    """A process that measures one network, and the ratios it still owes."""

    name: str
    process: BaseProcess
    rows: Connection
    deadline: float
    owed: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, ratios: tuple[float, ...], given: argparse.Namespace) -> Worker:
        rows, far = FRESH.Pipe(duplex=False)
        threads = given.threads or max((os.cpu_count() or 1) // given.jobs, 1)
        arguments = (far, name, ratios, given.size, given.dynamic, threads)
        process = FRESH.Process(target=work, args=arguments, daemon=True)
        process.start()
        far.close()
        return cls(name, process, rows, time.monotonic() + given.seconds, list(ratios))

    def collect(self, given: argparse.Namespace) -> Iterator[Row]:
        """Rows that have come; where no more can come, a row for each ratio still owed."""
        end: Row = {}
        try:
            while self.owed and self.rows.poll():
                row = self.rows.recv()
                self.owed.remove(row["ratio"])
                yield row
        except (EOFError, OSError):  # it died
            self.process.join()
            end = {"status": "error", "error": f"exit code {self.process.exitcode}"}
            if self.process.exitcode == -9:
                end = {"status": "memory", "error": "killed by the system"}
        if time.monotonic() > self.deadline:
            end = end or {"status": "timeout", "error": f"more than {given.seconds} s"}
        elif _resident(self.process) > given.memory:
            end = end or {"status": "memory", "error": f"more than {given.memory} GiB"}
        if end or not self.owed:
            yield from ({"ratio": ratio} | end for ratio in self.owed)
            self.owed = []
            self.process.join(0 if end else 10)
            self.process.kill()
            self.process.join()
            self.rows.close()


def _resident(process: BaseProcess) -> float:
    """GiB of memory in use; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def run(suite: str, names: Iterable[str], given: argparse.Namespace) -> None:
    """Measure what the CSV lacks, appending rows as they come."""
    path = given.out or RESULTS / f"coverage_{suite.replace('-', '_')}.csv"
    table = Table(path, FIELDS, end="\r\n")
    kept = [row for row in table.rows() if row["status"] not in given.redo]
    table.write(kept)
    done = {(row["name"], row["ratio"]) for row in kept}
    todo = deque((n, tuple(r for r in given.ratio if (n, f"{r:g}") not in done)) for n in names)
    todo = deque((n, ratios) for n, ratios in todo if ratios)
    running: list[Worker] = []
    tally: Counter[str] = Counter()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    layout = "{task.fields[tally]}  {task.fields[now]}"
    with Progress(*columns, TextColumn(layout)) as progress:
        total = sum(len(ratios) for _, ratios in todo)
        bar = progress.add_task(suite, total=total, tally="", now="")
        while todo or running:
            while todo and len(running) < given.jobs:
                running.append(Worker.start(*todo.popleft(), given))
            progress.update(bar, now=", ".join(w.name for w in running))
            wait([w.rows for w in running], timeout=0.5)
            for worker in list(running):
                for row in worker.collect(given):
                    row |= {"suite": suite, "name": worker.name, "ratio": f"{row['ratio']:g}"}
                    row |= {"torch": torch.__version__, "package": libraries.package(worker.name)}
                    table.append(row)
                    tally[row["status"]] += 1
                    text = ", ".join(f"{k} {n}" for k, n in tally.items())
                    progress.update(bar, advance=1, tally=text)
                    if row["status"] != "ok":
                        line = f"{worker.name} {row['ratio']} {row['status']}: {row['error']}"
                        progress.print(line, markup=False, soft_wrap=True)
                if not worker.owed:
                    running.remove(worker)


# --------------------------------------------------------------------------- command line
def main() -> None:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--ratio", type=float, nargs="+", default=[2.0])
    options.add_argument("--out", type=Path, help="default: results/coverage_<suite>.csv")
    options.add_argument("--seconds", type=float, default=600, help="cap per network")
    options.add_argument("--size", type=int, default=64, help="smallest image; 0: as pretrained")
    options.add_argument("--dynamic", choices=LEVELS, default=LEVELS[0], help="see gpdfx.expand")
    options.add_argument("--jobs", type=int, default=1, help="networks at once")
    threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    options.add_argument("--threads", type=int, default=threads, help="of each; 0: all cores")
    options.add_argument("--memory", type=float, default=16, help="cap per network in GiB")
    options.add_argument("--redo", nargs="+", default=[], choices=STATUSES, metavar="STATUS")
    parser = command_line("coverage", __doc__)
    suites = parser.add_subparsers(dest="suite", required=True)
    for suite in ("torchvision", "timm-files", "timm-all", *networks.ZOOS):
        suites.add_parser(suite, parents=[options])
    sample = suites.add_parser("timm-sample", parents=[options])
    sample.add_argument("--count", type=int, default=250)
    sample.add_argument("--seed", type=int, default=0)
    named = suites.add_parser("names", parents=[options])
    named.add_argument("names", nargs="+", help="<suite>:<model>, timm and torchvision included")
    tables = suites.add_parser("summary")
    tables.add_argument("csv", type=Path, nargs="*", help="default: all of results")
    tables.add_argument("--into", type=Path, help="write it between the marks in this file")
    given = parser.parse_args()
    match given.suite:
        case "summary":
            text = summary(given.csv or sorted(RESULTS.glob("coverage_*.csv")))
            write_between(given.into, text, "coverage") if given.into else print(text)
        case "torchvision":
            run(given.suite, networks.torchvision_all(), given)
        case "timm-files":
            run(given.suite, networks.timm_files(), given)
        case "timm-sample":
            run(given.suite, networks.timm_sample(given.count, given.seed), given)
        case "timm-all":
            run(given.suite, networks.timm_all(), given)
        case "names":
            run(given.suite, given.names, given)
        case zoo:
            for package, count in libraries.SKIPPED.items() if zoo == "libraries" else ():
                print(f"{package} is not installed: {count} of its networks are skipped")
            run(zoo, networks.zoo(zoo), given)


if __name__ == "__main__":
    main()
