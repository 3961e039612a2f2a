"""The plain teacher: the wide network's function in torch alone, and what one deploys it with."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx

import gpdfx
from gpdfx.calls import tree

from .helpers import thinned
from .networks import NETWORKS, WRITTEN

BRANCHES = (None, "auto", "acnet", "repvgg", "dbb", "mobileone")
NAMES = tuple(WRITTEN)


def trained(
    name: str, branches: Any = "auto", ratio: float = 2, *, double: bool = True, **options: Any
) -> tuple[nn.Module, gpdfx.Teacher, tuple[Tensor, ...]]:
    """A model and its teacher after three steps: copies differ, branches count."""
    model, inputs = NETWORKS[name].model(), NETWORKS[name].inputs()
    options = {"verify": False, "dynamic": "batch", **options}
    teacher = gpdfx.expand(model, ratio, example_inputs=inputs, branches=branches, **options)
    train(teacher, inputs)
    if double:
        model, teacher = model.double(), teacher.double()
        inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    return model, teacher.eval(), inputs


def train(teacher: gpdfx.Teacher, inputs: tuple[Tensor, ...]) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(teacher.train().parameters(), 0.02)
    for _ in range(3):
        both = [y for y in tree.leaves(teacher.both(*inputs)) if isinstance(y, Tensor)]
        optimizer.zero_grad()
        sum(y.square().mean() for y in both).backward()  # type: ignore[union-attr]
        optimizer.step()


def plain_of(teacher: gpdfx.Teacher, **options: Any) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # ties have a test of their own
        return gpdfx.plain_teacher(teacher, **options)


@torch.no_grad()
def gap(run: Any, other: Any, inputs: tuple[Tensor, ...]) -> float:
    """The largest difference of two networks, of the largest value."""
    y, z = other(*inputs), run(*inputs)
    return float((y - z).abs().max() / y.abs().max())


def more(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A larger batch."""
    return tuple(torch.cat([x, x[:1], x[:1]]) for x in inputs)


# --------------------------------------------------------------------------- the same function
@pytest.mark.parametrize(
    ("name", "branches", "ratio"),
    thinned(
        [(n, b, r) for n in NAMES for b in BRANCHES for r in (2, 1.5)],
        [("gpt", "auto", 1.5), ("grouped", "mobileone", 2), ("norms", None, 1.5)],
    ),
)
def test_it_computes_what_the_teacher_does(name: str, branches: Any, ratio: float) -> None:
    model, teacher, inputs = trained(name, branches, ratio)
    before = copy.deepcopy(teacher.state_dict())
    student = gpdfx.collapse(teacher).state_dict()
    plain = plain_of(teacher)
    assert isinstance(plain, fx.GraphModule)
    after = teacher.state_dict()
    assert all(torch.equal(x, after[key]) for key, x in before.items())
    assert gap(plain, teacher, inputs) < 1e-10
    assert gap(plain, teacher, more(inputs)) < 1e-10
    assert list(plain.state_dict()) == list(model.state_dict())
    for key, x in plain.state_dict().items():
        assert x.shape == teacher.state_dict()[key].shape, key
    again = gpdfx.collapse(teacher).state_dict()
    assert all(torch.equal(x, again[key]) for key, x in student.items())
    assert not any("gpdfx" in str(getattr(n.target, "__module__", "")) for n in plain.graph.nodes)


@pytest.mark.parametrize("name", thinned([(n,) for n in NAMES], [("unet",)]))
def test_it_does_in_float32(name: str) -> None:
    _, teacher, inputs = trained(name, double=False)
    assert gap(plain_of(teacher), teacher, more(inputs)) < 1e-5


