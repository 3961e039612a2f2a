"""The laws of the check, one by one: what each must see, and what it must not blame."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import gpdfx
from gpdfx.check.facts import MASK, difference, typical
from gpdfx.check.laws import SEQUENCE
from gpdfx.check.probe import jitter
from gpdfx.check.streaming import StreamingTeacher, conv2d
from gpdfx.errors import InputError, LossyError
from gpdfx.passes.widen import Widened

from .helpers import compiled, program_of, python_shell, verify

aten = torch.ops.aten


def insert(graph: fx.Graph, node: fx.Node, *calls: Any) -> None:
    """Put calls (op, further arguments) between a node and all that reads it."""
    users, last = list(node.users), node
    for op, *rest in calls:
        with graph.inserting_after(last):
            last = graph.call_function(op, (last, *rest))
    for user in users:
        user.replace_input_with(node, last)


def nodes(program: Widened, target: Any) -> list[tuple[fx.Graph, fx.Node]]:
    return [(g, n) for g in program.graphs.values() for n in g.nodes if n.target == target]


# --------------------------------------------------------------------------- the measure
@pytest.mark.parametrize("mask", [-1e4, -1e9, -1e30, -torch.inf])
def test_no_mask_hides_the_rest(mask: float) -> None:
    x = torch.randn(64, 64, dtype=torch.float64)
    x[:, 8:] = mask
    assert 0.5 < typical(x) < 2
    y = x.clone()
    y[:, :8] *= 1 + 1e-8
    assert 1e-9 < difference(x, y) < 1e-7
    assert difference(x, x.clone()) == 0


def test_what_is_zero_but_for_rounding_is_measured_by_its_floor() -> None:
    x, y = torch.full((3,), 1e-17), torch.full((3,), -1e-17)
    assert difference(x, y) > 1
    assert difference(x, y, floor=1.0) < 1e-16
    large = torch.tensor([1e8, 1e-9], dtype=torch.float64)
    assert difference(large, large + torch.tensor([0, 1e-9])) < 1e-7  # a difference of large ones
    assert MASK < 1e4


@pytest.mark.parametrize("other", [float("nan"), 0.0, -float("inf")])
def test_the_pattern_of_what_is_not_finite_counts(other: float) -> None:
    x = torch.tensor([1.0, float("inf"), float("nan")])
    assert difference(x, x.clone()) == 0
    y = x.clone()
    y[1] = other
    assert difference(x, y) == float("inf")
    assert difference(x, x.double()) == float("inf")


# --------------------------------------------------------------------------- gradients, casts
class Masked(nn.Module):
    """Returns scores of which a mask hides most."""

    def __init__(self, mask: float) -> None:
        super().__init__()
        self.mask, self.a, self.b = mask, nn.Linear(8, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        later = torch.ones(6, 6, dtype=torch.bool).triu(1)
        return self.b(self.a(x).relu()).unsqueeze(1).masked_fill(later, self.mask)


@pytest.mark.parametrize("mask", [-1e9, -1e30, -torch.inf])
def test_a_scaled_layer_behind_a_mask_is_caught(mask: float) -> None:
    call = ((torch.randn(4, 8),), {})
    program = program_of(Masked(mask), call)
    verify(program, call)
    for graph, node in nodes(program, aten.relu.default):
        insert(graph, node, (aten.mul.Tensor, 1 + 1e-8))
    with pytest.raises(LossyError, match="differs"):
        verify(program, call)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)
    )


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"])
@pytest.mark.parametrize("branches", [None, "auto"])
def test_a_detached_parameter_is_caught(name: str, branches: Any) -> None:
    call = ((torch.randn(4, 3, 4, 4),), {})
    program = program_of(network(), call, branches=branches)
    found = nodes(program, name)
    for graph in program.graphs.values():
        for node in graph.nodes:  # what is read from the fold
            if node.op == "call_function" and str(node.args[1:2]).startswith(f"('{name}"):
                found.append((graph, node))
    assert found
    for graph, node in found:
        insert(graph, node, (aten.detach.default,))
    with pytest.raises(LossyError, match=f"gradient of {name}"):
        verify(program, call)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_to_a_narrow_dtype_and_back_is_caught(dtype: torch.dtype) -> None:
    call = ((torch.randn(4, 8),), {})
    program = program_of(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)), call)

    def through(x: Tensor) -> Tensor:  # no node says so
        return x.to(dtype).to(x.dtype)

    for graph, node in nodes(program, aten.relu.default):
        insert(graph, node, (through,))
    with pytest.raises(LossyError, match="differs"):
        verify(program, call)


def test_one_more_draw_is_caught() -> None:
    """Nothing in this call depends on it; the next one of the user's would."""
    call = ((torch.randn(4, 8),), {})
    program = program_of(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)), call)
    (graph, node), *_ = nodes(program, aten.relu.default)
    with graph.inserting_after(node):
        graph.call_function(aten.rand.default, ([3],))
    with pytest.raises(LossyError, match="torch's generator"):
        verify(program, call)


