"""The objects a user holds: calling, moving, saving, copying, training together, collapsing."""

from __future__ import annotations

import copy
import io
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpdfx
from gpdfx.teacher.extract import take_first

from .helpers import facts
from .networks import NETWORKS, tensors_equal


def small_teacher(name: str = "unet", ratio: float = 2, **options: Any) -> Any:
    case = NETWORKS[name]
    model = case.model()
    options = {"branches": None, "verify": False, **options}
    teacher = gpdfx.expand(model, ratio, example_inputs=case.inputs(), **options)
    return model, teacher, case.inputs(seed=3)


@pytest.mark.parametrize("name", ["unet", "gpt", "odd", "grouped"])
def test_student_is_the_users_module(name: str) -> None:
    """Same outputs bit for bit, same gradients, same statistics, in both modes."""
    model, teacher, x = small_teacher(name, 1.5, branches="auto")
    for training in (False, True):
        model.train(training)
        teacher.train(training)
        results = []
        for call in (model, teacher.student):
            torch.manual_seed(1)
            y = call(*x)
            results.append(y)
        assert torch.equal(*results)
    for (key, a), (_, b) in zip(
        model.named_buffers(), teacher.student_buffers.named_buffers(), strict=True
    ):
        assert torch.equal(a, b), key


def test_the_students_gradient_through_the_teacher_is_its_own() -> None:
    model, teacher, x = small_teacher("unet", 2)
    model.eval(), teacher.eval()
    model(*x).square().sum().backward()
    teacher.student(*x).square().sum().backward()
    plain = dict(model.named_parameters())
    for name, p in teacher.named_parameters():
        first = take_first(p.grad, facts(teacher).maps[name])
        assert torch.equal(first, plain[name].grad), name
        assert float(p.grad.abs().sum()) == pytest.approx(float(first.abs().sum()), rel=1e-4)


def test_state_dict_round_trip_and_keys() -> None:
    model, teacher, x = small_teacher("odd")
    keys = set(teacher.state_dict())
    own = {k for k in keys if not k.startswith(("_shares.", "student_buffers."))}
    assert own == set(model.state_dict())
    assert any(k.startswith("_shares.") for k in keys)
    _, other, _ = small_teacher("odd", seed=7)
    teacher.eval(), other.eval()
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert not torch.equal(teacher(*x), other(*x))
    other.load_state_dict(teacher.state_dict())
    assert torch.equal(teacher(*x), other(*x))
    assert torch.equal(teacher.student(*x), other.student(*x))


@pytest.mark.parametrize("name", ["gpt", "odd"])
def test_deepcopy_and_save(name: str) -> None:
    _, teacher, x = small_teacher(name)
    teacher.eval()
    file = io.BytesIO()
    torch.save(teacher, file)
    file.seek(0)
    for twin in (copy.deepcopy(teacher), torch.load(file, weights_only=False)):
        assert torch.equal(twin(*x), teacher(*x))
        assert torch.equal(twin.student(*x), teacher.student(*x))
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert not torch.equal(twin(*x), teacher(*x))
        assert twin.training == teacher.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_another_type(dtype: torch.dtype) -> None:
    model, teacher, x = small_teacher("unet")
    model.to(dtype).eval(), teacher.to(dtype).eval()
    x = tuple(t.to(dtype) for t in x)
    tolerance = 1e-10 if dtype is torch.float64 else 0.1
    y = teacher(*x)
    assert y.dtype is dtype
    torch.testing.assert_close(y, model(*x), rtol=tolerance, atol=tolerance)
    assert torch.equal(teacher.student(*x), model(*x))
    assert next(gpdfx.collapse(teacher).parameters()).dtype is dtype


def test_ties_survive() -> None:
    model, teacher, _ = small_teacher("gpt")
    plain = gpdfx.collapse(teacher)
    assert plain.head.weight is plain.embed.weight
    assert teacher.head.weight is teacher.embed.weight
    assert len(list(teacher.parameters())) == len(list(model.parameters()))


def test_requires_grad_and_mode_survive() -> None:
    case = NETWORKS["unet"]
    model = case.model().eval()
    model.head.weight.requires_grad_(False)
    teacher = gpdfx.expand(model, 2, example_inputs=case.inputs(), verify=False)
    assert not teacher.training
    assert not teacher.head.weight.requires_grad
    assert teacher.head.bias.requires_grad
    plain = gpdfx.collapse(teacher)
    assert not plain.training
    assert not plain.head.weight.requires_grad


def test_the_users_model_and_the_random_state_are_untouched() -> None:
    case = NETWORKS["odd"]
    model = case.model()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    teacher = gpdfx.expand(model, 2, example_inputs=case.inputs())
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(1)
    teacher.student(*case.inputs())
    gpdfx.collapse(teacher)
    assert tensors_equal(before, model.state_dict())
    assert model.training


