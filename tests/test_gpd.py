"""GPD as a module: its loss against one written out, and anybody's training loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import gpdfx
from gpdfx.distill.features import Features, FitNet, ReviewKD
from gpdfx.distill.losses import KD

from .helpers import folding, hidden_student, run_teacher
from .networks import tensors_equal
from .runs import Net, X, Y, make


def test_the_loss_is_the_papers() -> None:
    gpd = make(kd=KD(temperature=2.0), lam=3.0, smoothing=0.1, temperature=1.0).eval()
    with torch.no_grad():
        for p in gpd.parameters():
            p.add_(0.1 * torch.randn_like(p))
    out = gpd(X, Y)
    wide, own, static = gpd.teacher(X), gpd.teacher.student(X), gpd._static(X)
    torch.testing.assert_close(out.teacher_logits, wide)
    torch.testing.assert_close(out.student_logits, own)
    torch.testing.assert_close(out.static_logits, static)
    soft = 0.9 * wide.softmax(1) + 0.1 / 5
    kd = KD(temperature=2.0)
    want = F.cross_entropy(wide, Y) + kd(wide, static, Y) + F.cross_entropy(own, Y)
    want = want + kd(own, static, Y) - 3.0 * (soft * own.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(out.loss, want)
    assert set(out.terms) == {"teacher", "student", "gap", "teacher_kd", "student_kd"}
    torch.testing.assert_close(sum(out.terms.values()), out.loss)


def test_the_soft_target_stops_the_gradient() -> None:
    """Nothing but the student's loss reaches copies that the student does not hold."""
    gpd = make(static=False, teacher_weight=0.0, branches=None).eval()
    gpd(X, Y).loss.backward()
    grad = gpd.teacher.get_parameter("a.weight").grad
    assert grad is not None
    assert grad[:6].any()
    assert not grad[6:].any()


def test_switches() -> None:
    gpd = make(static=False, start_epoch=2, lam=1.0)
    assert set(gpd(X, Y).terms) == {"teacher", "student"}
    gpd.epoch = 2
    assert set(gpd(X, Y).terms) == {"teacher", "student", "gap"}
    assert set(make(static=False, lam=0.0)(X, Y).terms) == {"teacher", "student"}
    assert not make(static=False, branches=None).teacher.report().branches


def test_the_static_teacher_stays_as_it_is() -> None:
    gpd = make()
    static = gpd._static
    assert static is not None
    before = copy.deepcopy(static.state_dict())
    optimizer = torch.optim.SGD(gpd.parameters(), 0.1)
    gpd.train()
    assert not static.training
    gpd(X, Y).loss.backward()
    optimizer.step()
    assert tensors_equal(before, static.state_dict())
    assert all(p.grad is None for p in static.parameters())
    assert not any("static" in name for name in gpd.state_dict())
    gpd.double()
    assert next(static.parameters()).dtype is torch.double
    gpd(X.double(), Y)


def test_training_moves_both_and_collapse_is_the_student() -> None:
    gpd = make(static=False)
    optimizer = torch.optim.AdamW(gpdfx.param_groups(gpd.teacher, 1e-2), lr=3e-3)
    first = last = 0.0
    for step in range(30):
        out = gpd(X, Y)
        optimizer.zero_grad()
        out.loss.backward()
        nn.utils.clip_grad_norm_(gpd.parameters(), 5.0)
        optimizer.step()
        last = float(out.loss.detach())
        first = first or last
        assert step or out.loss.isfinite()
    assert last < first - 0.5
    gpd.eval()
    plain = gpd.collapse()
    assert type(plain) is Net
    torch.testing.assert_close(plain(X), gpd.student(X))


