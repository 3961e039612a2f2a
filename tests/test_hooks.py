"""Hooks of gradients, hooks inside a teacher, and what looks for batch norms in it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import gpdfx

from .helpers import facts, parts, python_shell, summed, trains_as


class Words(nn.Module):
    """No gradient comes to its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(9, 8), nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(x)).relu()).mean(1)


class Image(nn.Module):
    """A residual network with norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(9, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(x)).relu().mean(1))


class Chain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def seen(kind: type[nn.Module], k: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(k)
    if kind in (Words, Tied):
        return torch.randint(0, 9, (6, 5), generator=draw)
    shape = (6, 3, 5, 5) if kind is Image else (6, 6)
    return (1 + k) * torch.randn(shape, generator=draw) - k


def a_model(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def expanded(model: nn.Module, **options: Any) -> gpdfx.Teacher:
    options = {"dynamic": "batch", "branches": None, **options}
    return gpdfx.expand(model, 2, example_inputs=(seen(type(model)),), **options)


def same_gradients(model: nn.Module, teacher: gpdfx.Teacher) -> None:
    """Of the inputs, and of every parameter, summed over its copies."""
    x, maps = seen(type(model), 1), facts(teacher).maps_of
    results = []
    for run in (model, teacher, teacher.student):
        own = x.clone().requires_grad_(x.is_floating_point())
        model.zero_grad(), teacher.zero_grad()
        run(own).square().sum().backward()
        names = [name for name, _ in model.named_parameters()]
        if run is model:
            grads = {name: model.get_parameter(name).grad for name in names}
        else:
            wide = {name: teacher.get_parameter(name).grad for name in names}
            grads = {n: summed(g, maps(n)) for n, g in wide.items() if g is not None}
        results.append((grads, own.grad))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------- of parameters
HOOKED = [(Words, "inner.weight"), (Image, "block.0.weight"), (Image, "stem.1.bias")]
HOOKED += [(Tied, "embed.weight"), (Chain, "0.weight"), (Chain, "3.bias")]


@pytest.mark.parametrize(("kind", "name"), HOOKED)
def test_a_hook_of_a_parameter_counts(kind: type[nn.Module], name: str) -> None:
    model = a_model(kind)
    p = model.get_parameter(name)
    mask = (torch.arange(p.numel()) % 3).view(p.shape)
    calls = list[Tensor]()
    p.register_hook(lambda g: g * mask)
    p.register_hook(lambda g: calls.append(g) or None)
    teacher = expanded(model, branches="auto")
    own = teacher.get_parameter(name)
    assert own.shape == p.shape
    same_gradients(model, teacher)
    assert len(calls) == 3
    assert own.grad is not None
    assert not own.grad[mask == 0].any()
    assert not any(n.startswith(f"_branches.{name}") for n, _ in teacher.named_parameters())
    teacher.zero_grad()
    x = seen(kind, 1)
    (teacher(x).sum() + teacher.student(x).sum()).backward()  # one call, of their sum
    assert len(calls) == 4
    assert not own.grad[mask == 0].any()


def test_a_hook_of_a_parameter_that_the_student_has_for_itself() -> None:
    model = a_model(Image)
    model.get_parameter("head.weight").register_hook(lambda g: g * 0)
    gpd = gpdfx.GPD(model, example_inputs=(seen(Image),), verify=False, unshared="head")
    gpd(seen(Image), torch.arange(6) % 4).loss.backward()
    assert not gpd.own_parameters()["head.weight"].grad.any()  # type: ignore[union-attr]
    assert gpd.own_parameters()["head.bias"].grad.any()  # type: ignore[union-attr]


def test_hooks_that_cannot_go_on_are_refused_by_name() -> None:
    model = a_model(Chain)
    handle = model.get_parameter("3.weight").register_hook(lambda g: g + model[3].weight)
    with pytest.raises(gpdfx.InputError, match=r"hook of 3.weight names") as caught:
        expanded(model)
    assert "teacher.get_parameter('3.weight')" in str(caught.value.remedy)
    handle.remove()
    p = model.get_parameter("0.bias")
    handle = p.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(gpdfx.InputError, match=r"0.bias has a hook that runs when") as caught:
        expanded(model)
    assert "teacher.widen('0.bias', mask)" in str(caught.value.remedy)
    handle.remove()
    mask = torch.ones(8, 6)
    mask[::2] = 0
    teacher = expanded(model)  # the remedy
    own = teacher.get_parameter("0.weight")
    wide = teacher.widen("0.weight", mask)
    own.register_hook(lambda g: g * wide)
    teacher(seen(Chain)).sum().backward()
    assert own.shape == (16, 6)
    assert not teacher.narrow("0.weight", own.grad)[::2].any()  # type: ignore[arg-type]


# --------------------------------------------------------------------------- of modules
def scale_inputs(_: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tuple(g if g is None else 3 * g for g in inputs)


def scale_outputs(_: nn.Module, outputs: Any) -> Any:
    return tuple(0.5 * g for g in outputs)


MODULES = [(Words, "inner"), (Words, "head"), (Image, "block"), (Image, "stem.1"), (Chain, "")]
MODULES += [(Chain, "2"), (Tied, "mix"), (Image, "")]


@pytest.mark.parametrize(("kind", "path"), MODULES)
@pytest.mark.parametrize("verify", [False, True])
def test_a_backward_hook_of_a_module_counts(kind: type[nn.Module], path: str, verify: bool) -> None:
    model = a_model(kind)
    plain = copy.deepcopy(model)
    module = model.get_submodule(path)
    module.register_full_backward_hook(scale_inputs)
    module.register_full_backward_pre_hook(scale_outputs)
    teacher = expanded(model, verify=verify)
    assert path in teacher.report().apart
    assert "has a backward hook" in teacher.report().apart[""]
    same_gradients(model, teacher)
    with pytest.raises(AssertionError):  # the hook shows
        same_gradients(plain, teacher)


def test_a_network_that_is_one_hooked_layer_is_refused_by_name() -> None:
    model = nn.Linear(6, 4)
    model.register_full_backward_hook(scale_inputs)
    with pytest.raises(gpdfx.CaptureError, match=r"\(root\) \(Linear\) has a backward hook") as e:
        gpdfx.expand(model, example_inputs=(seen(Chain),))
    assert "has parameters" in str(e.value.remedy)


# --------------------------------------------------------------------------- inside a teacher
HOOKS = ["register_forward_pre_hook", "register_full_backward_hook"]
HOOKS += ["register_full_backward_pre_hook", "register_backward_hook"]


@pytest.mark.parametrize(("kind", "path"), [(Chain, "0"), (Image, "block"), (Image, "stem.1")])
def test_a_hook_that_would_never_run_says_so(kind: type[nn.Module], path: str) -> None:
    teacher = expanded(a_model(kind), verify=False)
    for name in HOOKS:
        with pytest.raises(gpdfx.InputError, match="would never run") as caught:
            getattr(teacher.get_submodule(path), name)(print)
        assert caught.value.module_path == path
        assert "register_forward_hook takes hooks" in str(caught.value.remedy)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))  # the teacher itself is called
    teacher(seen(kind))
    assert calls


def test_what_the_graphs_hold_does_not_change() -> None:
    model = nn.Sequential(a_model(Chain), nn.Dropout(0.5))
    teacher = gpdfx.expand(model, 2, example_inputs=(seen(Chain),), verify=False)
    for path, name, value in (("0.1", "eps", 0.1), ("1", "p", 0.1), ("0.1", "affine", False)):
        with pytest.raises(gpdfx.InputError, match=f"{name} of a module inside a teacher"):
            setattr(teacher.get_submodule(path), name, value)
    assert "p=0.1" not in repr(teacher)
    for other in (teacher, expanded(a_model(Chain), verify=False)):
        with pytest.raises(gpdfx.InputError, match="another module inside a teacher"):
            nn.SyncBatchNorm.convert_sync_batchnorm(other)
    nn.SyncBatchNorm.convert_sync_batchnorm(gpdfx.expand(nn.Linear(4, 3), 2))  # there is none
    assert teacher.get_submodule("0.1").num_features == 16


# --------------------------------------------------------------------------- batch norms
class Twice(nn.Module):
    """A norm that is called twice, and one without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm, self.plain = nn.BatchNorm1d(8), nn.BatchNorm1d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.plain(self.norm(self.b(self.norm(self.a(x)).relu()))))


