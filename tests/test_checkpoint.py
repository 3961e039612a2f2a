"""Checkpoints: weights, averages and optimizers both ways, and files."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gpdfx
from gpdfx.branches.kinds import Branch, Full
from gpdfx.calls import tree

from .helpers import thinned
from .layers import a_teacher
from .networks import NETWORKS, tensors_equal


def trained(
    name: str = "unet", steps: int = 3, make: Any = None, **options: Any
) -> tuple[nn.Module, Any, Any]:
    model, teacher = a_teacher(name, **options)
    inputs = NETWORKS[name].inputs()
    make = make or (lambda p: torch.optim.SGD(p, 0.01, momentum=0.9))
    optimizer = make(teacher.parameters())
    for _ in range(steps):
        wide, own = (tree.leaves(y)[0] for y in teacher.both(*inputs))
        optimizer.zero_grad()
        (wide.square().mean() + own.square().mean()).backward()
        optimizer.step()
    return model, teacher, optimizer


@pytest.mark.parametrize("name", ["unet", "gpt", "odd"])
@pytest.mark.parametrize("extract", ["first", "mean"])
def test_to_student_is_the_collapsed_state(name: str, extract: str) -> None:
    model, teacher, _ = trained(name, extract=extract)
    state = gpdfx.to_student(teacher.state_dict(), teacher)
    assert list(state) == list(model.state_dict())
    assert tensors_equal(state, gpdfx.collapse(teacher).state_dict())
    copy.deepcopy(model).load_state_dict(state)


@pytest.mark.parametrize("name", ["unet", "gpt", "odd"])
def test_to_teacher_takes_new_weights_into_a_trained_teacher(name: str) -> None:
    _, teacher, _ = trained(name)
    torch.manual_seed(5)
    other = NETWORKS[name].build()
    before = copy.deepcopy(teacher.state_dict())
    state = gpdfx.to_teacher(other.state_dict(), teacher)
    assert tensors_equal(before, teacher.state_dict())  # nothing is changed
    teacher.load_state_dict(state)
    assert tensors_equal(gpdfx.collapse(teacher).state_dict(), other.state_dict())
    x = NETWORKS[name].inputs(seed=8)
    teacher.eval(), other.eval()
    one, two = (tree.leaves(y)[0] for y in (teacher(*x), other(*x)))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    kept = [k for k in state if k.endswith("product.second")]
    assert all(torch.equal(state[k], before[k]) for k in kept)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_prefixes_are_understood(prefix: str) -> None:
    _, teacher, _ = trained()
    state = {prefix + k: v for k, v in teacher.state_dict().items()}
    want = gpdfx.collapse(teacher).state_dict()
    assert tensors_equal(gpdfx.to_student(state, teacher), want)


def test_moving_averages_go_both_ways() -> None:
    model, teacher, _ = trained()
    averages = AveragedModel(teacher, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averages.update_parameters(teacher)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(1)
    averages.update_parameters(teacher)
    state = gpdfx.to_student(averages.state_dict(), teacher)
    mine = AveragedModel(model)
    mine.load_state_dict(state)
    assert int(mine.n_averaged) == 2
    want = gpdfx.collapse(averages.module).state_dict()
    assert tensors_equal(dict(mine.module.state_dict()), want)
    averages.load_state_dict(gpdfx.to_teacher(state, teacher))
    assert tensors_equal(gpdfx.collapse(averages.module).state_dict(), want)


@pytest.mark.parametrize("drop", [True, False])
def test_a_state_that_does_not_fit_is_refused_by_its_keys(drop: bool) -> None:
    _, teacher, _ = trained()
    state = dict(teacher.state_dict())
    state.pop("head.weight") if drop else state.update({"tail.weight": torch.ones(1)})
    with pytest.raises(gpdfx.InputError, match=r"head\.weight" if drop else r"tail\.weight"):
        gpdfx.to_student(state, teacher)
    with pytest.raises(gpdfx.InputError, match=r"head\.weight.* instead of "):
        gpdfx.to_student({**teacher.state_dict(), "head.weight": torch.ones(2, 2)}, teacher)


# --------------------------------------------------------------------------- optimizers
OPTIMIZERS = {
    "momentum": (lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), ["momentum_buffer"]),
    "adamw": (lambda p: torch.optim.AdamW(p, 0.01), ["exp_avg", "exp_avg_sq"]),
}


@pytest.mark.parametrize("which", OPTIMIZERS)
def test_moments_go_both_ways(which: str) -> None:
    make, keys = OPTIMIZERS[which]
    _, teacher, optimizer = trained("gpt", make=make, branches=None)
    state = gpdfx.to_student(optimizer.state_dict(), teacher)
    plain = gpdfx.collapse(teacher)
    mine = make(plain.parameters())
    mine.load_state_dict(state)
    own = dict(plain.named_parameters())
    for name, p in teacher.named_parameters():
        for key in keys:
            want = teacher.narrow(name, optimizer.state[p][key])
            assert torch.equal(mine.state[own[name]][key], want), (name, key)
    back = gpdfx.to_teacher(state, teacher)
    optimizer.load_state_dict(back)
    for name, p in teacher.named_parameters():
        for key in keys:
            want = teacher.widen(name, mine.state[own[name]][key])
            assert torch.equal(optimizer.state[p][key], want), (name, key)


def test_states_of_optimizers_may_be_by_name() -> None:
    """As ``torch.distributed.checkpoint`` has them, in any order."""
    make, keys = OPTIMIZERS["adamw"]
    _, teacher, optimizer = trained("gpt", make=make, branches=None)
    state = get_optimizer_state_dict(teacher, optimizer)
    for group in state["param_groups"]:
        group["params"].reverse()
    plain = gpdfx.collapse(teacher)
    mine = make([*plain.named_parameters()])
    mine.load_state_dict(gpdfx.to_student(state, teacher))
    own, wide = dict(plain.named_parameters()), dict(teacher.named_parameters())
    for name, p in own.items():
        for key in keys:
            want = teacher.narrow(name, optimizer.state[wide[name]][key])
            assert torch.equal(mine.state[p][key], want), (name, key)


def test_moments_of_branched_weights_are_refused_or_left_out() -> None:
    _, teacher, optimizer = trained("unet")
    with pytest.raises(gpdfx.InputError, match=r"down\.0\.0\.weight: it has branches"):
        gpdfx.to_student(optimizer.state_dict(), teacher)
    state = gpdfx.to_student(optimizer.state_dict(), teacher, strict=False)
    plain = gpdfx.collapse(teacher)
    mine = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9)
    mine.load_state_dict(state)
    own = dict(plain.named_parameters())
    held = {name for name, p in own.items() if mine.state.get(p)}
    assert "down.0.1.weight" in held
    assert "down.0.0.weight" not in held
    sum(p.sum() for p in plain.parameters()).backward()
    mine.step()  # begins anew for the others


def test_moments_keep_their_groups() -> None:
    _, teacher, _ = trained(steps=0, branches=None)
    groups = gpdfx.param_groups(teacher, 1e-4, lr=0.1)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    inputs = NETWORKS["unet"].inputs()
    teacher(*inputs).square().mean().backward()
    optimizer.step()
    state = gpdfx.to_student(optimizer.state_dict(), teacher)
    decay = {
        name: group["weight_decay"]
        for group in state["param_groups"]
        for name in group["param_names"]
    }
    assert decay["down.0.0.weight"] == 1e-4
    assert decay["down.0.1.weight"] == 0
    assert set(decay) == set(dict(gpdfx.collapse(teacher).named_parameters()))


def test_an_optimizer_of_something_else_is_refused() -> None:
    _, teacher, _ = trained(steps=0)
    foreign = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(gpdfx.InputError, match="other parameters"):
        gpdfx.to_student(foreign.state_dict(), teacher)


# --------------------------------------------------------------------------- files
@pytest.mark.parametrize(
    ("name", "branches"),
    thinned(
        itertools.product(("unet", "gpt", "odd"), ("auto", None, "mobileone")),
        {("unet", "auto"), ("gpt", "auto"), ("odd", "auto"), ("gpt", None), ("unet", "mobileone")},
    ),
)
def test_a_file_makes_the_teacher_again(name: str, branches: Any, tmp_path: Path) -> None:
    _, teacher, _ = trained(name, branches=branches, extract="mean", seed=3)
    path = tmp_path / "teacher.safetensors"
    gpdfx.save(teacher, path)
    torch.manual_seed(77)
    other = gpdfx.load(path, NETWORKS[name].build())
    assert tensors_equal(teacher.state_dict(), other.state_dict())
    x = NETWORKS[name].inputs(seed=4)
    for call in ("forward", "student"):
        results = []
        for one in (teacher.eval(), other.eval()):
            results.append(tree.leaves(getattr(one, call)(*x))[0])
        assert torch.equal(*results)
    assert not list(tmp_path.glob("*.tmp"))


class Detached(nn.Module):
    """Has no gradient where it is traced; only a check finds out."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return y.detach() if torch.compiler.is_exporting() else y


