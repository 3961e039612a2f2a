"""Branches: their kernels, the fold, training with them, and the way back."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpdfx
from benchmarks.layers import LAYERS
from gpdfx.branches.kinds import Branch, Full, LowRank, Shapes
from gpdfx.branches.layer import Layer
from gpdfx.branches.sets import SETS
from gpdfx.passes.folded import Branched, kernel, merged, plain
from gpdfx.teacher.fold import Fold
from gpdfx.teacher.folding import Chunk

from .helpers import facts, program_of, thinned, verify, with_branches
from .layers import Plain, a_teacher, leaf, plain_teacher
from .networks import NETWORKS, WRITTEN, tensors_equal

DENSE = ("orepa", "acnet", "repvgg", "lowrank")


def made(branch: Branch, layer: Layer, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    params = {
        name: torch.randn(shape, generator=draw, dtype=torch.float64)
        for name, shape in branch.shapes(layer).items()
    }
    constants = {k: v.double() for k, v in branch.constants(layer).items()}
    return branch.kernel(layer, params | constants).double().expand(layer.shape), params


@pytest.mark.parametrize("which", LAYERS)
def test_view_and_store_are_inverse(which: str) -> None:
    layer = LAYERS[which]
    weight = torch.randn(layer.stored)
    assert layer.view(weight).shape == layer.shape
    assert torch.equal(layer.store(layer.view(weight)), weight)


def test_view_is_how_a_layer_reads_its_weight() -> None:
    """One group and output at a time, every layout is a plain product."""
    x = torch.randn(2, 8, 7, dtype=torch.float64)
    for layout, run in (("conv", F.conv1d), ("transposed", F.conv_transpose1d)):
        layer = Layer(2, 3, 4, (1,), layout)
        weight = torch.randn(layer.stored, dtype=torch.float64)
        want = torch.einsum("goi,bgix->bgox", layer.view(weight)[..., 0], x.unflatten(1, (2, 4)))
        torch.testing.assert_close(run(x, weight, groups=2), want.flatten(1, 2))


@pytest.mark.parametrize("which", LAYERS)
@pytest.mark.parametrize("name", SETS)
def test_branches_fit_and_keep_the_shape(which: str, name: str) -> None:
    layer = LAYERS[which]
    for branch in SETS[name].on(layer).branches:
        weight, params = made(branch, layer)
        assert weight.shape == layer.shape
        init = branch.init(layer, torch.Generator().manual_seed(0))
        assert {k: tuple(v.shape) for k, v in init.items()} == branch.shapes(layer)
        assert set(init) == set(params)


def reference(branch: str, layer: Layer, params: dict[str, Tensor], x: Tensor) -> Tensor:
    """What the sources of the branches do to an image, op after op."""
    groups = layer.groups
    pad = [k // 2 for k in layer.kernel]

    def conv(x: Tensor, w: Tensor, padding: Any = 0, groups: int = groups) -> Tensor:
        return F.conv2d(x, w.flatten(0, 1), padding=padding, groups=groups)

    match branch:
        case "full":
            return conv(x, params["weight"], pad)
        case "pointwise":
            return conv(x, params["weight"][..., None, None])
        case "identity":
            return x
        case "average":
            y = conv(x, params["weight"][..., None, None])
            return F.avg_pool2d(y, layer.kernel, 1, pad)
        case "line":
            k = layer.kernel[0]
            return conv(x, params["weight"].view(*layer.shape[:3], k, 1), (k // 2, 0))
        case "product":
            hidden = params["first"].shape[1]
            skip = torch.eye(layer.inputs, dtype=x.dtype).repeat(hidden // layer.inputs, 1)
            y = conv(x, (params["first"] + skip)[..., None, None])
            return conv(y, params["second"], pad)
        case "separable":
            inputs = layer.groups * layer.inputs
            depthwise = params["depthwise"].flatten(0, 1)  # (inputs, expand, k, k)
            y = conv(x, depthwise.unsqueeze(2), pad, groups=inputs)
            return conv(y, params["pointwise"].flatten(2)[..., None, None])
        case "lowrank":
            y = conv(x, params["down"][..., None, None])
            return conv(y, params["up"][..., None, None])
    raise KeyError(branch)


@pytest.mark.parametrize("which", ["conv", "grouped", "depthwise", "1x1"])
@pytest.mark.parametrize("name", ["orepa", "acnet", "repvgg", "lowrank", "mobileone"])
def test_a_kernel_does_what_its_source_does(which: str, name: str) -> None:
    layer = LAYERS[which]
    x = torch.randn(2, layer.groups * layer.inputs, 9, 8, dtype=torch.float64)
    seen = 0
    for k, (key, branch) in enumerate(SETS[name].on(layer).named().items()):
        kind = key.split("_")[0]
        if kind == "frequency" or key == "line_1":
            continue
        weight, params = made(branch, layer, k)
        got = F.conv2d(
            x, layer.store(weight), padding=[k // 2 for k in layer.kernel], groups=layer.groups
        )
        torch.testing.assert_close(got, reference(kind, layer, params, x))
        seen += 1
    assert seen or not SETS[name].on(layer).branches


def test_frequency_filters_are_cosines_without_mean() -> None:
    layer = LAYERS["conv"]
    branch = next(b for b in SETS["orepa"].branches if type(b).__name__ == "Frequency")
    filters = branch.constants(layer)["filters"]
    assert filters.shape == (1, 6, 1, 3, 3)
    assert filters.sum((-1, -2)).abs().max() < 1e-6
    want = torch.tensor([math.cos(math.pi / 3 * 2 * (x + 0.5)) for x in range(3)])
    torch.testing.assert_close(filters[0, 2, 0, :, 1], want)  # channel 2: rows, frequency 2
    torch.testing.assert_close(filters[0, 3, 0, 1], want)  # channel 3: columns, frequency 2


@pytest.mark.parametrize("which", LAYERS)
@pytest.mark.parametrize("name", SETS)
def test_the_fold_begins_as_the_origin_bit_for_bit(which: str, name: str) -> None:
    layer = LAYERS[which]
    origin = torch.randn(layer.stored)
    fold = Fold(Branched("w", "b", layer, SETS[name].on(layer)), origin, seed=1)
    bias = torch.randn(layer.channels)
    folded = fold(origin, bias)
    assert torch.equal(folded[merged("w")], origin)
    assert torch.equal(folded.get(merged("b"), bias), bias)


@pytest.mark.parametrize("which", LAYERS)
@pytest.mark.parametrize("name", DENSE)
def test_the_fold_is_the_sum_of_scaled_kernels_with_its_gradients(which: str, name: str) -> None:
    layer = LAYERS[which]
    origin = torch.randn(layer.stored, dtype=torch.float64, requires_grad=True)
    chosen = SETS[name].on(layer)
    fold = Fold(Branched("w", None, layer, chosen), origin.detach(), seed=1)
    with torch.no_grad():
        fold.scales.normal_()
        for p in fold.parameters():
            p.normal_() if p is not fold.scales else None

    want = layer.view(origin) * layer.per_channel(fold.scales[0])
    for k, (key, branch) in enumerate(chosen.named().items()):
        own = fold.get_submodule(key)
        tensors = dict(own.named_parameters()) | dict(own.named_buffers())
        want = want + branch.kernel(layer, tensors) * layer.per_channel(fold.scales[k + 1])
    want = layer.store(want)
    got = fold(origin, None)[merged("w")]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(want)
    leaves = [origin, *fold.parameters()]
    mine, theirs = (torch.autograd.grad(y, leaves, cotangent) for y in (got, want))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------- in a teacher


def train(teacher: Any, name: str, steps: int, lr: float = 0.02) -> None:
    """Random targets, the joint loss, SGD with momentum."""
    optimizer = torch.optim.SGD(teacher.parameters(), lr, momentum=0.9)
    teacher.train()
    for step in range(steps):
        wide, own = (leaf(y) for y in teacher.both(*NETWORKS[name].inputs(seed=step)))
        loss = (wide - torch.randn(wide.shape)).square().mean()
        loss = loss + (own - wide.detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()


def lossless_with(name: str, sets: list[str]) -> None:
    """Captured once, then branched and checked set by set."""
    case = NETWORKS[name]
    call = case.inputs(), {}
    program = program_of(case.model(), call, dynamic="batch")
    for one in sets:
        check = verify(with_branches(program, one), call)
        assert check.tolerance == 1e-10 or name in ("odd", "norms"), (one, check)


@pytest.mark.parametrize("name", WRITTEN)
def test_every_set_is_lossless(name: str) -> None:
    lossless_with(name, list(SETS))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in WRITTEN])
def test_every_set_is_lossless_on_large_networks(name: str) -> None:
    lossless_with(name, list(SETS))


@pytest.mark.parametrize("branches", ["auto", "mobileone"])
@pytest.mark.parametrize("name", ["unet", "gpt", "grouped"])
def test_everything_trains_after_two_steps(name: str, branches: str) -> None:
    """Every branch parameter and every copy; what has no gradient has none in the student."""
    model, teacher = a_teacher(name, branches)
    train(teacher, name, 2)
    teacher.zero_grad()
    wide, own = teacher.both(*NETWORKS[name].inputs())
    (leaf(wide).square().mean() + leaf(own).square().mean()).backward()
    model.train()
    leaf(model(*NETWORKS[name].inputs())).square().mean().backward()
    small = {n: rows(p.grad).abs().amax(1) < 1e-6 for n, p in model.named_parameters()}
    for key, p in teacher.named_parameters():
        dead = ~rows(p.grad).any(1)
        own = key
        if ".norms." in key and key.endswith("bias"):  # shifts what the layer's own bias shifts
            own = key.removeprefix("_branches.").split(".weight.")[0] + ".bias"
        if own in small:
            index = torch.from_numpy(facts(teacher).maps[own][0].map)
            dead &= ~small[own][index]
        assert not dead.any(), (key, dead.nonzero().flatten().tolist())


def rows(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.flatten(1) if grad.ndim > 1 else grad.unsqueeze(1)


EACH_SET = ("auto", "dbb", "mobileone", "repvgg", "acnet")
TRAINED = {("unet", "auto"), ("grouped", "dbb"), ("gpt", "mobileone"), ("unet", "repvgg")}
TRAINED |= {("grouped", "acnet")}


@pytest.mark.parametrize(
    ("name", "branches"),
    thinned(itertools.product(("unet", "gpt", "grouped"), EACH_SET), TRAINED),
)
def test_a_trained_teacher_collapses_to_its_student(name: str, branches: str) -> None:
    """Exactly, whatever the branches learned, and without their parameters."""
    model, teacher = a_teacher(name, branches)
    train(teacher, name, 20)
    x = NETWORKS[name].inputs(seed=99)
    teacher.eval()
    plain = gpdfx.collapse(teacher)
    assert list(plain.state_dict()) == list(model.state_dict())
    one, other = leaf(plain(*x)), leaf(teacher.student(*x))
    assert not torch.allclose(one, leaf(model.eval()(*x)), rtol=1e-3)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    exact = teacher.double()
    plain = gpdfx.collapse(exact)
    x = tuple(y.double() if y.is_floating_point() else y for y in x)
    one, other = leaf(plain(*x)), leaf(exact.student(*x))
    assert (one - other).abs().max() <= 1e-12 * one.abs().max()


@pytest.mark.parametrize("branches", ["dbb", "mobileone"])
def test_normalized_branches_fold_exactly_in_eval_mode(branches: str) -> None:
    """In eval mode one layer does what the layer and its normalized branches do."""
    _, teacher, x = plain_teacher(branches)
    for _ in range(5):
        teacher(torch.randn_like(x))
    with torch.no_grad():
        for fold in teacher.folds():
            for norm in fold.norms.values():
                norm.weight.normal_()
                if norm.bias is not None:
                    norm.bias.normal_()
    teacher.double().eval()
    (fold,) = (f for f in teacher.folds() if f.branched.weight == "twice.weight")
    bias = teacher.twice.bias
    folded = fold(teacher.twice.weight, bias)
    y = torch.randn(4, 16, 9, 9, dtype=torch.float64)

    def conv(weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(y, weight, bias, padding=1, groups=fold.branched.layer.groups)

    want = conv(folded[plain("twice.weight")], bias)
    for key, norm in fold.norms.items():
        out = conv(folded[kernel("twice.weight", key)])
        want = want + F.batch_norm(
            out, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5
        )
    got = conv(folded[merged("twice.weight")], folded[merged("twice.bias")])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_normalized_branches_gather_the_statistics_of_batch_norm() -> None:
    """Two calls, two updates; a layer without a bias is normalized by its deviation alone."""
    _, teacher, x = plain_teacher("mobileone")
    teacher.train()
    with torch.no_grad():
        teacher(x)
    folds = {f.branched.weight: f for f in teacher.folds()}
    first = folds["first.weight"]
    name, norm = next(iter(first.norms.items()))
    weight = first(teacher.first.weight, None)[kernel("first.weight", name)]
    y = F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(norm.running_mean, 0.1 * y.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * y.var((0, 2, 3)))
    assert norm.bias is None
    assert folds["twice.weight"].norms[name].bias is not None
    assert len({f.branched.bias for f in folds.values()}) == 4


@pytest.mark.parametrize("branches", ["auto", "dbb"])
def test_the_fold_runs_once_a_step_and_layer(
    branches: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the fused fold has it, and layer by layer."""
    _, teacher, x = plain_teacher(branches)
    runs: list[str] = []
    for kind, names in ((Chunk, lambda c: [*c.sites]), (Fold, lambda f: [f.branched.weight])):
        name = "__call__" if kind is Chunk else "forward"
        call = getattr(kind, name)

        def record(self: Any, *a: Any, call: Any = call, names: Any = names) -> Any:
            runs.extend(names(self))
            return call(self, *a)

        monkeypatch.setattr(kind, name, record)
    teacher.both(x)
    assert sorted(runs) == [f"{name}.weight" for name in ("first", "head", "point", "twice")]


