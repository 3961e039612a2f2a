"""The Triton kernels without a GPU: their code, and what a fold costs the host.

    python -m benchmarks.kernels          # benchmarks/results/kernels.csv, some minutes
    python -m benchmarks.kernels host     # benchmarks/results/kernels_host.csv
    python -m benchmarks.kernels bytes    # benchmarks/results/kernels_bytes.csv

Without an argument, kernels are compiled for GPUs that need not be there: one row for each form,
kernel, architecture and type, with registers of a thread, bytes of shared memory and of stack,
instructions that spill (load from and store to local memory), loads and stores of 16 bytes.

``host``: milliseconds of a fold of ResNet-50 x2 with the default branches, forward and backward,
while nothing is launched: kernels and matrix products are counted and not called. ``launcher``:
without the ``node`` of autograd. ``empty``: as many calls of an empty function; of a node, one that
takes and returns as many tensors and does nothing else.

``bytes``: what the elementwise kernels move, relative to the least: ``benchmarks.kernels_bytes``.

``TRITON_INTERPRET`` must not be set.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import kernels_bytes
from benchmarks.layers import Case
from benchmarks.tables import RESULTS, Table, command_line
from benchmarks.timing import Call, machine, paired, quantiles
from gpdfx import Teacher, expand, models
from gpdfx.branches.layer import Layer
from gpdfx.kernels.fold import function, launch, op
from gpdfx.kernels.fold import triton_kernels as k

ARCHITECTURES = (80, 90, 100)
TYPES = ((torch.float32, "*fp32", "*fp32"), (torch.float32, "*fp32", "*bf16"))
TYPES += ((torch.bfloat16, "*bf16", "*bf16"), (torch.float16, "*fp16", "*fp16"))
"""Of parameters and of products."""
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = dict.fromkeys(("sizes", "addresses", "targets", "grads", "items", "table"), "*i64")
POINTERS |= {"programs": "*i32", "index": "*i32", "sums": "*fp32"}
DENSE, POINT = Layer(1, 128, 256, (3, 3), "conv"), Layer(1, 128, 256, (1, 1), "conv")
LAYERS: tuple[tuple[str, Layer, str, dict[str, Any]], ...] = (
    *((name, DENSE, name, {}) for name in ("none", "orepa", "acnet", "repvgg")),
    *((f"{name} last", DENSE, name, {"last": True}) for name in ("none", "orepa", "acnet")),
    *((f"{name} mean", DENSE, name, {"mean": True}) for name in ("none", "orepa")),
    ("7x7 orepa", Layer(1, 128, 64, (7, 7), "conv"), "orepa", {}),
    ("1x1 lowrank", POINT, "lowrank", {}),
    ("linear lowrank", Layer(1, 256, 256, (), "linear"), "lowrank", {}),
    ("1x1 none", POINT, "none", {}),
    ("depthwise orepa", Layer(256, 1, 1, (3, 3), "conv"), "orepa", {}),
    ("transposed orepa", Layer(1, 128, 256, (2, 2), "transposed"), "orepa", {}),
    ("unaligned orepa", DENSE, "orepa", {"aligned": False}),
)
"""Forms of layers: name, layer, branches."""
BRIEF = ("none", "orepa", "acnet last", "1x1 lowrank", "unaligned orepa")


# --------------------------------------------------------------------------- code
def form(
    layer: Layer,
    name: str,
    dtype: torch.dtype,
    last: bool = False,
    mean: bool = False,
    aligned: bool = True,
) -> launch.Form:
    """As ``launch`` makes it for a layer twice as wide as the student's."""
    case = Case(layer, name, dtype, mean)
    case = case.last() if last else case
    return launch.Layout(case.site, case.tensors, True, True, aligned).form


def cases(brief: bool) -> Iterator[tuple[str, bool, Any, str, str, dict[str, Any], int]]:
    """Form, whether it is aligned, kernel, types of parameters and products, constants, warps."""
    for dtype, parameters, products in TYPES[:1] if brief else TYPES:
        types = parameters, products
        for name, layer, chosen, options in LAYERS:
            if brief and name not in BRIEF:
                continue
            made = form(layer, chosen, dtype, **options)
            for kernel in (k.combine, k.scatter):
                yield name, made.unit > 1, kernel, *types, {"F": made}, made.warps
        kind = launch.TYPES[dtype]
        for taps in (1, 9):
            shared = {"dtype": kind, "TAPS": taps, "BLOCK": launch.BLOCK, "UNIT": launch.UNIT}
            yield f"taps {taps}", True, k.prepare, *types, shared, 4
            yield f"taps {taps}", True, k.finish, *types, shared, 4
        for source in {"*fp32", products}:
            yield source, True, k.reduce, parameters, source, {"BLOCK": launch.BLOCK}, 4


def build(
    kernel: Any, parameters: str, products: str, constants: Any, warps: int, arch: int
) -> Any:
    names = kernel.arg_names
    pointers = POINTERS | {"out": parameters, "staging": products, "source": products}
    signature = {n: pointers.get(n, "constexpr") for n in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={
            (n,): [["tt.divisibility", 16]]
            for n, name in enumerate(names)
            if signature[name] != "constexpr"
        },
    )
    target = GPUTarget("cuda", arch, 32)
    options = {"num_warps": warps, "maxnreg": launch.REGISTERS}
    return triton.compile(source, target=target, options=options)


