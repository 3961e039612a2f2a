"""Files of teachers: every damage is noticed, a header says nothing absurd, flags and dtypes come
back."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import gpdfx
from gpdfx import files, memory, storage
from gpdfx.branches import Full, Product

from .helpers import thinned
from .networks import tensors_equal

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def expanded(model: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    return gpdfx.expand(model or net(), example_inputs=(X,), verify=False, **options)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "teacher.safetensors"
    gpdfx.save(expanded(branches=[Full()]), path)
    return path


def forged(file: Path, to: Path, change: Callable[[Any], Any]) -> Path:
    """A copy with another header, whose checksum fits."""
    tensors, header = storage.FILE.read(file)
    changed = change(header)
    text = json.dumps(header if changed is None else changed)
    metadata = {"format": storage.FILE.name, "sha256": files.checksum(text, tensors)}
    files.write_tensors(to, tensors, metadata | {storage.FILE.key: text})
    return to


# --------------------------------------------------------------------------- damage
def test_every_damage_is_noticed(file: Path, tmp_path: Path) -> None:
    whole, dice, path = file.read_bytes(), random.Random(0), tmp_path / "damaged"
    damaged = [whole[:n] for n in (0, 5, 100, len(whole) - 1)] + [whole + b"\0"]
    for place in range(0, len(whole), 11):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << dice.randrange(8)
        damaged.append(bytes(flipped))
    student = net()
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(gpdfx.InputError, match=r"corrupt|holds no teacher|of the format"):
            gpdfx.load(path, student)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (None, "holds no teacher\n"),
        ({"gpdfx": "{}"}, "holds no teacher with a checksum, as gpdfx writes it now"),
        ({"gpdfx": "{}", "format": "gpdfx teacher 3", "sha256": ""}, "not 'gpdfx teacher 2'"),
    ],
    ids=["foreign", "old", "new"],
)
def test_files_of_another_format(metadata: Any, said: str, tmp_path: Path) -> None:
    save_file({"0.weight": torch.ones(2)}, tmp_path / "t", metadata)
    with pytest.raises(gpdfx.InputError, match=said) as caught:
        gpdfx.load(tmp_path / "t", net())
    assert caught.value.remedy == "pass what gpdfx.save wrote"
    with pytest.raises(gpdfx.InputError, match="is not there"):
        gpdfx.load(tmp_path / "none", net())


# --------------------------------------------------------------------------- the header
def recipe(**changes: Any) -> Callable[[Any], None]:
    return lambda header: header["recipe"].update(changes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (recipe(kemp=[]), "header.recipe.kemp is unknown"),
        (recipe(verify=True), "header.recipe.verify is unknown"),
        (lambda h: {**h, "recipe": {"seed": 0}}, "header.recipe.ratio is missing"),
        (lambda h: {k: v for k, v in h.items() if k != "recipe"}, "header.recipe is missing"),
        (lambda h: [1], r"header is \[1\]"),
        (recipe(keep=[1]), r"header.recipe.keep\[0\] is 1"),
        (recipe(ratio={"*": "2"}), r"header.recipe.ratio.\* is '2'"),
        (recipe(ratio={"*": True}), r"header.recipe.ratio.\* is True"),
        (recipe(ratio={"*": 1e9}), r"ratio\['\*'\] is 1000000000.0"),
        (recipe(ratio={"*": float("nan")}), r"ratio\['\*'\] is nan"),
        (recipe(ratio={"*": 3.0}), r"other sizes: 0.weight \(24, 8\) instead of \(36, 8\)"),
        (recipe(round_to=10**12), "round_to is 1000000000000"),
        (recipe(scales="x"), "scales is 'x'"),
        (recipe(seed=-1), "seed is -1"),
        (recipe(branches={"*": "x"}), "is 'x'"),
        (recipe(branches={"*": [{"kind": "x"}]}), "of your own kind None"),
        (recipe(branches={"*": [{"branch": "Full", "size": 3}]}), "Full with size=3"),
        (recipe(branches={"*": [{"branch": "Product", "hidden": "x"}]}), "hidden='x'"),
        (lambda h: h["same"].update({"0.weight": "nope"}), "same names 'nope'"),
        (lambda h: h.update(inputs={"tensor": "nope"}), "inputs cannot be read .KeyError: 'nope'"),
        (lambda h: h.update(inputs={"code": "x"}), "no kind 'code'"),
        (lambda h: h.update(inputs=7), "inputs cannot be read"),
        (lambda h: h["saved"]["dtypes"].update({"0.weight": "nn"}), "there is no dtype 'nn'"),
        (lambda h: h.update(inputs={"value": 3}), "inputs cannot be read"),
        (lambda h: h.update(inputs={"tuple": [{"value": 3}] * 2}), "no positional and keyword"),
        (lambda h: h["saved"]["dtypes"].update({"0.weight": "int8"}), "0.weight is not int8"),
        (lambda h: h["expanded"]["dtypes"].update({"0.bias": "quint8"}), "no dtype 'quint8'"),
        (lambda h: h["expanded"]["dtypes"].update({"0.bias": "int8"}), "in the file int8"),
        (lambda h: h["student"]["tensors"].update({"0.weight": "x"}), "0.weight is 'x'"),
    ],
)
def test_what_a_header_cannot_say(
    file: Path, tmp_path: Path, change: Callable[[Any], Any], said: str
) -> None:
    path = forged(file, tmp_path / "forged", change)
    with pytest.raises(gpdfx.InputError, match=said) as caught:
        gpdfx.load(path, net())
    assert caught.value.remedy


@pytest.mark.parametrize(
    "options",
    [{"ratio": {"*": 60000}}, {"branches": {"*": [{"branch": "LowRank", "rank": 10**9}]}}],
)
def test_a_teacher_far_larger_than_its_file_is_not_made(
    options: dict[str, Any], tmp_path: Path
) -> None:
    def wide() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 4))

    gpdfx.save(expanded(wide()), tmp_path / "t")
    path = forged(tmp_path / "t", tmp_path / "forged", recipe(**options))
    with pytest.raises(gpdfx.InputError, match=r"would take .* and the file holds far less"):
        gpdfx.load(path, wide())


def test_a_teacher_larger_than_the_memory_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = 4 * (16 * 8 + 16 + 4 * 16 + 4)  # bytes at ratio 4/3
    monkeypatch.setattr(memory, "memory_of", lambda device: weights)
    expanded(ratio=4 / 3, branches=None)
    for options in ({"ratio": 17 / 12, "branches": None}, {"ratio": 4 / 3, "branches": [Full()]}):
        with pytest.raises(gpdfx.InputError, match=r"would take .* GiB of parameters") as caught:
            expanded(**options)
        assert "smaller ratio" in str(caught.value)
    monkeypatch.undo()
    assert memory.memory_of(torch.device("cpu")) > 2**28
    with pytest.raises(gpdfx.InputError, match=r"ratio is 1000000000\.0"):
        expanded(ratio=1e9)
    product = nn.Sequential(nn.Conv2d(2, 4, 3))
    huge = {"branches": [Product(hidden=2**45)], "example_inputs": (torch.ones(2, 2, 5, 5),)}
    gpdfx.expand(product, **huge, verify=False)  # no more than there are inputs


# --------------------------------------------------------------------------- flags and dtypes
class Mixed(nn.Module):
    """Layers in three dtypes, and a buffer in a fourth that no state_dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(8, 6).double(), nn.BatchNorm1d(6).double()
        self.b, self.c = nn.Linear(6, 8).bfloat16(), nn.Linear(8, 3)
        self.register_buffer("factor", torch.full((3,), 0.5, dtype=torch.float16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x.double())).relu().bfloat16()
        return self.c(self.b(y).float()) * self.factor.float()