def test_sets_by_pattern_and_branches_of_ones_own() -> None:
    @dataclass(frozen=True)
    class Row(Branch):
        """One number per output channel, everywhere."""

        def shapes(self, layer: Layer) -> Shapes:
            return {"weight": (layer.groups, layer.outputs, 1)}

        def kernel(self, layer: Layer, params: Any) -> Tensor:
            weight: Tensor = params["weight"]
            return weight.reshape(*weight.shape, *[1] * len(layer.kernel))

    model, teacher, x = plain_teacher(
        {"*": "orepa", "twice": [Row(), Full()], "head": None, "point": [LowRank(3)]}
    )
    chosen = {f.branched.weight: f.branched.chosen for f in teacher.folds()}
    assert list(chosen) == ["first.weight", "twice.weight", "point.weight"]
    assert [type(b).__name__ for b in chosen["twice.weight"].branches] == ["Row", "Full"]
    assert teacher.get_parameter("_branches.point.weight.lowrank.up").shape == (1, 16, 3)
    assert teacher.report().branches["first.weight"] == "orepa"
    assert tensors_equal(gpdfx.collapse(teacher).state_dict(), model.state_dict())
    teacher.both(x)[0].square().sum().backward()
    assert teacher.get_parameter("_branches.twice.weight.scales").grad.any(1).all()


