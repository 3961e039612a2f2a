"""The Triton kernels: interpreted on the CPU, compiled for GPUs that are not there, and run on one
that is."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.layers import LAYERS, Case, deviations
from gpdfx.branches.kinds import LowRank
from gpdfx.branches.layer import Layer
from gpdfx.branches.term import Term
from gpdfx.distill.gpd import GPD
from gpdfx.kernels.fold import fold, function, key_of, op, reference, refusal
from gpdfx.kernels.fold.site import viewed

from .layers import plain_teacher

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, below")
compiled = pytest.mark.skipif(INTERPRETED, reason="runs in a process of its own, above")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

# Layouts, groups, odd sizes, inputs and rows in several blocks of the test's small blocks; rows
# that begin at multiples of 16 bytes, whose tensors are read as they lie.
ODD = (
    (Layer(1, 3, 5, (3,), "conv"), "orepa"),
    (Layer(2, 2, 3, (2,), "transposed"), "orepa"),
    (Layer(3, 1, 1, (3,), "conv"), "orepa"),
    (Layer(1, 1, 2, (1, 2, 1), "conv"), "orepa"),
    (Layer(1, 3, 6, (), "linear"), "lowrank"),
    (Layer(1, 2, 3, (), "matrix"), "lowrank"),
    (Layer(2, 2, 3, (2,), "transposed"), "none"),
    (Layer(1, 3, 6, (), "linear"), "none"),
    (Layer(1, 3, 3, (3, 3), "conv"), "repvgg"),
    (Layer(1, 3, 3, (2, 3), "conv"), "acnet"),
)
EVEN = (
    (Layer(1, 3, 16, (3,), "conv"), "orepa"),
    (Layer(1, 2, 16, (3, 3), "conv"), "acnet"),
    (Layer(1, 16, 16, (), "linear"), "lowrank"),
    (Layer(1, 2, 16, (3,), "conv"), "none"),
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


@compiled
def test_the_interpreter_agrees_with_the_reference() -> None:
    process(["-m", "pytest", __file__, "-n", "0"], TRITON_INTERPRET="1")


@compiled
def test_the_code_of_every_form_reads_16_bytes_and_spills_nothing(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    process(["-m", "benchmarks.kernels", "--brief", "--out", str(path)])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["kernel"] for row in rows} == {"prepare", "combine", "scatter", "finish", "reduce"}
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    for row in rows:
        assert row["stack"] == row["spills"] == "0", row
        assert int(row["registers"]) <= 255, row
        if row["kernel"] in ("combine", "scatter") and row["aligned"] == "True":
            assert int(row["loads_16_bytes"]) >= 1, row
    plain = [r for r in rows if r["kernel"] == "combine" and r["aligned"] == "False"]
    assert {r["loads_16_bytes"] for r in plain} == {"0"}


# --------------------------------------------------------------------------- against the reference
def flat(cases: list[Case]) -> tuple[str, list[Tensor]]:
    return key_of(tuple(c.site for c in cases)), [t.detach() for c in cases for t in c.tensors]


def order(x: Tensor) -> list[int]:
    """Strides that count."""
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def compare(
    cases: list[Case],
    half: torch.dtype | None = None,
    asked: tuple[bool, bool] = (True, True),
    lost: Sequence[tuple[int, int]] = (),
) -> None:
    """All layers in one fold. The error of each tensor is at most 1.5 times that of plain torch in
    the same type, or a unit in the last place of the sum of its summands' absolute values.
    ``lost``: (layer, weight) of gradients that there are none of."""
    key, tensors = flat(cases)
    weights = op.by_kernels(None, tensors, key, *asked, half)
    grads = [None if w is None else torch.empty_like(w).copy_(torch.randn_like(w)) for w in weights]
    for layer, weight in lost:
        grads[2 * layer + weight] = None
    back = iter(op.by_kernels(grads, tensors, key, *asked, half))
    pairs = list(zip(grads[::2], grads[1::2], strict=True))
    got: list[Tensor | None] = []
    for k, case in enumerate(cases):
        own = [next(back) for _ in range(case.site.size)]
        seen = pairs[k] != (None, None)
        got += [*weights[2 * k : 2 * k + 2], *(own if seen else [None] * len(own))]
    mine = [x for x in got if x is not None]
    for k, (x, y, found) in enumerate(deviations(cases, asked, pairs, mine, half)):
        assert x.shape == y.shape
        assert order(x) == order(y) or k > 1
        assert x.isfinite().all(), k
        assert found.ratio <= 1.5, (k, x.shape, found)


@pytest.fixture
def poisoned() -> Any:
    """Fresh memory is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks smaller than the layers of the tests, and no plan of an earlier one."""
    from gpdfx.kernels.fold import launch

    sizes = {"TILE": 32, "DEPTH_TILE": 8, "ROWS": 2, "DEPTH_ROWS": 2, "BLOCK": 16}
    for name, value in sizes.items():
        monkeypatch.setattr(launch, name, value)
    for cache in (launch.PLANS, launch.CALLS):
        cache.clear()


@interpreted
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("asked", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("layers", [ODD, EVEN])
def test_kernels_are_as_exact_as_torch(
    layers: Any, asked: tuple[bool, bool], mean: bool, poisoned: None, small: None
) -> None:
    cases = [Case(layer, chosen, torch.float32, mean) for layer, chosen in layers]
    lost = [(0, 1), (1, 0)] if asked == (True, True) else []
    compare(cases if mean or asked[0] else cases[:1], None, asked, lost)


@interpreted
@pytest.mark.parametrize("layers", [ODD[:1], EVEN[:2]])
def test_kernels_are_as_exact_where_inputs_are_last(
    layers: Any, poisoned: None, small: None
) -> None:
    compare([Case(layer, chosen, torch.float32).last() for layer, chosen in layers])


@interpreted
@pytest.mark.parametrize("types", ["float16", "autocast"])
def test_kernels_are_as_exact_in_half(types: str, poisoned: None, small: None) -> None:
    own = torch.float16 if types == "float16" else torch.float32
    half = torch.float16 if types == "autocast" else None
    compare([Case(*one, own) for one in (ODD[0], EVEN[2])], half)


@interpreted
def test_tensors_in_any_order_are_read(poisoned: None, small: None) -> None:
    """A weight that no convolution has, a branch's tensor that is not contiguous, and addresses
    that are no multiples of 16 bytes."""
    case = Case(Layer(1, 2, 16, (3,), "conv"), "acnet", torch.float32)
    whole = torch.randn(3, 16, 2).permute(2, 1, 0)
    case.origin = whole.requires_grad_()
    compare([case])
    case = Case(Layer(1, 2, 16, (3,), "conv"), "orepa", torch.float32)
    case.own[3]["weight"] = torch.randn(3, 16, 2, 1).permute(3, 2, 1, 0).requires_grad_()
    case.scales[0] = torch.randn(case.scales[0].numel() + 1)[1:].view_as(case.scales[0])
    compare([case])


@interpreted
@pytest.mark.parametrize("mean", [False, True])
def test_kernels_are_counted_as_they_load_and_store(
    mean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``benchmarks.kernels_bytes`` against every load and store that the interpreter does, but for
    those of tables."""
    from triton.runtime.interpreter import interpreter_builder

    from benchmarks import kernels_bytes
    from gpdfx.kernels.fold import launch

    tables = {"programs", "sizes", "addresses", "targets", "grads", "items", "table"}
    found: dict[str, list[int]] = {}
    skipped: list[tuple[int, int]] = []
    seen: set[tuple[str, int]] = set()
    kernel_name, launched = [""], launch.launch

    def launching(kernel: Any, count: int, *given: Tensor, **constants: Any) -> None:
        seen.clear()
        kernel_name[0] = kernel.fn.__name__
        for name, t in zip(kernel.arg_names, given, strict=False):
            if name in tables:
                skipped.append((t.data_ptr(), t.data_ptr() + t.nbytes))
        launched(kernel, count, *given, **constants)

    def counting(call: Any, kind: str) -> Any:
        def counted(*given: Any) -> Any:
            pointers, mask = given[0], given[1 if kind == "load" else 2]
            at = pointers.data[mask.data.astype(bool)].ravel().tolist()
            at = [n for n in at if not any(a <= n < b for a, b in skipped)]
            item = pointers.get_element_ty().primitive_bitwidth // 8
            fresh = {(kind, n) for n in at} - seen
            seen.update(fresh)
            total = found.setdefault(kernel_name[0], [0, 0])
            total[:] = total[0] + item * len(at), total[1] + item * len(fresh)
            return call(*given)

        return counted

    cases = [
        Case(Layer(1, 3, 4, (3,), "conv"), "orepa", torch.float32, mean),
        Case(Layer(1, 3, 4, (), "linear"), "lowrank", torch.float32, mean),
        Case(Layer(1, 3, 3, (3, 3), "conv"), "repvgg", torch.float32, mean),
        Case(Layer(2, 2, 3, (2,), "transposed"), "none", torch.float32, mean),
    ]
    key, tensors = flat(cases)
    asked = key, True, True, torch.float16
    weights = op.by_kernels(None, tensors, *asked)
    call = launch.prepared(tensors, *asked)
    assert call is not None
    sizes = kernels_bytes.sizes_of(call.plan, tensors)
    grads = [torch.empty_like(w).copy_(torch.randn_like(w)) for w in weights]
    monkeypatch.setattr(launch, "launch", launching)
    for kind in ("load", "store"):
        name = f"create_masked_{kind}"
        monkeypatch.setattr(
            interpreter_builder, name, counting(getattr(interpreter_builder, name), kind)
        )
    for given in (None, grads):
        found.clear()
        skipped.clear()
        op.by_kernels(given, tensors, *asked)
        counted = kernels_bytes.count(sizes, given is not None)
        assert {name: tuple(both) for name, both in found.items()} == counted


