"""Times of two things against each other, and what else a device tells of them.

``paired`` runs both in one process, interleaved, the first of a pair by turns: what a machine does
meanwhile hits both alike. Quantiles are over the pairs' ratios.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Call = Callable[[], Any]
Row = dict[str, Any]
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
LAUNCHES += ("cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


# --------------------------------------------------------------------------- time
def seconds(call: Call, steps: int = 1, device: str = "cpu") -> float:
    """Of one call, the mean of ``steps`` in a row; on GPUs by events of the stream."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(steps):
            call()
        return (time.perf_counter() - start) / steps
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(steps):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / steps


def paired(
    one: Call, other: Call, pairs: int, steps: int = 1, device: str = "cpu"
) -> list[tuple[float, float]]:
    """Seconds of a call of both, by pairs, after a warm-up."""
    one(), other()
    found = []
    for k in range(pairs):
        taken = [0.0, 0.0]
        for which in (0, 1) if k % 2 else (1, 0):
            taken[which] = seconds((one, other)[which], steps, device)
        found.append((taken[0], taken[1]))
    return found


def quantiles(values: Sequence[float]) -> Row:
    """Median, 20 % and 80 %."""
    several = [*values, *values] if len(values) == 1 else values
    low, *_, high = statistics.quantiles(several, n=5, method="inclusive")
    return {
        "median": f"{statistics.median(values):.4g}",
        "low": f"{low:.4g}",
        "high": f"{high:.4g}",
        "pairs": len(values),
    }


# --------------------------------------------------------------------------- counts
class Counter(TorchDispatchMode):
    """Ops that reach the dispatcher and compute (views do not), and multiply-adds of those that
    PyTorch has a formula for: convolutions and matrix products. ``opaque``: there were ops of
    gpdfx's own, whose products nothing sees."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.macs = 0
        self.opaque = False

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = op(*args, **(kwargs or {}))
        self.ops += not op.is_view
        self.opaque |= op.namespace == "gpdfx"
        formula = flop_registry.get(op.overloadpacket)
        if formula is not None:
            self.macs += int(formula(*args, **(kwargs or {}), out_val=out)) // 2
        return out


def counted(call: Call) -> Counter:
    """An eager call, its backward included, as the dispatcher sees it."""
    with Counter() as counter:
        call()
    return counter


def profiled(call: Call) -> dict[str, int]:
    """What the host and a GPU do in one call, how often, by ``torch.profiler``."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    return {event.key: event.count for event in found.key_averages()}


def launches(call: Call) -> int:
    """What the host asks a GPU for in one call: kernels, graphs, copies."""
    return sum(count for name, count in profiled(call).items() if name in LAUNCHES)


def products(call: Call) -> int:
    """Kernels of matrix products in one call, by the names that cuBLAS gives them."""
    known = re.compile(r"gemm|gemv|cutlass|nvjet|splitK", re.IGNORECASE)
    return sum(count for name, count in profiled(call).items() if known.search(name))


def peak(call: Call, held: Sequence[Tensor]) -> float:
    """MiB that an eager call needs on a GPU at most, with the tensors that it ``held`` before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    grown = torch.cuda.max_memory_allocated() - before
    return (grown + sum(x.numel() * x.element_size() for x in held)) / 2**20


# --------------------------------------------------------------------------- the machine
def machine(device: str = "cpu") -> Row:
    """What measured."""
    try:
        triton = installed("triton")
    except PackageNotFoundError:
        triton = ""
    name = f"{platform.machine()}, {os.cpu_count()} cores"
    return {
        "torch": torch.__version__,
        "triton": triton,
        "cuda": (torch.version.cuda or "") if device == "cuda" else "",
        "driver": _driver() if device == "cuda" else "",
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if device == "cuda" else name,
    }


@functools.cache
def _driver() -> str:
    """Of the first GPU; empty where nothing tells it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        return ""