def test_what_has_no_branches_is_reported() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 8)
            self.frozen = nn.Linear(8, 8)
            self.frozen.requires_grad_(False)
            self.made = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.small = nn.Linear(8, 1)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.made(self.frozen(self.table(x)).relu()).relu()
            return self.head(x), self.small(x)

    model = Odd()
    teacher = gpdfx.expand(model, 2, example_inputs=(torch.randint(0, 11, (4, 5)),))
    report = teacher.report()
    assert report.unbranched["frozen.weight"] == "it is frozen"
    assert "embedding" in report.unbranched["table.weight"]
    assert report.unbranched["small.weight"].startswith("no branch")
    assert "made.parametrizations.weight.original1" in report.unbranched
    assert not report.branches
    assert "branches" in str(report)


@pytest.mark.parametrize(
    "given", ["orep", ["orepa"], 3, {"*": "none"}, {"nothing": "orepa"}, {"*": [1]}]
)
def test_a_wrong_set_is_refused_by_name(given: Any) -> None:
    with pytest.raises(gpdfx.InputError, match="branches"):
        gpdfx.expand(Plain(), 2, example_inputs=(torch.randn(2, 3, 9, 9),), branches=given)


def test_live_scales_change_the_function_and_the_report_says_so() -> None:
    model, teacher, x = plain_teacher("orepa", scales="scratch")
    model.eval(), teacher.eval()
    assert "change the function" in str(teacher.report())
    assert not torch.allclose(teacher(x), model(x), rtol=1e-2)
    torch.testing.assert_close(gpdfx.collapse(teacher)(x), teacher.student(x))
    scales = teacher.get_parameter("_branches.first.weight.scales")
    assert scales[:, 0].tolist() == [0.25, 0.25, 0.0, 0.5, 1.0, 0.5]