class Depends(nn.Module):
    """Captured in parts; one of its norms is not in one."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm, self.head = Chain(), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.norm.register_full_backward_hook(scale_inputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.net(x))
        return self.head(x if x.sum() > -1e9 else -x)


class Writes(Twice):
    """Captured without in-place ops."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x[:, ::2].mul_(2.0)
        x[:, 1] = x[:, 2]
        return self.c(self.plain(self.norm(self.b(self.norm(x)).relu())))


def settled(model: nn.Module, kind: type[nn.Module]) -> None:
    update_bn([seen(kind, k) for k in range(3)], model)


@pytest.mark.parametrize("kind", [Chain, Image, Twice, Depends, Writes])
def test_update_bn_does_what_it_says(kind: type[nn.Module]) -> None:
    model = a_model(kind)
    teacher = expanded(model, branches="auto", verify=False)
    x = seen(kind, 4)
    for run in (model, teacher):
        run.train()(x)
        settled(run, kind)
    torch.testing.assert_close(teacher.eval()(x), model.eval()(x), rtol=1e-3, atol=1e-4)
    for name, buffer in model.named_buffers():
        wide = teacher.get_buffer(name)
        torch.testing.assert_close(wide, teacher.widen(name, buffer), rtol=1e-3, atol=1e-4)
    model.train()(x), teacher.train()(x)  # the momentum is what it was
    torch.testing.assert_close(teacher.eval()(x), model.eval()(x), rtol=1e-3, atol=1e-4)