@pytest.mark.parametrize("name", thinned([(n,) for n in NAMES], [("unet",), ("gpt",)]))
def test_in_train_mode_too(name: str) -> None:
    """Outputs of equal seeds, statistics, and gradients: the wide network goes on training."""
    _, teacher, inputs = trained(name, None)
    plain, teacher = plain_of(teacher, mode="train"), teacher.train()
    teacher.zero_grad()
    start = copy.deepcopy(plain.state_dict())
    results = []
    for run in (plain, teacher):
        torch.manual_seed(0)
        y = run(*inputs)
        y.square().mean().backward()
        results.append(y.detach())
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    wide, buffers = dict(teacher.named_parameters()), dict(teacher.named_buffers())
    for key, buffer in plain.named_buffers():
        if key in start and key in buffers:
            torch.testing.assert_close(buffer, buffers[key], rtol=1e-9, atol=1e-9)
    for key in ("down.0.0.weight", "down.0.1.weight") if name == "unet" else ():  # no shares
        torch.testing.assert_close(plain.get_parameter(key).grad, wide[key].grad)
        assert wide[key].grad.abs().max() > 0  # type: ignore[union-attr]


def test_normalized_branches_have_no_plain_form_in_train_mode() -> None:
    _, teacher, _ = trained("unet", "dbb")
    with pytest.raises(gpdfx.InputError, match="batch norm of their own"):
        gpdfx.plain_teacher(teacher, mode="train")
    with pytest.raises(gpdfx.InputError, match="mode is 'both'"):
        gpdfx.plain_teacher(teacher, mode="both")
    with pytest.raises(gpdfx.InputError, match="takes a teacher"):
        gpdfx.plain_teacher(nn.Linear(2, 2))


# --------------------------------------------------------------------------- ties and layers
def test_a_tie_ends_where_layers_weigh_copies_differently() -> None:
    _, teacher, _ = trained("gpt", None)
    with pytest.warns(UserWarning, match=r"embed.weight and head.weight are tied"):
        plain = gpdfx.plain_teacher(teacher)
    table, head = plain.get_parameter("embed.weight"), plain.get_parameter("head.weight")
    assert not torch.equal(table, head)
    own = teacher.get_parameter("embed.weight")
    assert torch.equal(table, own)
    copies = (head / own).unflatten(1, (2, -1)).sum(1)  # the shares of one index add up to one
    torch.testing.assert_close(copies, torch.ones_like(copies))


class Tied(nn.Module):
    """Two layers of one weight, and a table that is the head by a function alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.b(F.relu(self.a(self.embed(tokens))))
        return F.linear(x, self.embed.weight)


def test_a_tie_stays_where_shares_are_alike_or_stay_in_the_graph() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (3, 4))
    teacher = gpdfx.expand(Tied(), 2, example_inputs=(tokens,), branches=None, shares="uniform")
    train(teacher, (tokens,))
    plain = gpdfx.plain_teacher(teacher.double().eval())
    assert plain.get_parameter("a.weight") is plain.get_parameter("b.weight")
    assert torch.equal(plain.get_parameter("embed.weight"), teacher.get_parameter("embed.weight"))
    assert gap(plain, teacher, (tokens,)) < 1e-12


def test_layers_are_modules_of_torch() -> None:
    model, teacher, _ = trained("unet", "dbb")
    plain = plain_of(teacher)
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)
    for path, layer in model.named_modules():
        if isinstance(layer, kinds):
            wide = plain.get_submodule(path)
            assert type(wide) is type(layer)
            assert path in {n.target for n in plain.graph.nodes}
            assert repr(wide).partition("(")[0] == repr(layer).partition("(")[0]
    first, last = plain.get_submodule("down.0.0"), plain.get_submodule("head")
    assert (first.in_channels, first.out_channels) == (3, 16)
    assert (last.in_channels, last.out_channels) == (16, 5)
    assert plain.get_submodule("down.0.3").groups == 16


# --------------------------------------------------------------------------- calls
class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


class Calls(nn.Module):
    """Structured arguments and results, and other paths for other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 6), nn.Linear(6, 3), nn.BatchNorm1d(6)

    def forward(
        self, batch: dict[str, Any], scale: Tensor | None = None, *, flip: bool = False
    ) -> dict[str, Any]:
        x = self.norm(self.a(batch["x"] + batch["more"][0]))
        x = x if scale is None else x * scale
        y = self.b(-x if flip else x)
        return {"pair": Pair(y, y + 1), "answer": Answer(y * 2), "sizes": (y.shape[0], None, [y])}


