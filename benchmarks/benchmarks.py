"""Lets ``python benchmarks/speed.py`` do what ``python -m benchmarks.speed`` does.

A script that is run by its path finds modules in its own folder first, and there this file is what
it imports as ``benchmarks``. It stands for the package, and puts the checkout's root in the place
of the folder, so that ``gpdfx`` is this checkout's. Scripts import ``benchmarks`` before ``gpdfx``.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
__path__ = [str(Path(__file__).resolve().parent)]
