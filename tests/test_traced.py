"""Modules that ``torch.fx`` has traced (feature extractors, prepared networks): a copy of one, by
its own ``__deepcopy__``, keeps only what its graph names, and export would run its graph alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

import gpdfx

from .helpers import parts, trains_as


class Net(nn.Module):
    """Not the same in both modes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2))
        self.b, self.head = nn.Conv1d(6, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.stem(x)
        x = x * 2 if self.training else x
        return self.head(self.b(x).relu().mean(-1)) * scale


class Looks(nn.Module):
    """A traced part between Python."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.head = part, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        return self.head(y if float(y.detach().sum()) < 1e9 else y + 1)


def features() -> nn.Module:
    return create_feature_extractor(Net(), {"stem": "low", "b": "high"})


def in_place() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 3, 1), fx.symbolic_trace(Net()))


def in_python() -> nn.Module:
    return Looks(fx.symbolic_trace(Net()))


@pytest.mark.parametrize("make", [lambda: fx.symbolic_trace(Net()), features, in_place, in_python])
def test_traced_modules_widen(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    traced = next(name for name, m in model.named_modules() if isinstance(m, fx.GraphModule))
    model.get_submodule(traced).unused = nn.Linear(2, 2)  # which no graph names
    teacher = gpdfx.expand(model, 2, example_inputs=(torch.randn(4, 3, 9),), branches=None)
    report = teacher.report()
    assert set(report.apart) == ({""} if make is in_python else set())
    assert report.parameters[1] > 1.7 * report.parameters[0]
    assert hasattr(gpdfx.collapse(teacher).get_submodule(traced), "unused")
    for training in (False, True):
        model.train(training), teacher.train(training)
        trains_as(model, teacher, torch.randn(5, 3, 11))


@pytest.mark.parametrize("part", [False, True])
def test_hooks_on_them_are_part_of_the_function(part: bool) -> None:
    torch.manual_seed(0)
    inner = fx.symbolic_trace(Net().eval())
    inner.register_forward_hook(lambda module, args, y: y * 3)
    inner.get_submodule("b").register_forward_hook(lambda module, args, y: y + 1)
    model, x = Looks(inner) if part else inner, torch.randn(4, 3, 9)
    teacher = gpdfx.expand(model, 2, example_inputs=(x,), branches=None, dynamic="batch")
    for run in (teacher, teacher.student, gpdfx.collapse(teacher), copy.deepcopy(teacher)):
        torch.testing.assert_close(run(x), model(x))


def test_a_copied_teacher_goes_on_to_run_its_parts() -> None:
    torch.manual_seed(0)
    model = in_python().train()
    options = {"branches": None, "dynamic": "batch", "verify": False}
    teacher = gpdfx.expand(model, 2, example_inputs=(torch.randn(4, 3, 9),), **options)
    assert "part" in parts(teacher)
    twin, x = copy.deepcopy(teacher), torch.randn(4, 3, 9) + 1
    for run in (teacher, twin):
        torch.manual_seed(0)
        run(x)
    torch.testing.assert_close(dict(twin.named_buffers()), dict(teacher.named_buffers()))


def test_what_is_done_to_one_afterwards_is_not_done_to_its_copies() -> None:
    torch.manual_seed(0)
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    example = torch.randn(3, 4)
    teacher = gpdfx.expand(model, 2, example_inputs=(example,), branches=None)
    want = model(example)
    (relu,) = (node for node in model.graph.nodes if node.target == "1")
    relu.replace_all_uses_with(relu.args[0])
    model.recompile()
    assert not torch.allclose(model(example), want)
    torch.testing.assert_close(gpdfx.collapse(teacher)(example), want)


def test_an_exported_program_is_refused_by_name() -> None:
    x = torch.randn(4, 3, 9)
    model = torch.export.export(Net().eval(), (x,)).module()
    with pytest.raises(gpdfx.InputError, match=r"(?s)train\(\).*made from"):
        gpdfx.expand(model, 2, example_inputs=(x,))
