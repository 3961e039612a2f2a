"""Networks that are prepared for quantization (``prepare_qat``): their fake quantizers and
observers run in the teacher, widen, and are the prepared student's again after ``collapse``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.ao.quantization as q
from torch import Tensor, nn
from torch.ao.quantization import quantize_fx

import gpdfx


@pytest.fixture(autouse=True)
def _deprecated() -> Iterator[None]:
    """PyTorch has announced that this will move to another package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Convs(nn.Module):
    """As in PyTorch's tutorial: stubs, fused layers, a sum that is observed."""

    def __init__(self, fuse: bool = True) -> None:
        super().__init__()
        self.quant, self.dequant = q.QuantStub(), q.DeQuantStub()
        self.a, self.an, self.ar = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.b, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c, self.cr, self.d = nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Linear(6, 5)
        self.add = torch.ao.nn.quantized.FloatFunctional()
        if fuse:
            q.fuse_modules_qat(self, [["a", "an", "ar"], ["b", "bn"], ["c", "cr"]], inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ar(self.an(self.a(self.quant(x))))
        x = self.add.add(x, self.bn(self.b(x)))
        return self.dequant(self.d(self.cr(self.c(x)).mean((2, 3))))


class Plain(nn.Module):
    """A sigmoid, whose range is given and not observed, between convolutions."""

    def __init__(self, activation: type[nn.Module] = nn.Sigmoid) -> None:
        super().__init__()
        self.quant, self.dequant = q.QuantStub(), q.DeQuantStub()
        self.a, self.act, self.b = nn.Conv2d(3, 6, 3), activation(), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.b(self.act(self.a(self.quant(x)))))


class Normed(nn.Module):
    """A convolution that its norm is folded into, and a line of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = q.QuantStub(), q.DeQuantStub()
        self.a, self.n, self.b = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)
        q.fuse_modules_qat(self, [["a", "n"]], inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.b(self.n(self.a(self.quant(x))).amax((2, 3))))


class Tokens(nn.Module):
    """A table and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.quant, self.dequant = nn.Embedding(11, 6), q.QuantStub(), q.DeQuantStub()
        self.table.qconfig = q.default_embedding_qat_qconfig
        self.a, self.norm, self.b = nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.change(self.a(self.quant(self.table(tokens))))
        return self.dequant(self.b(torch.tanh(self.norm(x))))

    def change(self, x: Tensor) -> Tensor:
        return x


class Written(Tokens):
    """A write to a part of a feature, which only a functional capture has."""

    def change(self, x: Tensor) -> Tensor:
        x.view(*x.shape[:-1], 2, 5)[..., 0, :].mul_(2)
        return x


def image() -> Tensor:
    return torch.randn(4, 3, 8, 8)


def tokens() -> Tensor:
    return torch.randint(0, 11, (5, 3))


def config(activation: Any, weight: Any, **options: Any) -> Any:
    by = torch.per_channel_symmetric if "Channel" in weight.__name__ else torch.per_tensor_symmetric
    signed = {"dtype": torch.qint8, "qscheme": by, "quant_min": -8, "quant_max": 7}
    return q.QConfig(
        activation=q.FakeQuantize.with_args(observer=activation, **options),
        weight=q.FakeQuantize.with_args(observer=weight, **signed),
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "fused, by channel": lambda: q.get_default_qat_qconfig("fbgemm"),
    "fused": lambda: q.get_default_qat_qconfig("qnnpack"),
    "in Python, by channel": lambda: q.get_default_qat_qconfig("fbgemm", version=0),
    "in Python": lambda: q.get_default_qat_qconfig("qnnpack", version=0),
    "histogram": lambda: config(q.HistogramObserver, q.MinMaxObserver),
    "extremes, by channel": lambda: config(q.MinMaxObserver, q.PerChannelMinMaxObserver),
    "extremes, symmetric": lambda: config(
        q.MinMaxObserver, q.MinMaxObserver, qscheme=torch.per_tensor_symmetric
    ),
}


