"""What follows a loop: students and teachers exported, traced and quantized."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.ao.quantization as q
from torch import Tensor, nn

import gpdfx

from .layers import plain_teacher


@pytest.fixture(params=["student", "teacher"])
def trained(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    """In eval mode, whose branches count, with an input and its output."""
    _, teacher, x = plain_teacher("auto")
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.05 * torch.randn_like(p))
        teacher.train()(x)
        network = teacher if request.param == "teacher" else gpdfx.collapse(teacher)
        return network, x, network.eval()(x)


def exported(network: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = torch.export.export(network, (x,)).module()(x)
    return y


def traced(network: nn.Module, x: Tensor) -> Tensor:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(network, (x,)), file)
    file.seek(0)
    y: Tensor = torch.jit.load(file)(x)
    return y


@pytest.mark.parametrize("way", [exported, traced])
def test_it_is_exported(trained: Any, way: Any) -> None:
    network, x, y = trained
    torch.testing.assert_close(way(network, x), y)


def test_onnxruntime_gives_its_outputs(trained: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network, x, y = trained
    file = str(tmp_path / "network.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (x,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, y.numpy(), rtol=1e-4, atol=1e-5)


def prepared(teacher: nn.Module) -> None:
    teacher.qconfig = q.get_default_qconfig("qnnpack")  # type: ignore[assignment]
    q.prepare(teacher.eval())


def prepared_to_train(teacher: nn.Module) -> None:
    teacher.qconfig = q.get_default_qat_qconfig("qnnpack")  # type: ignore[assignment]
    q.prepare_qat(teacher.train())


def quantized(network: nn.Module) -> nn.Module:
    made: nn.Module = q.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", [prepared, prepared_to_train, quantized])
def test_a_teacher_is_not_quantized(call: Any) -> None:
    """It would go unsaid: none of its modules is of a class that is looked for."""
    _, teacher, _ = plain_teacher(None, verify=False)
    with pytest.raises(gpdfx.InputError, match=r"not quantized(.|\n)*quantize gpdfx.collapse"):
        call(teacher)


@pytest.mark.filterwarnings("ignore")
def test_a_student_is_quantized() -> None:
    torch.backends.quantized.engine = "qnnpack"  # others saturate on CPUs without VNNI
    _, teacher, x = plain_teacher("auto", verify=False)
    student = gpdfx.collapse(teacher).eval()
    made = quantized(student)
    assert "quantized.dynamic" in type(made.head).__module__
    gap = (made(x) - student(x)).abs().max() / student(x).abs().max()
    assert gap < 0.05  # steps of 8 bits
