"""What ``expand`` takes: seconds by stage and memory, beside ``torch.export`` of the same network.

    python -m benchmarks.expand_time                               # an hour on two cores
    python -m benchmarks.expand_time --only torchvision:resnet18   # one of them
    python -m benchmarks.expand_time summary

``export`` of both modes, for the example's sizes alone, is what no capture can do without;
``export_free``, of one mode for all sizes, is half of what it does if nothing stands in its way.
Pairs are interleaved, after a warm-up of both. Peaks are what a process's memory grows by, at most,
with the check and without. A rerun does what is missing in the CSV.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import operator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.export import Dim

from benchmarks import libraries, networks, timing
from benchmarks.tables import RESULTS, Row, Table, command_line, markdown
from gpdfx import expand
from gpdfx.calls import tree
from gpdfx.passes.program import duplicate
from gpdfx.report.report import Report

STAGES = ("capture", "transform", "verify", "report")
COLUMNS = (
    *("network", "size", "branches", "pairs", "export", *STAGES, "total"),
    *(
        "verify_capture",
        "total_export",
        "export_free",
        "capture_export_free",
        "peak",
        "peak_unverified",
        "torch",
        "threads",
        "machine",
    ),
)
FRESH = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Setting:
    """A network by its name in ``networks``; ``size``: of its images, at least, 0 its own."""

    network: str
    size: int = 64
    branches: str | None = None

    @property
    def key(self) -> tuple[str, ...]:
        return self.network, str(self.size), self.branches or "none"


SETTINGS = [
    Setting("torchvision:resnet18", branches="auto"),
    Setting("torchvision:resnet50", 0),
    *(
        Setting(f"torchvision:{name}")
        for name in ("mobilenet_v3_small", "efficientnet_b0", "densenet121", "shufflenet_v2_x1_0")
    ),
    *(
        Setting(f"timm:{name}")
        for name in ("convnext_atto", "vit_tiny_patch16_224", "levit_128s", "mobilevit_xxs")
    ),
    *(Setting(f"timm:{name}") for name in ("edgenext_xx_small", "resnext26ts")),
    *(
        Setting(f"transformers:{name}")
        for name in (
            *("BertForSequenceClassification", "GPT2LMHeadModel", "LlamaForCausalLM"),
            *("T5ForConditionalGeneration", "ViTForImageClassification", "Wav2Vec2ForCTC"),
        )
    ),
    *(
        Setting(f"libraries:{name}", 0)
        for name in ("diffusers/UNet2DModel", "diffusers/UVit2DModel", "demucs/Demucs")
        if name in libraries.TABLE
    ),
]


# --------------------------------------------------------------------------- one network
class Flat(nn.Module):
    """A network that returns its tensors alone: export knows no other structures."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return [x for x in tree.leaves(self.network(*args, **kwargs)) if isinstance(x, Tensor)]


class Subject:
    """A network and a call of it, in a process that has expanded and exported another one."""

    def __init__(self, setting: Setting, threads: int) -> None:
        torch.set_num_threads(threads)
        self.branches = setting.branches
        self.model: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        self.args: tuple[Any, ...] = (torch.randn(4, 3),)
        self.kwargs: dict[str, Any] = {}
        self.export()
        self.expand()
        self.model, self.args, self.kwargs = networks.build(setting.network, setting.size)

    def export(self) -> None:
        """Both modes."""
        for training in (False, True):
            model = Flat(duplicate(self.model)).train(training)
            torch.export.export(model, self.args, self.kwargs, strict=False)

    def export_free(self) -> None:
        """One mode, with free sizes."""

        def free(x: Any) -> Any:
            return dict.fromkeys(range(x.ndim), Dim.AUTO) if isinstance(x, Tensor) else None

        given = {"args": self.args, "kwargs": self.kwargs}
        shapes = tree.map_leaves(free, {name: x for name, x in given.items() if x})
        model = Flat(duplicate(self.model)).train()
        torch.export.export(model, self.args, self.kwargs, dynamic_shapes=shapes, strict=False)

    def expand(self, verify: bool = True) -> Report:
        inputs = {"example_inputs": self.args, "example_kwargs": self.kwargs}
        return expand(self.model, 2, **inputs, branches=self.branches, verify=verify).report()