class Untouched(nn.Module):
    """Nothing in it knows of quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
        self.c = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n(self.a(x)).relu()
        return self.c(torch.sigmoid(x + self.b(x)).mean((2, 3)))


@pytest.mark.parametrize("called", [True, False])
def test_what_fx_prepares_widens_and_converts(called: bool) -> None:
    torch.manual_seed(0)
    torch.backends.quantized.engine = "qnnpack"  # others saturate on CPUs without VNNI
    choice, x = q.get_default_qat_qconfig_mapping("fbgemm"), image()
    model: Any = quantize_fx.prepare_qat_fx(Untouched().train(), choice, (x,))
    if called:
        model(image())
    teacher = gpdfx.expand(model, 2, example_inputs=(x,), branches=None, dynamic="batch")
    assert teacher.report().widened == 1.0
    agree(teacher, model, x, image() * 2)
    converted = quantize_fx.convert_fx(gpdfx.collapse(teacher).eval())
    assert ".quantized" in type(converted.a).__module__
    gap = (converted(x) - model.eval()(x)).abs().max() / model(x).abs().max()
    assert gap < 0.1


def prepared(model: nn.Module, chosen: str, *calls: Tensor) -> nn.Module:
    model.train().qconfig = CONFIGS[chosen]()  # type: ignore[assignment]
    q.prepare_qat(model, inplace=True)
    for x in calls:
        model(x)
    return model


def agree(teacher: Any, model: nn.Module, *inputs: Tensor) -> None:
    """In both modes, call after call: outputs, and what the observers have seen."""
    for training in (True, False):
        model.train(training), teacher.train(training)
        for x in inputs:
            want = model(x)
            assert torch.equal(teacher.student(x), want)
            torch.testing.assert_close(teacher(x), want, rtol=1e-4, atol=1e-5)
    own = dict(model.named_buffers())
    for name, buffer in gpdfx.collapse(teacher).named_buffers():
        torch.testing.assert_close(buffer, own[name], rtol=0, atol=0)
    for name, buffer in own.items():
        maps = teacher._facts.maps_of(name)
        wide = buffer[maps[0].map] if maps else buffer
        torch.testing.assert_close(dict(teacher.named_buffers())[name], wide)


CASES = [
    (Convs, image, "fused, by channel", 2),
    (Normed, image, "in Python, by channel", 1.5),
    (Plain, image, "fused", 1.5),
    (Plain, image, "in Python", 2),
    (Plain, image, "extremes, by channel", 2),
    (Written, tokens, "fused, by channel", 2),
    (Tokens, tokens, "extremes, symmetric", 1.5),
]


@pytest.mark.parametrize(("make", "draw", "chosen", "ratio"), CASES)
def test_what_is_prepared_widens(make: Any, draw: Any, chosen: str, ratio: float) -> None:
    torch.manual_seed(0)
    model = prepared(make(), chosen, draw())
    teacher = gpdfx.expand(model, ratio, example_inputs=(draw(),), branches=None, dynamic="batch")
    report = teacher.report()
    assert report.widened == 1.0
    assert report.parameters[1] > 1.3 * report.parameters[0]
    assert not report.apart
    assert max(report.error.values()) <= 1e-10
    agree(teacher, model, draw(), draw())


@pytest.mark.parametrize("chosen", ["fused, by channel", "fused", "extremes, symmetric"])
def test_one_that_was_never_called_begins_to_observe(chosen: str) -> None:
    torch.manual_seed(0)
    model = prepared(Plain(nn.ReLU), chosen)
    before = copy.deepcopy(model.state_dict())
    teacher = gpdfx.expand(model, 2, example_inputs=(image(),), branches=None, dynamic="batch")
    assert teacher.report().widened == 1.0
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    agree(teacher, model, image() * 3, image())


@pytest.mark.parametrize(("make", "draw"), [(Convs, image), (Plain, image), (Tokens, tokens)])
def test_what_python_gives_a_size_has_to_be_called_first(make: Any, draw: Any) -> None:
    model = prepared(make(), "in Python, by channel")
    with pytest.raises(gpdfx.InputError, match=r"(?s)min_val gets its size.*call the model once"):
        gpdfx.expand(model, 2, example_inputs=(draw(),))


@pytest.mark.parametrize("chosen", ["fused, by channel", "in Python, by channel"])
@pytest.mark.parametrize("switch", [q.disable_observer, q.disable_fake_quant])
def test_switches_work_before_expand_and_after(chosen: str, switch: Any) -> None:
    torch.manual_seed(0)
    model = prepared(Plain(nn.ReLU), chosen, image())
    model.apply(switch)
    teacher = gpdfx.expand(model, 2, example_inputs=(image(),), branches=None, dynamic="batch")
    agree(teacher, model, image())
    for one in (q.enable_observer, q.enable_fake_quant, switch):
        model.apply(one), teacher.apply(one)
        agree(teacher, model, image() * 2)
    twin = copy.deepcopy(teacher)
    model.apply(q.enable_observer).apply(q.enable_fake_quant)
    twin.double().float().apply(q.enable_observer).apply(q.enable_fake_quant)
    agree(twin, model, image() * 3)


@pytest.mark.parametrize(("make", "chosen"), [(Convs, "fused, by channel"), (Plain, "in Python")])
def test_the_trained_student_converts(make: Any, chosen: str) -> None:
    torch.manual_seed(0)
    torch.backends.quantized.engine = "qnnpack"  # others saturate on CPUs without VNNI
    model = prepared(make(), chosen, image())
    teacher = gpdfx.expand(model, 2, example_inputs=(image(),))
    optimizer, x = torch.optim.SGD(teacher.parameters(), 0.05), image()
    losses = []
    for _ in range(8):
        wide, own = teacher.both(x)
        loss = wide.square().mean() + own.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    student = gpdfx.collapse(teacher).eval()
    assert list(student.state_dict()) == list(model.state_dict())
    assert torch.equal(student(x), teacher.eval().student(x))
    converted = q.convert(student)
    assert ".quantized" in type(converted.a).__module__
    gap = (converted(x) - student(x)).abs().max() / student(x).abs().max()
    assert gap < 0.1  # steps of 8 bits


class Rounds(nn.Module):
    """Written by hand: numbers, a learned step, a table of steps by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.step, self.zero = nn.Parameter(torch.tensor([0.1])), nn.Parameter(torch.zeros(1))
        self.register_buffer("steps", torch.rand(8) / 8 + 0.05)
        self.register_buffer("zeros", torch.zeros(8, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.fake_quantize_per_channel_affine(
            self.a.weight, self.steps, self.zeros, 0, -8, 7
        )
        x = nn.functional.linear(x, weight, self.a.bias)
        x = torch.fake_quantize_per_tensor_affine(x, 0.05, 3, -128, 127)
        x = self.b(x.relu())
        x = torch.fake_quantize_per_tensor_affine(x, self.steps[:1], self.zeros[:1], -128, 127)
        return self.c(self.learned(x))

    def learned(self, x: Tensor) -> Tensor:
        return torch._fake_quantize_learnable_per_tensor_affine(
            x, self.step, self.zero, -128, 127, 0.5
        )


def test_ops_by_themselves_widen_and_train() -> None:
    torch.manual_seed(0)
    teacher = gpdfx.expand(
        Rounds(), 2, example_inputs=(torch.randn(5, 6),), branches=None, dynamic="batch"
    )
    report = teacher.report()
    assert report.widened == 1.0
    assert not any("fake_quant" in bridge.op for bridge in report.bridged)
    assert max(report.error.values()) <= 1e-10  # the gradients of the step, too


@pytest.mark.parametrize("observer", [q.MinMaxObserver, q.MovingAverageMinMaxObserver])
def test_what_no_graph_can_do_is_python_or_refused(observer: Any) -> None:
    """One fake quantizer of a kind of its own: around it the student's width, and it is told."""

    class Own(q.FakeQuantize):
        def forward(self, X: Tensor) -> Tensor:
            return super().forward(X) if float(X.detach().sum()) < 1e9 else X

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)),
        Own(observer=observer),
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
    )
    x = torch.randn(5, 6)
    teacher = gpdfx.expand(net, 2, example_inputs=(x,), branches=None, dynamic="batch")
    report = teacher.report()
    assert set(report.apart) >= {""}
    assert "at the student's width" in str(report)
    assert teacher.get_parameter("0.0.weight").shape == (16, 6)
    assert torch.equal(teacher.student(x), net(x))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.GELU])
def test_where_no_part_can_be_captured_the_remedy_is_of_quantization(
    activation: Any,
) -> None:
    model = prepared(Plain(activation), "histogram", image())
    with pytest.raises(gpdfx.CaptureError, match=r"(?s)HistogramObserver\).*get_default_qat_qconf"):
        gpdfx.expand(model, 2, example_inputs=(image(),), dynamic="batch")
