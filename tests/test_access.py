"""What a training loop holds - a GPD, an average of it, it wrapped - in place of a teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import gpdfx
from gpdfx.distill.features import FitNet

from .networks import tensors_equal
from .runs import Net, X, Y


@pytest.fixture(scope="module")
def trained() -> gpdfx.GPD:
    """With a head that is the student's own, and losses of features; after a step."""
    torch.manual_seed(0)
    gpd = gpdfx.GPD(
        Net(), Net(), features=FitNet(["b"], ["b"]), unshared="head", example_inputs=(X,)
    )
    optimizer = torch.optim.SGD(gpdfx.param_groups(gpd, 1e-3), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        gpd(X, Y).loss.backward()
        optimizer.step()
    return gpd.eval()


class Wrapped(nn.Module):
    """As DDP holds its module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


HOLDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda gpd: gpd,
    "average": AveragedModel,
    "average of timm": ModelEmaV3,
    "compiled": torch.compile,  # type: ignore[dict-item]
    "wrapped": Wrapped,
    "wrapped and compiled": lambda gpd: torch.compile(Wrapped(gpd)),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("whole", [True, False])
def test_each_is_as_good_as_a_teacher(trained: gpdfx.GPD, holder: str, whole: bool) -> None:
    held = HOLDERS[holder](trained if whole else trained.teacher)
    want = trained.collapse().state_dict()
    assert tensors_equal(want, gpdfx.collapse(held).state_dict())
    assert str(gpdfx.explain(held, "a.weight")) == str(gpdfx.explain(trained.teacher, "a.weight"))
    state = gpdfx.to_student(held.state_dict(), held)
    prefix = "module." if "n_averaged" in state else ""
    state.pop("n_averaged", None)
    assert tensors_equal(want, {k.removeprefix(prefix): x for k, x in state.items()})
    inside = nn.ModuleDict({"net": held, "metric": nn.Linear(2, 2)})  # as Lightning's modules
    for state in (trained.state_dict(), inside.state_dict()):
        assert tensors_equal(want, gpdfx.to_student(state, held))
    torch.manual_seed(1)
    other = Net()
    twin = copy.deepcopy(trained)
    state = nn.ModuleDict({"net": other, "metric": nn.Linear(2, 2)}).state_dict()
    (twin if whole else twin.teacher).load_state_dict(gpdfx.to_teacher(state, held))
    torch.testing.assert_close(twin.student(X), other.eval()(X))
    torch.testing.assert_close(twin.teacher(X), other(X), rtol=1e-4, atol=1e-5)
    assert tensors_equal(twin.features.state_dict(), trained.features.state_dict())


@pytest.mark.parametrize("of_gpd", [True, False])
def test_optimizers_of_a_gpd(of_gpd: bool) -> None:
    """Momentum follows both ways: the own head's is the head's, features' are left out."""
    torch.manual_seed(0)
    gpd = gpdfx.GPD(
        Net(),
        Net(),
        features=FitNet(["b"], ["b"]),
        unshared="head",
        example_inputs=(X,),
        branches=None,
    )
    groups = gpdfx.param_groups(gpd if of_gpd else gpd.teacher, 1e-3)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    gpd(X, Y).loss.backward()
    optimizer.step()

    def made(state: dict[str, Any], module: nn.Module) -> torch.optim.Optimizer:
        groups = [
            [module.get_parameter(n) for n in g["param_names"]] for g in state["param_groups"]
        ]
        made = torch.optim.SGD([{"params": group} for group in groups], lr=0.1, momentum=0.9)
        made.load_state_dict(state)
        return made

    student = gpd.collapse()
    own = made(gpdfx.to_student(optimizer.state_dict(), gpd), student)
    head = gpd.own_parameters()["head.weight"]
    momentum = own.state[student.head.weight]["momentum_buffer"]
    torch.testing.assert_close(momentum, optimizer.state[head]["momentum_buffer"])
    wide = optimizer.state[gpd.teacher.get_parameter("a.weight")]["momentum_buffer"]
    a = own.state[student.a.weight]["momentum_buffer"]
    torch.testing.assert_close(a, gpd.teacher.narrow("a.weight", wide))
    back = gpdfx.to_teacher(own.state_dict(), gpd)
    again = made(back, gpd)
    torch.testing.assert_close(again.state[head]["momentum_buffer"], momentum)
    shared = gpd.teacher.get_parameter("head.weight")
    want = gpd.teacher.widen("head.weight", momentum)
    torch.testing.assert_close(again.state[shared]["momentum_buffer"], want)


def test_an_average_is_deployed(trained: gpdfx.GPD) -> None:
    for held in (trained, torch.compile(AveragedModel(trained))):
        torch.testing.assert_close(gpdfx.plain_teacher(held)(X), trained.teacher(X))


def test_a_gpd_of_a_teacher(trained: gpdfx.GPD, tmp_path: Path) -> None:
    """Of one that was loaded, or that expand made otherwise."""
    gpdfx.save(trained.teacher, tmp_path / "teacher.safetensors")
    teacher = gpdfx.load(tmp_path / "teacher.safetensors", Net())
    again = gpdfx.GPD(teacher).eval()
    assert again.teacher is teacher
    torch.testing.assert_close(again.student(X), trained.student(X))
    torch.testing.assert_close(again.teacher(X), trained.teacher(X))
    with pytest.raises(gpdfx.InputError, match="ratio"):
        gpdfx.GPD(teacher, ratio=3)
    with pytest.raises(gpdfx.InputError, match="features"):
        gpdfx.GPD(teacher, Net(), features=FitNet(["a"], ["a"]))


def test_a_gpd_in_a_file(trained: gpdfx.GPD, tmp_path: Path) -> None:
    """All of it, its losses of features and numbers too; its teacher alone where that is asked."""
    path = tmp_path / "gpd.safetensors"
    twin = copy.deepcopy(trained)
    twin.lam, twin.epoch = 2.5, 4
    for held in (twin, AveragedModel(twin), torch.compile(twin)):
        gpdfx.save(held, path)
        torch.manual_seed(1)
        again = gpdfx.GPD.load(path, Net(), trained._static, features=FitNet(["b"], ["b"])).eval()
        assert (again.lam, again.epoch) == (2.5, 4)
        assert tensors_equal(again.state_dict(), twin.state_dict())
        torch.testing.assert_close(again(X, Y).loss, twin(X, Y).loss, rtol=0, atol=0)
    teacher = gpdfx.load(path, Net())
    assert tensors_equal(teacher.state_dict(), twin.teacher.state_dict())
    with pytest.raises(gpdfx.InputError, match=r"losses of features has no student\.parts\.0"):
        gpdfx.GPD.load(path, Net())
    gpdfx.GPD(teacher, lam=1.0).save(path)
    assert gpdfx.GPD.load(path, Net(), temperature=2.0).temperature == 2.0
    gpdfx.save(teacher, path)
    assert gpdfx.GPD.load(path, Net()).lam == 3.0


def test_a_student_may_call_a_module_like_a_method_of_gpd(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("stored", nn.Linear(4, 6))
    teacher = gpdfx.expand(model, example_inputs=(torch.randn(3, 4),), verify=False)
    gpdfx.save(teacher, tmp_path / "t")
    again = gpdfx.load(tmp_path / "t", copy.deepcopy(model))
    assert tensors_equal(again.state_dict(), teacher.state_dict())


def test_the_static_teacher_is_not_touched() -> None:
    """Not even if it is the student; and it is not held twice."""
    torch.manual_seed(0)
    model = Net().train()
    gpd = gpdfx.GPD(model, model, example_inputs=(X,), verify=False)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert gpd._static is not model
    assert gpd._static.a.weight.data_ptr() == model.a.weight.data_ptr()
    assert not gpd._static.training
    frozen = Net().eval().requires_grad_(False)
    assert gpdfx.GPD(Net(), frozen, example_inputs=(X,), verify=False)._static is frozen


def test_a_mistyped_keyword_is_an_error() -> None:
    with pytest.raises(TypeError, match="smoothin"):
        gpdfx.GPD(Net(), smoothin=0.1, example_inputs=(X,))  # type: ignore[call-arg]


def test_what_holds_no_teacher(trained: gpdfx.GPD, tmp_path: Path) -> None:
    for call in (
        lambda x: gpdfx.collapse(x),
        lambda x: gpdfx.explain(x, "a.weight"),
        lambda x: gpdfx.save(x, tmp_path / "x"),
        lambda x: gpdfx.to_student(trained.state_dict(), x),
    ):
        for wrong in (Net(), AveragedModel(Net()), Wrapped(Net()), "gpd"):
            with pytest.raises(gpdfx.InputError, match="takes a teacher, not"):
                call(wrong)