def test_structures_and_signature_are_the_teachers() -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(5, 4), torch.rand(5, 1)
    batch = {"x": x, "more": [x * 2]}
    teacher = gpdfx.expand(Calls(), 2, example_inputs=(batch, scale), example_kwargs={"flip": True})
    plain = gpdfx.plain_teacher(teacher.eval())
    larger = {"x": torch.randn(7, 4), "more": [torch.randn(7, 4)]}
    for given in (batch, larger):
        other = torch.rand(len(given["x"]), 1)
        want, got = teacher(given, scale=other, flip=True), plain(given, scale=other, flip=True)
        assert [type(x) for x in (got, *got.values())] == [dict, Pair, Answer, tuple]
        assert got["answer"].hidden is None
        assert got["sizes"][:2] == (len(given["x"]), None)
        for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(AssertionError, match="made for flip = True"):
        plain(batch, scale, flip=False)


def test_sizes_of_another_path_are_refused() -> None:
    _, teacher, (x,) = trained("branching", None, dynamic="sizes")
    plain = plain_of(teacher)
    assert gap(plain, teacher, (x[:, :, :12, :12],)) < 1e-10
    with pytest.raises(gpdfx.InputError):
        teacher(x[:, :, :13])
    with pytest.raises(AssertionError, match="this network needs"):
        plain(x[:, :, :13])


class Talks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * float(y.mean().item() > 0))


def test_what_was_captured_in_parts_is_refused() -> None:
    teacher = gpdfx.expand(Talks(), 2, example_inputs=(torch.randn(3, 4),), verify=False)
    with pytest.raises(gpdfx.InputError, match="captured in parts") as refusal:
        gpdfx.plain_teacher(teacher.eval())
    assert "report() says" in str(refusal.value.remedy)


class Step(torch.autograd.Function):
    """Passes its gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Own(nn.Module):
    """A function of the user's; a path by values, and autocast, where they are asked for."""

    def __init__(self, *, half: bool = False, paths: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.half, self.paths = nn.Linear(4, 6), nn.Linear(6, 3), half, paths

    def forward(self, x: Tensor) -> Tensor:
        y: Any = Step.apply(self.a(x))
        if self.paths:
            y = torch.cond(y.sum() > 0, torch.relu, torch.tanh, (y,))
        with torch.autocast("cpu", enabled=self.half):
            return self.b(y)


def test_functions_of_the_users_and_what_no_tracer_takes() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4)
    teacher = gpdfx.expand(Own(), 2, example_inputs=(x,), verify=False)
    train(teacher, (x,))
    plain = pickle.loads(pickle.dumps(gpdfx.plain_teacher(teacher.double().eval())))
    for inputs in (x.double(), x.double() - 3, x.double() + 3):
        assert gap(plain, teacher, (inputs,)) < 1e-12
    with pytest.raises(gpdfx.InputError, match="Step has a backward of its own"):
        gpdfx.plain_teacher(teacher, mode="train")
    for options, match in (({"half": True}, "turns autocast on"), ({"paths": True}, "calls cond")):
        other = gpdfx.expand(Own(**options), 2, example_inputs=(x,), verify=False)
        with pytest.raises(gpdfx.InputError, match=match):
            gpdfx.plain_teacher(other.eval())