@pytest.mark.parametrize("place", ["first", "last", "all"])
def test_what_the_check_took_apart_is_loaded(place: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        one = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)
        two = nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)
        first = (nn.Sequential if place == "last" else Detached)(*one)
        return nn.Sequential(first, (nn.Sequential if place == "first" else Detached)(*two))

    x = torch.randn(4, 6)
    teacher = gpdfx.expand(build(), 2, example_inputs=(x,))
    assert "" in teacher.report().apart
    gpdfx.save(teacher, tmp_path / "t.safetensors")
    again = gpdfx.load(tmp_path / "t.safetensors", build())
    assert again.report().apart.keys() == teacher.report().apart.keys()
    assert tensors_equal(again.state_dict(), teacher.state_dict())
    torch.testing.assert_close(again(x), teacher(x))


def test_the_header_is_json_and_ties_are_stored_once(tmp_path: Path) -> None:
    _, teacher, _ = trained("gpt")
    path = tmp_path / "teacher.safetensors"
    gpdfx.save(teacher, path)
    with safe_open(str(path), "pt") as file:
        header = json.loads(file.metadata()["gpdfx"])
        names = set(file.keys())
    assert header["recipe"]["ratio"] == {"*": 2.0}
    assert header["recipe"]["branches"] == {"*": "auto"}
    assert header["versions"]["torch"] == torch.__version__
    assert header["same"]  # the head is the embedding
    assert not names & set(header["same"])


