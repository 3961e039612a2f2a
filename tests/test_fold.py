"""The fused fold: what it computes, its gradients, and what it costs in nodes and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import gpdfx
from benchmarks.layers import LAYERS, Case
from gpdfx.branches.kinds import Full
from gpdfx.branches.layer import Layer
from gpdfx.branches.term import Term
from gpdfx.kernels.fold import Site, key_of, op, reference
from gpdfx.passes.folded import students, teachers

from .helpers import folding, hidden_student, parts, run_teacher
from .layers import a_teacher, leaf, plain_teacher
from .networks import NETWORKS, tensors_equal

DENSE = ("none", "orepa", "acnet", "repvgg", "lowrank")


# --------------------------------------------------------------------------- one layer


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("which", LAYERS)
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("asked", ["teacher", "student", "both", "mean", "both, mean"])
def test_weights_and_gradients_are_those_of_the_formula(
    which: str, name: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "BLOCK", 72)
    mean = "mean" in asked
    case = Case(LAYERS[which], name, mean=mean)
    asked = {"mean": "student"}.get(asked, asked.split(",")[0])
    wants = [
        w
        for w, of in zip(case.naive(), ("teacher", "student"), strict=True)
        if asked in (of, "both")
    ]
    got = case.fused(asked != "student", asked != "teacher")
    close(got, wants)
    cotangents = [torch.randn_like(w) for w in wants]
    theirs = torch.autograd.grad(wants, case.leaves, cotangents)
    close(torch.autograd.grad(got, case.leaves, cotangents, retain_graph=True), theirs)
    orders = [c.transpose(0, 1).contiguous().transpose(0, 1) for c in cotangents]
    close(torch.autograd.grad(got, case.leaves, orders), theirs)
    if asked == "both":  # the loss may not depend on one of them
        one = torch.autograd.grad(case.fused()[1], case.leaves, cotangents[1])
        close(one, torch.autograd.grad(case.naive()[1], case.leaves, cotangents[1]))


@pytest.mark.parametrize("which", ["conv1d", "transposed", "depthwise", "linear"])
def test_gradients_have_gradients(which: str) -> None:
    layer = {"conv1d": Layer(1, 2, 2, (3,), "conv"), "depthwise": Layer(2, 1, 1, (3,), "conv")}
    chosen = "lowrank" if which == "linear" else "orepa"
    case = Case(layer.get(which, LAYERS[which]), chosen, mean=which == "linear")

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        rest = iter(leaves)
        tensors = [next(rest) if t.requires_grad else t for t in case.tensors]
        return tuple(case.fused(tensors=tensors))

    assert torch.autograd.gradcheck(call, case.leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, case.leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("letters", "others"),
    [
        *(("goie", "giex"), ("goie", "gie"), ("goe", "giex"), ("goex", "gie"), ("goix", "gox")),
        *(("goi", "gox"), ("goi", "gix"), ("gox", "gi"), ("go", "gx"), ("go", ""), ("gox", "")),
    ],
)
def test_a_term_may_have_any_letters(letters: str, others: str) -> None:
    """Those that no set has, as a branch of one's own may: against autograd through its kernel."""
    layer, sizes = Layer(2, 3, 6, (3,), "conv"), {"g": 2, "o": 3, "i": 6, "x": 3, "e": 5}
    given = (letters, others) if others else (letters,)
    shapes = [(6, 6, 3), (2, 6), *([sizes[c] for c in own] for own in given)]
    tensors = [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    site = Site(layer, (Term("p", letters, "d" if others else "", others),))
    want, _ = reference.plain(site, tensors, True, False)
    got, _ = reference.forward(site, [t.detach() for t in tensors], True, False)
    cotangent = torch.randn_like(got)
    wants = torch.autograd.grad(want, tensors, cotangent)
    gots = reference.backward(site, [t.detach() for t in tensors], cotangent, None)
    close([got], [want])
    both = zip(gots, wants, site.differentiable(), strict=True)
    close(*zip(*((a, b) for a, b, trains in both if trains), strict=True))


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    case = Case(LAYERS["conv"], "orepa")
    case.scales[0].requires_grad_(False)
    case.own[2]["second"].requires_grad_(False)
    wide, _ = case.fused()
    wide.sum().backward()
    assert case.scales[0].grad is None
    assert case.own[2]["second"].grad is None
    assert all(t.grad is not None for t in case.leaves)
    with torch.no_grad():
        assert not case.fused()[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_stays_in_the_type_of_its_parameters(dtype: torch.dtype) -> None:
    case, exact = Case(LAYERS["conv"], "orepa", dtype), Case(LAYERS["conv"], "orepa")
    wide, own = case.fused()
    assert wide.dtype == own.dtype == dtype
    wide.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == dtype for t in case.leaves)
    with torch.no_grad():
        for t, other in zip(exact.tensors, case.tensors, strict=True):
            t.copy_(other)
    noise = 200 * torch.finfo(dtype).eps
    torch.testing.assert_close(wide, exact.naive()[0].to(dtype), rtol=noise, atol=noise)


def test_under_autocast_products_are_in_its_type_in_the_backward_too() -> None:
    case = Case(LAYERS["conv"], "orepa", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        wide, _ = case.fused()
    assert wide.dtype == torch.float32
    plain = case.fused()[0]
    assert not torch.equal(wide, plain)
    torch.testing.assert_close(wide, plain, rtol=0.1, atol=0.1)
    wide.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in case.leaves)


# --------------------------------------------------------------------------- in a teacher
@pytest.mark.parametrize(
    ("name", "branches"),
    [("unet", "auto"), ("gpt", "auto"), ("grouped", "auto"), ("odd", "auto"), ("grouped", "acnet")],
)
def test_the_students_part_alone_is_cut_out_of_the_whole(name: str, branches: str) -> None:
    _, teacher = a_teacher(name, branches)
    teacher.double().eval()
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    alone, both = folding(teacher)(teacher=False), folding(teacher)()
    wide = folding(teacher)(student=False)
    assert alone.keys() | wide.keys() == both.keys()
    for key, weight in both.items():
        close(alone.get(key, weight), weight)
        close(wide.get(key, weight), weight)
    sites = {name: site for chunk in folding(teacher).whole for name, site in chunk.sites.items()}
    assert sum(site.cut is not None for site in sites.values()) > len(sites) / 2
    for weight, site in sites.items():
        if site.cut is not None:
            assert (
                alone[students(weight)].shape == hidden_student(teacher).get_parameter(weight).shape
            )
        assert wide[teachers(weight)].shape == teacher.get_parameter(weight).shape
    leaves = [p for p in teacher.parameters() if p.requires_grad]
    grads = []
    for call in (teacher.student, lambda *x: teacher.both(*x)[1]):
        out = leaf(call(*(double(x) for x in NETWORKS[name].inputs())))
        grads.append(torch.autograd.grad(out.square().mean(), leaves, allow_unused=True))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def test_shares_are_in_the_weight_that_the_teacher_reads() -> None:
    _, teacher, _ = plain_teacher("auto")
    source = parts(teacher)[""].sections[0].code.source
    assert "share" not in source
    folded = folding(teacher)()
    assert not torch.equal(
        folded[teachers("point.weight")][:8, :8], folded[students("point.weight")]
    )
    assert torch.equal(folded[students("point.weight")], teacher.point.weight[:8, :8])


def test_a_layer_without_a_fused_fold_takes_its_own_way() -> None:
    class Own(Full):
        """A kind of the user's, although it derives from one of ours."""

        def kernel(self, layer: Layer, params: Any) -> Tensor:
            return params["weight"].square()

    _, teacher, x = plain_teacher({"*": "orepa", "twice": [Own()], "point": None})
    (chunk,) = folding(teacher).whole
    assert list(chunk.sites) == ["first.weight", "point.weight", "head.weight"]
    with torch.no_grad():
        for fold in teacher.folds():
            fold.scales.add_(0.1)
    teacher.both(x)[1].sum().backward()
    assert teacher.get_parameter("_branches.twice.weight.own.weight").grad.any()
    torch.testing.assert_close(gpdfx.collapse(teacher)(x), teacher.student(x))


def test_nothing_but_parameters_is_kept_for_the_backward() -> None:
    _, teacher, _ = plain_teacher("auto")
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        folding(teacher)()
    own = {t.data_ptr() for t in (*teacher.parameters(), *teacher.buffers())}
    assert {t.data_ptr() for t in kept} <= own


def test_gradients_by_function_transforms() -> None:
    _, teacher, x = plain_teacher("orepa")
    teacher.eval()
    params = {n: p.detach() for n, p in teacher.named_parameters()}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(teacher, params, (x,)).square().sum()

    grads = torch.func.grad(loss)(params)
    teacher(x).square().sum().backward()
    for name, p in teacher.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, msg=name)


