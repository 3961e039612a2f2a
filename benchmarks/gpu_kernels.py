"""Whether every form of the fold's kernels is right on this device: ``benchmarks.gpu``."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.kernels import BRIEF, LAYERS
from benchmarks.layers import Case, deviations
from benchmarks.timing import Row
from gpdfx.kernels.fold import function, refusal

FIELDS = ("form", "type", "by", "error", "plain_error", "ratio", "ok", "tensors")
FIELDS += ("first_s", "forward_s", "backward_s", "torch", "triton", "cuda", "driver", "machine")
TYPES = {
    "float32": (torch.float32, None),
    "autocast": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
}
"""Of parameters and, if another, of products."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BOUND = 1.5


def forms() -> list[tuple[str, str]]:
    """Names of a form and of a type, those that most networks have first."""
    names = sorted((name for name, *_ in LAYERS), key=lambda name: name not in BRIEF)
    types = [t for t in TYPES if not INTERPRETED or t in ("float32", "float16")]
    both = [(name, kind) for kind in types for name in names]
    return sorted(both, key=lambda one: one[0] not in BRIEF)


def check(name: str, kind: str, device: str) -> Row:
    """Weights and gradients of two calls, with other numbers in the same tensors, relative to the
    error of plain torch: the worst tensor. Fresh memory is full of NaN, and so are the results of
    the first call when the second begins. ``first_s``: of the first call, which compiles."""
    if INTERPRETED:
        function.KERNELS.add("cpu")
    _, layer, chosen, options = next(one for one in LAYERS if one[0] == name)
    if device == "cpu":
        groups, outputs, inputs = (min(n, 8) for n in layer.shape[:3])
        layer = replace(layer, groups=groups, outputs=outputs, inputs=inputs)
    dtype, half = TYPES[kind]
    case = Case(layer, chosen, dtype, options.get("mean", False)).change(lambda t: t.to(device))
    case = case.last() if options.get("last") else case
    case = case if options.get("aligned", True) else case.change(shifted)
    seconds: list[float] = []
    worst, count = None, 0
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory
    try:
        for _ in range(2):
            with torch.no_grad():
                for t in case.leaves:
                    t.copy_(torch.randn(t.shape))
            made, grads, found, *taken = once(case, device, half)
            seconds += taken
            got = [*(w.detach() for w in made), *found]
            each = list(deviations([case], (True, True), [grads], got, half))
            bad = max((d for *_, d in each), key=lambda d: (d.ratio != d.ratio, d.ratio))
            worst = max(filter(None, (worst, bad)), key=lambda d: (d.ratio != d.ratio, d.ratio))
            count += len(each)
            for x in got:
                x.fill_(torch.nan)
            del made, grads, found, got, each
    finally:
        torch.use_deterministic_algorithms(False)
    assert worst is not None
    fused = device in function.KERNELS and not refusal(case.site)
    return {
        "form": name,
        "type": kind,
        "by": "kernels" if fused else "plain torch",
        "error": worst.error,
        "plain_error": worst.plain,
        "ratio": worst.ratio,
        "ok": worst.ratio <= BOUND,
        "tensors": count,
        "first_s": seconds[0] + seconds[1],
        "forward_s": seconds[2],
        "backward_s": seconds[3],
        **timing.machine(device),
    }


def once(
    case: Case, device: str, half: torch.dtype | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor], float, float]:
    """Weights, random gradients of these, those of all parameters, seconds of both directions."""
    made: list[Tensor] = []
    found: list[Tensor] = []

    def forward() -> None:
        with torch.autocast(device, half, enabled=half is not None):
            made.extend(case.fused())

    def backward() -> None:
        found.extend(torch.autograd.grad(made, case.leaves, grads))

    first = timing.seconds(forward, device=device)
    grads = [torch.empty_like(w).copy_(torch.randn(w.shape)) for w in made]
    return made, grads, found, first, timing.seconds(backward, device=device)


def shifted(x: Tensor) -> Tensor:
    """The same numbers at an address that is no multiple of 16 bytes."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
