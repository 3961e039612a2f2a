"""What a run of ``gpdfx train`` says that a step costs, and what it then costs.

    python -m benchmarks.train_cost        # about ten minutes

480 images of 64 x 64 (noise, in ten classes) and timm's resnet10t, with the default branches and
without any; a process a run. ``announced`` and ``measured`` are in steps of the plain student.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torchvision.utils import save_image

from benchmarks import timing
from benchmarks.tables import RESULTS, Table, command_line
from gpdfx import __file__ as PACKAGE

COUNTS = {"train": 48, "val": 4}
COLUMNS = (
    *("student", "batch", "branches", "announced", "measured", "seconds", "plain_seconds"),
    *("announced_without", "parameters", "checkpoint_mb"),
)


def make_images(folder: Path) -> None:
    """Ten classes of noise."""
    draw = torch.Generator().manual_seed(0)
    for split, count in COUNTS.items():
        for label in range(10):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for k in range(count):
                save_image(torch.rand(3, 64, 64, generator=draw), place / f"{k}.png")


def measure(student: str, batch: int, branches: str, images: Path, steps: int) -> dict[str, Any]:
    """One run, just long enough; what it said and measured."""
    epochs = -(-(steps + 2) // max(1, 480 // batch))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gpdfx", "train", "--quiet", "--json", "--no-verify"]
        command += ["--student", student, "--data", f"imagefolder:{images}", "--size", "64"]
        command += ["--batch-size", str(batch), "--epochs", str(epochs), "--recipe", "resnet18"]
        command += ["--schedule", "cosine", "--branches", branches, "--time-steps", str(steps)]
        command += ["--out", str(Path(folder) / "run")]
        root = Path(PACKAGE).parents[1]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    summary = json.loads(done.stdout)
    told, found = summary["estimate"], summary["step_time"]
    return {
        **{"student": student, "batch": batch, "branches": branches},
        **{"announced": told["ratio"], "measured": found["ratio"]},
        **{"seconds": found["step"], "plain_seconds": found["plain"]},
        "announced_without": told["ratio"] - told["branches"],
        "parameters": told["parameters"][0],
        "checkpoint_mb": told["checkpoint"][0] / 1e6,
    }


def main() -> None:
    parser: argparse.ArgumentParser = command_line("train_cost", __doc__)
    parser.add_argument("--student", default="timm:resnet10t")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 256])
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--out", type=Path, default=RESULTS / "train_cost.csv", help="a CSV")
    given = parser.parse_args()
    about = timing.machine()
    table = Table(given.out, (*COLUMNS, *about), key=("student", "batch", "branches"))
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder))
        for batch in given.batches:
            for branches in ("auto", "none"):
                if (given.student, str(batch), branches) in table.done():
                    continue
                row = measure(given.student, batch, branches, Path(folder), given.steps)
                table.append(row | about)
                print(
                    "{batch:4} {branches:5} said {announced:.2f}, is {measured:.2f}".format(**row)
                )


if __name__ == "__main__":
    main()
