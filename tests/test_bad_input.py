"""Bad input: one error family, a remedy, and the user's model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpdfx

from .networks import tensors_equal

OTHERS = torch.int32, torch.complex64


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(x + y)


class Hopeless(nn.Module):
    """Does not export, and has no part that would."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * self.weight
        return x


class Empty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def refused(model: Any, *words: str, **options: Any) -> gpdfx.GpdfxError:
    """Expand must refuse, say these words and a remedy, and leave the model alone."""
    is_module = isinstance(model, nn.Module)
    lazy = is_module and any(
        isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()
    )
    before = None
    if is_module and not lazy:
        before = {k: copy.deepcopy(t) for k, t in model.state_dict().items() if torch.is_tensor(t)}
    with pytest.raises(gpdfx.GpdfxError) as caught:
        gpdfx.expand(model, **options)
    error = caught.value
    for word in words:
        assert word in str(error), str(error)
    assert error.remedy
    assert "what to do" in str(error)
    if before is not None and not any(t.is_meta for t in before.values()):
        after = model.state_dict()
        assert tensors_equal(before, {k: after[k] for k in before})
    return error


@pytest.mark.parametrize("model", [nn.Linear, "resnet18", None, {"weight": torch.ones(1)}])
def test_not_a_module(model: Any) -> None:
    refused(model, "nn.Module")


@pytest.mark.parametrize("ratio", [0.5, 0, -1, float("nan"), float("inf"), "2", None, True, 2j])
def test_bad_ratio(ratio: Any) -> None:
    refused(small(), "ratio is", ratio=ratio)


def test_a_model_that_does_not_export_names_the_line() -> None:
    inputs = (torch.ones(2, 4),)
    error = refused(Hopeless(), "cannot capture Hopeless", example_inputs=inputs)
    assert isinstance(error, gpdfx.CaptureError)
    assert error.source is not None
    assert "if x.sum() > 0" in error.source


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        (torch.ones(2, 4), "a Tensor"),
        ((torch.ones(2, 4), torch.ones(2, 4)), "do not fit"),
        ((), "do not fit"),
        ("x", "a str"),
    ],
)
def test_example_inputs_of_the_wrong_kind_or_count(inputs: Any, word: str) -> None:
    refused(small(), word, example_inputs=inputs)


def test_example_kwargs_of_the_wrong_kind() -> None:
    refused(TwoInputs(), "example_kwargs", example_inputs=(), example_kwargs=[1])
    refused(TwoInputs(), "do not fit", example_kwargs={"z": torch.ones(2, 4)})


def test_a_forward_that_fails_on_the_example() -> None:
    error = refused(
        small(), "fails in train mode: RuntimeError", example_inputs=(torch.ones(2, 5),)
    )
    assert isinstance(error, gpdfx.InputError)
    refused(small(), "fails in train mode", example_inputs=("words",))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors(layout: Any) -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=layout)
    refused(small(), "nested", "to_padded_tensor", example_inputs=(nested,))
    refused(TwoInputs(), "nested", example_kwargs={"x": torch.ones(2, 3, 4), "y": nested})
    gpdfx.expand(small(), example_inputs=(nested.to_padded_tensor(0.0),), verify=False)


