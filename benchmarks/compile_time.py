"""How long ``torch.compile`` takes over a GPD: its first two steps, with nothing in a cache.

    python -m benchmarks.compile_time        # a minute or two

The student is three convolutions with batch norm, batches are 16 images of 32 x 32. The plain
student is compiled before, in a process and with a cache of its own, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks import timing
from benchmarks.tables import RESULTS, Table, command_line
from gpdfx import GPD


def student() -> nn.Module:
    """Three convolutions."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def measure(what: str) -> float:
    """Seconds of two steps."""
    images, classes = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    net = student()
    run = torch.compile(GPD(net, example_inputs=(images,)) if what == "gpd" else net)
    start = time.perf_counter()
    for _ in range(2):
        out = run(images, classes).loss if what == "gpd" else run(images).square().mean()
        out.backward()
    return time.perf_counter() - start


def main() -> None:
    parser = command_line("compile_time", __doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "compile_time.csv", help="a CSV")
    parser.add_argument("what", nargs="?", choices=("plain", "gpd"), help="in this process, alone")
    given = parser.parse_args()
    if given.what:
        print(f"{measure(given.what):.1f}")
        return
    columns = ("what", "seconds", *timing.machine())
    table = Table(given.out, columns, key=("what", "torch", "machine"))
    for what in ("plain", "gpd"):
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
            argv = [sys.executable, "-m", "benchmarks.compile_time", what]
            done = subprocess.run(
                argv, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
        row = {"what": what, "seconds": done.stdout.split()[-1], **timing.machine()}
        table.replace([row])
        print(f"{what:6} {row['seconds']} s")
    print(f"{table.path}: torch {row['torch']}, {row['machine']}")


if __name__ == "__main__":
    main()
