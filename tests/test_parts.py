"""Networks that do not export as a whole: captured in parts, the user's Python between them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

import gpdfx
from gpdfx.check.probe import randomize
from gpdfx.compiler import Inputs, capture_model
from gpdfx.passes.program import module_path, origin
from gpdfx.passes.widen import Widened

from .helpers import parts, program_of, python_shell, verify
from .networks import tensors_equal


class Loop(nn.Module):
    """Goes round a layer as often as the values say; one parameter is Python's own, one is tied to
    a part's, one module is called with two kinds of arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU())
        self.step = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, 8))
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(8))
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.calls += 1
        y = self.stem(x).transpose(1, 2)
        rounds = 2 + int(y.detach().mean() > 1e9)
        for _ in range(rounds):
            y = y + self.step(y)
        y = y + self.attend(y, y, y, need_weights=False)[0]
        z, weights = self.attend(y, y, y)
        z = nn.functional.linear(z.sum(1) * self.scale, self.last.weight)
        return {"logits": self.first(z), "weights": weights, "rounds": rounds}


def example(model: nn.Module, *inputs: Tensor) -> Inputs:
    return inputs, {}


def loop() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Loop(), torch.randn(4, 3, 9)


def test_parts_are_captured_and_the_rest_stays_python() -> None:
    model, x = loop()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    teacher = gpdfx.expand(model, 2, example_inputs=(x,))
    report = teacher.report()
    assert set(report.apart) == {""}
    assert "data-dependent" in report.apart[""]
    assert "for _ in range(rounds)" in report.apart[""]  # the user's line
    assert max(report.error.values()) <= 1e-10
    assert set(parts(teacher)) == {"stem", "step", "attend", "first"}
    assert len(parts(teacher)["attend"].sections) == 4  # two kinds of calls in each mode
    wide = teacher.state_dict()
    assert wide["stem.0.weight"].shape == (8, 3, 3)  # its outputs go to Python
    assert wide["step.0.weight"].shape == (24, 8)
    assert wide["first.weight"].shape == (8, 8)
    assert teacher.first.weight is teacher.last.weight
    held = {f.parameter: f.reason for f in report.fixed if not f.cannot}
    assert held["scale"].startswith("uncaptured")
    assert tensors_equal(gpdfx.collapse(teacher).state_dict(), before)
    assert "not captured" in str(report)
    assert "4" in gpdfx.explain(teacher, "step.0.weight").dimensions[0].axis


def test_nodes_know_where_they_come_from() -> None:
    model, x = loop()
    model.step[0] = nn.Sequential(nn.Linear(8, 12))
    program = capture_model(model, example(model, x), False, "batch")
    nodes = program.modes["step_eval"].nodes
    inner, gelu, *_, outer = (origin(n) for n in nodes if n.op == "call_function")
    assert (inner.path, inner.kind) == ("step.0.0", "Linear")
    assert (gelu.path, gelu.kind, str(gelu)) == ("step.1", "GELU", "step.1 (GELU)")
    assert (outer.path, outer.kind) == ("step.3", "Linear")
    assert str(origin(nodes[0])) == ""
    whole = capture_model(nn.Linear(3, 3), ((torch.randn(2, 3),), {}), False, "batch")
    (node,) = (n for n in whole.modes["eval"].nodes if n.op == "call_function")
    assert str(origin(node)) == module_path(node) == "(root) (Linear)"


def test_what_the_user_asks_for_reaches_every_part() -> None:
    model, x = loop()
    ratio = {"*": 2, "step": 3}
    asked = {"keep": "attend.in_proj_bias", "round_to": 8}
    teacher = gpdfx.expand(model, ratio, example_inputs=(x,), **asked)
    wide = teacher.state_dict()
    assert wide["step.0.weight"].shape == (40, 8)
    assert wide["attend.in_proj_weight"].shape == (24, 8)
    reasons = {f.parameter: f.reason for f in teacher.report().fixed}
    assert reasons["attend.in_proj_bias"] == "kept (attend.in_proj_bias)"


