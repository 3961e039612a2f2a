"""The oracle must bite: faults planted in the teacher, each of which it has to catch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import gpdfx
from gpdfx.algebra.frozen import Frozen
from gpdfx.calls.sizes import resized
from gpdfx.check import laws, streaming
from gpdfx.check.attempts import StaleError, UndecidedError, attempts
from gpdfx.check.facts import Fact, Law, difference
from gpdfx.check.probe import randomize, settle_statistics
from gpdfx.check.visit import WrittenError
from gpdfx.errors import LossyError
from gpdfx.kernels import copies
from gpdfx.passes.program import is_mutable
from gpdfx.passes.widen import Widened
from gpdfx.teacher.compiled import Compiled, Inputs, Python

from .helpers import program_of, teacher_of, verify

aten = torch.ops.aten
Tamper = Callable[[Widened], None]


# --------------------------------------------------------------------------- small networks
class Plain(nn.Module):
    """Convolutions, batch norm, concat, dropout, an in-place write, statistics over channels."""

    def __init__(self, zero: bool = False) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 12, 3, padding=1, groups=3)
        self.norm = nn.BatchNorm2d(12)
        self.group = nn.GroupNorm(2, 12)
        self.c = nn.Conv2d(18, 8, 1)
        self.last = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)
        if zero:
            nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        z = F.dropout(self.group(self.norm(self.b(y))), 0.2, self.training)
        y = self.c(torch.cat([y, z], 1))
        y = y / (y.var(1, keepdim=True, unbiased=True) + 1) * y.softmax(1)
        y = y + self.last(y)
        y = y.mean((2, 3)) - y.mean((1, 2, 3))[:, None]
        out = torch.zeros_like(y)
        out[:, :4] = y[:, 4:]
        out[:, 4:] = y[:, :4].cumsum(1)
        return self.fc(out)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.qkv = nn.Linear(12, 36)
        self.proj = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.embed(x)).reshape(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def compiled(model: nn.Module, *inputs: Tensor, ratio: float = 2.0) -> tuple[Widened, Inputs]:
    return program_of(model, (inputs, {}), ratio), (inputs, {})


def image() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------- faults in the graph
def nodes(w: Widened, *targets: Any) -> list[tuple[fx.Graph, fx.Node]]:
    found = [(g, n) for g in w.graphs.values() for n in g.nodes if n.target in targets]
    assert found, f"no node calls {targets}"
    return found


def no_shares(w: Widened) -> None:
    for _, node in nodes(w, copies.share):
        node.replace_all_uses_with(node.args[0])


def shares_of_whole_axis(w: Widened) -> None:
    """In a grouped conv only the inner factor is contracted; here the groups count too."""
    for graph, node in nodes(w, aten.conv2d.default):
        if len(node.args) > 6 and node.args[6] != 1:
            with graph.inserting_before(node):
                node.update_arg(1, graph.call_function(aten.mul.Tensor, (node.args[1], 0.5)))


def swapped_maps(w: Widened) -> None:
    """Head and feature order swapped: the rows of qkv follow 3 x 4 x 3 instead of 3 x 3 x 4."""
    rows = w.maps["qkv.weight"][0]
    swapped = rows.map.reshape(3, -1, 4).transpose(0, 2, 1).reshape(-1)
    w.maps["qkv.weight"] = (Frozen(rows.student, swapped), w.maps["qkv.weight"][1])


def wrong_map(w: Widened) -> None:
    maps = w.maps["a.weight"]
    w.maps["a.weight"] = (Frozen(maps[0].student, maps[0].map[::-1].copy()), *maps[1:])


def wrong_bias_map(w: Widened) -> None:
    w.maps["c.bias"] = (Frozen(8, np.roll(w.maps["c.bias"][0].map, 1)),)


def wrong_groups(w: Widened) -> None:
    for _, node in nodes(w, aten.group_norm.default):
        node.update_arg(1, 1)


def stale_buffer(w: Widened) -> None:
    for graph, node in nodes(w, aten.batch_norm.default):
        with graph.inserting_before(node):
            node.update_arg(3, graph.call_function(aten.clone.default, (node.args[3],)))


def transposed_cat(w: Widened) -> None:
    for _, node in nodes(w, aten.cat.default):
        node.update_arg(0, list(reversed(node.args[0])))


def naive_variance(w: Widened) -> None:
    for graph, node in nodes(w, copies.variance):
        with graph.inserting_before(node):
            options = {"correction": 1, "keepdim": True}
            new = graph.call_function(aten.var.correction, (node.args[0], [1]), options)
        node.replace_all_uses_with(new)


def naive_softmax(w: Widened) -> None:
    for graph, node in nodes(w, copies.softmax):
        with graph.inserting_before(node):
            new = graph.call_function(aten.softmax.int, (node.args[0], 1))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def lost_write(w: Widened) -> None:
    writes = [(g, n) for g, n in nodes(w, aten.copy_.default) if is_mutable(n)]
    for graph, node in writes[-1:]:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)


def other_mask(w: Widened) -> None:
    """Dropout drawn at the teacher's shape although equal seeds must give equal functions."""
    for graph, node in nodes(w, copies.dropout_mask):
        drop = next(u for u in graph.nodes if u.target is aten.mul.Tensor and node in deep(u))
        with graph.inserting_before(drop):
            new = graph.call_function(aten.dropout.default, (drop.args[0], 0.2, True))
        drop.replace_all_uses_with(new)


