"""All that is to be known of a GPU that is lent for some minutes, the most worth knowing first.

    python -m benchmarks.gpu --seconds 400 --out DIR               # a bare machine, no network
    python -m benchmarks.gpu --seconds 400 --out DIR --peer PATH   # and the reference's steps
    python -m benchmarks.gpu --device cpu --seconds 60 --out DIR   # a rehearsal

Every row is in DIR as soon as it is known, and a second run with the same DIR goes on where the
first one ended: what is in ``jobs.csv`` is done.

    machine.txt      the device, versions, and when
    jobs.csv         when each job began and how it ended
    gpu_kernels.csv  forms of the fold's kernels against float64: ``benchmarks.gpu_kernels``
    speed.csv        steps and folds, as ``benchmarks.speed`` has them
    goals.csv        what was to be reached, and whether it was
    left.txt         jobs that did not fit into the seconds

Jobs run in processes of their own, kernels several at a time (they compile first). A process whose
job fails, crashes or takes far too long is replaced, for a GPU may be of no use after an error. A
job begins if what is left is enough for one of its kind, as long as the last one took.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import gpu_goals, gpu_kernels, speed, speed_summary, timing
from benchmarks.peer import load_peer
from benchmarks.speed_steps import Setting
from benchmarks.tables import Table, command_line, read
from benchmarks.timing import Row

GUESS = {"kernels": 20.0, "eager": 30.0, "graph": 30.0, "default": 90.0}
"""Seconds of the first job of a kind."""
JOBS = ("job", "kind", "worker", "state", "at", "limit", "seconds", "error")
PHASES = ("kernels", "steps")
SHARE, END = 0.35, 3
"""Of the seconds, what kernels have before the steps; seconds for the end."""
RESNET = Setting("torchvision:resnet18", "cuda", 224, 256, 2.0, "bf16")
VIT = replace(RESNET, network="timm:vit_small_patch16_224", batch=128)
MOBILE = replace(VIT, network="torchvision:mobilenet_v2")
SMALL = Setting("gpdfx:cnn", "cpu", 12, 3, 2.0, "fp32", 1, "system")
REST = ("orepa", "repvgg")
STEPS: dict[str, tuple[tuple[Setting, str, tuple[str, ...]], ...]] = {
    "cuda": (
        (RESNET, "eager", ("plain", "none", "auto", "acnet")),
        (RESNET, "graph", ("plain", "none", "auto", "acnet")),
        (RESNET, "eager", ("peer",)),
        (RESNET, "default", ("peer",)),
        (RESNET, "graph", REST),
        (RESNET, "eager", (*REST, "dbb", "mobileone")),
        (RESNET, "default", ("none", "auto")),
        (replace(RESNET, batch=128), "graph", ("none", "auto")),
        (replace(RESNET, batch=64), "graph", ("none", "auto")),
        (VIT, "graph", ("none", "auto")),
        (MOBILE, "graph", ("none", "auto")),
        (VIT, "eager", ("none", "auto")),
        (MOBILE, "eager", ("none", "auto")),
        (RESNET, "default", ("orepa", "acnet")),
    ),
    "cpu": (
        (SMALL, "eager", ("plain", "auto", "acnet")),
        (replace(SMALL, batch=2), "eager", ("plain",)),
    ),
}
"""What is measured in which way, in the order of worth."""
KINDS = {"plain": ("noise", "wide"), "peer": ("peer",)}
"""Of rows; of branch sets, all others."""
WORK = (sys.executable, "-m", "benchmarks.gpu", "work")


@dataclass(frozen=True)
class Job:
    """A form of layers in a type (``setting`` is none), or rows of ``benchmarks.speed``."""

    setting: Setting | None
    way: str
    what: str

    @property
    def kind(self) -> str:
        """What takes about as long."""
        return f"{self.setting.network} {self.way}" if self.setting else "kernels"

    @property
    def name(self) -> str:
        where = f" {self.setting.batch}" if self.setting else ""
        return f"{self.kind}{where} {self.what}"


def jobs_of(phase: str, given: argparse.Namespace) -> list[Job]:
    """All of a phase."""
    if phase == "kernels":
        return [Job(None, "kernels", "/".join(one)) for one in gpu_kernels.forms()]
    some = ((s, way, what) for s, way, names in STEPS[given.device] for what in names)
    return [Job(*one) for one in some if given.peer or one[2] != "peer"]


# --------------------------------------------------------------------------- a process of its own
class Worker:
    """Jobs one after the other, as long as there is time; what fails ends the process, too."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.journal = given, journal(given.out)
        self.bench: speed.Bench | None = None
        self.way = ""

    def work(self) -> None:
        given = self.given
        own = jobs_of(given.phase, given)[given.worker :: given.of]
        for job in own:
            expected = estimate(job, read(self.journal.path), given.device)
            if job not in left(own, given.out) or time.time() + expected > given.until:
                continue
            self.note(job, "begun", limit=f"{3 * expected + 30:.0f}")
            start, said = time.time(), ""
            try:
                for row in self.rows(job):
                    said = said or row.get("error", "")
                    print(speed_summary.sentence(row), flush=True)
            except (Exception, SystemExit) as error:
                said = speed.told(error)
            seconds = f"{time.time() - start:.2f}"
            self.note(job, "failed" if said else "done", seconds=seconds, error=said)
            if job.setting:
                gpu_goals.write(given.out)
            if said:
                sys.exit(f"{job.name} failed: {said}")

    def note(self, job: Job, state: str, **more: str) -> None:
        row = {"job": job.name, "kind": job.kind, "state": state, "worker": self.given.worker}
        self.journal.append(row | {"at": f"{time.time():.2f}"} | more)
        print(f"{job.name}: {state}, {self.given.until - time.time():.0f} s left", flush=True)

    def rows(self, job: Job) -> Iterator[Row]:
        """Until one is an error."""
        given = self.given
        if job.setting is None:
            row = gpu_kernels.check(*job.what.split("/"), given.device)
            Table(given.out / "gpu_kernels.csv", gpu_kernels.FIELDS).append(row)
            return
        same = self.bench is not None and self.bench.setting == job.setting
        if self.bench is None or not same:
            self.bench = speed.Bench(job.setting, given.pairs, given.steps, None)
        if job.what == "peer":
            self.bench.peer = self.bench.peer or load_peer(given.peer)
        kinds = KINDS.get(job.what, ("teacher", "gpd", "fold"))
        begin, *rest = self.bench.plan(kinds, (job.what,), (job.way,))
        table = Table(given.out / "speed.csv", speed.FIELDS, speed.KEY)
        for part in rest if same and self.way == job.way else (begin, *rest):
            for row in speed.attempt(self.bench, part, table):
                yield row
                if row.get("error"):
                    return
        self.way = job.way