def same(one: Any, other: Any) -> None:
    """Assert that two teachers have the same tensors, flags and dtypes, and compute the same."""
    assert tensors_equal(one.state_dict(), other.state_dict())
    for walk in ("named_parameters", "named_buffers"):
        pairs = [dict(getattr(t, walk)()) for t in (one, other)]
        forms = [{n: (x.dtype, x.requires_grad) for n, x in each.items()} for each in pairs]
        assert forms[0] == forms[1]
    x = X.to(next(iter(one.parameters())).dtype) if not isinstance(one._student, Mixed) else X
    one.eval(), other.eval()
    assert torch.equal(one(x), other(x))
    assert torch.equal(one.student(x), other.student(x))


def first_frozen() -> nn.Module:
    model = net()
    model[0].requires_grad_(False)
    return model


LATER = ("", "frozen", "thawed", "branch", "double")


@pytest.mark.parametrize(
    ("build", "branches", "later"),
    thinned(
        itertools.product((net, first_frozen, Mixed), (None, "auto"), LATER),
        {
            (first_frozen, None, ""),
            (first_frozen, "auto", "thawed"),
            (Mixed, "auto", ""),
            (net, "auto", "frozen"),
            (net, "auto", "branch"),
            (net, "auto", "double"),
        },
    ),
)
def test_flags_and_dtypes_come_back(
    build: Callable[[], nn.Module], branches: Any, later: str, tmp_path: Path
) -> None:
    teacher = expanded(build(), branches=branches)
    first = next(iter(teacher.named_parameters()))[0]
    if later == "frozen":
        teacher.requires_grad_(False)
        teacher.get_parameter(first).requires_grad_(True)
    elif later == "thawed":
        teacher.requires_grad_(True)
    elif later == "branch":
        for fold in teacher.folds():
            fold.scales.requires_grad_(False)
    elif later == "double" and build is not Mixed:
        teacher.double()
    gpdfx.save(teacher, tmp_path / "t")
    student = (Mixed if build is Mixed else net)().half().requires_grad_(False)
    before = copy.deepcopy(student)
    loaded = gpdfx.load(tmp_path / "t", student)
    same(teacher, loaded)
    assert tensors_equal(student.state_dict(), before.state_dict())
    for p, q in zip(student.parameters(), before.parameters(), strict=True):
        assert (p.dtype, p.requires_grad) == (q.dtype, q.requires_grad)
    gpdfx.save(loaded, tmp_path / "again")
    same(teacher, gpdfx.load(tmp_path / "again", student.double().requires_grad_(True)))