class Graph(nn.Module):
    """One layer of a graph network; ``edges``: an adjacency in any form."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, *edges: Tensor) -> Tensor:
        h = self.a(x)
        if len(edges) == 1:
            return self.c((edges[0] @ h).relu())
        row, column, value = edges
        out = torch.zeros_like(h)
        return self.c(out.index_add(0, row, value[:, None] * h[column]).relu())


@pytest.mark.parametrize("form", ["to_sparse", "to_sparse_csr"])
def test_sparse_tensors_and_what_does_the_same(form: str) -> None:
    torch.manual_seed(0)
    model, x, dense = Graph(), torch.randn(5, 4), (torch.rand(5, 5) < 0.5).float()
    sparse = getattr(dense, form)()
    row, column = dense.nonzero().T
    for edges in ((dense,), (sparse,), (row, column, dense[row, column])):
        teacher = gpdfx.expand(model, example_inputs=(x, *edges))
        assert teacher.report().parameters[1] > 1.5 * teacher.report().parameters[0]
        torch.testing.assert_close(teacher(x, *edges), model(x, sparse))


def test_example_inputs_without_values() -> None:
    refused(small(), "no values", example_inputs=(torch.ones(2, 4, device="meta"),))


@pytest.mark.parametrize("seed", ["a", None, -1, 2**70, 1.5])
def test_seeds(seed: Any) -> None:
    refused(small(), "seed is", seed=seed)


@pytest.mark.parametrize("features", ["0", 3, [3], None])
def test_features_that_are_no_names(features: Any) -> None:
    refused(small(), "features is", features=features)


def test_inputs_that_cannot_be_guessed() -> None:
    refused(TwoInputs(), "x, y")
    refused(Empty(), "cannot guess")


def test_lazy_and_meta_parameters() -> None:
    refused(nn.Sequential(nn.LazyLinear(3)), "lazy")
    refused(small().to("meta"), "meta device")


def test_wrapped_models() -> None:
    refused(torch.compile(small()), "compiled")
    refused(nn.DataParallel(small()), "data parallel")
    refused(torch.jit.script(small()), "TorchScript")
    quantized = nn.Sequential()
    quantized.add_module("q", torch.ao.nn.quantized.Linear(4, 3))
    refused(quantized, "quantized")


def test_models_that_hide_what_they_have() -> None:
    class Trained(nn.Sequential):
        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            return ((n, p) for n, p in super().named_parameters(*args, **kwargs) if n[0] != "0")

    class Renamed(nn.Sequential):
        def named_modules(self, *args: Any, **kwargs: Any) -> Any:
            return ((f"net.{n}", m) for n, m in super().named_modules(*args, **kwargs))

    class Plain(nn.Sequential):
        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            return super().named_parameters(*args, **kwargs)

    refused(Trained(*small()), "Trained.named_parameters hides")
    refused(nn.Sequential(small(), Renamed(nn.ReLU())), "Renamed.named_modules hides")
    gpdfx.expand(Plain(nn.Linear(4, 3)), verify=False)


def test_ddp(tmp_path: Any) -> None:
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        refused(nn.parallel.DistributedDataParallel(small()), "data parallel")
    finally:
        torch.distributed.destroy_process_group()


def test_a_teacher() -> None:
    refused(gpdfx.expand(small(), verify=False), "teacher already")


@pytest.mark.parametrize("option", ["shares", "randomness", "branches"])
def test_unknown_options(option: str) -> None:
    refused(small(), "nonsense", **{option: "nonsense"})


def test_what_takes_a_teacher_says_so(tmp_path: Path) -> None:
    model: Any = small()
    for name, rest in (
        ("collapse", ()),
        ("explain", ("0.weight",)),
        ("graph", (tmp_path / "x.svg",)),
        ("save", (tmp_path / "x",)),
    ):
        with pytest.raises(gpdfx.InputError, match=f"{name} takes a teacher"):
            getattr(gpdfx, name)(model, *rest)
    for convert in (gpdfx.to_student, gpdfx.to_teacher):
        with pytest.raises(gpdfx.InputError, match="takes a teacher, not Sequential"):
            convert(model.state_dict(), model)


def test_arguments_of_other_calls(tmp_path: Path) -> None:
    model: Any = small()
    teacher = gpdfx.expand(model, branches=None, verify=False)
    gpdfx.save(teacher, tmp_path / "t")
    whole, odd = ({k: x.to(d) for k, x in model.state_dict().items()} for d in OTHERS)
    small_floats = {k: x.to(torch.float8_e5m2) for k, x in teacher.state_dict().items()}
    stray = {"state": {9: {}}, "param_groups": [{"params": [0, 1, 2, 3]}]}
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("no folder", lambda: gpdfx.save(teacher, tmp_path / "none" / "t")),
        ("is a folder", lambda: gpdfx.save(teacher, tmp_path)),
        ("is no path", lambda: gpdfx.save(teacher, 3)),  # type: ignore[arg-type]
        ("no folder", lambda: gpdfx.graph(teacher, tmp_path / "none" / "t.svg")),
        ("not NoneType", lambda: gpdfx.load(tmp_path / "t", None)),  # type: ignore[arg-type]
        ("no parameter is called", lambda: gpdfx.explain(teacher, 3)),  # type: ignore[arg-type]
        ("state_dict first", lambda: gpdfx.to_student(model, teacher)),
        ("state_dict first", lambda: gpdfx.to_teacher(None, teacher)),  # type: ignore[arg-type]
        ("weight is int", lambda: gpdfx.to_teacher(dict.fromkeys(model.state_dict(), 3), teacher)),
        ("0.weight is torch.int32", lambda: gpdfx.to_teacher(whole, teacher)),
        ("0.weight is torch.complex64", lambda: gpdfx.to_teacher(odd, teacher)),
        ("0.weight is torch.float8_e5m2", lambda: gpdfx.to_student(small_floats, teacher)),
        ("no optimizer's", lambda: gpdfx.to_student({"state": 3, "param_groups": 4}, teacher)),
        (
            "no optimizer's",
            lambda: gpdfx.to_student({"state": {0: 3}, "param_groups": []}, teacher),
        ),
        ("state of 9 is of none", lambda: gpdfx.to_student(stray, teacher)),
        ("no parameter or buffer", lambda: teacher.widen("nope", torch.ones(1))),
        ("no parameter or buffer", lambda: teacher.narrow("0.wieght", torch.ones(1))),
        (r"is \(6, 4\)", lambda: teacher.widen("0.weight", torch.ones(1, 1))),
        ("no parameter or buffer", lambda: teacher.load_student(nn.Linear(4, 3))),
        ("static_teacher is a str", lambda: gpdfx.GPD(model, "resnet18")),  # type: ignore[arg-type]
        ("lam is", lambda: gpdfx.GPD(model, lam="3")),  # type: ignore[arg-type]
    ]
    for said, call in wrong:
        with pytest.raises(gpdfx.InputError, match=said) as caught:
            call()
        assert caught.value.remedy


def test_inputs_of_another_type_than_the_example() -> None:
    teacher = gpdfx.expand(small(), branches=None, verify=False)
    for x, said in (
        (torch.ones(2, 4, dtype=torch.long), "torch.int64, the example's torch.float32"),
        (torch.ones(2, 4).double(), "torch.float64"),
        (torch.ones(2, 4, device="meta"), "on meta"),
    ):
        with pytest.raises(gpdfx.InputError, match=said):
            teacher(x)
    teacher.double()(torch.ones(2, 4).double())


def test_calls_that_do_not_fit_the_capture() -> None:
    teacher = gpdfx.expand(
        nn.Conv2d(3, 4, 3), example_inputs=(torch.ones(2, 3, 8, 8),), dynamic="batch"
    )
    with pytest.raises(gpdfx.InputError, match="size 9 in dimension 2"):
        teacher(torch.ones(2, 3, 9, 8))
    with pytest.raises(gpdfx.InputError, match="dimensions"):
        teacher(torch.ones(3, 8, 8))
    with pytest.raises(gpdfx.InputError, match="structure"):
        teacher((torch.ones(2, 3, 8, 8),))
    with pytest.raises(gpdfx.InputError, match="does not fit"):
        teacher()