@pytest.mark.parametrize("branches", [None, "auto", "dbb", "acnet"])
def test_weights_made_when_they_are_read_are_those_of_the_fold(branches: Any) -> None:
    _, teacher, x = plain_teacher(branches)
    teacher.eval()
    late, folded = folding(teacher).lazy(), folding(teacher)()
    assert late.keys() == folded.keys()
    for name, weight in folded.items():
        assert torch.equal(late[name], weight)
        assert not late[name].requires_grad
    assert (
        late.keys()
        == folding(teacher).lazy(student=False).keys() | folding(teacher).lazy(teacher=False).keys()
    )
    with torch.no_grad():
        assert torch.equal(teacher(x), run_teacher(teacher, folded, x))


class InRegions(nn.Module):
    """A layer that is called without gradients first, and one without autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(3, 8, 3, padding=1)
        self.exact = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            before = self.twice(x)
        y = before + self.twice(x)
        with torch.autocast("cpu", enabled=False):
            y = self.exact(y.float().relu())
        return self.head(y)


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("branches", [None, "orepa", "dbb"])
def test_where_a_weight_is_read_changes_neither_it_nor_its_gradient(
    branches: Any, cast: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    teacher = gpdfx.expand(InRegions(), 2, example_inputs=(x,), branches=branches)
    with torch.no_grad():
        for fold in teacher.folds():
            fold.scales.add_(0.5)
    found = []
    for lazy in (True, False):
        teacher.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            fold = folding(teacher)
            out = teacher(x) if lazy else run_teacher(teacher, fold(student=False), x)
        out.float().square().sum().backward()
        found.append([out.detach(), *(p.grad for p in teacher.parameters() if p.requires_grad)])
    assert found[0][1:]
    for late, early in zip(*found, strict=True):
        assert (late is None) == (early is None)
        assert late is None or torch.equal(late, early)
    assert teacher.twice.weight.grad is not None


def test_a_weight_is_folded_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    _, teacher, x = plain_teacher("orepa")
    made: list[int] = []
    call = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *a: (made.append(1), call(*a))[1])
    teacher(x)
    teacher.both(x)
    assert len(made) == 2 * len(folding(teacher).alone)


def test_what_is_frozen_takes_no_gradient() -> None:
    _, teacher, x = plain_teacher(None)
    teacher.point.weight.requires_grad_(False)
    folded = folding(teacher)()
    assert folded[teachers("head.weight")].requires_grad
    assert not folded[teachers("point.weight")].requires_grad
    assert not folded[students("point.weight")].requires_grad
    teacher.both(x)[1].sum().backward()
    assert teacher.point.weight.grad is None


@pytest.mark.parametrize("ratio", [1.5, 2, 3])
@pytest.mark.parametrize("branches", [None, "orepa"])
def test_the_mean_of_copies_is_in_the_fold(ratio: float, branches: Any) -> None:
    model, teacher, _ = plain_teacher(branches, extract="mean", ratio=ratio)
    sites = {name: site for chunk in folding(teacher).whole for name, site in chunk.sites.items()}
    assert sites
    assert all(site.mean for site in sites.values())
    assert tensors_equal(gpdfx.collapse(teacher).state_dict(), model.state_dict())
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
        whole = folding(teacher)()
        for fold in teacher.folds():
            fold.reset()
        own = dict(teacher.student_parameters())
    for name in sites:
        mean = teacher._means[name](teacher.get_parameter(name), teacher._tensor)
        torch.testing.assert_close(own[name], mean)
    assert whole.keys() >= {students(name) for name in sites}


def test_channels_last_weights_stay_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 9)
    teacher = gpdfx.expand(model, 2, example_inputs=(x,), branches="orepa")
    for weight in folding(teacher)().values():
        assert weight.is_contiguous(memory_format=torch.channels_last)


# --------------------------------------------------------------------------- compilers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("asked", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize(
    ("which", "name", "mean"), [("grouped", "orepa", True), ("linear", "lowrank", False)]
)
def test_the_operator_gives_what_plain_torch_does(
    which: str,
    name: str,
    mean: bool,
    asked: tuple[bool, bool],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Tensor, "new_empty", Tensor.new_zeros)  # between results, too
    case = Case(LAYERS[which], name, dtype, mean=mean)
    key, tensors = key_of((case.site,)), [t.detach() for t in case.tensors]
    given = tensors, key, *asked, None
    weights = op.by_operator(None, *given, False)
    assert tensors_equal(
        _numbered(weights), _numbered(reference.forward(case.site, tensors, *asked))
    )
    grads = [None if w is None else torch.randn_like(w) for w in weights]
    want = reference.backward(case.site, tensors, *grads)  # type: ignore[arg-type]
    assert tensors_equal(_numbered(op.by_operator(grads, *given, False)), _numbered(want))
    if dtype is torch.float32:
        torch.library.opcheck(op.fold_op, (*given, False))


def _numbered(tensors: Any) -> dict[str, Tensor]:
    return {str(k): x for k, x in enumerate(tensors) if x is not None}


def test_compilers_are_given_a_fold_as_one_op() -> None:
    """Its many small ones would take a compiler for CPUs longer than the networks do."""
    _, teacher, x = plain_teacher("auto")
    run = torch.compile(teacher.both, backend="aot_eager", fullgraph=True)
    run(x)
    with torch.profiler.profile() as seen:
        sum(y.square().mean() for y in run(x)).backward()  # type: ignore[union-attr]
    counts = {event.key: event.count for event in seen.key_averages()}
    folds = len(list(teacher.folds()))
    assert [counts[name] for name in ("gpdfx::fold", "gpdfx::fold_backward")] == [folds] * 2


def test_what_is_exported_has_no_operator_of_ours() -> None:
    _, teacher, x = plain_teacher("auto")
    graph = torch.export.export(teacher.eval(), (x,)).graph
    assert not [node for node in graph.nodes if "gpdfx" in str(node.target)]