class Result(NamedTuple):
    logits: Tensor
    features: Tensor
    nothing: None = None


class Structured(nn.Module):
    """Keyword inputs, optional inputs, a hidden feature returned, names that clash with ours."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(4, 6)
        self.report = nn.Linear(6, 6)
        self._shares = nn.Linear(6, 3)

    def forward(self, x: Tensor, *, scale: Tensor, flag: bool = True, extra: Any = None) -> Any:
        hidden = F.relu(self.student(x)) * scale
        logits = self._shares(self.report(hidden) if flag else hidden)
        if self.training:
            return {"loss": logits.mean(), "result": Result(logits, hidden)}
        return Result(logits, hidden)


def test_inputs_and_outputs_of_any_structure() -> None:
    torch.manual_seed(0)
    model = Structured()
    keywords = {"scale": torch.ones(2, 1), "flag": True}
    teacher = gpdfx.expand(model, 2, example_inputs=(torch.randn(2, 4),), example_kwargs=keywords)
    x, scale = torch.randn(5, 4), torch.randn(5, 1)
    y = teacher.eval()(x, scale=scale)
    want = model.eval()(x, scale=scale)
    assert isinstance(y, Result)
    assert y.nothing is None
    assert y.features.shape == want.features.shape
    torch.testing.assert_close(y.logits, want.logits)
    torch.testing.assert_close(y.features, want.features)
    assert set(teacher.train()(x, scale=scale)) == {"loss", "result"}
    with pytest.raises(gpdfx.InputError):
        teacher(x, scale=scale, flag=False)
    assert teacher.report().widened == 1.0
    assert set(model.state_dict()) <= set(teacher.state_dict())


def test_copies_grow_apart() -> None:
    """After 100 AdamW steps of the joint loss copies differ by a tenth of their update."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    x = torch.randn(256, 8)
    y = (x[:, :4] * x[:, 4:]).argmax(1)
    for ratio in (2, 3):
        teacher = gpdfx.expand(model, ratio)
        start = {n: p.detach().clone() for n, p in teacher.named_parameters()}
        optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
        for _ in range(100):
            logits, student = teacher(x), teacher.student(x)
            soft = logits.detach().softmax(1)
            loss = F.cross_entropy(logits, y) + F.cross_entropy(student, y)
            loss = loss + 3 * F.cross_entropy(student, soft, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        moved = teacher.get_parameter("2.weight").detach() - start["2.weight"]
        copies = moved.unflatten(0, (ratio, 16))
        spread = (copies - copies.mean(0, keepdim=True)).norm() / copies.norm()
        assert spread > 0.1
        assert (teacher(x) - teacher.student(x)).abs().max() > 0.1


def test_independent_randomness_draws_for_every_copy() -> None:
    case = NETWORKS["gpt"]
    options = {"example_inputs": case.inputs(), "verify": False}
    shared = gpdfx.expand(case.model(), 2, **options)
    apart = gpdfx.expand(case.model(), 2, randomness="independent", **options)
    results = []
    for teacher in (shared, apart):
        torch.manual_seed(0)
        results.append(teacher.train()(*case.inputs()))
    assert not torch.allclose(*results)
    torch.manual_seed(0)
    model = case.model().train()
    torch.manual_seed(0)
    torch.testing.assert_close(results[0], model(*case.inputs()), rtol=1e-4, atol=1e-4)


def test_report_prints_and_serialises() -> None:
    case = NETWORKS["odd"]
    report = gpdfx.expand(case.model(), 2, example_inputs=case.inputs()).report()
    text = str(report)
    for word in (
        "widened",
        "parameters",
        "multiply-adds",
        "aten.masked_scatter",
        "exact to",
        "held back",
    ):
        assert word in text
    plain = report.to_dict()
    assert plain["error"].keys() == {"probe/eval", "probe/train", "real/eval", "real/train"}
    assert report.macs[1] > report.macs[0] > 0
    assert {b.op for b in report.bridged} >= {"aten.masked_scatter.default", "aten.sort.default"}
    assert all("networks.py" in b.source for b in report.bridged)


def test_inplace_writes_through_bridged_views_are_captured_functionally() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
            self.register_buffer("seen", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y[:, ::2].mul_(2.0)
            y[:, 1] = 0.5
            y.relu_()
            self.seen.copy_(y.detach().mean(0))
            return self.b(y)

    torch.manual_seed(0)
    teacher = gpdfx.expand(Views(), 2, example_inputs=(torch.randn(3, 4),))
    assert teacher.report().widened == 1.0


def test_a_network_that_only_runs_in_float32() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
            self.table = torch.randn(6, 6)  # no buffer: it stays float32

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) @ self.table)

    torch.manual_seed(0)
    report = gpdfx.expand(Single(), 2, example_inputs=(torch.randn(3, 4),)).report()
    assert report.check.dtype is torch.float32
    assert report.check.tolerance == 1e-5