def test_a_teacher_with_branches_compiles_in_one_graph() -> None:
    _, teacher, x = plain_teacher("orepa")
    train_like = torch.compile(teacher, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for fold in teacher.folds():
            fold.scales.add_(0.1)
    teacher.eval()
    grads = []
    for call in (teacher, train_like):
        teacher.zero_grad()
        call(x).square().sum().backward()
        grads.append(
            {n: p.grad.clone() for n, p in teacher.named_parameters() if p.grad is not None}
        )
    assert grads[0].keys() == grads[1].keys()
    for name, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][name], rtol=1e-4, atol=1e-4, msg=name)


def test_other_parameters_can_be_called_with() -> None:
    """The fold reads what ``functional_call`` gives, in the backward too."""
    _, teacher, x = plain_teacher("orepa")
    teacher.eval()
    other = {n: (p + 0.1).detach().requires_grad_() for n, p in teacher.named_parameters()}
    torch.func.functional_call(teacher, other, (x,)).sum().backward()
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            p.copy_(other[name])
    teacher(x).sum().backward()
    for name, p in teacher.named_parameters():
        torch.testing.assert_close(p.grad, other[name].grad, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------- extraction
@pytest.mark.parametrize(
    ("name", "ratio"),
    thinned(
        itertools.product(("unet", "gpt", "grouped", "odd"), (1.5, 2, 3)),
        {("unet", 1.5), ("unet", 2), ("unet", 3), ("gpt", 1.5), ("grouped", 3), ("odd", 2)},
    ),
)
def test_the_mean_of_equal_copies_is_the_copy_bit_for_bit(name: str, ratio: float) -> None:
    model, teacher = a_teacher(name, None, ratio, extract="mean")
    assert tensors_equal(gpdfx.collapse(teacher).state_dict(), model.state_dict())


def test_the_mean_is_weighted_by_shares_where_the_layer_contracts() -> None:
    _, teacher, x = plain_teacher(None, extract="mean")
    teacher.double().eval()
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    weight = teacher.point.weight.detach()  # (16, 16, 1, 1)
    table = teacher.get_buffer("_shares.point.weight")
    shares = table.reshape(16, 2).repeat_interleave(8, 1).reshape(16, 16)
    assert torch.allclose(shares.view(16, 2, 8).sum(1), torch.ones(16, 8).double(), atol=1e-2)
    want = (weight[..., 0, 0] * shares).view(2, 8, 2, 8).sum(2).mean(0)
    got = dict(teacher.student_parameters())
    torch.testing.assert_close(got["point.weight"][..., 0, 0], want)
    torch.testing.assert_close(got["norm.weight"], teacher.norm.weight.view(2, 8).mean(0))
    teacher.student(x.double()).square().sum().backward()
    assert teacher.point.weight.grad.ne(0).all()