def test_own_branches_need_to_be_passed_again(tmp_path: Path) -> None:
    class Own(Full):
        pass

    path = tmp_path / "teacher.safetensors"
    branches: tuple[Branch, ...] = (Own(),)
    _, teacher, _ = trained("unet", branches=branches)
    gpdfx.save(teacher, path)
    with pytest.raises(gpdfx.InputError, match="Own"):
        gpdfx.load(path, NETWORKS["unet"].build())
    other = gpdfx.load(path, NETWORKS["unet"].build(), branches=branches)
    assert tensors_equal(teacher.state_dict(), other.state_dict())
    _, teacher, _ = trained("unet", branches=(Full(norm=True),))
    gpdfx.save(teacher, path)
    other = gpdfx.load(path, NETWORKS["unet"].build())
    assert tensors_equal(teacher.state_dict(), other.state_dict())


def test_another_architecture_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    _, teacher, _ = trained("unet", steps=0)
    path = tmp_path / "teacher.safetensors"
    gpdfx.save(teacher, path)
    other = type(NETWORKS["unet"].build())(width=16)
    with pytest.raises(gpdfx.InputError, match=r"down\.0\.0\.weight is \[16, 3, 3, 3\]"):
        gpdfx.load(path, other)
    with pytest.raises(gpdfx.InputError, match="another architecture"):
        gpdfx.load(path, nn.Linear(3, 4))


@pytest.mark.parametrize("harm", ["truncate", "flip", "foreign", "absent"])
def test_a_damaged_file_is_refused(harm: str, tmp_path: Path) -> None:
    _, teacher, _ = trained("unet", steps=0)
    path = tmp_path / "teacher.safetensors"
    gpdfx.save(teacher, path)
    data = bytearray(path.read_bytes())
    match harm:
        case "truncate":
            path.write_bytes(data[: len(data) // 2])
        case "flip":
            path.write_bytes(data[:40] + b"\x00" * 40 + data[80:])
        case "foreign":
            from safetensors.torch import save_file

            save_file({"x": torch.ones(2)}, path)
        case "absent":
            path.unlink()
    with pytest.raises(gpdfx.InputError, match=str(path.name)):
        gpdfx.load(path, NETWORKS["unet"].build())


def test_structured_examples_are_kept_or_asked_for(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, more: Any, k: int = 1) -> Tensor:
            y: Tensor = self.b(self.a(x + (more["y"] if isinstance(more, dict) else 0) * k).relu())
            return y

    path = tmp_path / "teacher.safetensors"
    call = (torch.randn(3, 4), {"y": torch.randn(3, 4)})
    teacher = gpdfx.expand(Two(), 2, example_inputs=call, example_kwargs={"k": 2}, verify=False)
    gpdfx.save(teacher, path)
    other = gpdfx.load(path, Two())
    assert torch.equal(other(*call, k=2), teacher(*call, k=2))
    strange = (torch.randn(3, 4), slice(3))
    teacher = gpdfx.expand(Two(), 2, example_inputs=strange, verify=False)
    gpdfx.save(teacher, path)
    with pytest.raises(gpdfx.InputError, match="example"):
        gpdfx.load(path, Two())
    other = gpdfx.load(path, Two(), example_inputs=strange)
    assert torch.equal(other(*strange), teacher(*strange))