def inspect(compiled: Any) -> dict[str, int]:
    """What the machine code needs, and has."""
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
        "loads_16_bytes": len(re.findall(r"\bLDG\.E\.128\b", code)),
        "stores_16_bytes": len(re.findall(r"\bSTG\.E\.128\b", code)),
    }


def _run(tool: str, *arguments: str) -> str:
    command = [str(TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def code_rows(architectures: list[int], brief: bool) -> Iterator[dict[str, Any]]:
    for arch in architectures:
        for name, aligned, kernel, parameters, products, constants, warps in cases(brief):
            yield {
                "form": name,
                "kernel": kernel.fn.__name__,
                "aligned": aligned,
                "arch": f"sm_{arch}",
                "parameters": parameters.removeprefix("*"),
                "products": products.removeprefix("*"),
                "warps": warps,
                **inspect(build(kernel, parameters, products, constants, warps, arch)),
                "triton": triton.__version__,
            }


# --------------------------------------------------------------------------- the host
def resnet(network: str, branches: Any, size: int = 64) -> Teacher:
    model = models.load(network, classes=1000, shape=(3, size, size))
    example = (torch.randn(2, 3, size, size),)
    return expand(model, 2, example_inputs=example, branches=branches, verify=False)


class _Given(torch.autograd.Function):
    """A node that keeps what it takes, and whose results and gradients are given."""

    @staticmethod
    def forward(results: list[Tensor], grads: list[Tensor | None], *tensors: Tensor) -> Any:
        return tuple(results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.grads = inputs[1]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.grads


def _repeat(call: Call, times: int) -> None:
    for _ in range(times):
        call()


def host_rows(network: str, branches: Any, pairs: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of a direction, and of as many calls of an empty function."""
    teacher = resnet(network, branches)
    (chunk,) = teacher._folding.whole
    params = [p for p in teacher.parameters() if p.requires_grad]
    tensors = chunk.tensors()
    own = [tensors[n].detach() for n in chunk.index]
    asked = chunk.key, True, True, None
    launched = 0

    def empty(*given: Any, **constants: Any) -> None:
        nonlocal launched
        launched += 1

    @torch.no_grad()
    def launcher(grads: Any = None) -> None:
        op.by_kernels(grads, own, *asked)

    with (
        mock.patch.multiple(launch, launch=empty, multiply=empty),
        mock.patch.object(function, "KERNELS", {"cpu"}),
    ):
        weights = op.by_kernels(None, own, *asked)
        grads = [None if w is None else torch.randn_like(w) for w in weights]
        made = [w for w in chunk(True, True).values() if w.requires_grad]
        results = [torch.empty_like(w) for w in made]
        nothing = partial(
            _Given.apply,
            results,
            [torch.empty_like(p) if p.requires_grad else None for p in tensors],
        )

        def back(*made: Tensor) -> Call:
            """Through the node, from the gradients that the rest of a network has."""
            (loss,) = _Given.apply(
                [made[0].new_zeros(())], [torch.randn_like(w) for w in made], *made
            )
            return lambda: torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)

        whole: dict[str, tuple[Call, Call | None]] = {
            "launcher forward": (launcher, None),
            "launcher backward": (lambda: launcher(grads), None),
            "node forward": (lambda: chunk(True, True), lambda: nothing(*tensors)),
            "node backward": (back(*made), back(*nothing(*tensors))),
        }
        for what, (call, alike) in whole.items():
            call()
            launched = 0
            call()
            count = launched
            both = paired(call, alike or partial(_repeat, empty, count), pairs)
            yield {
                "what": what,
                "network": network,
                "branches": branches,
                "launches": count,
                "tensors": len(own),
                "results": sum(x is not None for x in weights),
                **quantiles([a * 1e3 for a, _ in both]),
                "empty": quantiles([b * 1e3 for _, b in both])["median"],
                **machine(),
            }


def main() -> None:
    parser = command_line("kernels", __doc__)
    parser.add_argument("what", nargs="?", choices=("code", "host", "bytes"), default="code")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--brief", action="store_true", help="some forms, in float32")
    parser.add_argument("--network", default="torchvision:resnet50")
    parser.add_argument("--branches", default="auto")
    parser.add_argument("--pairs", type=int, default=50)
    given = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    if given.what == "code":
        path, rows = "kernels.csv", list(code_rows(given.arch, given.brief))
    elif given.what == "bytes":
        path, rows = "kernels_bytes.csv", []
        for network, branches in product(kernels_bytes.NETWORKS, kernels_bytes.SETS):
            chosen = None if branches == "none" else branches
            teacher = resnet(network, chosen, kernels_bytes.SIZE)
            rows += kernels_bytes.rows(network, branches, teacher)
    else:
        path = "kernels_host.csv"
        rows = list(host_rows(given.network, given.branches, given.pairs))
    Table(given.out or RESULTS / path, list(rows[0]), end="\r\n").write(rows)


if __name__ == "__main__":
    main()