def test_parts_train_move_copy_and_follow_other_sizes() -> None:
    model, x = loop()
    teacher = gpdfx.expand(model, 1.5, example_inputs=(x,))
    model.double(), teacher.double()
    x = x.double()
    for training in (True, False):
        model.train(training), teacher.train(training)
        torch.manual_seed(1)
        mine = model(x[:3, :, :7])
        torch.manual_seed(1)
        theirs = teacher(x[:3, :, :7])
        assert list(mine) == list(theirs)
        assert mine["rounds"] == theirs["rounds"]
        torch.testing.assert_close(theirs["logits"], mine["logits"], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(teacher(x)["weights"].shape, model(x)["weights"].shape)
    assert torch.equal(teacher.calls, model.calls)
    twin = copy.deepcopy(teacher)
    teacher.train()
    sgd = torch.optim.SGD(teacher.parameters(), 0.1)
    loss = teacher(x)["logits"].square().mean() + teacher.student(x)["logits"].square().mean()
    loss.backward()
    sgd.step()
    teacher.eval(), twin.eval()
    assert not torch.equal(teacher(x)["logits"], twin(x)["logits"])  # a copy shares nothing
    plain = gpdfx.collapse(teacher).eval()
    torch.testing.assert_close(plain(x)["logits"], teacher.student(x)["logits"])


def test_a_call_of_another_kind_is_refused() -> None:
    model, x = loop()
    teacher = gpdfx.expand(model, 2, example_inputs=(x,)).eval()
    part = python_shell(teacher).get_submodule("step")
    with pytest.raises(gpdfx.InputError, match="size 9 in dimension 2"):
        part(torch.randn(2, 5, 9))


def _tamper(widened: Widened, key: str) -> None:
    graph: fx.Graph = widened.graphs[key]
    node = graph.output_node()
    with graph.inserting_before(node):
        other = graph.call_function(torch.ops.aten.mul.Tensor, (node.args[0][0], 1 + 1e-6))
    node.args = ((other, *node.args[0][1:]),)


@pytest.mark.parametrize("key", ["stem_train", "step_eval", "attend_eval_1", "first_train"])
def test_the_oracle_catches_a_fault_in_any_part(key: str) -> None:
    model, x = loop()
    call = example(model, x)
    widened = program_of(model, call, dynamic="batch")
    _tamper(widened, key)
    with pytest.raises(gpdfx.LossyError, match=r"differs by \d\.\d+e-06"):
        verify(widened, call)


class TokenModel(nn.Module):
    """An encoder whose forward looks at the values of its mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.embed = nn.Embedding(20, 16)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 20)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.embed(tokens), mask=mask))


def test_transformer_encoder_with_a_mask() -> None:
    torch.manual_seed(0)
    model = TokenModel()
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    inputs = {"example_inputs": (torch.randint(0, 20, (3, 7)),), "example_kwargs": {"mask": mask}}
    teacher = gpdfx.expand(model, 2, **inputs).eval()
    ends = 2 * 20 * 16  # embedding and head have Python, and nothing of theirs, on either side
    layers = 2 * 16 * (3 * 16 + 16 + 2 * 24)
    assert teacher.report().widened == pytest.approx(layers / (layers + ends))
    assert set(parts(teacher)) == {"embed", "encoder.layers.0", "encoder.layers.1", "head"}
    model.eval()
    tokens = torch.randint(0, 20, (6, 7))
    with torch.no_grad():  # where PyTorch would take its fused path past the layers
        torch.testing.assert_close(
            teacher(tokens, mask=mask), model(tokens, mask=mask), rtol=1e-4, atol=1e-5
        )


class Watched(nn.Module):
    """Computes something else when it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y if torch.compiler.is_compiling() else y * 2)


def test_a_graph_that_is_not_the_function_is_not_used() -> None:
    torch.manual_seed(0)
    teacher = gpdfx.expand(Watched(), 2, example_inputs=(torch.randn(4, 4),))
    assert "traced" in teacher.report().apart[""]
    assert set(parts(teacher)) == {"a", "b"}


class Sorting(nn.Module):
    """Experts that get a list of how many rows are theirs: plain numbers that follow values."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.last = nn.Linear(4, 2), nn.Linear(4, 3)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(1)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=2).tolist()
        return self.last(self.experts(x[order], counts))


class Redraw(nn.Module):
    """Counts calls, and asks how many there were."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of
        self.register_buffer("calls", torch.zeros(()))

    def forward(self) -> None:
        if self.calls > 3:
            self.calls.zero_()
        self.calls += 1


class Redrawn(nn.Module):
    """Python that depends on values, and a module of it that knows a part by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.redraw = Redraw(self.net)

    def forward(self, x: Tensor) -> Tensor:
        self.redraw()
        return self.net(x)


def test_a_part_with_another_name_widens() -> None:
    model, x = Redrawn(), torch.randn(3, 4)
    report = gpdfx.expand(model, 2, example_inputs=(x,)).report()
    assert report.widened == 1.0
    assert report.parameters[1] > report.parameters[0]
    assert set(report.apart) == {"", "redraw"}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)
        )

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        return torch.cat([e(y) for e, y in zip(self.each, x.split(counts), strict=True)])


def test_arguments_that_follow_from_values_are_not_baked() -> None:
    torch.manual_seed(0)
    model, x = Sorting(), torch.randn(12, 4)
    teacher = gpdfx.expand(model, 2, example_inputs=(x,)).eval()
    assert {"experts.each.0", "experts.each.1"} < set(parts(teacher))
    experts, alone = 2 * (4 * 8 + 8 * 4), 4 * 2 + 4 * 3
    assert teacher.report().widened == pytest.approx(experts / (experts + alone))
    for count in (12, 1, 5):  # an expert may get one row, or none
        y = torch.randn(count, 4)
        torch.testing.assert_close(teacher(y), model(y))


class Streams(nn.Module):
    """Returns what adds its own result to another's, later: a function of a tensor, or an object
    with a method."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.mix, self.kind = nn.Linear(8, 8), kind

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        own = self.mix(x)
        ways = {
            "closure": lambda y: y + own,
            "default": lambda y, own=own: y + own,
            "partial": partial(torch.add, own),
            "method": own.add,
            "module": lambda y: y + self.mix(y),
        }
        return x, ways[self.kind]


