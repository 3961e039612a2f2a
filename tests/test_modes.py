"""Modules in train and in eval mode side by side: a frozen norm while the rest trains, dropout that
stays on in eval mode, and networks whose own ``train()`` keeps something frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import gpdfx
from gpdfx.train.networks import check_logits

from .helpers import parts
from .test_parts import loop


class Block(nn.Module):
    """A residual block with a norm and dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(width, width, 3, padding=1), nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.norm(self.conv(x)).relu())


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8))
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(-1))


class Frozen(Blocks):
    """Its own ``train()`` keeps norms in eval mode."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self


class Forgets(Frozen):
    """One that does not return itself, as is easily forgotten."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


class Stage(Block):
    """A part with a ``train()`` of its own."""

    def train(self, mode: bool = True) -> Stage:
        super().train(mode)
        self.norm.eval()
        return self


class Staged(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.blocks.append(Stage(8))


def freeze_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()


def freeze_stem(model: nn.Module) -> None:
    model.get_submodule("stem").eval()


def freeze_one(model: nn.Module) -> None:
    model.get_submodule("blocks.1.norm").eval()


def drop_in_eval(model: nn.Module) -> None:
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()


def only_head_trains(model: nn.Module) -> None:
    model.eval().get_submodule("head").train()


def average_all(model: nn.Module) -> None:
    """Statistics are those of all batches, by the count of them."""
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = None


@pytest.mark.parametrize("change", [lambda model: None, freeze_norms, freeze_one])
def test_norms_that_average_all_batches(change: Callable[[nn.Module], None]) -> None:
    model = a_model()
    average_all(model), change(model)
    teacher = expanded(model)
    assert not teacher.report().apart
    same(model, teacher, calls=3)
    model.train(), teacher.train()
    same(model, teacher, calls=3)
    for run in (model, teacher):
        run.get_submodule("stem.1").momentum = 0.5
    same(model, teacher)


CHANGES = [freeze_norms, freeze_stem, freeze_one, drop_in_eval, only_head_trains]


def a_model(kind: type[nn.Module] = Blocks) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def inputs() -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(1)
    while True:
        yield 2 * torch.randn(4, 3, 9, generator=draw) + 1


def same(model: nn.Module, teacher: gpdfx.Teacher, calls: int = 2) -> None:
    """Call after call: outputs, gradients of the inputs, and what collapse has in the end."""
    for x in (x for x, _ in zip(inputs(), range(calls), strict=False)):
        results = []
        for run in (model, teacher, teacher.student):
            own = x.clone().requires_grad_()
            torch.manual_seed(2)
            y = run(own)
            y = y["logits"] if isinstance(y, dict) else y
            y.square().sum().backward()
            results.append((y.detach(), own.grad))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)
    plain = gpdfx.collapse(teacher)
    assert [m.training for m in plain.modules()] == [m.training for m in model.modules()]
    torch.testing.assert_close(dict(plain.named_buffers()), dict(model.named_buffers()))


def expanded(model: nn.Module, **options: object) -> gpdfx.Teacher:
    x = next(inputs())
    return gpdfx.expand(
        model, 2, example_inputs=(x,), **{"branches": None, "dynamic": "batch", **options}
    )


@pytest.mark.parametrize("change", CHANGES)
def test_modules_stay_as_they_were_given(change: Callable[[nn.Module], None]) -> None:
    model = a_model()
    change(model)
    teacher = expanded(model)
    assert teacher.training == model.training
    assert {"probe/given", "real/given"} <= teacher.report().error.keys()
    same(model, teacher)
    for mode in (True, False):
        same(model.train(mode), teacher.train(mode), calls=1)
    change(model), change(teacher)
    same(model, teacher)


