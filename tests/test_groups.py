"""Parameter groups: what decays, and the paper's parametrization as factors."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor, nn

import gpdfx
from gpdfx.distill.features import FitNet


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.b, self.head = nn.Conv2d(4, 6, 3, groups=2), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        x = F.relu(self.b(x)).mean((2, 3))
        out: Tensor = self.head(x)
        return out


def a_teacher(ratio: float = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    return gpdfx.expand(Net(), ratio, example_inputs=(x,), verify=False, **options)


def test_scales_norms_and_biases_do_not_decay() -> None:
    teacher = a_teacher(branches="mobileone")
    groups = gpdfx.param_groups(teacher, 0.1, no_decay=["head"])
    decay = {n: g["weight_decay"] for g in groups for n in g["param_names"]}
    assert set(decay) == set(dict(teacher.named_parameters()))
    decayed = {n for n, d in decay.items() if d}
    assert {"a.weight", "b.weight"} <= decayed
    assert "head.weight" not in decayed
    assert "_branches.a.weight.full.weight" in decayed
    assert not any("scales" in n or "norm" in n or n.endswith("bias") for n in decayed)
    torch.optim.AdamW(groups, lr=0.1)


def test_frozen_parameters_are_left_out() -> None:
    teacher = a_teacher()
    teacher.a.weight.requires_grad_(False)
    names = {n for g in gpdfx.param_groups(teacher) for n in g["param_names"]}
    assert "a.weight" not in names


@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize("which", ["sgd", "adam"])
def test_the_papers_parametrization(which: str, ratio: int) -> None:
    """Training W with these factors is training W / r with none."""
    teacher = a_teacher(ratio, branches=None, shares="uniform").double()
    teacher.eval()
    copies = {"a.weight": 1, "b.weight": ratio, "head.weight": ratio}
    if teacher.b.weight.shape[1] == 2:  # its groups widened, not their inside
        copies["b.weight"] = 1
    ours = {n: p.detach().clone().requires_grad_() for n, p in teacher.named_parameters()}
    paper = {n: (p.detach() / copies.get(n, 1)).requires_grad_() for n, p in ours.items()}

    def make(groups: Any) -> torch.optim.Optimizer:
        if which == "sgd":
            return torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        return torch.optim.AdamW(groups, lr=0.01, eps=0.0)

    groups = gpdfx.param_groups(
        teacher,
        0.1,
        lr=0.05 if which == "sgd" else 0.01,
        parametrization="paper",
        optimizer=which,
    )
    for group in groups:
        group["params"] = [ours[n] for n in group.pop("param_names")]
    decay, plain = ([], [])
    for p in paper.values():
        (plain if p.ndim < 2 else decay).append(p)
    theirs = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    one, two = make(groups), make(theirs)
    torch.manual_seed(1)
    for _ in range(10):
        x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
        for optimizer, tensors in (
            (one, ours),
            (two, {n: p * copies.get(n, 1) for n, p in paper.items()}),
        ):
            y = torch.func.functional_call(teacher, tensors, (x,))
            optimizer.zero_grad()
            (y - 1).square().mean().backward()
            optimizer.step()
    for n, p in ours.items():
        torch.testing.assert_close(p, paper[n] * copies.get(n, 1), rtol=1e-6, atol=1e-9, msg=n)
    moved = (ours["head.weight"] - teacher.head.weight).abs().max()
    assert moved > 1e-3


def test_branches_share_their_weights_factor() -> None:
    teacher = a_teacher(branches="orepa")
    groups = gpdfx.param_groups(teacher, lr=0.1, parametrization="paper")
    rate = {n: g["lr"] for g in groups for n in g["param_names"]}
    own = rate["b.weight"]
    assert rate["_branches.b.weight.product.second"] == own
    assert rate["_branches.b.weight.product.first"] == 0.1
    assert rate["head.weight"] == pytest.approx(0.4)


def names_of(groups: list[dict[str, Any]]) -> list[str]:
    return [name for group in groups for name in group["param_names"]]


def test_every_trainable_parameter_of_a_gpd_is_there_once() -> None:
    """The student's own head, losses of features; and by timm's protocol the same decay."""
    torch.manual_seed(0)
    features = FitNet(["b"], ["b"])
    gpd = gpdfx.GPD(
        Net(), Net(), features=features, unshared="head", example_inputs=(torch.randn(4, 3, 8, 8),)
    )
    gpd.teacher.a.weight.requires_grad_(False)
    groups = gpdfx.param_groups(gpd, 0.1)
    trainable = {name: p for name, p in gpd.named_parameters() if p.requires_grad}
    assert sorted(names_of(groups)) == sorted(trainable)
    assert {"teacher.student_own.head.weight", "features.student.parts.0.weight"} <= {*trainable}
    for group in groups:
        assert all(map(operator.is_, group["params"], map(trainable.get, group["param_names"])))
    decayed = {*names_of([group for group in groups if group["weight_decay"]])}
    assert not any("scales" in name or name.endswith("bias") for name in decayed)
    optimizer = create_optimizer_v2(gpd, "adamw", lr=0.1, weight_decay=0.1)
    held = [id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]]
    assert {*held} == {id(trainable[name]) for name in decayed}
    assert sorted(names_of(gpdfx.param_groups(torch.compile(gpd)))) == sorted(trainable)


class Named(nn.Module):
    """A position embedding and norms of three dimensions, which do not decay, in a part."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = Positions(), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.part(x).mean((2, 3)))
        return out


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 6, 3), nn.LayerNorm([6, 6, 6])
        self.position = nn.Parameter(torch.randn(6, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.a(x) + self.position)
        return out

    def no_weight_decay(self) -> set[str]:
        return {"position"}


def test_what_the_student_names_does_not_decay() -> None:
    gpd = gpdfx.GPD(Named(), example_inputs=(torch.randn(4, 3, 8, 8),), verify=False)
    groups = gpdfx.param_groups(gpd, 0.1)
    kept = {*names_of([group for group in groups if not group["weight_decay"]])}
    assert {"teacher.part.position", "teacher.part.norm.weight"} <= kept
    assert "teacher.part.a.weight" not in kept
    patterns = gpdfx.param_groups(gpd, 0.1, no_decay=["part"])
    kept = {*names_of([group for group in patterns if not group["weight_decay"]])}
    branches = [n for n, _ in gpd.named_parameters() if n.startswith("teacher._branches.part.a.")]
    assert {"teacher.part.a.weight", *branches} <= kept
    assert len(branches) > 2


def test_layer_decay_is_timms() -> None:
    """For the student's parameters, their branches and what is its own."""
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=4, **sizes)
    x = torch.randn(2, 3, 16, 16)
    gpd = gpdfx.GPD(vit, example_inputs=(x,), unshared="head", verify=False)
    groups = gpdfx.param_groups(gpd, 0.1, lr=0.01, layer_decay=0.5)
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    want = {}
    for group in param_groups_layer_decay(vit, 0.1, layer_decay=0.5):
        for p in group["params"]:
            name = next(n for n, q in vit.named_parameters() if q is p)
            want[name] = 0.01 * group["lr_scale"]
    assert {n: rates[f"teacher.{n}"] for n in want} == pytest.approx(want)
    assert rates["teacher.student_own.head.weight"] == 0.01
    branch = "teacher._branches.blocks.0.mlp.fc1.weight.lowrank.up"
    assert rates[branch] == pytest.approx(want["blocks.0.mlp.fc1.weight"])
    assert len({*want.values()}) == 4
    timms = create_optimizer_v2(gpd, "adamw", lr=0.01, weight_decay=0.1, layer_decay=0.5)
    scales = {id(p): g["lr_scale"] for g in timms.param_groups for p in g["params"]}
    for name, p in gpd.named_parameters():
        assert 0.01 * scales[id(p)] == pytest.approx(rates[name]), name
    with pytest.raises(gpdfx.InputError, match="group_matcher"):
        gpdfx.param_groups(a_teacher(), lr=0.1, layer_decay=0.5)


def test_uneven_copies_have_no_such_factor() -> None:
    with pytest.raises(gpdfx.InputError, match=r"head\.weight"):
        gpdfx.param_groups(a_teacher(1.5), lr=0.1, parametrization="paper")


@pytest.mark.parametrize(
    "options",
    [
        {"parametrization": "x"},
        {"optimizer": "x"},
        {"parametrization": "paper"},
        {"layer_decay": 0.5},
        {"weight_decay": float("nan")},
        {"weight_decay": -0.1},
        {"weight_decay": "0.1"},
        {"lr": -1.0},
    ],
)
def test_wrong_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(gpdfx.InputError):
        gpdfx.param_groups(a_teacher(), **options)
    with pytest.raises(gpdfx.InputError, match="takes a teacher"):
        gpdfx.param_groups(Net())