def measure(setting: Setting, threads: int, pairs: int) -> Row:
    """Seconds, the medians of all pairs."""
    subject, reports = Subject(setting, threads), list[Report]()
    found = timing.paired(lambda: reports.append(subject.expand()), subject.export, pairs)
    reports = reports[1:]  # of the warm-up
    total, export = (median(column) for column in zip(*found, strict=True))
    bare = list[Report]()
    expand = lambda: bare.append(subject.expand(verify=False))  # noqa: E731
    free = [theirs for _, theirs in timing.paired(expand, subject.export_free, pairs)]
    captures = [one.seconds["capture"] for one in bare[1:]]
    return {
        **{stage: median(one.seconds[stage] for one in reports) for stage in STAGES},
        "verify_capture": median(r.seconds["verify"] / r.seconds["capture"] for r in reports),
        "total_export": median(ours / theirs for ours, theirs in found),
        "export_free": median(free),
        "capture_export_free": median(map(operator.truediv, captures, free)),
        **{"total": total, "export": export, "pairs": pairs},
        **timing.machine(),
    }


def peak(setting: Setting, threads: int, verify: bool) -> float:
    """MiB by which a process grows at most in ``expand``; needs Linux."""
    subject = Subject(setting, threads)
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew
    before = _resident("VmRSS")
    subject.expand(verify)
    return (_resident("VmHWM") - before) / 2**10


def _resident(what: str) -> int:
    """KiB, as the kernel tells them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def alone(call: Any, *args: Any) -> Any:
    """A call in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=FRESH) as own:
        return own.submit(call, *args).result()


# --------------------------------------------------------------------------- all
def run(settings: list[Setting], given: argparse.Namespace) -> None:
    """Measure what the CSV lacks, appending rows as they come."""
    table = Table(given.out, COLUMNS, COLUMNS[:3])
    todo = [setting for setting in settings if setting.key not in table.done()]
    for setting in track(todo):
        found = dict(zip(COLUMNS, setting.key, strict=False))
        found |= alone(measure, setting, given.threads, given.pairs)
        for column, verify in (("peak", True), ("peak_unverified", False)):
            found[column] = alone(peak, setting, given.threads, verify)
        table.append(found)


def summary(table: Table) -> str:
    """Every network, and the medians of the ratios."""
    rows = table.rows()
    columns = [c for c in COLUMNS if c not in ("pairs", "torch", "threads", "machine")]
    cells = ([_short(row[c]) for c in columns] for row in rows)
    told = ("verify_capture", "total_export", "capture_export_free")
    known = {c: [float(row[c]) for row in rows if row[c]] for c in told}
    ratios = {c: median(found) if found else math.nan for c, found in known.items()}
    return (
        f"{markdown(columns, cells)}\n\nMedians of {len(rows)}: verify / capture "
        f"{ratios['verify_capture']:.2f}, total / export {ratios['total_export']:.2f}, "
        f"capture / export of one mode for all sizes {ratios['capture_export_free']:.2f}."
    )


def _short(cell: str) -> str:
    """Numbers with three digits."""
    try:
        return f"{float(cell):.3g}" if "." in cell else cell
    except ValueError:
        return cell


def main() -> None:
    parser = command_line("expand_time", __doc__)
    names = [setting.network for setting in SETTINGS]
    parser.add_argument("what", nargs="?", choices=("run", "summary"), default="run")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NETWORK")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "expand_time.csv")
    given = parser.parse_args()
    if given.what == "run":
        run([s for s in SETTINGS if s.network in (given.only or names)], given)
    print(summary(Table(given.out, COLUMNS, COLUMNS[:3])))


if __name__ == "__main__":
    main()
