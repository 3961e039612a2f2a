"""Every op of torch that makes a tensor, and what becomes of it in a teacher.

    python -m benchmarks.ops            # write docs/ops.md

*signature* and *function*: it has a rule, a line read like einops or code. *composed*: torch makes
it of others, and so does the teacher. *in place*: where nobody sees that memory else it becomes the
op without the underscore. *bridged*: it runs at the student's width, for the reason given, as does
every ``out=``, and what libraries add without a rule. *not captured*: no export has it, for the
reason given. There is no other class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import command_line
from gpdfx.passes.canonicalize import functional
from gpdfx.passes.rules import bridged, rule_of
from gpdfx.torch_private import aten_names, is_composite

FILE = Path(__file__).resolve().parents[1] / "docs" / "ops.md"

NOT_CAPTURED = {
    "another layout or backend, in which no parameter of a student is": (
        "*sparse* *_csr* *_coo* *csc* *bsc* *bsr* coalesce _coalesce* *_indices* indices* *values* "
        "smm hspmm *nested* *jagged* *mkldnn* *cudnn* *miopen* *_mps* *mps_* *nnpack* _cslt* "
        "_spdiags to_dense _to_dense _*_sparse* resize_as_sparse* copy_sparse*"
    ),
    "quantized numbers: a student is expanded before it is converted": (
        "*quantized* quantize_* dequantize* *fbgemm* int_repr q_* _make_per_* _empty_*_quantized "
        "*int4* *int8* *_qparams* *_dyn_quant* _saturate* _rowwise* _scaled_mm* _scaled_grouped* "
        "_mixed_dtypes* *wrapped* *cachemask* _int_mm _fused_moving_avg_obs_fq_helper"
    ),
    "a derivative, which autograd takes": "*backward* *_jvp *_grad",
    "a kernel of another op, below what is captured": (
        "_[!_]* *_copy* native_* *_forward *_impl* slow_conv* thnn_* conv_depthwise3d *_unsafe* "
        "batch_norm_* *_helper* convolution_overrideable slice_inverse linalg__powsum split_copy* "
        "copy mm.dtype bmm.dtype addmm.dtype baddbmm.dtype *hacked_twin norm.ScalarOpt_dtype "
        "quantized_batch_norm linalg_pinv.atol*"
    ),
    "named dimensions, which export refuses": "*.names",
    "TorchScript's own": "einsum.sublist m?.a matrix_H.a numpy_T.a split.default to.prim_*",
    "it changes what a tensor is, not what it holds": (
        "resize* set* from_file to_mkldnn zero new_empty_strided empty_quantized data "
        "get_gradients requires_grad_ retain_grad swap*"
    ),
}


def classes() -> Iterator[tuple[str, str, str]]:
    """Every overload that makes a tensor: its name, its class, and what is to be said of it."""
    for name in aten_names():
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            op = getattr(packet, overload)
            out = any(a.is_out for a in op._schema.arguments)
            if not out and any("Tensor" in str(a.type) for a in op._schema.returns):
                yield str(op).removeprefix("aten."), *_class(op)


def _class(op: Any) -> tuple[str, str]:
    name = str(op).removeprefix("aten.")
    rule, twin, why = rule_of(op), functional(op), bridged.reason(op)
    if rule is not None:
        return ("signature", rule.text) if rule.text else ("function", "")
    if twin is not None and twin is not op and _class(twin)[0] in _KNOWN:
        return "in place", ""
    if why:
        return "bridged", why
    if "_foreach" in name or "_fused_" in name or "_amp_" in name:
        return "bridged", "lists of tensors, as an optimizer has them"
    for why, patterns in NOT_CAPTURED.items():
        if any(fnmatch(name, p) or fnmatch(name.split(".")[0], p) for p in patterns.split()):
            return "not captured", why
    if is_composite(op):
        return "composed", ""
    if op._schema.is_mutable:
        return "bridged", "it writes into a tensor that it is given"
    raise AssertionError(f"{name} is in no class: give it a rule, or a reason")


KINDS = ("signature", "function", "composed", "in place", "bridged", "not captured")
_KNOWN = ("signature", "function", "composed", "bridged")


def table() -> str:
    """The file as text, by class and by what is said of the ops; overloads stand with their op."""
    grouped: dict[str, dict[str, list[str]]] = {kind: {} for kind in KINDS}
    rows = list(classes())
    for name, kind, said in rows:
        grouped[kind].setdefault(said, []).append(name)
    counts = Counter(kind for _, kind, _ in rows)
    lines = ["# Operators", "", (__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    lines += [
        f"Written by `python -m benchmarks.ops`, of PyTorch {version()}: {len(rows)} overloads."
    ]
    for kind, said in grouped.items():
        lines += ["", f"## {kind.capitalize()}: {counts[kind]}", ""]
        for what, names in sorted(said.items()):
            text = (
                f"`{what}`: " if kind in ("signature", "in place") else f"{what}: " if what else ""
            )
            lines.append(f"- {text}{', '.join(_joined(names))}")
    return "\n".join(lines) + "\n"


def _joined(names: list[str]) -> list[str]:
    """``sum``, ``sum.dim_IntList`` -> ``sum (dim_IntList)``."""
    overloads: dict[str, list[str]] = {}
    for name, _, overload in (name.partition(".") for name in names):
        overloads.setdefault(name, []).append(overload)
    return [n if x == ["default"] else f"{n} ({', '.join(x)})" for n, x in overloads.items()]


def version() -> str:
    """Of the torch that is running, without its build."""
    return ".".join(torch.__version__.split("+")[0].split(".")[:2])


if __name__ == "__main__":
    command_line("ops", __doc__).parse_args()
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(table())
