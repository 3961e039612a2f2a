"""The Triton kernels: interpreted on the CPU, compiled for GPUs that are not there, and run on one
that is."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpdfx.branches.layer import Layer
from gpdfx.distill.gpd import GPD
from gpdfx.kernels.fold import key_of, reference
from gpdfx.kernels.fold.op import backward_op, fold_op, refusal

from .layers import LAYERS, Case, plain_teacher

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, below")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

# Layouts, groups, odd sizes, inputs and rows in several blocks of the test's small blocks.
ODD = (
    (Layer(1, 3, 5, (3,), "conv"), "orepa"),
    (Layer(2, 2, 3, (2,), "transposed"), "orepa"),
    (Layer(3, 1, 1, (3,), "conv"), "orepa"),
    (Layer(1, 1, 2, (1, 2, 1), "conv"), "orepa"),
    (Layer(1, 3, 6, (), "linear"), "lowrank"),
    (Layer(1, 2, 3, (), "matrix"), "lowrank"),
    (Layer(2, 2, 3, (2,), "transposed"), "none"),
    (Layer(1, 3, 6, (), "linear"), "none"),
)


def process(command: list[str], **variables: str) -> None:
    """Run in a process of its own, whose kernels are decorated anew."""
    root = Path(__file__).parent.parent
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command],
        env=clean | {"PYTHONPATH": str(root)} | variables,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stdout[-4000:] + done.stderr[-4000:]


def test_the_interpreter_agrees_with_the_reference() -> None:
    process(["-m", "pytest", __file__, "-k", "kernels_are"], TRITON_INTERPRET="1")


def test_nothing_spills_on_any_architecture(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    process(["-m", "benchmarks.kernels", str(path)])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["kernel"] for row in rows} == {"prepare", "combine", "scatter", "finish", "reduce"}
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90"}
    for row in rows:
        assert row["stack"] == row["spills"] == "0", row
        assert int(row["registers"]) <= 255, row


# --------------------------------------------------------------------------- against the reference
def exactly(case: Case, grads: Any) -> list[Tensor]:
    """Weights and gradients in float64, of the same numbers."""
    tensors = [t.detach().double() if t.is_floating_point() else t for t in case.tensors]
    return plainly(case, tensors, [None if g is None else g.double() for g in grads])


def plainly(case: Case, tensors: list[Tensor], grads: Any) -> list[Tensor]:
    weights = reference.forward(case.site, tensors, True, True)
    found = [*weights, *reference.backward(case.site, tensors, *grads)]
    return [x for x in found if x is not None]


def summands(case: Case, grads: Any) -> list[Tensor]:
    """The same with absolute values everywhere: nothing cancels."""
    tensors = [t.detach().double().abs() if t.is_floating_point() else t for t in case.tensors]
    return plainly(case, tensors, [None if g is None else g.double().abs() for g in grads])


def order(x: Tensor) -> list[int]:
    """Strides that count."""
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).square().mean().sqrt())


def compare(cases: list[Case], made: torch.dtype, seen: str = "both") -> None:
    """All layers in one launch. The error of each tensor is at most 1.5 times that of plain torch
    in the same type, or a unit in the last place of the sum of its summands' absolute values.
    ``seen``: ``"one each"`` leaves the first layer without the student's gradient, the second
    without the teacher's."""
    from gpdfx.kernels.fold import launch

    sites = [case.site for case in cases]
    owned = [[t.detach() for t in case.tensors] for case in cases]
    weights = launch.forward(sites, owned, True, made)
    grads: list[Any] = [[torch.randn_like(wide), torch.randn_like(own)] for wide, own in weights]
    if seen == "one each":
        grads[0][1] = grads[1][0] = None
    back = launch.backward(sites, owned, grads, made)
    for case, pair, given, found, tensors in zip(cases, weights, grads, back, owned, strict=True):
        got = [x for x in (*pair, *found) if x is not None]
        exact = exactly(case, given)
        with torch.autocast(got[0].device.type, made, enabled=made != case.dtype):
            own = plainly(case, tensors, given)
        sizes = summands(case, given)
        for k, (mine, theirs, true) in enumerate(zip(got, own, exact, strict=True)):
            assert mine.shape == theirs.shape
            assert k > 1 or order(mine) == order(theirs)
            assert mine.isfinite().all(), (case.layer, k)
            a_unit = torch.finfo(case.dtype).eps * float(sizes[k].square().mean().sqrt())
            limit = max(1.5 * error(theirs, true), a_unit)
            assert error(mine, true) <= limit, (case.layer, k, error(mine, true), limit)


