"""Folding the branches alone, against copying as many bytes as it has to move."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import gpdfx
from benchmarks.speed_steps import DTYPES, GRAPH, Setting, capture
from benchmarks.timing import Call, Row, counted, launches, paired, products, quantiles
from gpdfx.passes.folded import teachers


def fold_rows(
    teacher: gpdfx.Teacher, setting: Setting, name: str, way: str, pairs: int, steps: int
) -> Iterator[Row]:
    """Forward, and forward and backward. Bytes are those that any implementation has to move:
    parameters p and folded weights w once each way, so p + w forward (read p, write w), and
    2 p + w more backward (read p and the gradient of w, write the gradient of p). ``macs``: a
    count, not a ratio, and empty where nothing sees it."""
    device, cast = setting.device, DTYPES[setting.dtype]
    with torch.no_grad():
        folded = teacher._fold()
    owned = {id(p): p for fold in teacher.folds() for p in fold.parameters()}
    owned |= {id(p): p for n, p in teacher.named_parameters() if teachers(n) in folded}
    params = [p for p in owned.values() if p.requires_grad]
    read, written = _bytes(params), _bytes(folded.values())
    grads = {key: torch.randn_like(x) for key, x in folded.items()}

    def fold() -> dict[str, Tensor]:
        with torch.autocast(device, cast, enabled=cast is not None):
            return teacher._fold()

    def forward() -> None:
        with torch.no_grad():
            fold()

    def both() -> None:
        weights = fold()
        kept = [x for x in weights.values() if x.requires_grad]
        outer = [grads[key] for key, x in weights.items() if x.requires_grad]
        torch.autograd.grad(kept, params, outer, allow_unused=True)

    for what, call, moved in (
        ("fold forward", forward, read + written),
        ("fold forward + backward", both, 3 * read + 2 * written),
    ):
        source, target = torch.randn(2, moved // 8, device=device)

        def copy(source: Tensor = source, target: Tensor = target) -> None:
            target.copy_(source)

        row = _row(what, call, copy, moved, setting, way, pairs, steps)
        yield row | {"branches": name, "way": way}


def _row(
    what: str,
    call: Call,
    copy: Call,
    moved: int,
    setting: Setting,
    way: str,
    pairs: int,
    steps: int,
) -> Row:
    run = capture(call) if way == GRAPH else call
    both = paired(copy, run, pairs, steps, setting.device)
    copies, folds = zip(*both, strict=True)
    row: Row = {"what": what, "against": "copy of its bytes"}
    row |= quantiles([a / b for a, b in both])
    for prefix, seconds in (("", folds), ("against_", copies)):
        row[f"{prefix}seconds"] = quantiles(seconds)["median"]
        row[f"{prefix}gb_s"] = f"{moved / 1e9 / float(row[f'{prefix}seconds']):.3g}"
    counts = counted(call)
    row |= {"ops": counts.ops, "macs": "" if counts.opaque else counts.macs}
    if setting.device == "cuda":
        row["launches"], row["products"] = launches(run), products(call)
    return row


def _bytes(tensors: object) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)  # type: ignore[attr-defined]
