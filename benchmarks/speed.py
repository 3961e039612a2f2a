"""What a step of training costs, against the plain networks and the reference implementation.

    python -m benchmarks.speed                          # defaults of this device, all rows
    python -m benchmarks.speed --only teacher fold --branches none auto --size 64 --batch 16
    python -m benchmarks.speed --peer PATH              # and those of a checkout of guoyongcs/GPD
    python -m benchmarks.speed summary --into docs/speed.md

A step is zero_grad, forward, backward and optimizer step (SGD with momentum). All runs in one
process, in interleaved pairs; a row is the median of the pairs' ratios with 20 % and 80 %. Both of
a pair run in the same way: eager, by torch.compile, or as one CUDA graph. On GPUs: bf16 autocast,
channels last, cudnn.benchmark, fused optimizer. On CPUs: an allocator that keeps freed memory
(``gpdfx.keep_memory``, as in ``gpdfx train``) for both of a pair, or glibc's default
(``--allocator system``), which gives it back to the system.

    noise    plain wide network / itself (A/A)
    wide     plain wide network / plain student
    teacher  dynamic teacher / plain wide network: the price of the branches
    gpd      GPD / plain wide network + plain student
    fold     copying as many bytes / folding the branches: the share of copy bandwidth
    peer     reference implementation / GPD: how much faster ours is (--peer)

``macs`` is the same ratio of multiply-adds, as the dispatcher saw them; of a fold, relative to a
step of the plain wide network; empty where gpdfx's own kernels compute. ``products``: how many of
the launches are those of matrix products. Rows appear in
``results/speed_DEVICE.csv`` one by one, in place of earlier ones of the same setting.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from benchmarks import speed_summary, timing
from benchmarks.peer import Peer, load_peer
from benchmarks.speed_fold import fold_rows
from benchmarks.speed_steps import GRAPH, WAYS, Gap, Setting, Step, Task, make_step, plain_wide
from benchmarks.tables import RESULTS, Table, command_line, read
from benchmarks.timing import Row
from gpdfx import keep_memory

KINDS = ("noise", "wide", "teacher", "gpd", "fold", "peer")
SETS = ("none", "acnet", "repvgg", "orepa", "auto", "dbb", "mobileone")
SETTING = ("network", "width", "dtype", "size", "batch", "allocator")
KEY = ("what", "against", "branches", "way", *SETTING)
FIELDS = (
    *KEY,
    *("median", "low", "high", "pairs", "steps", "seconds", "against_seconds", "macs", "ops"),
    *("against_ops", "launches", "products", "against_launches", "peak_mib", "against_peak_mib"),
    *("compile_s", "against_compile_s", "gb_s", "against_gb_s", "error"),
    *("torch", "triton", "cuda", "driver", "threads", "machine"),
)


class Subject:
    """A step by name, with what is told of it once. Several steps run one after the other."""

    def __init__(self, name: str, device: str, steps: Sequence[Step]) -> None:
        self.name, self.device, self.steps = name, device, steps
        self.compile_s: float | None = None

    def run(self) -> None:
        for step in self.steps:
            step.run()

    def eager(self) -> None:
        for step in self.steps:
            step.eager()

    @functools.cached_property
    def counts(self) -> timing.Counter:
        self.eager()  # the optimizer's first step has ops of its own
        return timing.counted(self.eager)

    @functools.cached_property
    def device_facts(self) -> Row:
        if self.device == "cpu":
            return {}
        held = [x for step in self.steps for x in step.state()]
        return {
            "launches": timing.launches(self.run),
            "peak_mib": f"{timing.peak(self.eager, held):.0f}",
        }

    def facts(self, way: str) -> Row:
        """``compile_s``: seconds of the first call, which compiles."""
        if self.compile_s is None and way not in ("eager", GRAPH):
            self.compile_s = timing.seconds(self.run, device=self.device)
        told: Row = {"ops": self.counts.ops, **self.device_facts}
        if self.compile_s is not None:
            told["compile_s"] = f"{self.compile_s:.1f}"
        return told


class Bench:
    """All rows of a setting."""

    def __init__(self, setting: Setting, pairs: int, steps: int, peer: Peer | None) -> None:
        self.setting, self.pairs, self.steps, self.peer = setting, pairs, steps, peer
        self.kept: dict[str, Subject] = {}  # of one way

    def plan(
        self, kinds: Sequence[str], sets: Sequence[str], ways: Sequence[str]
    ) -> list[Callable[[], Iterator[Row]]]:
        """What is measured, in order."""
        jobs: list[Callable[[], Iterator[Row]]] = []
        for way in ways:
            jobs.append(functools.partial(self.begin, way))
            jobs += [functools.partial(self.plain, k, way) for k in ("noise", "wide") if k in kinds]
            if {"teacher", "gpd", "fold"} & {*kinds}:
                jobs += [functools.partial(self.branched, kinds, name, way) for name in sets]
            if self.peer is not None and "peer" in kinds:
                jobs.append(functools.partial(self.reference, way))
        return jobs

    @functools.cached_property
    def about(self) -> Row:
        """What all rows tell."""
        setting = self.setting
        about: Row = {"network": setting.network, "width": f"{setting.ratio:g}"}
        about |= {"dtype": setting.dtype, "size": setting.size, "batch": setting.batch}
        about |= {"steps": self.steps, "allocator": setting.allocator}
        return about | timing.machine(setting.device)

    # ---- subjects
    def begin(self, way: str) -> Iterator[Row]:
        """Build the plain networks."""
        self.kept.clear()
        setting = self.setting
        student = setting.student()
        wide = plain_wide(student, setting.gpd(None).teacher)
        for name, net in (("plain student", student), ("plain wide", wide)):
            self.kept[name] = self.subject(name, Task(setting.placed(net).train()), way)
        both = [step for s in self.kept.values() for step in s.steps]
        name = "plain wide + plain student"
        self.kept[name] = Subject(name, setting.device, both)
        yield from ()

    def subject(self, name: str, net: torch.nn.Module, way: str, **options: Any) -> Subject:
        step = make_step(net, self.setting, way, **options)
        return Subject(name, self.setting.device, [step])

    def compare(self, one: Subject, other: Subject, branches: str, way: str) -> Row:
        facts, others = one.facts(way), other.facts(way)
        device = self.setting.device
        pairs = timing.paired(one.run, other.run, self.pairs, self.steps, device)
        a, b = zip(*pairs, strict=True)
        row = {"what": one.name, "against": other.name, "branches": branches, "way": way}
        row |= timing.quantiles([x / y for x, y in pairs]) | facts
        row |= {f"against_{k}": v for k, v in others.items()}
        if not (one.counts.opaque or other.counts.opaque):
            row |= {"macs": f"{one.counts.macs / max(other.counts.macs, 1):.3f}"}
        row |= {"seconds": timing.quantiles(a)["median"]}
        return row | {"against_seconds": timing.quantiles(b)["median"]}

    # ---- rows
    def plain(self, kind: str, way: str) -> Iterator[Row]:
        wide, student = self.kept["plain wide"], self.kept["plain student"]
        yield self.compare(wide, wide if kind == "noise" else student, "", way)

    def branched(self, kinds: Sequence[str], name: str, way: str) -> Iterator[Row]:
        gpd = self.setting.gpd(None if name == "none" else name)
        if "teacher" in kinds:
            teacher = self.subject("teacher step", Task(gpd.teacher), way)
            yield self.compare(teacher, self.kept["plain wide"], name, way)
            del teacher
        if "gpd" in kinds:
            step = self.subject("GPD step", Gap(gpd), way)
            yield self.compare(step, self.kept["plain wide + plain student"], name, way)
            del step
        if "fold" in kinds and way in ("eager", GRAPH) and name != "none":
            whole = self.kept["plain wide"].counts.macs
            for row in fold_rows(gpd.teacher, self.setting, name, way, self.pairs, self.steps):
                yield row | {"macs": row["macs"] and f"{row['macs'] / max(whole, 1):.3f}"}

    def reference(self, way: str) -> Iterator[Row]:
        """The reference against ours with branches everywhere, and with those that it has."""
        assert self.peer is not None
        net, layers = self.peer.build(self.setting)
        peer = self.subject("reference step", net, way, backward=self.peer.backward)
        yield self.compare(peer, self.kept["plain wide + plain student"], "its own", way)
        its: dict[str, str | None] = {"*": None} | dict.fromkeys(layers, "orepa")
        for name, branches in (("its own", its), ("auto", "auto")):
            ours = self.subject("GPD step", Gap(self.setting.gpd(branches)), way)
            yield self.compare(peer, ours, name, way)
            del ours  # before the next one is built


def attempt(bench: Bench, job: Callable[[], Iterator[Row]], table: Table) -> Iterator[Row]:
    """The rows of a job, each of them written; what fails says so in a row."""
    try:
        for row in job():
            table.replace([row | bench.about])
            yield row
    except (Exception, SystemExit) as error:  # of a compiler, a kernel, a graph: all are figures
        name = title(job)
        row = {"what": name, "way": name.split()[-1], "error": told(error)}
        table.replace([row | bench.about])
        yield row


def told(error: BaseException) -> str:
    """On one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def title(job: Any) -> str:
    """The name of a job: a method and the words that it is given."""
    return " ".join([job.func.__name__, *(x for x in job.args if isinstance(x, str))])