class Residual(nn.Module):
    def __init__(self, kind: str, python: bool) -> None:
        super().__init__()
        self.first, self.streams, self.last = nn.Linear(6, 8), Streams(kind), nn.Linear(8, 3)
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.python = python

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.python and x.sum().item() > 1e6:
            x = 2 * x
        x, add = self.streams(x)
        y: Tensor = self.last(add(self.inner(x)))
        return y


@pytest.mark.parametrize("kind", ["closure", "default", "partial", "method", "module"])
@pytest.mark.parametrize("python", [False, True])
def test_a_function_that_a_module_returns_is_of_its_own_call(kind: str, python: bool) -> None:
    torch.manual_seed(0)
    model, x = Residual(kind, python), torch.randn(4, 6)
    teacher = gpdfx.expand(model, 2, example_inputs=(x,))
    for y in (x, torch.randn(3, 6)):
        torch.testing.assert_close(teacher(y), model(y))
        torch.testing.assert_close(teacher.student(y), model(y))
    assert not python or "holds tensors of the call" in teacher.report().apart["streams"]
    assert teacher.report().widened > (0.5 if python else 0.99)


# --------------------------------------------------------------------------- structures
@dataclass
class Pair:
    x: Tensor
    y: Tensor
    scale: float = 2.0


class Both(NamedTuple):
    logits: Tensor
    hidden: tuple[Tensor, Pair] | None
    loss: float | None


class Structured(nn.Module):
    """Takes and returns what no container of PyTorch's knows; more of it while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, pair: Pair, extra: dict[str, Tensor] | None = None, *, k: int = 1) -> Both:
        h = self.a(pair.x * pair.scale + pair.y) * k
        h = h + extra["bias"] if extra else h
        g = self.b(h.relu())
        return Both(self.c(g), (h, Pair(g, h, 0.5)) if self.training else None, None)


def test_structures_of_any_kind_go_in_and_out() -> None:
    torch.manual_seed(0)
    model = Structured()
    pair, extra = Pair(torch.randn(4, 4), torch.randn(4, 4)), {"bias": torch.randn(4, 1)}
    teacher = gpdfx.expand(
        model, 2, example_inputs=(pair,), example_kwargs={"extra": extra, "k": 3}
    )
    assert teacher.report().widened == 1.0
    assert teacher.a.weight.shape == (16, 4)
    assert teacher.report().inputs == {
        "pair.x": "batch x 4",
        "pair.y": "batch x 4",
        "extra['bias']": "batch x 1",
    }
    out, want = teacher(pair, extra=extra, k=3), model(pair, extra=extra, k=3)
    assert type(out) is Both
    assert out.hidden is not None
    assert type(out.hidden[1]) is Pair
    assert out.hidden[1].scale == 0.5
    torch.testing.assert_close(out.hidden[1].x, want.hidden[1].x)  # at the student's width
    assert teacher.eval()(pair, extra, k=3).hidden is None
    for bad in ((pair, extra, 2), (Pair(pair.x, pair.y, 3.0), extra, 3), (pair, None, 3)):
        with pytest.raises(gpdfx.InputError, match=r"pair\.x"):
            teacher(bad[0], extra=bad[1], k=bad[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"]
)
def test_detection_gives_identical_boxes(name: str) -> None:
    torch.manual_seed(0)
    small = {"min_size": 96, "max_size": 128} if "rcnn" in name else {}
    model = torchvision.models.get_model(
        name, weights=None, weights_backbone=None, num_classes=4, **small
    )
    randomize(model, 0)
    images = [torch.rand(3, 96, 128), torch.rand(3, 96, 120)]
    boxes = torch.tensor([[5.0, 5.0, 50.0, 60.0], [20.0, 20.0, 90.0, 80.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images]
    teacher = gpdfx.expand(model, 2, example_inputs=(images, targets), dynamic="batch")
    assert teacher.report().widened > 0.95
    model.double().eval(), teacher.double().eval()
    images = [x.double() for x in images]
    for mine, theirs in zip(model(images, targets), teacher(images, targets), strict=True):
        assert len(mine["boxes"]) > 0
        assert torch.equal(mine["labels"], theirs["labels"])
        torch.testing.assert_close(theirs["boxes"], mine["boxes"], rtol=1e-10, atol=1e-8)