def estimate(job: Job, known: Sequence[Row], device: str) -> float:
    """Seconds, from those of the last one of its kind."""
    taken = [float(r["seconds"]) for r in known if r["kind"] == job.kind and r["seconds"]]
    return 1.2 * taken[-1] if taken else GUESS[job.way] / (1 if device == "cuda" else 10)


# --------------------------------------------------------------------------- the first process
def journal(out: Path) -> Table:
    return Table(out / "jobs.csv", JOBS)


def left(jobs: Sequence[Job], out: Path) -> list[Job]:
    """What has not been done."""
    last = {row["job"]: row["state"] for row in read(journal(out).path)}
    return [job for job in jobs if last.get(job.name, "cut") == "cut"]


def look_after(given: argparse.Namespace, phase: str, until: float, of: int, worker: int) -> None:
    """Run a worker; one that ends early or takes far too long is replaced."""
    table = journal(given.out)
    words = {"device": given.device, "out": given.out, "pairs": given.pairs, "peer": given.peer}
    words |= {"steps": given.steps, "phase": phase, "worker": worker, "of": of, "until": until}
    told = [f"--{name}={value}" for name, value in words.items() if value is not None]
    while time.time() < until:
        before = len(read(table.path))
        process = subprocess.Popen([*WORK, *told], cwd=Path(__file__).resolve().parents[1])
        late = False
        while process.poll() is None:
            time.sleep(0.1)
            last = since(before, given.out, worker)
            begun = last.get("state") == "begun"
            late = begun and time.time() - float(last["at"]) > float(last["limit"])
            if late or time.time() > until:
                process.kill()
                process.wait()
        last = since(before, given.out, worker)
        if last.get("state") == "begun":
            cut = time.time() > until
            said = "" if cut else "took too long" if late else f"ended: {process.returncode}"
            row = {"state": "cut" if cut else "failed", "error": said, "limit": ""}
            table.append(last | row | {"at": f"{time.time():.2f}"})
        if process.returncode == 0 or not last:
            return


