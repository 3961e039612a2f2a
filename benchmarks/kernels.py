"""Compile the Triton kernels ahead of time, for GPUs that need not be there.

    python -m benchmarks.kernels        # benchmarks/results/kernels.csv, about a minute

One row for each kernel, architecture and types of parameters and products: registers of a thread,
bytes of shared memory and of stack, instructions that spill (load from and store to local memory).
``TRITON_INTERPRET`` must not be set.
"""

from __future__ import annotations

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

from benchmarks.tables import RESULTS, Table, command_line
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
    expanded = block | {"EXPANDED": 8}
    sums = expanded | {"ROWS": launch.ROWS, "SPLITS": launch.SPLITS}
    for parameters, products in TYPES:
        yield k.prepare, parameters, products, block
        yield k.combine, parameters, products, expanded
        scattered = expanded | {"BLOCK": launch.block(expanded["EXPANDED"])}
        yield k.scatter, parameters, products, scattered
        yield k.finish, parameters, products, sums
        if parameters == products:
            yield k.reduce, parameters, products, {"BLOCK": 8 * launch.BLOCK}
    for kernel in (k.combine, k.scatter):  # no depthwise-separable branch in any layer
        yield kernel, torch.float32, torch.float32, block | {"EXPANDED": 1}


def build(
    kernel: Any, parameters: torch.dtype, products: torch.dtype, constants: Any, arch: int
) -> Any:
    names = kernel.arg_names
    given = constants | {"dtype": launch.TYPES[parameters], "made": launch.TYPES[products]}
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
        for kernel, parameters, products, constants in configurations():
            yield {
                "kernel": kernel.fn.__name__,
                "arch": f"sm_{arch}",
                "parameters": str(parameters).removeprefix("torch."),
                "products": str(products).removeprefix("torch."),
                "constants": " ".join(f"{key}={value}" for key, value in constants.items()),
                **inspect(build(kernel, parameters, products, constants, arch)),
                "triton": triton.__version__,
            }


def main() -> None:
    parser = command_line("kernels", __doc__)
    parser.add_argument("path", type=Path, nargs="?", default=RESULTS / "kernels.csv")
    given = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    measured = list(rows())
    Table(given.path, list(measured[0]), end="\r\n").write(measured)


if __name__ == "__main__":
    main()