def run(bench: Bench, jobs: Sequence[Callable[[], Iterator[Row]]], out: Path) -> None:
    """Do the jobs; what fails says so in a row, and the others go on."""
    console, table = Console(stderr=True, highlight=False), Table(out, FIELDS, KEY)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(jobs))
        for job in jobs:
            progress.update(task, description=title(job))
            for row in attempt(bench, job, table):
                progress.print(speed_summary.sentence(row))
            progress.advance(task)


def configure() -> None:
    """PyTorch as all steps want it."""
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64  # a network counts; beyond it runs eagerly


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with this device's defaults."""
    cuda = torch.cuda.is_available()
    parser = command_line("speed", __doc__)
    add = parser.add_argument
    add("command", nargs="?", choices=("run", "summary"), default="run")
    add("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    add("--network", default="torchvision:resnet18", help="as in gpdfx.models (%(default)s)")
    add("--ratio", type=float, default=2.0)
    add("--size", type=int, help="pixels; 224 on GPUs, 64 on CPUs")
    add("--channels", type=int, default=3, help="of the input")
    add("--batch", type=int, help="256 on GPUs, 16 on CPUs")
    text = "on CPUs: keep freed memory (%(default)s), or give it back"
    add("--allocator", choices=("keep", "system"), default="keep", help=text)
    add("--dtype", choices=("fp32", "bf16"), help="of autocast; bf16 on GPUs, fp32 on CPUs")
    add("--pairs", type=int, help="20 on GPUs, 5 on CPUs")
    add("--steps", type=int, help="per side of a pair; 10 on GPUs, 1 on CPUs")
    add("--branches", nargs="+", choices=SETS, default=SETS, metavar="SET", help=", ".join(SETS))
    text = "how steps run; on GPUs all, on CPUs eager"
    add("--compile", nargs="+", choices=WAYS, metavar="WAY", help=f"{text}: {', '.join(WAYS)}")
    add("--only", nargs="+", choices=KINDS, default=KINDS, metavar="ROW", help=", ".join(KINDS))
    add("--peer", type=Path, help="a checkout of github guoyongcs/GPD")
    add("--out", type=Path, help="the CSV")
    add("--into", type=Path, help="with summary: write the table there")
    given = parser.parse_args(argv)
    usual = (224, 256, "bf16", 20, 10, WAYS) if given.device == "cuda" else (64, 16, "fp32", 5, 1)
    names = ("size", "batch", "dtype", "pairs", "steps", "compile")
    for name, value in zip(names, (*usual, ("eager",)), strict=False):
        if getattr(given, name) is None:
            setattr(given, name, value)
    if given.device == "cpu" and GRAPH in given.compile:
        parser.error("a CUDA graph needs a GPU: leave out graph")
    name = timing.machine("cuda")["machine"] if given.device == "cuda" else "cpu"
    slug = "_".join(str(name).lower().replace("-", " ").split())
    given.out = given.out or RESULTS / f"speed_{slug}.csv"
    return given


def main(argv: Sequence[str] | None = None) -> None:
    given = parse(argv)
    if given.command == "run":
        configure()
        peer = load_peer(given.peer) if given.peer else None
        setting = Setting(
            given.network,
            given.device,
            given.size,
            given.batch,
            given.ratio,
            given.dtype,
            given.channels,
            given.allocator if given.device == "cpu" else "",
        )
        if setting.allocator == "keep" and not keep_memory():
            raise SystemExit("this C library has no mallopt: pass --allocator system")
        bench = Bench(setting, given.pairs, given.steps, peer)
        run(bench, bench.plan(given.only, given.branches, given.compile), given.out)
    rows = read(given.out)
    speed_summary.draw(rows, given.out.with_suffix(".svg"))
    speed_summary.show(rows)
    if given.into:
        speed_summary.write(given.into, given.out.parent)


if __name__ == "__main__":
    main()