@pytest.mark.parametrize("kind", [Frozen, Forgets, Staged])
@pytest.mark.parametrize("called", [False, True])
def test_its_own_train_counts(kind: type[nn.Module], called: bool) -> None:
    """Before it was ever called, the model is in a mode that it will not be in again."""
    model = a_model(kind)
    if called:
        model.train()
    teacher = expanded(model)
    assert ("real/given" in teacher.report().error) is not called
    same(model, teacher)
    for mode in (False, True):
        model.train(mode), teacher.train(mode)
        same(model, teacher)
    if kind is Staged:
        model.get_submodule("blocks.2").eval(), teacher.get_submodule("blocks.2").eval()
        with pytest.raises(gpdfx.InputError, match=r"blocks.2 \(Stage\) in eval"):
            teacher(next(inputs()))
        model.get_submodule("blocks.2").train(), teacher.get_submodule("blocks.2").train()
        assert not teacher.get_submodule("blocks.2.norm").training
        same(model, teacher)


@pytest.mark.parametrize("path", ["stem.1", "attend", "step"])
def test_parts_stay_as_they_were_given(path: str) -> None:
    model, _ = loop()
    model.get_submodule(path).eval()
    teacher = expanded(model, verify=path == "attend")
    assert "" not in parts(teacher)
    same(model, teacher)
    for mode in (True, False):
        same(model.train(mode), teacher.train(mode), calls=1)
    for run in (model, teacher):
        run.train().get_submodule(path).eval()
    same(model, teacher)


def test_another_mode_is_refused_by_name() -> None:
    model = a_model()
    freeze_stem(model)
    teacher = expanded(model).train()
    teacher.get_submodule("blocks.0.norm").eval()
    with pytest.raises(gpdfx.InputError, match=r"blocks.0.norm \(BatchNorm1d\) in eval") as caught:
        teacher(next(inputs()))
    assert "before expand" in str(caught.value.remedy)
    teacher.student(next(inputs()))  # the user's own module can
    teacher.get_submodule("blocks.0.norm").training = True
    teacher(next(inputs()))
    flags = {module: module.training for module in teacher.modules()}
    teacher.eval()
    for module, flag in flags.items():  # as after an evaluation
        module.training = flag
    assert teacher.training
    teacher(next(inputs()))
    freeze_norms(teacher.get_submodule("stem").eval())
    teacher(next(inputs()))


def test_another_mode_of_a_part_is_the_users_python() -> None:
    model, x = loop()
    teacher = expanded(model, verify=False).train()
    teacher.get_submodule("stem.1").eval()
    model.train().get_submodule("stem.1").eval()
    results = []
    for run in (teacher, model):
        torch.manual_seed(0)
        results.append(run(x))
    torch.testing.assert_close(*results)


def test_plain_networks_have_two_graphs() -> None:
    for mode in (True, False):
        teacher = expanded(a_model().train(mode), verify=False)
        assert [s.site.mode for s in parts(teacher)[""].sections] == ["train", "eval"]


def test_given_modes_survive_copies_branches_and_the_compiler() -> None:
    model = a_model()
    freeze_norms(model)
    teacher = copy.deepcopy(expanded(model, branches="dbb", verify=False))
    compiled = torch.compile(teacher, backend="eager", fullgraph=True)
    x = next(inputs())
    for run in (teacher, compiled, teacher.student):
        torch.manual_seed(2)
        got = run(x)
        torch.manual_seed(2)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


def test_given_modes_survive_distillation_and_looking_at_a_network() -> None:
    model = a_model()
    freeze_norms(model)
    flags = [m.training for m in model.modules()]
    gpd = gpdfx.GPD(model, example_inputs=(next(inputs()),), branches=None, verify=False)
    gpd(next(inputs()), torch.tensor([0, 1, 2, 3]))
    assert [m.training for m in gpd.collapse().modules()] == flags
    assert all(m.training for m in gpd.train().collapse().modules())

    class Data:
        shape, classes = (3, 9), 4

    check_logits("model", model, Data(), 0)  # type: ignore[arg-type]
    assert [m.training for m in model.modules()] == flags
