"""Parameter groups: what decays, and the paper's parametrization as factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpdfx


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


def test_uneven_copies_have_no_such_factor() -> None:
    with pytest.raises(gpdfx.InputError, match=r"head\.weight"):
        gpdfx.param_groups(a_teacher(1.5), lr=0.1, parametrization="paper")


@pytest.mark.parametrize(
    "options", [{"parametrization": "x"}, {"optimizer": "x"}, {"parametrization": "paper"}]
)
def test_wrong_arguments(options: dict[str, str]) -> None:
    with pytest.raises(gpdfx.InputError):
        gpdfx.param_groups(a_teacher(), **options)