def test_what_is_not_shared_is_the_students_own() -> None:
    gpd = make(static=False, unshared="head", branches=None).eval()
    assert len(gpd.own_parameters()) == 2
    torch.testing.assert_close(gpd.student(X), gpd.teacher(X), rtol=1e-4, atol=1e-5)
    gpd(X, Y).loss.backward()
    assert gpd.own_parameters()["head.weight"].grad is not None
    with torch.no_grad():
        gpd.own_parameters()["head.bias"].add_(1)
    torch.testing.assert_close(gpd.collapse()(X), gpd.student(X))
    torch.testing.assert_close(gpd.teacher.student(X), gpd.student(X))
    torch.testing.assert_close(gpd.student(X), gpd.teacher(X) + 1, rtol=1e-4, atol=1e-5)
    averages = AveragedModel(gpd)
    torch.testing.assert_close(gpdfx.collapse(averages)(X), gpd.student(X))
    alone = make(static=False, unshared="*")
    alone(X, Y).loss.backward()
    shared = alone.teacher.get_parameter("a.weight")
    assert shared.grad is not None
    assert len(alone.own_parameters()) == len(list(Net().parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    gpd = make()
    with torch.autocast("cpu", dtype):
        out = gpd(X, Y)
    assert out.student_logits.dtype is dtype
    assert out.loss.dtype is torch.float32
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in gpd.parameters())


def test_a_compiled_step_is_the_eager_one() -> None:
    gpd = make().eval()
    compiled = torch.compile(gpd, fullgraph=True, backend="aot_eager")
    found = []
    for call in (gpd, compiled):
        gpd.zero_grad()
        out = call(X, Y)
        out.loss.backward()
        grads = {n: p.grad.clone() for n, p in gpd.named_parameters() if p.grad is not None}
        found.append((out.loss.detach(), grads))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("branches", [None, "auto"])
def test_a_teacher_that_never_ran_compiles(branches: str | None) -> None:
    """What is made once must be there before the compiler comes."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)
    teacher = gpdfx.expand(model, 2, example_inputs=(x,), branches=branches, verify=False)
    for y in torch.compile(teacher.both, fullgraph=True, backend="eager")(x):
        torch.testing.assert_close(y, model(x))


def test_gradients_accumulate() -> None:
    gpd = make(static=False).eval()
    gpd(X, Y).loss.backward()
    whole = {n: p.grad.clone() for n, p in gpd.named_parameters() if p.grad is not None}
    gpd.zero_grad()
    for part in (slice(0, 3), slice(3, 6)):
        (gpd(X[part], Y[part]).loss / 2).backward()
    for name, p in gpd.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_activations_may_be_recomputed() -> None:
    gpd = make(static=False).eval()
    gpd(X, Y).loss.backward()
    whole = {n: p.grad.clone() for n, p in gpd.named_parameters() if p.grad is not None}
    gpd.zero_grad()

    def run(x: Tensor) -> Tensor:
        return gpd(x, Y).loss

    torch.utils.checkpoint.checkpoint(run, X, use_reentrant=False).backward()
    for name, p in gpd.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], msg=name)


def test_moving_averages_and_copies() -> None:
    gpd = make()
    averages = AveragedModel(gpd)
    averages.update_parameters(gpd)
    torch.testing.assert_close(averages.module.eval()(X, Y).loss, gpd.eval()(X, Y).loss)


def test_a_users_criterion_and_structured_outputs() -> None:
    """Segmentation: a dict in, a dict with maps of logits out, void pixels."""

    class Segment(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

        def forward(self, image: Tensor) -> dict[str, Tensor]:
            hidden = self.a(image).relu()
            return {"hidden": hidden, "out": self.b(hidden)}

    def criterion(logits: Tensor, maps: Tensor) -> Tensor:
        return F.cross_entropy(logits, maps, ignore_index=255)

    torch.manual_seed(0)
    gpd = gpdfx.GPD(
        Segment(), criterion=criterion, example_kwargs={"image": X}, verify=False, dynamic="batch"
    )
    maps = torch.randint(0, 4, (6, 9, 9))
    maps[:, 0] = 255
    out = gpd({"image": X}, maps)
    assert out.student_logits.shape == (6, 4, 9, 9)
    torch.testing.assert_close(out.terms["student"], criterion(out.student_logits, maps))
    out.loss.backward()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lam": -1.0}, "lam"),
        ({"smoothing": 2.0}, "smoothing"),
        ({"unshared": "heat"}, "heat"),
        ({"static": False, "kd": KD()}, "static"),
        ({"ratio": 0.5}, "ratio"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], text: str) -> None:
    with pytest.raises(gpdfx.InputError, match=text):
        make(**options)


def test_a_static_teacher_with_other_classes_is_refused() -> None:
    torch.manual_seed(0)
    gpd = gpdfx.GPD(Net(), Net(12, classes=7), example_inputs=(X,), verify=False)
    with pytest.raises(gpdfx.InputError, match="classes"):
        gpd(X, Y)


class Deep(nn.Module):
    """Two stages with a residual sum, whose result is the stage's."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.one = Stage(width, width)
        self.two = Stage(width, 2 * width)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(self.stem(x)))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Stage(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(inputs, outputs, 3, padding=1, stride=2)
        self.b = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return (x + self.b(x)).relu()


@pytest.mark.parametrize("kind", [ReviewKD, FitNet])
def test_features_of_teacher_and_student_are_distilled(kind: Any) -> None:
    torch.manual_seed(0)
    loss = kind(["one", "two"], ["one", "two"], weight=0.5)
    x = torch.randn(4, 3, 16, 16)
    gpd = gpdfx.GPD(Deep(), Deep(8), features=loss, example_inputs=(x,), dynamic="batch").eval()
    out = gpd(x, Y[:4])
    assert set(out.terms) == {"teacher", "student", "gap", "teacher_features", "student_features"}
    taps: list[Tensor] = []
    run_teacher(gpd.teacher, folding(gpd.teacher)(), x, features=taps)
    with Features(hidden_student(gpd.teacher), ["one", "two"]) as seen:
        gpd.teacher.student(x)
    assert [t.shape[1] for t in taps] == [8, 16]
    for wide, own in zip(taps, seen.tensors, strict=True):  # the copies of what the student has
        torch.testing.assert_close(wide[:, : own.shape[1]], own)
        torch.testing.assert_close(wide[:, own.shape[1] :], own)
    with Features(gpd._static, ["one", "two"]) as static:
        gpd._static(x)
    want = gpd.features["teacher"](taps, static.tensors)
    torch.testing.assert_close(out.terms["teacher_features"], want)
    out.loss.backward()
    for name, p in gpd.features.named_parameters():
        assert p.grad is not None, name
    assert gpd.teacher.get_parameter("one.a.weight").grad is not None


def test_features_that_do_not_exist_are_refused() -> None:
    with pytest.raises(gpdfx.InputError, match="ones"):
        gpdfx.GPD(Deep(), Deep(8), features=FitNet(["ones"], ["one"]), example_inputs=(X,))