# --------------------------------------------------------------------------- masked rows
class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 4, 4).permute(2, 0, 3, 1, 4)
        drop = 0.1 if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        return self.head(y.transpose(1, 2).reshape(b, n, 16))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_that_is_masked_entirely_attends_to_nothing(kind: str) -> None:
    x, causal = torch.randn(3, 6, 16), torch.ones(6, 6).tril().bool()
    padded = causal.clone()
    padded[0] = False
    if kind == "float":
        causal, padded = (torch.zeros(6, 6).masked_fill(~m, -torch.inf) for m in (causal, padded))
    model = Attends()
    teacher = gpdfx.expand(model, 2, example_inputs=(x, causal))
    for mode in (True, False):
        torch.manual_seed(1)
        expected = model.train(mode)(x, padded)
        torch.manual_seed(1)
        got = teacher.train(mode)(x, padded)
        torch.testing.assert_close(got, expected)
        assert got.isfinite().all()


# --------------------------------------------------------------------------- other sizes
CONDITIONS: dict[str, Callable[[Tensor], bool]] = {
    "rows > columns": lambda x: x.shape[1] > x.shape[2],
    "columns != 7": lambda x: x.shape[2] != 7,
    "batch > 1": lambda x: x.shape[0] > 1,
    "one column": lambda x: x.shape[2] == 1,
    "batch > rows": lambda x: x.shape[0] > x.shape[1],
    "even": lambda x: x.shape[1] % 2 == 0,
}


class Branches(nn.Module):
    def __init__(self, condition: Callable[[Tensor], bool], training_only: bool) -> None:
        super().__init__()
        self.condition, self.only = condition, training_only
        self.a, self.b = nn.Linear(1, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x.mean((1, 2)).unsqueeze(-1)).relu()
        if (self.training or not self.only) and self.condition(x):
            y = y * 2 + 1
        return self.b(y)


@pytest.mark.parametrize("training_only", [False, True])
@pytest.mark.parametrize("name", CONDITIONS)
def test_a_size_across_a_condition_is_refused_or_right(name: str, training_only: bool) -> None:
    model = Branches(CONDITIONS[name], training_only)
    teacher = gpdfx.expand(model, 2, example_inputs=(torch.randn(4, 6, 5),))
    held = 0
    for shape in ((4, 6, 5), (1, 6, 5), (4, 5, 6), (4, 6, 7), (4, 6, 1), (8, 6, 5), (4, 7, 5)):
        x = torch.randn(shape)
        for mode in (True, False):
            try:
                got = teacher.train(mode)(x)
            except InputError:
                continue
            held += 1
            torch.testing.assert_close(got, model.train(mode)(x))
    assert held >= 4


# --------------------------------------------------------------------------- what Python does
class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(8, 12), nn.Linear(12, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.n: Any = 0
        self.mean = torch.zeros(12)


class Draws(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x).relu() * (1 + random.random()))


class DrawsNumbers(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x).relu() * float(1 + np.random.rand()))