def test_another_momentum_counts() -> None:
    model = a_model(Image)
    teacher = expanded(model, verify=False)
    for run in (model, teacher):
        for module in run.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.7
        run.train()(seen(Image, 1))
    x = seen(Image, 2)
    torch.testing.assert_close(teacher.eval()(x), model.eval()(x), rtol=1e-3, atol=1e-4)


def test_update_bn_of_copies_averages_and_compiled_teachers() -> None:
    model = a_model(Chain)
    teacher, x = expanded(model, verify=False), seen(Chain, 4)
    settled(model, Chain)
    file = io.BytesIO()
    torch.save(teacher, file)
    file.seek(0)
    average = AveragedModel(teacher)
    average.update_parameters(teacher)
    compiled = torch.compile(teacher, backend="eager")
    for run in (copy.deepcopy(teacher), torch.load(file, weights_only=False), average, compiled):
        settled(run, Chain)
        torch.testing.assert_close(run.eval()(x), model.eval()(x), rtol=1e-3, atol=1e-4)
    assert python_shell(teacher) is None


class Around(nn.Module):
    """Forward hooks on the module that is captured: the whole, or a part."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12))
        self.head, self.whole = nn.Linear(12, 4), whole
        for one in (self, self.stem):
            one.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
            one.register_forward_hook(lambda module, args, y: y * 3 + args[0].mean())

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        if not self.whole and float(y.detach().mean()) > 1e9:
            return self.head(y * 2)
        return self.head(y)


@pytest.mark.parametrize("whole", [True, False])
def test_forward_hooks_of_what_is_captured(whole: bool) -> None:
    torch.manual_seed(0)
    model, x = Around(whole), torch.randn(4, 8)
    teacher = gpdfx.expand(model, 2, example_inputs=(x,), branches=None)
    assert list(parts(teacher)) == ([""] if whole else ["stem", "head"])
    assert teacher.report().parameters[1] > teacher.report().parameters[0]
    trains_as(model, teacher, x)
