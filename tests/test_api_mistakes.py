"""Wrong calls of the Python API: one ``GpdfxError`` each, which says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gpdfx

X, Y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])


class Broken(nn.Module):
    """A bug of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.zeros(7)


class Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> None:
        self.layer(x)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


class Given:
    """What the calls are made with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.net = folder, net()
        self.teacher = gpdfx.expand(self.net, 2, example_inputs=(X,), verify=False)
        self.gpd = gpdfx.GPD(self.net, ratio=2, example_inputs=(X,), verify=False)
        self.file = folder / "teacher.safetensors"
        gpdfx.save(self.teacher, self.file)
        self.other = folder / "notes.txt"
        self.other.write_text("no teacher")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tmp_path_factory.mktemp("mistakes"))


def expand(model: Any = None, ratio: Any = 2, **options: Any) -> Any:
    options = {"example_inputs": (X,), "verify": False} | options
    return gpdfx.expand(net() if model is None else model, ratio, **options)


def gpd(**options: Any) -> gpdfx.GPD:
    return gpdfx.GPD(net(), **{"example_inputs": (X,), "verify": False} | options)


MISTAKES: dict[str, tuple[Callable[[Given], Any], str]] = {
    # expand
    "a list of layers": (lambda g: expand([nn.Linear(6, 3)]), "nn.Module"),
    "a function": (lambda g: expand(torch.relu), "nn.Module"),
    "ratio is text": (lambda g: expand(ratio="2"), "ratio"),
    "ratio is below 1": (lambda g: expand(ratio=0.5), "ratio"),
    "ratio is an array": (lambda g: expand(ratio=np.array([2, 3])), "ratio"),
    "ratio of no layer": (lambda g: expand(ratio={"layer9.*": 3}), "layer9"),
    "inputs are one array": (lambda g: expand(example_inputs=np.zeros((2, 6))), "example_inputs"),
    "inputs of another size": (lambda g: expand(example_inputs=(torch.randn(2, 5),)), "5"),
    "one input too many": (lambda g: expand(example_inputs=(X, X)), "argument"),
    "kwargs is a list": (lambda g: expand(example_kwargs=[1]), "example_kwargs"),
    "keep is a number": (lambda g: expand(keep=3), "keep"),
    "keep matches nothing": (lambda g: expand(keep=["haed"]), "haed"),
    "round_to is a fraction": (lambda g: expand(round_to=1.5), "round_to"),
    "branches of no name": (lambda g: expand(branches="orepaa"), "orepa"),
    "branches is a class": (lambda g: expand(branches=nn.Linear), "branches"),
    "shares of no name": (lambda g: expand(shares="equal"), "shares"),
    "extract of no name": (lambda g: expand(extract="last"), "extract"),
    "dynamic of no name": (lambda g: expand(dynamic="yes"), "dynamic"),
    "features of no module": (lambda g: expand(features=["7"]), "7"),
    "a bug in forward": (lambda g: expand(Broken()), "test_api_mistakes.py"),
    "forward returns nothing": (lambda g: expand(Silent()), "returns no tensor"),
    "an unknown keyword": (lambda g: expand(round=2), "round"),
    # teacher
    "a call without inputs": (lambda g: g.teacher(), "input"),
    "a call with text": (lambda g: g.teacher("x"), "call"),
    "inputs of another width": (lambda g: g.teacher(torch.randn(2, 9)), "size"),
    "a teacher's parameter that is none": (lambda g: g.teacher.widen("9.weight", X), "9.weight"),
    "widen of another size": (lambda g: g.teacher.widen("0.weight", X), "0.weight"),
    # GPD
    "labels are text": (lambda g: g.gpd(X, ["cat"] * 4), "targets"),
    "labels for fewer samples": (lambda g: g.gpd(X, Y[:2]), "target"),
    "no labels": (lambda g: g.gpd(X), "target"),
    "lam is negative": (lambda g: gpd(lam=-1), "lam"),
    "temperature is text": (lambda g: gpd(temperature="hot"), "temperature"),
    "smoothing is above 1": (lambda g: gpd(smoothing=2), "smoothing"),
    "criterion is a name": (lambda g: gpd(criterion="ce"), "criterion"),
    "kd without a static teacher": (lambda g: gpd(kd=gpdfx.losses.KD()), "static"),
    "static has other classes": (lambda g: gpd(static_teacher=nn.Linear(6, 4))(X, Y), "4"),
    "unshared matches nothing": (lambda g: gpd(unshared="classifier"), "classifier"),
    # files, reports and the rest
    "a file that is none": (lambda g: gpdfx.load(g.folder / "none", net()), "none"),
    "a file of something else": (lambda g: gpdfx.load(g.other, net()), "notes.txt"),
    "a file of another network": (lambda g: gpdfx.load(g.file, nn.Linear(6, 3)), "architecture"),
    "save to nowhere": (lambda g: gpdfx.save(g.teacher, g.folder / "no" / "x"), "no"),
    "collapse of a student": (lambda g: gpdfx.collapse(net()), "teacher"),
    "collapse of a file": (lambda g: gpdfx.collapse(g.file), "teacher"),
    "explain what is no parameter": (lambda g: gpdfx.explain(g.teacher, "0.wieght"), "0.weight"),
    "a picture of no kind": (lambda g: gpdfx.graph(g.teacher, g.folder / "x.gif"), ".svg"),
    "a state of other keys": (lambda g: gpdfx.to_teacher({"a": X}, g.teacher), "a"),
    "groups by a text": (lambda g: gpdfx.param_groups(g.teacher, "1e-4"), "weight_decay"),
    "export of a student": (lambda g: gpdfx.plain_teacher(net()), "teacher"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_error_with_a_remedy(given: Given, name: str) -> None:
    call, word = MISTAKES[name]
    with pytest.raises((gpdfx.GpdfxError, TypeError)) as caught:
        call(given)
    error = caught.value
    assert isinstance(error, gpdfx.GpdfxError) or name == "an unknown keyword"
    assert word in str(error)
    if isinstance(error, gpdfx.GpdfxError):
        assert "what to do: " in str(error)
        assert "bug in gpdfx" not in str(error)
        assert len(str(error)) < 900


def test_there_are_enough() -> None:
    assert len(MISTAKES) >= 30