def deep(node: fx.Node, limit: int = 4) -> set[fx.Node]:
    """A node's nearest ancestors."""
    if limit == 0:
        return set()
    return {m for n in node.all_input_nodes for m in ({n} | deep(n, limit - 1))}


def first_copy_only(w: Widened) -> None:
    """A narrow that takes the wrong copies."""
    for graph, node in nodes(w, copies.narrow):
        with graph.inserting_before(node):
            node.update_arg(2, graph.call_function(aten.flip.default, (node.args[2], [0])))


def cut_gradient(w: Widened) -> None:
    for graph, node in nodes(w, aten.relu.default):
        with graph.inserting_after(node):
            new = graph.call_function(aten.detach.default, (node,))
        node.replace_all_uses_with(new, lambda user, n=new: user is not n)


def one_mode(w: Widened) -> None:
    w.graphs["train"] = w.graphs["eval"]


def teacher_scale(w: Widened) -> None:
    """Attention scaled by the teacher's width, which the features' shares do not undo."""
    for _, node in nodes(w, aten.scaled_dot_product_attention.default):
        node.kwargs = {**node.kwargs, "scale": 8**-0.5}


def uneven_mean(w: Widened) -> None:
    """Unequal numbers of copies weigh unequally in a plain mean."""
    for graph, node in nodes(w, copies.average):
        with graph.inserting_before(node):
            args = (node.args[0], node.args[1], node.args[4])
            new = graph.call_function(aten.mean.dim, args)
        node.replace_all_uses_with(new)


FAULTS: dict[str, tuple[Callable[[], nn.Module], Tamper, float]] = {
    "no shares": (Plain, no_shares, 2),
    "shares of the whole axis": (Plain, shares_of_whole_axis, 2),
    "wrong map": (Plain, wrong_map, 2),
    "wrong map of a bias": (Plain, wrong_bias_map, 2),
    "fault behind a zero norm": (lambda: Plain(zero=True), wrong_bias_map, 2),
    "wrong groups": (Plain, wrong_groups, 2),
    "stale buffer": (Plain, stale_buffer, 2),
    "transposed cat": (Plain, transposed_cat, 1),
    "naive variance": (Plain, naive_variance, 2),
    "naive softmax": (Plain, naive_softmax, 2),
    "lost in-place write": (Plain, lost_write, 2),
    "another dropout mask": (Plain, other_mask, 2),
    "wrong copies narrowed": (Plain, first_copy_only, 2),
    "cut gradient": (Plain, cut_gradient, 2),
    "eval graph in train mode": (Plain, one_mode, 2),
    "uneven mean": (Plain, uneven_mean, 1.5),
    "swapped heads and features": (Heads, swapped_maps, 2),
    "attention scaled by the teacher": (Heads, teacher_scale, 2),
}


