"""Which input sizes may differ from the example's, and how others are refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import gpdfx
from gpdfx.calls.sizes import Sizes, Symbol
from gpdfx.check.attempts import trial_inputs
from gpdfx.check.facts import Fact, Law
from gpdfx.check.observe import reached
from gpdfx.check.streaming import StreamingTeacher
from gpdfx.passes.capture import export, limits

from .helpers import compiled, program_of
from .networks import NETWORKS


def close(teacher: gpdfx.Teacher, model: nn.Module, *shape: int) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    want = model.double().eval()(x)
    torch.testing.assert_close(teacher.double().eval()(x), want, rtol=1e-9, atol=1e-11)


def test_height_and_width_are_free_where_the_model_leaves_them_free() -> None:
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    teacher = gpdfx.expand(model, 1.5, example_inputs=(torch.randn(2, 3, 64, 64),))
    assert teacher.report().inputs == {"x": "batch x 3 x any x any"}
    for shape in ((1, 3, 64, 64), (3, 3, 33, 80), (2, 3, 32, 32)):
        close(teacher, model, *shape)


def test_a_tokens_length_is_free() -> None:
    case = NETWORKS["gpt"]
    teacher = gpdfx.expand(case.model(), 2, example_inputs=case.inputs())
    assert teacher.report().inputs == {"tokens": "batch x any"}
    assert teacher(torch.randint(0, 50, (3, 7))).shape == (3, 7, 50)
    with pytest.raises(gpdfx.InputError, match=r"tokens.shape\[1\] <= 16"):
        teacher(torch.randint(0, 50, (3, 17)))


def test_a_size_on_another_path_is_refused_by_name() -> None:
    case = NETWORKS["branching"]
    model = case.model()
    teacher = gpdfx.expand(model, 2, example_inputs=case.inputs())
    close(teacher, model, 3, 3, 20, 28)
    for shape, named in (((2, 3, 18, 16), r"x.shape\[2\].*% 2"), ((2, 3, 300, 16), "<= 64")):
        with pytest.raises(gpdfx.InputError, match=named):
            teacher(torch.randn(shape, dtype=torch.float64))
    with pytest.raises(gpdfx.InputError, match="size 4 in dimension 1"):
        teacher(torch.randn(2, 4, 16, 16, dtype=torch.float64))


class Tied(nn.Module):
    """Two inputs of one length, and a length that is a multiple of three."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.a(x) + self.a(y)
        return self.b(z.unflatten(1, (z.shape[1] // 3, 3)).sum(2).relu())


def test_sizes_that_belong_together_are_compared() -> None:
    model = Tied()
    inputs = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    teacher = gpdfx.expand(model, 2, example_inputs=inputs)
    x, y = torch.randn(3, 9, 4), torch.randn(3, 9, 4)
    torch.testing.assert_close(teacher(x, y), model(x, y))
    with pytest.raises(gpdfx.InputError, match=r"input y has size 12 in dimension 1"):
        teacher(x, torch.randn(3, 12, 4))
    with pytest.raises(gpdfx.InputError, match=r"x\.shape"):
        teacher(torch.randn(3, 8, 4), torch.randn(3, 8, 4))


@pytest.mark.parametrize("dynamic", ["batch", "none"])
def test_lower_levels_bake_the_sizes(dynamic: str) -> None:
    case = NETWORKS["unet"]
    model = case.model()
    teacher = gpdfx.expand(model, 2, example_inputs=case.inputs(), dynamic=dynamic)
    first = {"batch": "batch", "none": "2"}[dynamic]
    assert teacher.report().inputs == {"x": f"{first} x 3 x 16 x 16"}
    with pytest.raises(gpdfx.InputError, match="size 20 in dimension 2"):
        teacher(torch.randn(2, 3, 20, 16))


def test_impatience_falls_back_to_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PATIENCE", 0.01)
    case = NETWORKS["unet"]
    teacher = gpdfx.expand(case.model(), 2, example_inputs=case.inputs())
    assert teacher.report().inputs == {"x": "batch x 3 x 16 x 16"}


def test_patience_may_end_at_any_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever tracing is stopped, it leaves nothing behind: a timer's error ended the process."""
    case = NETWORKS["unet"]
    model, inputs = case.model(), case.inputs()
    sites = export.whole(model, inputs, {})
    asked = 0

    def clock() -> float:
        nonlocal asked
        asked += 1
        return float(asked)

    monkeypatch.setattr(limits.time, "thread_time", clock)
    monkeypatch.setattr(limits, "PATIENCE", 1e9)
    assert export.capture(model, sites).modes["eval"].level == "sizes"
    assert asked > 300
    for moment in range(0, asked // 2, asked // 6):  # the first mode
        monkeypatch.setattr(limits, "PATIENCE", float(moment))
        assert export.capture(model, sites).modes["eval"].level == "batch"


class Chosen(nn.Module):
    """Its branches are traced by the compiler, which must not see the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.cond(y.sum() > 0, self.b, lambda y: y.sin(), (y,))


def test_branches_may_be_traced_within_the_limit() -> None:
    model = Chosen()
    program = export.capture(model, export.whole(model, (torch.randn(2, 4),), {}))
    assert {mode.level for mode in program.modes.values()} == {"sizes"}


class Precise(nn.Module):
    """Asks for its own dtype while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.training:
            y = y * torch.full(y.shape[:1], 1 / 3, dtype=y.dtype)[:, None, None]
        return self.b(y)


def test_impatience_never_parts_the_modes_or_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph in float64, which tells baked dtypes, has the same free sizes as the other's."""
    patient, calls = limits.time_limit, []

    def third_time(seconds: float | None) -> AbstractContextManager[None]:
        calls.append(seconds)
        if seconds is not None and len(calls) > 2:
            raise limits.TooSlowError
        return patient(seconds)

    monkeypatch.setattr(limits, "time_limit", third_time)
    teacher = gpdfx.expand(Precise(), 2, example_inputs=(torch.randn(2, 7, 4),))
    assert len(calls) == 4
    assert teacher.report().check.tolerance == 1e-10
    assert teacher.report().inputs == {"x": "batch x any x 4"}


class Sly(nn.Module):
    """Reads a size where no tracer can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        length = float(str(x.size(1))) if str(x.size(1)).isdigit() else 7.0
        return self.b(self.a(x).mean(1) * length)


def test_a_size_that_only_seems_free_is_pinned_by_the_check() -> None:
    model = Sly()
    teacher = gpdfx.expand(model, 2, example_inputs=(torch.randn(2, 7, 4),))
    assert teacher.report().inputs == {"x": "batch x 7 x 4"}
    torch.testing.assert_close(teacher(torch.ones(5, 7, 4)), model(torch.ones(5, 7, 4)))
    with pytest.raises(gpdfx.InputError, match="size 8 in dimension 1"):
        teacher(torch.randn(2, 8, 4))


class Queries(nn.Module):
    """Learned queries, the same for every sample, by einsum and by matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(5, 8))
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(4, 6), nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.queries.expand(x.shape[0], -1, -1))
        scores = torch.einsum("bqd,bkd->bqk", q, self.k(x)) + q @ self.v(x).transpose(1, 2)
        return self.head(scores.softmax(-1) @ self.v(x))


@pytest.mark.parametrize(("by", "example"), [(2, 4), (3, 6), (5, 5)])
def test_a_condition_on_the_batch_leaves_the_rest_of_it_free(by: int, example: int) -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return x + self.b(x) if x.shape[0] % by == 0 else x

    model = Pairs()
    teacher = gpdfx.expand(model, example_inputs=(torch.randn(example, 3, 8, 8),), branches=None)
    assert teacher.report().inputs == {"x": "batch x 3 x any x any"}
    close(teacher, model, 4 * by, 3, 9, 7)
    with pytest.raises(gpdfx.InputError, match=f"% {by}"):
        teacher(torch.randn(4 * by + 1, 3, 9, 7).double())


@pytest.mark.parametrize(("condition", "batch"), [("n % 3 == 0", 6), ("n > 9", 10), ("n > 1", 4)])
def test_the_check_cuts_the_batch_to_what_conditions_allow(condition: str, batch: int) -> None:
    sizes = Sizes((("n", 3),), {"n": Symbol(0, 0, 1, 0)}, (condition,))
    (cut,) = sizes.smaller([torch.randn(12, 3)], 8, 4, ["x"]) or [torch.empty(0)]
    assert cut.shape == (batch, 3)


@pytest.mark.parametrize(("frames", "samples"), [(4, 4), (64, 2)])
def test_two_samples_of_a_video_are_enough(frames: int, samples: int) -> None:
    class Video(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv3d(1, 4, 3, 8), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.reshape(-1, 1, frames, 80, 80)).mean(2))

    example = (torch.randn(5, 1, frames, 80, 80),), {}
    made = compiled(program_of(Video(), example), example)
    (x,), _ = trial_inputs(made.program, StreamingTeacher(made), example)[0]
    assert x.shape == (samples, 1, frames, 80, 80)


class Nearly(nn.Module):
    """Another path for three samples, which the norm after it all but takes back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 1, 3), nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1)
        self.c = nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = 20 * self.a(x)
        x = x * 0.5 if x.shape[0] == 3 else x + self.b(x)
        return self.c(self.norm(x))


def test_a_path_that_differs_by_little_is_another_one() -> None:
    """Rounding would differ by less."""
    model = Nearly()
    teacher = gpdfx.expand(model, example_inputs=(torch.randn(4, 3, 8, 8),), branches=None)
    close(teacher, model, 5, 3, 9, 7)
    with pytest.raises(gpdfx.InputError, match="!= 3"):
        teacher(torch.randn(3, 3, 8, 8).double())


@pytest.mark.parametrize(
    ("holds", "shape"),
    [
        (lambda x: len(x) == 3, (3, 3, 8, 8)),
        (lambda x: x.shape[0] == 1, (1, 3, 8, 8)),
        (lambda x: x.shape[2] != 5, (4, 3, 5, 8)),
        (lambda x: x.shape[2] == 1, (4, 3, 1, 8)),
    ],
)
@pytest.mark.parametrize("part", [True, False])
def test_a_path_without_gradients_is_another_one(
    holds: Callable[[Tensor], bool], shape: tuple[int, ...], part: bool
) -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
            self.c = nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            a = a.detach() if holds(x) else a
            b = b.detach() if holds(x) and not part else b
            return self.c(a + b)

    model = Held()
    teacher = gpdfx.expand(model, example_inputs=(torch.randn(4, 3, 8, 8),), branches=None)
    with pytest.raises(gpdfx.InputError):
        teacher(torch.randn(shape))


def test_what_gradients_come_to() -> None:
    a, b, c, d = (torch.randn(3, requires_grad=True) for _ in range(4))
    sources = {Fact(Law.PARAMETERS, n): x for n, x in zip("abcd", (a, b, c, d), strict=True)}
    with torch.no_grad():
        constant = c * 2
    outputs = (a * b.detach()).relu() + a, constant, d
    seen = {Fact(Law.OUTPUTS, k): y for k, y in enumerate(outputs)}
    assert {fact.which for fact in reached(seen, sources)} == {"a", "d"}


class Drops(nn.Module):
    """In train mode a small batch is often dropped whole, and with it what tells two ways apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.shape[0] > 2:
            x = x + self.b(x)
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.3) if self.training else x


class Tall(nn.Module):
    """Takes no small images, and another way for tall ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(F.avg_pool2d(self.a(x), 2), scale_factor=2, mode="bicubic")
        return x + self.b(x) if x.shape[2] > x.shape[3] else x * 0.5


@pytest.mark.parametrize(
    ("model", "shape"), [(Drops(), (2, 3, 8, 8)), (Drops(), (1, 3, 8, 8)), (Tall(), (4, 3, 8, 6))]
)
def test_a_condition_that_was_not_seen_to_be_none_holds(
    model: nn.Module, shape: tuple[int, ...]
) -> None:
    teacher = gpdfx.expand(model, example_inputs=(torch.randn(4, 3, 8, 8),), branches=None)
    for training in (False, True):
        with pytest.raises(gpdfx.InputError):
            teacher.train(training)(torch.randn(shape))
    close(teacher, model, 6, 3, 12, 12)


def test_learned_queries_leave_the_batch_free() -> None:
    """Their shares are one set for all samples, not one for each of the example's."""
    model = Queries()
    teacher = gpdfx.expand(model, 2, example_inputs=(torch.randn(3, 7, 4),))
    assert teacher.report().inputs == {"x": "batch x any x 4"}
    close(teacher, model, 5, 6, 4)
