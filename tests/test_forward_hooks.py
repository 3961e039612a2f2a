"""Forward hooks on modules inside a teacher run as on the student's own."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpdfx
from gpdfx.calls import tree

from .helpers import parts


class Gate(nn.Module):
    """Two arguments, one by its name; and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float, *, by: Tensor) -> Tensor:
        return self.mix(x) * by.sigmoid() * scale


class Network(nn.Module):
    """A module that runs twice, one that works in place, a residual sum, one that does nothing, one
    that is never called, one that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Identity())
        self.drop, self.gate, self.idle = nn.Dropout(0.5), Gate(), nn.Linear(8, 8)
        self.pair, self.head = Pair(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        x = x + self.block(x)
        x = self.gate(x, 0.5, by=x[:, :1])
        return self.head(self.pair(self.drop(x))[1])


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x * 2


SEEN = ["stem", "stem.0", "stem.1", "stem.2", "block", "block.0", "block.1", "gate", "gate.mix"]
SEEN += ["head"]


def made(ratio: float = 2, **options: Any) -> tuple[Network, gpdfx.Teacher, Tensor]:
    torch.manual_seed(0)
    model, x = Network().double(), torch.randn(5, 6, dtype=torch.float64)
    options = {"branches": None, "verify": False} | options
    return model, gpdfx.expand(model, ratio, example_inputs=(x,), **options), x


def watch(module: nn.Module, into: dict[str, list[Any]], paths: list[str]) -> None:
    def note(path: str, _: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        call = args, kwargs, result
        into.setdefault(path, []).append(
            tree.map_leaves(lambda t: t.clone() if isinstance(t, Tensor) else t, call)
        )

    for path in paths:
        one = module.get_submodule(path)
        one.register_forward_hook(
            lambda m, a, k, r, path=path: note(path, m, a, k, r), with_kwargs=True
        )


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("ratio", [1, 2])
def test_they_see_what_hooks_of_the_student_see(mode: str, ratio: float) -> None:
    """At ratio 1 every tensor, else the same values, which several copies have. Of a module that
    works in place the graph still has the argument."""
    model, teacher, x = made(ratio)
    paths = [*SEEN, *(["drop"] if mode == "train" and ratio == 1 else [])]
    seen: dict[str, list[Any]] = {}
    expected: dict[str, list[Any]] = {}
    if "drop" in paths:
        with pytest.raises(gpdfx.InputError, match="does nothing"):  # in eval mode
            teacher.get_submodule("drop").register_forward_hook(print)
        paths.remove("drop")
    watch(teacher, seen, paths)
    watch(model, expected, paths)
    model.stem[2].inplace = False
    for net in (teacher, model):
        net.train(mode == "train")
        torch.manual_seed(1)
        net(x)
    assert [*map(len, seen.values())] == [*map(len, expected.values())]
    assert seen.keys() == expected.keys() == set(paths)
    assert len(seen["block"]) == 2
    for path in paths:
        (a, other), (b, own) = (tree.flatten(calls[path])[::-1] for calls in (seen, expected))
        assert a == b, path
        for got, want in zip(other, own, strict=True):
            if not isinstance(want, Tensor):
                assert got == want
            elif ratio == 1:
                torch.testing.assert_close(got, want)
            else:
                for row, own_row in zip(got, want, strict=True):
                    near = (row[:, None] - own_row).abs().amin(1)
                    assert near.max() < 1e-12, path
    assert seen["stem.0"][0][2].shape[1] == len(teacher.get_parameter("stem.0.weight"))


def test_what_they_return_takes_the_place_of_the_result() -> None:
    _, teacher, x = made()
    plain = teacher.eval()(x)
    handle = teacher.get_submodule("gate").register_forward_hook(lambda m, args, y: y * 0)
    assert torch.allclose(teacher(x), teacher.get_parameter("head.bias").expand(5, 3))
    assert not torch.equal(plain, teacher(x))
    assert torch.allclose(teacher.student(x), plain)  # the student's modules are others
    handle.remove()
    assert torch.equal(teacher(x), plain)


def test_a_loss_of_features_trains_what_is_before_them() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    student = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))
    gpd = gpdfx.GPD(student, ratio=2, example_inputs=(images,), verify=False)
    features: list[Tensor] = []
    gpd.teacher.get_submodule("1").register_forward_hook(lambda m, args, y: features.append(y))
    gpd(images, torch.tensor([0, 1, 2, 3]))
    assert [tuple(y.shape) for y in features] == [(4, 12, 6, 6)]
    features[0].square().sum().backward()
    parameters = dict(gpd.teacher.named_parameters())
    assert parameters["0.weight"].grad is not None
    assert parameters["3.weight"].grad is None


def copies(teacher: gpdfx.Teacher) -> Iterator[nn.Module]:
    file = io.BytesIO()
    torch.save(teacher, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)
    yield copy.deepcopy(teacher)
    yield teacher


def double(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return y * 2


def test_copies_and_compiled_teachers_run_them() -> None:
    _, teacher, x = made()
    plain = teacher.eval()(x)
    bias = teacher.get_parameter("head.bias").detach()
    for one in copies(teacher):
        one.get_submodule("head").register_forward_hook(double)
        assert torch.allclose(one(x), 2 * plain)
    for one in copies(teacher):  # which bring theirs
        assert torch.allclose(one(x), 2 * plain)
    compiled = torch.compile(teacher, backend="eager")
    assert torch.allclose(compiled(x), 2 * plain)
    assert not torch.allclose(plain, bias.expand(5, 3))


def test_a_loaded_teacher_runs_them(tmp_path: Path) -> None:
    model, teacher, x = made()
    gpdfx.save(teacher, tmp_path / "teacher.safetensors")
    loaded = gpdfx.load(tmp_path / "teacher.safetensors", model).eval()
    loaded.get_submodule("head").register_forward_hook(double)
    assert torch.allclose(loaded(x), 2 * teacher.eval()(x))


class InParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y if float(y.detach().mean()) < 1e9 else y * 2)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("drop", "it does nothing"),
        ("block.2", "it does nothing"),
        ("pair", "something else than one tensor"),
        ("idle", "never called"),
    ],
)
def test_a_module_that_the_graph_does_not_show_is_refused(path: str, why: str) -> None:
    _, teacher, _ = made()
    with pytest.raises(gpdfx.InputError, match=why) as caught:
        teacher.get_submodule(path).register_forward_hook(print)
    assert caught.value.module_path == path
    assert "around this one" in str(caught.value.remedy)


def test_a_network_in_parts_is_refused() -> None:
    teacher = gpdfx.expand(InParts(), 2, example_inputs=(torch.randn(2, 6),), verify=False)
    assert "" not in parts(teacher)
    with pytest.raises(gpdfx.InputError, match="captured in parts"):
        teacher.get_submodule("a").register_forward_hook(print)
