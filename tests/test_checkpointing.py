"""Activation checkpointing: the user's wish to save memory, in teacher and student."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import gpdfx
from gpdfx.teacher.module import Teacher

from .helpers import parts, trains_as

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


class Block(nn.Module):
    """A residual block of which the inside is checkpointed, unless ``reentrant`` is none."""

    def __init__(self, norm: nn.Module, reentrant: bool | None) -> None:
        super().__init__()
        self.conv, self.norm, self.reentrant = nn.Conv2d(8, 8, 3, padding=1), norm, reentrant
        self.drop = nn.Dropout(0.3)

    def inside(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.conv(x)).relu())

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return x + self.inside(x)
        return x + checkpoint(self.inside, x, use_reentrant=self.reentrant)


class Net(nn.Module):
    def __init__(
        self, reentrant: bool | None = False, norm: Callable[[int], nn.Module] = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.blocks = nn.Sequential(*(Block(norm(8), reentrant) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class First(nn.Module):
    """A reentrant checkpoint on the input: its parameters have no gradient, as PyTorch warns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.a, x, use_reentrant=True)
        return self.c(checkpoint(self.b, h.requires_grad_(), use_reentrant=True))


class Nested(nn.Module):
    """One inside the other, a region without gradients in it, several results, a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def outer(self, x: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        h = self.a(x)
        with torch.no_grad():
            mask = (h > 0).float()
        inner = checkpoint(lambda y: self.b(y * mask).tanh(), h, use_reentrant=False)
        return inner * scale, h

    def forward(self, x: Tensor) -> Tensor:
        one, two = checkpoint(self.outer, x, use_reentrant=False, scale=0.5)
        return self.c(one + two)


class Sequential(nn.Module):
    """Segments of a plain sequence, an LSTM's output among them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh())
        self.lstm, self.c = nn.LSTM(12, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint_sequential(self.layers, 2, x, use_reentrant=False)
        return self.c(checkpoint(self.lstm, h, use_reentrant=False)[0])


class InPython(nn.Module):
    """A branch on values keeps the network as Python between its parts, some checkpointed."""

    def __init__(self, checkpointed: bool = True) -> None:
        super().__init__()
        self.a, self.c, self.checkpointed = nn.Linear(8, 12), nn.Linear(12, 4), checkpointed
        self.b = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if float(h.detach().mean()) > 100:
            h = h / 2
        if not self.checkpointed:
            return self.c(self.b(h))
        return self.c(checkpoint(self.b, h, use_reentrant=False))


def group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(2, width)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "blocks": (Net, (3, 8, 8)),
    "reentrant blocks": (lambda: Net(True), (3, 8, 8)),
    "group norm": (lambda: Net(False, group_norm), (3, 8, 8)),
    "first": (First, (8,)),
    "nested": (Nested, (8,)),
    "sequential": (Sequential, (5, 8)),
    "in Python": (InPython, (8,)),
}


def made(name: str, **options: Any) -> tuple[nn.Module, Tensor, Teacher]:
    torch.manual_seed(0)
    build, size = CASES[name]
    model, x = build().train(), torch.randn(4, *size)
    options = {"branches": None} | options
    return model, x, gpdfx.expand(model, 2, example_inputs=(x,), **options)


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_statistics_are_those_of_a_checkpoint(name: str) -> None:
    model, x, teacher = made(name)
    trains_as(model, teacher, x)
    own = copy.deepcopy(model)
    torch.manual_seed(0)
    own(x).sum().backward()  # batch norm counts once more in the backward
    student = gpdfx.collapse(teacher)
    for key, buffer in own.named_buffers():
        torch.testing.assert_close(teacher.get_buffer(key).flatten()[:1], buffer.flatten()[:1])
        torch.testing.assert_close(student.get_buffer(key), buffer)


@pytest.mark.parametrize(("extract", "branches"), [("first", "auto"), ("mean", "mobileone")])
@pytest.mark.parametrize(
    ("with_", "without"),
    [
        (lambda: Net(False), lambda: Net(None)),
        (lambda: Net(True), lambda: Net(None)),
        (InPython, lambda: InPython(False)),
    ],
)
def test_branches_train_under_a_checkpoint(
    with_: Callable[[], nn.Module], without: Callable[[], nn.Module], extract: str, branches: str
) -> None:
    x, gradients = torch.randn(4, 8) if with_ is InPython else torch.randn(4, 3, 8, 8), []
    options: Any = {"scales": "scratch", "extract": extract, "branches": branches}
    for build in (with_, without):
        torch.manual_seed(0)
        teacher = gpdfx.expand(build().train(), 2, example_inputs=(x,), **options)
        torch.manual_seed(0)
        sum(y.square().sum() for y in teacher.both(x)).backward()  # type: ignore[union-attr]
        gradients.append({n: p.grad for n, p in teacher.named_parameters()})
    torch.testing.assert_close(*gradients)


def saved(call: Callable[[], Tensor]) -> int:
    """Bytes that a forward saves for its backward, parameters left out."""
    total = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal total
        total += x.numel() * x.element_size() * (x._base is None and not x.is_leaf)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return total


def test_teacher_and_student_save_memory() -> None:
    x = torch.randn(8, 3, 32, 32)
    sizes = {}
    for reentrant in (False, True, None):
        torch.manual_seed(0)
        model = Net(reentrant, group_norm).train()
        teacher = gpdfx.expand(model, 2, example_inputs=(x,), branches=None)
        sizes[reentrant] = saved(partial(teacher, x)), saved(partial(teacher.student, x))
    for checkpointed in (False, True):
        for with_, without in zip(sizes[checkpointed], sizes[None], strict=True):
            assert with_ < 0.5 * without


def _timm() -> tuple[nn.Module, Tensor]:
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=4,
    )
    model.set_grad_checkpointing()
    return model, torch.randn(2, 3, 16, 16)


def _torchvision() -> tuple[nn.Module, Tensor]:
    model = torchvision.models.DenseNet(
        growth_rate=4,
        block_config=(2, 2),  # type: ignore[arg-type]
        num_init_features=8,
        num_classes=4,
        memory_efficient=True,
    )
    return model, torch.randn(2, 3, 64, 64)


def _transformers() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = transformers.BertForSequenceClassification(config)
    model.gradient_checkpointing_enable()
    return model, torch.randint(0, 20, (2, 5))


@pytest.mark.parametrize("build", [_timm, _torchvision, _transformers])
def test_libraries_that_checkpoint(build: Callable[[], tuple[nn.Module, Any]]) -> None:
    torch.manual_seed(0)
    model, x = build()
    teacher = gpdfx.expand(model.train(), 2, example_inputs=(x,), branches=None)
    assert list(parts(teacher)) == [""]
    assert f"{teacher.report().recomputed} regions" in str(teacher.report())
    trains_as(model, teacher, x)


def test_the_compiler_is_not_told() -> None:
    model, x, teacher = made("blocks")
    model.eval(), teacher.eval()
    for call in (teacher, teacher.student):
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        compiled(x).square().sum().backward()
    torch.testing.assert_close(compiled(x), model(x))