@pytest.mark.parametrize("keep", [streaming.KEEP, 0], ids=["kept", "streaming"])
@pytest.mark.parametrize("name", FAULTS)
def test_the_oracle_catches(name: str, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where wide parameters are gathered at every use."""
    monkeypatch.setattr(streaming, "KEEP", keep)
    build, tamper, ratio = FAULTS[name]
    torch.manual_seed(0)
    model = build()
    x = image() if isinstance(model, Plain) else torch.randn(2, 7, 5)
    widened, call = compiled(model, x, ratio=ratio)
    verify(widened, call)  # sound before
    tamper(widened)
    with pytest.raises(LossyError) as caught:
        verify(widened, call)
    assert "differs" in str(caught.value) or "fails" in str(caught.value)


def test_the_place_is_named() -> None:
    torch.manual_seed(0)
    widened, call = compiled(Plain(), image())
    naive_softmax(widened)
    with pytest.raises(LossyError) as caught:
        verify(widened, call)
    assert caught.value.node == "softmax"
    assert "y.softmax(1)" in (caught.value.source or "")


def test_a_fault_behind_a_zero_norm_is_invisible_on_the_real_weights() -> None:
    """Why there is a probe: y + last(y) with a zero norm, and a fault that only last() sees."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.norm = nn.LayerNorm(6)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.c(y + self.norm(self.b(y)))

    torch.manual_seed(0)
    model, x = Hidden(), torch.randn(3, 4)
    widened, call = compiled(model, x)
    widened.maps["b.bias"] = (Frozen(6, np.roll(widened.maps["b.bias"][0].map, 1)),)
    teacher = teacher_of(widened, call)
    torch.testing.assert_close(teacher(x), model(x))
    with pytest.raises(LossyError, match="probe"):
        verify(widened, call)


def test_a_stale_cache_in_the_student_is_cleared_or_caught() -> None:
    """Tensors cached outside the parameters (LeViT) must not hide new weights."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5))
            self.fc = nn.Linear(5, 5)
            self.cache: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return self.fc(x) * self.table
            if "t" not in self.cache:
                self.cache["t"] = self.table * 1
            return self.fc(x) * self.cache["t"]

    model = Cached().eval()
    widened, call = compiled(model, torch.randn(2, 5))
    with pytest.raises(LossyError, match=r"teacher\.student"):
        laws.verify(Compiled.of(widened, call, Python()))
    verify(widened, call)
    assert not model.cache


@pytest.mark.parametrize("name", ["up.weight", "down.weight", "down.bias"])
def test_a_cache_of_any_parameter_is_seen(name: str) -> None:
    """Of a wide one, too."""

    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 5)
            self.cache: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            own = dict(self.named_parameters())
            if not self.training:
                own[name] = self.cache.setdefault("w", own[name] * 1)
            return F.linear(F.linear(x, own["up.weight"]), own["down.weight"], own["down.bias"])

    widened, call = compiled(Remembers().eval(), torch.randn(2, 5))
    with pytest.raises(LossyError, match=r"teacher\.student"):
        laws.verify(Compiled.of(widened, call, Python()))


def test_not_a_number_fails() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.log(self.fc(x) - 1e9)

    widened, call = compiled(Log(), torch.randn(2, 4))
    with pytest.raises(LossyError):
        verify(widened, call)


class Casts(nn.Module):
    """Rounds to float32 on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).to(torch.float64).relu().to(torch.float32)


def test_what_follows_an_attempt_depends_on_its_error() -> None:
    """Copies for a student that writes to its parameters, its own casts, then another probe."""
    errors: list[Exception] = [
        WrittenError(),
        LossyError("a constant is in float32"),
        UndecidedError("rounding decides"),
        StaleError("a cache"),
    ]
    program = program_of(Casts(), ((torch.randn(2, 4),), {}))
    tries = attempts(program, [((torch.randn(2, 4),), {})], 7)
    seen = [next(tries), *(tries.send(error) for error in errors[:-1])]
    assert [a.borrow for a in seen] == [True, False, True, True]
    assert [a.precision.lifted for a in seen] == [True, True, False, True]
    assert [(a.seed, a.settled) for a in seen] == [(7, False)] * 3 + [(8, True)]
    assert [a.loose for a in seen] == [False, False, True, False]
    with pytest.raises(LossyError, match="a cache"):
        tries.send(errors[-1])
    tries = attempts(program, [((torch.randn(2, 4),), {})], 7)
    next(tries)
    tries.send(UndecidedError("every output is zero"))  # says nothing: nor does what follows
    again = tries.send(LossyError("a constant is in float32"))
    assert (again.seed, again.precision.lifted) == (8, True)


def test_facts_read_as_words() -> None:
    facts = [
        Fact(Law.OUTPUTS, 0),
        Fact(Law.OUTPUTS, 3, "stem.1"),
        Fact(Law.INPUTS, 1),
        Fact(Law.PARAMETERS, "fc.weight"),
        Fact(Law.BUFFERS, "norm.running_mean", call=1),
    ]
    assert list(map(str, facts)) == [
        "output 0",
        "output 3 (stem.1)",
        "gradient of input 1",
        "gradient of fc.weight",
        "buffer norm.running_mean of call 2",
    ]


