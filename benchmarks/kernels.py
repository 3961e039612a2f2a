"""Compile the Triton kernels ahead of time, for GPUs that need not be there.

    python -m benchmarks.kernels        # benchmarks/results/kernels.csv, about a minute

One row for each kernel, architecture and types of parameters and products: registers of a thread,
bytes of shared memory and of stack, instructions that spill (load from and store to local memory).
``TRITON_INTERPRET`` must not be set.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.networks import RESULTS
from gpdfx.kernels.fold import launch
from gpdfx.kernels.fold import triton_kernels as k

ARCHITECTURES = (80, 90)
TYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),  # under autocast
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"table": "*i64", "programs": "*i32"}


def configurations() -> Iterator[tuple[Any, torch.dtype, torch.dtype, dict[str, Any]]]:
    """Kernel, types of parameters and products, constants: as ``launch`` calls them."""
    block = {"BLOCK": launch.BLOCK}
    wide = block | {"EXPANDED": 8}
    sums = wide | {"ROWS": launch.ROWS, "SPLITS": launch.SPLITS}
    for own, made in TYPES:
        yield k.prepare, own, made, block
        yield k.combine, own, made, wide
        yield k.scatter, own, made, wide | {"BLOCK": launch.block(wide["EXPANDED"])}
        yield k.finish, own, made, sums
        if own == made:
            yield k.reduce, own, made, {"BLOCK": 8 * launch.BLOCK}
    for kernel in (k.combine, k.scatter):  # no depthwise-separable branch in any layer
        yield kernel, torch.float32, torch.float32, block | {"EXPANDED": 1}


def build(kernel: Any, own: torch.dtype, made: torch.dtype, constants: Any, arch: int) -> Any:
    names = kernel.arg_names
    given = constants | {"dtype": launch.TYPES[own], "made": launch.TYPES[made]}
    source = ASTSource(
        fn=kernel,
        signature={n: POINTERS.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in given.items() if n in names},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in POINTERS},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})


def inspect(compiled: Any) -> dict[str, int]:
    """What the machine code needs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    numbers = {key: int(n) for key, n in re.findall(r"(REG|STACK):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared": compiled.metadata.shared,
    }


def _run(tool: str, *arguments: str) -> str:
    command = [str(TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def rows() -> Iterator[dict[str, Any]]:
    for arch in ARCHITECTURES:
        for kernel, own, made, constants in configurations():
            yield {
                "kernel": kernel.fn.__name__,
                "arch": f"sm_{arch}",
                "parameters": str(own).removeprefix("torch."),
                "products": str(made).removeprefix("torch."),
                "constants": " ".join(f"{key}={value}" for key, value in constants.items()),
                **inspect(build(kernel, own, made, constants, arch)),
                "triton": triton.__version__,
            }


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    found = list(rows())
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "kernels.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
