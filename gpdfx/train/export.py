"""What to do with a finished run: measure its networks again, export the student to ONNX."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models, storage
from ..data.splits import generator
from ..distill.gpd import find_logits
from ..errors import GpdfxError, InputError
from .config import TrainConfig, read_config
from .evaluate import accuracies, check_logits
from .run import STUDENT, SUMMARY, TEACHER, open_data
from .state import AsPath, Replacing
from .step import join

TOLERANCE = 1e-4  # of ONNX's logits, relative to the largest


def load_run(folder: AsPath) -> tuple[TrainConfig, dict[str, Any], nn.Module]:
    """Configuration, summary and plain student of a finished run.

    Raises ``InputError`` if the folder holds none.
    """
    path = Path(folder) / SUMMARY
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
        config = read_config(summary["config"])
        classes, shape = int(summary["classes"]), tuple(summary["shape"])
    except FileNotFoundError:
        raise InputError(
            f"{folder} holds no finished run: there is no {SUMMARY}",
            remedy="give the folder of a run; gpdfx train with its settings finishes one",
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no summary of a run: {error!r}", remedy="give the folder of a run"
        ) from error
    student = models.load(config.student, classes=classes, shape=shape)
    models.load_weights(student, Path(folder) / STUDENT)
    return config, summary, student.eval()


def evaluate(folder: AsPath, data: str | None = None, device: str = "auto") -> dict[str, Any]:
    """Accuracies of the plain student, and of the dynamic teacher if the run has kept it, on the
    run's data or on another source with the same classes.

    Returns ``data``, ``validation`` and ``test``, the latter two by network.
    """
    config, _, student = load_run(folder)
    source = dataclasses.replace(config, data=data or config.data)
    splits = open_data(source)
    example = torch.randn(2, *splits.shape, generator=generator("example", config.seed))
    check_logits(config.student, student, example, splits.classes)
    with join(device) as place:
        networks: dict[str, Callable[[Tensor], Any]] = {"student": student.to(place.device)}
        file = Path(folder) / TEACHER
        if file.exists():
            teacher = storage.load(file, models.load(config.student, **_like(splits)))
            networks["teacher"] = teacher.eval().to(place.device)
        found: dict[str, Any] = {"data": splits.name}
        for name, split in (("validation", splits.validation), ("test", splits.test)):
            batch = config.numbers.batch_size
            values = accuracies(split, [*networks.values()], batch, place, config.workers)
            found[name] = dict(zip(networks, values, strict=True))
    return found


def _like(data: Any) -> dict[str, Any]:
    return {"classes": data.classes, "shape": data.shape}


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
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                model,
                (batches[0],),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["input"],
                output_names=["logits"],
                verbose=False,
            )
    except Exception as error:  # whatever the exporter meets
        raise GpdfxError(
            f"{config.student} does not export to ONNX: {error}",
            remedy="torch.onnx.export(dynamo=True) has to take the network; "
            f"{STUDENT} is its state_dict",
        ) from error
    with Replacing(file) as fresh:
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


@torch.no_grad()
def _difference(session: Any, model: nn.Module, x: Tensor) -> float:
    (found,) = session.run(["logits"], {"input": x.numpy()})
    wanted = model(x)
    return float((torch.from_numpy(found) - wanted).abs().max() / wanted.abs().max())


class quiet:
    """No chatter of the exporter below errors."""

    def __enter__(self) -> None:
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(logging.NOTSET)