class Counts(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        return self.c(self.a(x).relu() * (1 + 1 / self.n))


class CountsInABuffer(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.c(self.a(x).relu() * self.seen)


class Averages(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.training:
            self.mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        return self.c((y - self.mean).relu())


class Hooked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a.register_full_backward_hook(lambda _module, grads, _out: (grads[0] * 5,))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x).relu())


@pytest.mark.parametrize("kind", [Draws, DrawsNumbers, Counts, CountsInABuffer, Averages, Hooked])
def test_what_no_graph_does_stays_python(kind: type[Net]) -> None:
    """Nobody is blamed: the teacher follows the student, call after call, in its gradients too."""
    torch.manual_seed(0)
    model = kind()
    teacher = gpdfx.expand(model, 2, example_inputs=(torch.randn(3, 8),), branches=None)
    whole = kind is CountsInABuffer
    assert (python_shell(teacher) is None) is whole
    assert bool(teacher.report().apart) is not whole
    for seed in range(3):
        x, results = torch.randn(5, 8), []
        for run in (model.train(), teacher.train()):
            for draw in (random.seed, np.random.seed, torch.manual_seed):
                draw(seed)
            own = x.clone().requires_grad_()
            y = run(own)
            y.sum().backward()
            results.append((y.detach(), own.grad))
        torch.testing.assert_close(*results)


def test_what_training_leaves_is_looked_at_in_eval_mode() -> None:
    """A buffer that is zero at first hides what is done with it."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 3)
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            if self.training:
                self.mean.lerp_(y.detach().mean(0), 0.1)
            return self.out(y - self.mean)

    call = ((torch.randn(3, 4),), {})
    verify(program_of(Centred(), call), call)
    program = program_of(Centred(), call)
    (key,) = (key for key, mode in program.modes.items() if mode.site.mode == "eval")
    (node,) = (n for n in program.graphs[key].nodes if n.target == "mean")
    insert(program.graphs[key], node, (aten.neg.default,))
    with pytest.raises(LossyError, match="of call 4"):
        verify(program, call)


# --------------------------------------------------------------------------- casts
class Rounds(nn.Module):
    """Computes a part of itself in float32, and another in bfloat16, on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y = F.softmax(y.cumsum(-1), -1, dtype=torch.float32).to(x.dtype)
        return self.down(y.bfloat16().to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_cast_is_seen_in_a_network_that_casts(dtype: torch.dtype) -> None:
    """Its own are lifted to float64 in the check, and with them any other."""
    call = ((torch.randn(3, 6),), {})
    verify(program_of(Rounds(), call), call)
    program = program_of(Rounds(), call)
    for graph, node in nodes(program, aten.linear.default)[:1]:
        insert(graph, node, (aten.to.dtype, dtype), (aten.to.dtype, torch.float64))
    with pytest.raises(LossyError, match="asks for another dtype"):
        verify(program, call)


def test_a_lost_cast_is_seen() -> None:
    call = ((torch.randn(3, 6),), {})
    program = program_of(Rounds(), call)
    graph, node = next((g, n) for g, n in nodes(program, aten.to.dtype) if torch.bfloat16 in n.args)
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)
    with pytest.raises(LossyError, match="asks for another dtype"):
        verify(program, call)


# --------------------------------------------------------------------------- sizes
def test_a_large_batch_is_cut_and_seen_once_whole() -> None:
    """In float64 a few samples do; in the own dtype it is the example."""
    seen: dict[torch.dtype, set[int]] = {}

    class Notes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_exporting():
                seen.setdefault(x.dtype, set()).add(len(x))
            return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))

    teacher = gpdfx.expand(Notes(), 2, example_inputs=(torch.randn(32, 3, 8, 8),))
    assert teacher.report().inputs == {"x": "batch x 3 x any x any"}
    assert max(seen[torch.float64]) <= 5
    assert 32 in seen[torch.float32]


# --------------------------------------------------------------------------- the certificate
def test_the_certificate_lists_every_law() -> None:
    teacher = gpdfx.expand(network(), 2, example_inputs=(torch.randn(4, 3, 4, 4),))
    report = teacher.report()
    laws = {one.law: one for one in report.certificate}
    assert laws.keys() >= {
        "outputs",
        "gradients of inputs",
        "gradients of parameters",
        "buffers after the call",
        "generators after the call",
        SEQUENCE,
        "branches at the start",
        "the student's view",
        "casts",
    }
    both = {"probe/eval", "probe/train", "real/eval", "real/train"}
    assert both <= set(laws["gradients of parameters"].where)
    assert both | {"own/eval", "own/train"} <= set(laws["outputs"].where)
    assert all(one.error < 1e-4 for one in report.certificate)
    assert report.check is not None
    assert not report.check.left_out
    assert "certificate" in str(report)
    plain = report.to_dict()
    assert [row["law"] for row in plain["certificate"]] == list(laws)