def since(before: int, out: Path, worker: int) -> Row:
    """What a worker noted last; empty if that is not since so many rows."""
    own = [r for r in read(journal(out).path)[before:] if r["worker"] == str(worker)]
    return own[-1] if own else {}


def supervise(given: argparse.Namespace, phase: str, until: float) -> None:
    """All workers of a phase."""
    jobs = left(jobs_of(phase, given), given.out)
    several = phase == "kernels" and given.device == "cuda"
    count = min(len(jobs), 8, max(1, (os.cpu_count() or 1) // 2) if several else 1)
    if count:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(partial(look_after, given, phase, until, count), range(count)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("gpu", __doc__)
    add = parser.add_argument
    add("command", nargs="?", choices=("run", "work"), default="run", help=argparse.SUPPRESS)
    add("--seconds", type=float, default=400, help="in all (%(default)s)")
    add("--out", type=Path, required=True, help="a folder")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--pairs", type=int, help="of a row of speed.csv; 5, on CPUs 1")
    add("--steps", type=int, help="per side of a pair; 5, on CPUs 1")
    add("--peer", type=Path, help="a checkout of github guoyongcs/GPD")
    for name in ("worker", "of"):
        add(f"--{name}", type=int, help=argparse.SUPPRESS)
    add("--phase", choices=("kernels", "steps"), help=argparse.SUPPRESS)
    add("--until", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here: --device cpu rehearses")
    usual = (5, 5) if given.device == "cuda" else (1, 1)
    given.pairs, given.steps = given.pairs or usual[0], given.steps or usual[1]
    given.out = given.out.resolve()
    return given


def main(argv: Sequence[str] | None = None) -> None:
    given = parse(argv)
    if given.command == "work":
        speed.configure()
        Worker(given).work()
        return
    start = time.time()
    given.out.mkdir(parents=True, exist_ok=True)
    for table in (Table(given.out / "gpu_kernels.csv", gpu_kernels.FIELDS), journal(given.out)):
        if not table.path.exists():
            table.write([])
    facts = timing.machine(given.device) | {"date": time.strftime("%F %T %z")}
    told = "\n".join(f"{name}: {value}" for name, value in facts.items())
    print(told, flush=True)
    (given.out / "machine.txt").write_text(f"{told}\n")
    until = start + given.seconds - END
    supervise(given, "kernels", start + SHARE * given.seconds)
    supervise(given, "steps", until)
    supervise(given, "kernels", until)
    print(gpu_goals.write(given.out))
    rest = left([job for phase in PHASES for job in jobs_of(phase, given)], given.out)
    (given.out / "left.txt").write_text("".join(f"{job.name}\n" for job in rest))
    failed = [f"{r['job']}: {r['error']}" for r in read(table.path) if r["state"] == "failed"]
    print(f"\n{len(failed)} failed", *failed, sep="\n")
    print(f"\n{len(rest)} not done in {given.seconds:g} s", *(job.name for job in rest), sep="\n")


if __name__ == "__main__":
    main()