@interpreted
def test_the_node_of_autograd_is_the_same_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several layers, of which one has no kernel; what moves is found again."""
    monkeypatch.setattr(function, "KERNELS", {"cpu"})
    cases = [Case(*one, torch.float32) for one in (ODD[4], ODD[7])]
    own = replace(cases[0].site.terms[0], letters="goh", others="hi", factor="down")
    cases.append(Case(ODD[4][0], "lowrank", torch.float32))
    cases[2].site = replace(cases[2].site, terms=(own,))
    cases[2].own[0]["down"] = cases[2].own[0]["down"][0].detach().requires_grad_()
    sites = tuple(case.site for case in cases)
    assert [bool(refusal(site)) for site in sites] == [False, False, True]
    for _ in range(2):
        tensors = [
            t.detach().clone().requires_grad_(t.requires_grad) for c in cases for t in c.tensors
        ]
        leaves = [t for t in tensors if t.requires_grad]
        found = []
        for kernels in ({"cpu"}, set()):
            monkeypatch.setattr(function, "KERNELS", kernels)
            index = tuple(range(len(tensors)))
            pairs = fold(sites, key_of(sites), index, tensors, teacher=True, student=True)
            made = [w for pair in pairs for w in pair]
            grads = torch.autograd.grad([w.square().sum() for w in made], leaves)
            found.append([*made, *grads])
        torch.testing.assert_close(*found)


@interpreted
def test_kernels_are_given_new_addresses() -> None:
    """A parameter that moves is found again, and so are new shares in the old place."""
    case = Case(Layer(1, 2, 2, (), "linear"), "lowrank", torch.float32)
    key = key_of((case.site,))
    for _ in range(2):
        owned = [t.detach().clone() for t in case.tensors]
        for _ in range(2):
            pair = op.by_kernels(None, owned, key, True, True, None)
            torch.testing.assert_close(pair, list(reference.forward(case.site, owned, True, True)))
            owned[2].mul_(2)


@interpreted
def test_layers_that_differ_in_classes_alone_have_plans_of_their_own() -> None:
    """And a tile that lies between changes of classes reads one share for all of its inputs."""
    for classes, run in (((0, 0, 1, 1), 2), ((0, 1, 1, 0), 1), ((0, 1, 0, 1), 1)):
        case = Case(Layer(1, 2, 4, (), "linear"), "lowrank", torch.float32)
        case.classes = torch.tensor(classes)
        table = torch.randn(2, 2)
        case.table, share = table, replace(case.share, at=-1, split=None)
        case.site = replace(case.site, share=share.of(case.layer, case.classes))
        assert case.site.share.run == run
        wide, _ = op.by_kernels(None, flat([case])[1], key_of((case.site,)), True, True, None)
        want, _ = reference.forward(case.site, flat([case])[1], True, True)
        torch.testing.assert_close(wide, want)


@interpreted
def test_what_does_not_change_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpdfx.kernels.fold import launch

    case = Case(Layer(1, 2, 2, (), "linear"), "lowrank", torch.float32)
    key, sent, upload = key_of((case.site,)), [], launch.upload
    for cache in (launch.PLANS, launch.CALLS):
        cache.clear()
    tensors = [[t.detach().clone() for t in case.tensors] for _ in range(2)]
    op.by_kernels(None, tensors[0], key, True, True, None)
    monkeypatch.setattr(launch, "upload", lambda *given: (sent.append(given), upload(*given))[1])
    for k in (0, 1, 0, 1):  # two teachers of one structure, as a mean of a network's is
        op.by_kernels(None, tensors[k], key, True, True, None)
    assert len(sent) == 1
    assert len(launch.PLANS) == 1


@interpreted
def test_a_call_ends_with_its_tensors() -> None:
    from gpdfx.kernels.fold import launch

    case = Case(Layer(1, 2, 2, (), "linear"), "lowrank", torch.float32)
    key, before = key_of((case.site,)), len(launch.CALLS)
    tensors = [t.detach().clone() for t in case.tensors]
    for _ in range(2):
        op.by_kernels(None, tensors, key, True, True, None)
        assert len(launch.CALLS) == before + 1
    del tensors
    assert len(launch.CALLS) == before


@interpreted
def test_a_graph_under_capture_leaves_nothing_but_what_it_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is made meanwhile is the graph's; what was there stays as long as the graph."""
    from gpdfx.kernels.fold import launch

    case = Case(Layer(1, 2, 2, (), "linear"), "lowrank", torch.float32)
    key = key_of((case.site,))
    known, fresh = ([t.detach().clone() for t in case.tensors] for _ in range(2))
    monkeypatch.setattr(launch, "KEPT", [])
    op.by_kernels(None, known, key, True, True, None)
    before = dict(launch.PLANS), dict(launch.CALLS)
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: x)
    for own in (known, fresh, known):
        pair = op.by_kernels(None, own, key, True, True, None)
        torch.testing.assert_close(pair, list(reference.forward(case.site, own, True, True)))
        assert launch.PLANS.keys() == before[0].keys()
        assert before[1] == launch.CALLS
    calls = [x for x in launch.KEPT if isinstance(x, launch.Call)]
    assert len(calls) == 2
    assert sum(call in launch.CALLS.values() for call in calls) == 1