def test_what_is_left_out_is_said() -> None:
    class Picky(nn.Module):
        """Takes no other call than the first."""

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            assert torch.compiler.is_exporting() or not x.detach().amax() < 1
            return self.a(x)

    teacher = gpdfx.expand(Picky(), 2, example_inputs=(torch.full((2, 4), 1.05),))
    check = teacher.report().check
    assert check is not None
    assert any(SEQUENCE in text for text in check.left_out)
    assert "not certified" in str(teacher.report())


def test_copies_are_jittered_by_different_numbers() -> None:
    x = torch.ones(128, 64, 3, 3, dtype=torch.float64)
    y = x.clone()
    jitter(y, torch.Generator().manual_seed(0))
    assert 1 < float(y.min()) < float(y.max()) < 1.1
    assert (y[:64] != y[64:]).all()
    assert (y[:, :32] != y[:, 32:]).all()


def test_numbers_in_any_memory_format_are_jittered() -> None:
    x = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    jitter(x, torch.Generator().manual_seed(0))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert (x > 1).all()


@pytest.mark.parametrize(
    ("size", "kernel", "options"),
    [
        (2, 3, ([1, 1], [1, 1])),  # one product
        (4, 3, ([2, 2], [1, 1])),
        (5, (3, 1), ([2, 1], [1, 0], [1, 1])),
        (5, 2, ([1], [0], [2])),
        (4, 1, ()),
        (3, 3, ([1, 1], [1, 1], [1, 1], 2)),
        (32, 3, ([1, 1], [1, 1])),  # PyTorch's own
    ],
)
@pytest.mark.parametrize("kind", [torch.contiguous_format, torch.channels_last])
def test_the_checks_convolution_is_a_convolution(
    size: int, kernel: int | tuple[int, int], options: tuple[Any, ...], kind: torch.memory_format
) -> None:
    groups = options[3] if len(options) > 3 else 1
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 256, kernel, groups=groups).double().to(memory_format=kind)
    x = torch.randn(2, 16, size, size, dtype=torch.float64, requires_grad=True)
    plain = torch.ops.aten.conv2d.default(x, layer.weight, layer.bias, *options)
    ours = conv2d(x, layer.weight, layer.bias, *options)
    sources = [x, layer.weight, layer.bias]
    cotangent = torch.randn_like(plain)
    assert ours.stride() == plain.stride()
    torch.testing.assert_close(ours, plain)
    for own, other in zip(
        torch.autograd.grad((ours * cotangent).sum(), sources),
        torch.autograd.grad((plain * cotangent).sum(), sources),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


def test_of_layers_alike_one_has_branches_with_values() -> None:
    """The smallest; of the others the check looks at weight, scales and the student's part."""
    model = nn.Sequential(*(nn.Conv2d(n, 2 * n, 3) for n in (4, 8, 16)), nn.Conv2d(32, 3, 1))
    call = ((torch.randn(2, 4, 9, 9),), {})
    teacher = StreamingTeacher(compiled(program_of(model, call, branches="orepa"), call))
    drawn = {
        name: all(not p.is_meta for p in teacher.get_submodule(f"_branches.{name}").parameters())
        for name in ("0.weight", "1.weight", "2.weight")
    }
    assert drawn == {"0.weight": True, "1.weight": True, "2.weight": False}


class Narrow(nn.Module):
    """Asks for a narrow dtype on the way, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.way = way
        if way == "half":
            self.b.half()

    def forward(self, x: Tensor) -> Any:
        y = self.a(x).tanh()
        if self.way == "half":
            return self.c(self.b(y.half()).float())
        with torch.autocast("cpu", torch.bfloat16):
            y = self.b(y).relu()
            with torch.autocast("cpu", enabled=self.way != "within"):
                y = y.float().softmax(-1)
        return self.c(y.float())


@pytest.mark.parametrize("way", ["autocast", "within", "half"])
def test_what_is_narrow_on_the_way_is_held_to_its_own_precision(way: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    teacher = gpdfx.expand(Narrow(way), 2, example_inputs=(x,), branches=None)
    found = next(one for one in teacher.report().certificate if one.law == "outputs")
    assert {"own/eval", "own/train"} <= set(found.where)