class Draws(nn.Module):
    """Of nothing but sizes, and of buffers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + torch.rand(3) + self.scale * 2


def test_pickle_freezes_neither_draws_nor_buffers() -> None:
    x = torch.randn(3, 4)
    teacher = gpdfx.expand(Draws(), 2, example_inputs=(x,), verify=False).eval()
    plain = pickle.loads(pickle.dumps(gpdfx.plain_teacher(teacher)))
    assert not torch.equal(plain(x), plain(x))
    plain.get_buffer("scale").fill_(5)
    results = []
    for run in (plain, teacher):
        torch.manual_seed(3)
        results.append(run(x))
    torch.testing.assert_close(results[0], results[1] + 8)


# --------------------------------------------------------------------------- without the package
class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.head = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.deep(F.relu(self.norm(self.a(x))))).mean((2, 3)))


ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "gpdfx":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocked())
import pickle, torch
saved = torch.load(sys.argv[1], weights_only=False)
inputs, expected = saved["inputs"], saved["outputs"]
for plain in (saved["plain"], pickle.loads(pickle.dumps(saved["plain"]))):
    torch.testing.assert_close(plain(*inputs), expected)
plain.load_state_dict(saved["state"], strict=True)
torch.testing.assert_close(torch.export.export(plain, inputs).module()(*inputs), expected)
assert not any(name.split(".")[0] == "gpdfx" for name in sys.modules)
"""


def test_nothing_of_the_package_is_needed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(4, 3, 8, 8),)
    teacher = gpdfx.expand(Small(), 2, example_inputs=inputs, branches="dbb", verify=False)
    train(teacher, inputs)
    plain = plain_of(teacher.eval())
    with torch.no_grad():
        outputs = teacher(*inputs)
    saved = {"plain": plain, "state": plain.state_dict(), "inputs": inputs, "outputs": outputs}
    torch.save(saved, tmp_path / "plain.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "plain.pt")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------- formats
FORMATS = thinned(
    [(n,) for n in ("gpt", "unet", "grouped", "norms", "experts")], [("gpt",), ("grouped",)]
)


@pytest.mark.parametrize("name", FORMATS)
def test_it_exports_with_free_batch(name: str) -> None:
    _, teacher, inputs = trained(name, double=False)
    plain, batch = plain_of(teacher), {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(plain, inputs, dynamic_shapes=tuple(batch for _ in inputs))
    assert gap(program.module(), teacher, more(inputs)) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(plain, inputs)
    assert gap(traced, teacher, inputs) < 1e-5


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_onnxruntimes(name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    _, teacher, (x,) = trained(name, double=False)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            plain_of(teacher),
            (x,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (larger,) = more((x,))
    (given,) = session.run(None, {session.get_inputs()[0].name: larger.numpy()})
    assert gap(lambda _: torch.from_numpy(given), teacher, (larger,)) < 1e-4


def test_student_and_plain_teacher_quantize() -> None:
    """Dynamic int8 of linear layers, and static int8 of all layers (FX graph mode; that of exported
    programs, PT2E, is in torchao by now)."""
    torch.manual_seed(0)
    x = torch.randn(32, 3, 8, 8)
    teacher = gpdfx.expand(Small(), 2, example_inputs=(x,), branches="repvgg", verify=False)
    train(teacher, (x,))
    engines = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = engine = "x86" if "x86" in engines else engines[-1]
    for network in (gpdfx.collapse(teacher.eval()).eval(), gpdfx.plain_teacher(teacher)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dynamic = quantization.quantize_dynamic(copy.deepcopy(network), {nn.Linear})
            mapping = quantization.get_default_qconfig_mapping(engine)
            prepared = quantize_fx.prepare_fx(copy.deepcopy(network), mapping, (x,))
            prepared(x)
            static = quantize_fx.convert_fx(prepared)
        kinds = [type(m).__module__ for m in dynamic.modules()]
        assert kinds.count("torch.ao.nn.quantized.dynamic.modules.linear") == 1
        assert gap(dynamic, network, (x,)) < 0.02
        layers = [m for m in static.modules() if type(m).__module__.startswith("torch.ao.nn")]
        assert len(layers) >= 3
        assert gap(static, network, (x,)) < 0.1


# --------------------------------------------------------------------------- a language model
@pytest.mark.slow
def test_a_llama_grows_into_its_own_class() -> None:
    pytest.importorskip("transformers")
    example = Path(__file__).parents[1] / "examples" / "grow_llama.py"
    done = subprocess.run(
        [sys.executable, str(example)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "parameters 26,784 -> 94,528" in done.stdout