def test_dead_parameters_are_listed() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    widened, call = compiled(Dead(), torch.randn(2, 4))
    result = verify(widened, call)
    assert set(result.dead) == {"unused.weight", "unused.bias"}


class Collects(list[Tensor]):
    """A hook whose copies are itself."""

    def __call__(self, _: nn.Module, args: tuple[Tensor]) -> None:
        self.append(args[0])

    def __deepcopy__(self, memo: Any) -> Collects:
        return self


def test_settled_statistics_are_the_batchs() -> None:
    """Where rounding decides on one probe, the next has the statistics of its own batch."""
    model = randomize(Plain(), 0).eval()
    assert isinstance(model.norm, nn.BatchNorm2d)
    seen = Collects()
    model.norm.register_forward_pre_hook(seen)
    settle_statistics(model, ((image(),), {}))
    torch.testing.assert_close(model.norm.running_mean, seen[-1].mean((0, 2, 3)))
    torch.testing.assert_close(model.norm.running_var, seen[-1].var((0, 2, 3)))
    assert model.norm.momentum == 0.1


@pytest.mark.parametrize("name", ["b.weight", "norm.running_var"])
def test_what_ships_is_compared_value_by_value(name: str) -> None:
    """The check runs on gathered weights; a stored one that differs by a bit must not pass."""
    widened, call = compiled(Plain(), image())
    teacher = teacher_of(widened, call)
    laws.check_values(widened, teacher)
    stored = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
    with torch.no_grad():
        flat = stored[name].view(-1)
        flat[-1] = torch.nextafter(flat[-1], flat[-1] + 1)
    with pytest.raises(LossyError, match=name):
        laws.check_values(widened, teacher)


class Writes(nn.Module):
    """Scales its own weight, the student's and the teacher's alike, at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.a.weight.mul_(0.5)
        return self.b(self.a(x).relu())


def test_a_student_that_writes_to_its_parameters_is_checked_on_copies() -> None:
    model, x = Writes(), torch.randn(4, 4)
    before = model.a.weight.detach().clone()
    widened, call = compiled(model, x)
    verify(widened, call)
    assert torch.equal(model.a.weight, before)
    assert torch.equal(widened.student.a.weight, before)


class Aside(nn.Module):
    """Returns a loss that is zero in eval mode beside its result, or nothing but zeros."""

    def __init__(self, *, blank: bool) -> None:
        super().__init__()
        self.a, self.b, self.blank = nn.Linear(4, 6), nn.Linear(6, 3), blank

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        loss = y.square().mean() if self.training else y.new_zeros(())
        return self.b(y) * (0 if self.blank else 1), loss


def test_an_output_that_is_zero_is_reported_and_all_of_them_refused() -> None:
    x = torch.randn(3, 4)
    report = gpdfx.expand(Aside(blank=False), example_inputs=(x,)).report()
    assert report.to_dict()["vacuous"] == ["probe/eval: output 1", "real/eval: output 1"]
    assert "vacuous" in str(report)
    with pytest.raises(LossyError, match="every output is zero or nan in eval mode"):
        gpdfx.expand(Aside(blank=True), example_inputs=(x,))


class Masked(nn.Module):
    """A mask of -inf, and a parameter that was never initialised."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.spare = nn.Parameter(torch.full((6, 2), torch.nan))
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return self.b((y @ y.mT + self.mask).softmax(-1) @ y), y @ self.spare


def test_what_is_not_finite_is_compared_too() -> None:
    x = torch.randn(2, 3, 4)
    report = gpdfx.expand(Masked(), example_inputs=(x,)).report()
    assert report.to_dict()["vacuous"] == ["real/eval: output 1", "real/train: output 1"]
    finite, mask = torch.ones(3), torch.tensor([0.0, -torch.inf, 1.0])
    assert difference(mask, mask.clone()) == 0
    assert difference(mask, finite) == difference(finite, mask) == math.inf
    assert difference(mask, mask.neg()) == math.inf
    assert difference(finite, finite * torch.nan) == math.inf


def test_an_empty_example_grows() -> None:
    assert resized(torch.randn(0, 4), 0, 3).tolist() == [[1.0] * 4] * 3
    assert resized(torch.arange(2), 0, 5).tolist() == [0, 0, 0, 1, 1]
    assert resized(torch.arange(5), 0, 2).tolist() == [0, 1]
