"""A finished run's student as ONNX."""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.splits import generator
from ..distill.gpd import find_logits
from ..errors import GpdfxError, InputError
from ..files import AsPath, replacing
from .evaluate import load_run
from .state import STUDENT

TOLERANCE = 1e-4  # of ONNX's logits, relative to the largest


def export(folder: AsPath, file: AsPath) -> dict[str, Any]:
    """Write a run's student as ONNX, for batches of any size, and check it with onnxruntime
    against torch. The file appears if it is right, or not at all.

    Returns ``file``, its ``bytes``, ``opset``, ``inputs``, ``outputs`` and the relative ``error``.

    Raises:
        InputError: no finished run, or the packages are missing.
        GpdfxError: the student does not export, or computes something else in onnxruntime.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"the export needs {error.name}", remedy="pip install 'gpdfx[onnx]'"
        ) from error
    config, summary, student = load_run(folder)
    draw = generator("onnx", 0)
    batches = [torch.randn(n, *summary["shape"], generator=draw) for n in (2, 1, 5)]
    model = Logits(student).eval()
    program = _to_onnx(model, batches[0], config.student)
    with replacing(file) as fresh:
        program.save(str(fresh))
        session = onnxruntime.InferenceSession(str(fresh), providers=["CPUExecutionProvider"])
        worst = max(_difference(session, model, x) for x in batches)
        if not worst <= TOLERANCE:
            raise GpdfxError(
                f"onnxruntime's logits differ from torch's by {worst:.1e} of the largest",
                remedy=f"nothing was written; {STUDENT} is the student's state_dict",
            )
    return {
        "file": str(file),
        "bytes": Path(file).stat().st_size,
        "opset": program.model.opset_imports.get(""),
        "inputs": {x.name: x.shape for x in session.get_inputs()},
        "outputs": {x.name: x.shape for x in session.get_outputs()},
        "error": worst,
    }


class Logits(nn.Module):
    """A network that returns its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return find_logits(self.network(x))


def _to_onnx(model: nn.Module, example: Tensor, name: str) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.ExitStack() as quiet:
            logging.disable(logging.WARNING)  # the exporter's chatter
            quiet.callback(logging.disable, logging.NOTSET)
            return torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["input"],
                output_names=["logits"],
                verbose=False,
            )
    except Exception as error:  # whatever the exporter meets
        raise GpdfxError(
            f"{name} does not export to ONNX: {error}",
            remedy="torch.onnx.export(dynamo=True) has to take the network; "
            f"{STUDENT} is its state_dict",
        ) from error


@torch.no_grad()
def _difference(session: Any, model: nn.Module, x: Tensor) -> float:
    (logits,) = session.run(["logits"], {"input": x.numpy()})
    expected = model(x)
    return float((torch.from_numpy(logits) - expected).abs().max() / expected.abs().max())