@pytest.fixture
def poisoned() -> Any:
    """Fresh memory is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@interpreted
@pytest.mark.parametrize("types", ["float32", "float16", "autocast"])
def test_kernels_are_as_exact_as_torch(
    types: str, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpdfx.kernels.fold import launch

    monkeypatch.setattr(launch, "BLOCK", 4)
    monkeypatch.setattr(launch, "ROWS", 4)
    monkeypatch.setattr(launch, "SPLITS", 2)
    own = torch.float16 if types == "float16" else torch.float32
    made = torch.float32 if types == "float32" else torch.float16
    layers = ODD if types == "float32" else ODD[:1]
    cases = [Case(layer, chosen, own) for layer, chosen in layers]
    compare(cases, made, "one each" if types == "float32" else "both")


@interpreted
def test_kernels_are_given_new_addresses() -> None:
    """A parameter that moves is found again, and so are new shares in the old place."""
    from gpdfx.kernels.fold import launch

    case = Case(Layer(1, 2, 2, (), "linear"), "lowrank", torch.float32)
    for _ in range(2):
        owned = [t.detach().clone() for t in case.tensors]
        for _ in range(2):
            (pair,) = launch.forward([case.site], [owned], True, torch.float32)
            want = reference.forward(case.site, owned, True, True)
            torch.testing.assert_close(pair, want)
            owned[2].mul_(2)


@interpreted
def test_matrices_of_shares_end_with_their_tables() -> None:
    from gpdfx.kernels.fold import launch

    before = len(launch.TABLES.shares)
    case = Case(Layer(1, 2, 2, (), "linear"), "lowrank", torch.float32)
    owned = [t.detach().clone() for t in case.tensors]
    for _ in range(2):
        launch.forward([case.site], [owned], True, torch.float32)
        assert len(launch.TABLES.shares) == before + 1
    del owned
    assert len(launch.TABLES.shares) == before


@interpreted
def test_a_graph_under_capture_leaves_nothing_but_what_it_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is made meanwhile is the graph's; shares that were there stay as long as the graph."""
    from gpdfx.kernels.fold import launch

    case = Case(Layer(1, 2, 2, (), "linear"), "lowrank", torch.float32)
    owned = [t.detach().clone() for t in case.tensors]
    monkeypatch.setattr(launch, "TABLES", launch.Tables())
    launch.forward([case.site], [owned], True, torch.float32)
    before = dict(launch.TABLES.made)
    (matrix,) = launch.TABLES.shares.values()
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: x)
    for k in range(2):
        (pair,) = launch.forward([case.site], [owned], True, torch.float32)
        torch.testing.assert_close(pair, reference.forward(case.site, owned, True, True))
        assert before.keys() == launch.TABLES.made.keys()
        assert [id(x) for x in launch.TABLES.shares.values()] == [id(matrix)]
        kept = launch.TABLES.captured.values()
        assert any(x is matrix for x in kept) == (k == 0)
        owned[2].mul_(2)  # other shares, which are made in the graph
        launch.TABLES.captured.clear()


@interpreted
def test_kernels_are_there_for_channels_last() -> None:
    layer = Layer(1, 2, 3, (2, 2), "conv")
    case = Case(layer, "orepa", torch.float32)
    case.origin = case.origin.detach().to(memory_format=torch.channels_last).requires_grad_()
    compare([case], torch.float32)


# --------------------------------------------------------------------------- the operator
@pytest.mark.parametrize(
    ("which", "chosen"),
    [("grouped", "orepa"), ("transposed", "orepa"), ("linear", "lowrank"), ("grouped", "none")],
)
@pytest.mark.parametrize("whole", [False, True])
def test_the_operator_is_registered_well(which: str, chosen: str, whole: bool) -> None:
    """``whole``: the student's weight is all of the teacher's."""
    case = Case(LAYERS[which], chosen, torch.float32)
    if whole:
        case.site = replace(case.site, cut=None)
    key, index = key_of((case.site,)), list(range(len(case.tensors)))
    for asked in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(fold_op, (case.tensors, index, key, *asked, None))
    made = fold_op(case.tensors, index, key, True, True, None)
    grads = [torch.randn_like(w) for w in made]
    detached = [t.detach() for t in case.tensors]
    torch.library.opcheck(backward_op, (grads, detached, index, key, True, True, None))
    torch.library.opcheck(backward_op, (grads[1:], detached, index, key, False, True, None))
    torch.autograd.backward(made, grads)
    operator = [t.grad for t in case.leaves]
    function = torch.autograd.grad(case.fused(), case.leaves, grads)
    torch.testing.assert_close(operator, list(function))


def test_what_has_no_kernel_is_named() -> None:
    _, teacher, _ = plain_teacher({"*": "orepa", "twice": "acnet", "head": "lowrank"})
    report = teacher.report()
    assert report.unfused == {"twice.weight": "there is no kernel for Line"}
    assert "1 fold in plain torch on a GPU" in str(report)
    assert all(not refusal(site) for site in (Case(*one).site for one in ODD))


# --------------------------------------------------------------------------- on a GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["conv", "grouped", "depthwise", "transposed", "1x1"])
@gpu[0]
@gpu[1]
def test_kernels_on_a_gpu(which: str, dtype: torch.dtype, poisoned: None) -> None:
    layer = LAYERS[which]
    case = Case(layer, "orepa" if layer.spatial else "lowrank", dtype)
    for name in ("origin", "table", "classes"):
        setattr(case, name, getattr(case, name).detach().cuda())
    case.scales = [t.detach().cuda() for t in case.scales]
    case.own = [{name: t.detach().cuda() for name, t in own.items()} for own in case.own]
    compare([case], dtype)


@gpu[0]
@gpu[1]
def test_a_step_on_a_gpu_is_the_step_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model, _, x = plain_teacher("auto")
    gpd = GPD(model, example_inputs=(x,)).eval()
    y = torch.randint(0, 5, (len(x),))
    found = []
    for device, call in (
        ("cpu", gpd),
        ("cuda", gpd),
        ("cuda", torch.compile(gpd, fullgraph=True, dynamic=False)),
    ):
        gpd.to(device).zero_grad()
        call(x.to(device), y.to(device)).loss.backward()
        grads = [p.grad for p in gpd.parameters() if p.grad is not None]
        found.append([g.clone().cpu() for g in grads])  # `to` moves the gradients, too
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-3, atol=1e-4)