def test_unshared_parameters_come_back(tmp_path: Path) -> None:
    teacher = expanded()
    teacher.unshare("2")
    own = teacher.own_parameters()
    own["2.bias"].requires_grad_(False)
    with torch.no_grad():
        own["2.bias"].add_(1)
    gpdfx.save(teacher, tmp_path / "t")
    loaded = gpdfx.load(tmp_path / "t", net())
    assert [*loaded.own_parameters()] == ["2.weight", "2.bias"]
    same(teacher, loaded)


def test_frozen_layers_stay_so_in_training(tmp_path: Path) -> None:
    gpdfx.save(expanded(first_frozen()), tmp_path / "t")
    loaded = gpdfx.load(tmp_path / "t", net())
    before = {name: p.clone() for name, p in loaded.named_parameters()}
    loaded(X).sum().backward()
    torch.optim.SGD(loaded.parameters(), 0.1).step()
    moved = {n for n, p in loaded.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert not moved & {"0.weight", "0.bias"}


# --------------------------------------------------------------------------- more than a teacher
def test_more_tensors_are_of_the_checksum(tmp_path: Path) -> None:
    path, teacher = tmp_path / "t", expanded()
    storage._write(path, teacher, {"lam": 0.5}, {"x": torch.arange(3)})
    stored = storage.read_file(path)
    assert stored.header["gpd"] == {"lam": 0.5}
    assert stored.more["x"].tolist() == [0, 1, 2]
    same(teacher, storage.make(stored, net()))
    storage._write(path, teacher, {"lamm": 0.5}, {})
    with pytest.raises(gpdfx.InputError, match="settings that are unknown: lamm"):
        gpdfx.GPD.load(path, net())
    storage._write(path, teacher, {"lam": 0.5}, {"x": torch.arange(3)})
    content = path.read_bytes()
    place = content.index(torch.arange(3).numpy().tobytes())
    path.write_bytes(content[: place + 8] + b"\7" + content[place + 9 :])
    with pytest.raises(gpdfx.InputError, match="its checksum does not fit"):
        storage.read_file(path)


def test_names_beside_a_file_are_of_one_call_alone(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "f") as one, files.replacing(tmp_path / "f") as other:
        one.write_text("one")
        other.write_text("other")
        assert one != other
        assert all(map(files.is_left_over, (one, other)))
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text() == "one"  # the last to end
    assert not files.is_left_over(tmp_path / "f")
