"""How good networks are on a split of the data; and a finished run: its networks on any data, its
student as ONNX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models, storage
from ..access.plain.deploy import plain_teacher
from ..data.loaders import eval_loader
from ..data.splits import Split, generator
from ..distill.gpd import find_logits
from ..errors import GpdfxError, InputError, install
from ..files import AsPath, replacing
from ..teacher.module import Teacher
from .config import TrainConfig, read_config
from .networks import Net, check_logits
from .ranks import Ranks, join
from .state import BEST, STUDENT, SUMMARY, TEACHER

TOLERANCE = 1e-4  # of ONNX's logits, relative to the largest


@torch.no_grad()
def accuracies(
    split: Split, networks: Mapping[str, nn.Module | None], config: TrainConfig, ranks: Ranks
) -> dict[str, float]:
    """The fraction of right predictions of each network that there is; all ranks share the
    work."""
    present = {name: network for name, network in networks.items() if network is not None}
    if not present:
        return {}
    right = torch.zeros(len(present), dtype=torch.int64, device=ranks.device)
    share = {"workers": config.workers, "rank": ranks.rank, "world": ranks.world}
    with contextlib.ExitStack() as folded:
        for network in present.values():
            if isinstance(network, Teacher):
                folded.enter_context(network._folded_once())
        for x, y in eval_loader(split, config.numbers.batch_size, **share):
            x, y = x.to(ranks.device), y.to(ranks.device)
            for k, network in enumerate(present.values()):
                right[k] += (find_logits(network(x)).argmax(1) == y).sum()
    counts = ranks.sum(right).tolist()
    return {name: count / len(split) for name, count in zip(present, counts, strict=True)}


def measure(net: Net, split: Split, config: TrainConfig, ranks: Ranks) -> dict[str, float]:
    """Accuracies of the plain student and the dynamic teacher, and the gap."""
    networks = {"student": net.eval().collapse(average=False), "teacher": net.teacher}
    measured = accuracies(split, networks, config, ranks)
    net.train()
    if "teacher" in measured:
        measured["gap"] = measured["teacher"] - measured["student"]
    return measured


# --------------------------------------------------------------------------- of a finished run
RUN = "give the folder of a finished run; gpdfx train with its settings finishes one"


def read_summary(folder: AsPath, needed: Iterable[str]) -> dict[str, Any]:
    """The summary of a finished run. Raises ``InputError`` if there is none with these keys."""
    path = Path(folder) / SUMMARY
    try:
        summary = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        text = f"{folder} holds no finished run: there is no {SUMMARY}"
        raise InputError(text, remedy=RUN) from None
    except ValueError as error:
        raise InputError(f"{path} is no summary of a run: {error}", remedy=RUN) from error
    held = dict(summary) if isinstance(summary, dict) else {}
    if missing := [key for key in needed if key not in held]:
        text = f"{path} is no summary of a run: it has no {', '.join(missing)}"
        raise InputError(text, remedy=RUN)
    return held


def load_run(folder: AsPath, best: bool = False) -> tuple[TrainConfig, dict[str, Any], nn.Module]:
    """Configuration, summary and plain student of a finished run: that of the last epoch, or the
    ``best`` one on validation.

    Raises ``InputError`` if the folder holds none.
    """
    summary = read_summary(folder, ("config", "classes", "shape"))
    config = read_config(summary["config"])
    try:
        classes, shape = int(summary["classes"]), tuple(summary["shape"])
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder}/{SUMMARY} has no sizes: {error}", remedy=RUN) from error
    student = models.load(config.student, classes=classes, shape=shape)
    models.load_weights(student, Path(folder) / (BEST if best else STUDENT))
    return config, summary, student.eval()


def evaluate(
    folder: AsPath, data: str | None = None, device: str = "auto", *, best: bool = False
) -> dict[str, Any]:
    """Accuracies of the plain student, and of the dynamic teacher if the run has kept it, on the
    run's data or on another source with the same classes; or of the ``best`` student alone, for
    the teacher of its epoch is not kept.

    Returns ``data``, ``validation`` and ``test``, the latter two by network.
    """
    config, _, student = load_run(folder, best)
    splits = dataclasses.replace(config, data=data or config.data).open_data()
    check_logits(config.student, student, splits, config.seed)
    with join(device) as ranks:
        networks = {"best" if best else "student": student.to(ranks.device)}
        file = Path(folder) / TEACHER
        if file.exists() and not best:
            like = models.load(config.student, classes=splits.classes, shape=splits.shape)
            networks["teacher"] = storage.load(file, like).eval().to(ranks.device)
        validation, test = (
            accuracies(split, networks, config, ranks) for split in (splits.validation, splits.test)
        )
    return {"data": splits.name, "validation": validation, "test": test}


def export(
    folder: AsPath, file: AsPath, *, teacher: bool = False, best: bool = False
) -> dict[str, Any]:
    """Write a run's student as ONNX, the last or the ``best`` one on validation, or its ``teacher``
    (``gpdfx.plain_teacher``), for batches of any size, and check it with onnxruntime against torch.
    The file appears if it is right, or not at all.

    Returns ``file``, its ``bytes``, ``opset``, ``inputs``, ``outputs`` and the relative ``error``.

    Raises:
        InputError: no finished run, none that kept its teacher, or the packages are missing.
        GpdfxError: the network does not export, or computes something else in onnxruntime.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"the export needs {error.name}", remedy=install("onnx")) from error
    config, summary, network = load_run(folder, best)
    state, of = BEST if best else STUDENT, config.student
    if teacher:
        state, of = TEACHER, f"the teacher of {config.student}"
        if not (Path(folder) / TEACHER).exists():
            raise InputError(
                f"{folder} holds no {TEACHER}",
                remedy="train with a teacher, and keep it in the folder of the run",
            )
        network = plain_teacher(storage.load(Path(folder) / TEACHER, network).eval())
    draw = generator("onnx", 0)
    batches = [torch.randn(n, *summary["shape"], generator=draw) for n in (2, 1, 5)]
    model = Logits(network).eval()
    program = _to_onnx(model, batches[0], of, state)
    with replacing(file) as fresh:
        program.save(str(fresh))
        session = onnxruntime.InferenceSession(str(fresh), providers=["CPUExecutionProvider"])
        worst = max(_difference(session, model, x) for x in batches)
        if not worst <= TOLERANCE:
            raise GpdfxError(
                f"onnxruntime's logits differ from torch's by {worst:.1e} of the largest",
                remedy=f"nothing was written; {state} holds the weights",
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


def _to_onnx(model: nn.Module, example: Tensor, name: str, state: str) -> Any:
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
            f"{state} holds its weights",
        ) from error


@torch.no_grad()
def _difference(session: Any, model: nn.Module, x: Tensor) -> float:
    (logits,) = session.run(["logits"], {"input": x.numpy()})
    expected = model(torch.cat([x, x]))[: len(x)]  # loaded teachers take no batch of one
    return float((torch.from_numpy(logits) - expected).abs().max() / expected.abs().max())
