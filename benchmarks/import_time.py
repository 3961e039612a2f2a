"""What ``import gpdfx`` costs beside ``import torch``.

    python -m benchmarks.import_time        # half a minute

Fresh processes in interleaved pairs, the start of Python included in both.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from functools import partial

from benchmarks import timing
from gpdfx import __version__


def run(code: str) -> None:
    """In a process of its own."""
    subprocess.run([sys.executable, "-c", code], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.import_time")
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    with_gpdfx, torch_alone = partial(run, "import torch, gpdfx"), partial(run, "import torch")
    found = timing.paired(with_gpdfx, torch_alone, given.pairs)
    more = timing.quantiles([ours - theirs for ours, theirs in found])
    ratio = timing.quantiles([ours / theirs for ours, theirs in found])
    alone = statistics.median(theirs for _, theirs in found)
    about = timing.machine()
    print(f"import torch         {alone:.2f} s")
    print("import torch, gpdfx  {median} s more (20 % {low}, 80 % {high})".format(**more))
    print("ratio                {median} (20 % {low}, 80 % {high}), {pairs} pairs".format(**ratio))
    print(f"gpdfx {__version__}, torch {about['torch']}, Python {sys.version.split()[0]},")
    print(about["machine"])


if __name__ == "__main__":
    main()