# --------------------------------------------------------------------------- the operator
@interpreted
@pytest.mark.parametrize(
    ("which", "chosen"),
    [("grouped", "orepa"), ("transposed", "orepa"), ("linear", "lowrank"), ("grouped", "none")],
)
@pytest.mark.parametrize("whole", [False, True])
def test_the_operator_is_registered_well(
    which: str, chosen: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``whole``: the student's weight is all of the teacher's."""
    from gpdfx.kernels.fold import launch

    monkeypatch.setattr(Tensor, "new_empty", Tensor.new_zeros)  # between results, too
    nothing = mock.patch.multiple(launch, launch=mock.DEFAULT, multiply=mock.DEFAULT)
    case = Case(LAYERS[which], chosen, torch.float32)
    if whole:
        case.site = replace(case.site, cut=None)
    key, tensors = flat([case])
    for asked in ((True, True), (False, True), (True, False)):
        with nothing:  # of results, only what they are like is checked
            torch.library.opcheck(op.fold_op, (tensors, key, *asked, None))
        weights = viewed(
            op.fold_op(tensors, key, *asked, None), op.layout_of(tensors, key, *asked)[0]
        )
        grads = [None if w is None else torch.randn_like(w) for w in weights]
        with nothing:
            torch.library.opcheck(op.backward_op, (grads, tensors, key, *asked, None))
        want = reference.forward(case.site, tensors, *asked)
        torch.testing.assert_close(weights, list(want))


@interpreted
def test_compilers_are_given_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    _, teacher, x = plain_teacher("auto")
    teacher.eval()
    leaves = [p for p in teacher.parameters() if p.requires_grad]
    compiled = torch.compile(teacher, backend="aot_eager", fullgraph=True, dynamic=False)
    found = []
    for kernels, call in ((set(), teacher), ({"cpu"}, compiled)):
        monkeypatch.setattr(function, "KERNELS", kernels)
        y = call(x)
        grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
        found.append([y, *(g for g in grads if g is not None)])
    torch.testing.assert_close(*found)


def test_what_has_no_kernel_is_named() -> None:
    class Own(LowRank):
        """As data, but of letters that no kernel knows."""

        def term(self, layer: Layer) -> Term:
            return replace(super().term(layer), taps=layer.line())

    _, teacher, _ = plain_teacher({"*": "orepa", "twice": "acnet", "head": [Own()]})
    report = teacher.report()
    assert report.unfused == {"head.weight": "there is no kernel for goh ghi"}
    assert "1 fold in plain torch on a GPU" in str(report)
    assert all(not refusal(site) for site in (Case(*one).site for one in (*ODD, *EVEN)))


# --------------------------------------------------------------------------- on a GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["conv", "grouped", "depthwise", "transposed", "1x1"])
@gpu[0]
@gpu[1]
def test_kernels_on_a_gpu(which: str, dtype: torch.dtype, poisoned: None) -> None:
    layer = LAYERS[which]
    case = Case(layer, "orepa" if layer.spatial else "lowrank", dtype)
    compare([case.change(Tensor.cuda)])


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
