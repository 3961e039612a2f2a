"""The state of a training run in one file, which appears whole or not at all.

    write_state("run/state.safetensors", tensors, {"epoch": 3, "config": {...}})
    tensors, facts = read_state("run/state.safetensors")

See ``files.Format``: a file that is cut short, changed by a bit, or not ours is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import AsPath, Format, Tensors, first_difference, is_left_over
from ..storage import version
from .folder import LOCK

# The files of a run.
STATE, STUDENT = "state.safetensors", "student.safetensors"
BEST = "student_best.safetensors"
TEACHER, SUMMARY = "teacher.safetensors", "summary.json"
MODEL, OPTIMIZER = "model.", "optimizer."  # what the names of their tensors begin with
SAME_NETWORK = "use the network that the run began with, or another folder"
Facts = dict[str, Any]


@dataclass
class Progress:
    """What a run has done: whole epochs, and steps of the one that goes on.

    ``sums``: of the losses of this epoch's steps, by name, and their number as ``steps``.
    ``history``: see ``gpdfx.train.log``. ``notes``: what was said before the first step.
    ``seconds``: those before it was continued. ``cost``: see ``steps.estimate``.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    static_accuracy: float | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    cost: dict[str, Any] | None = None

    def best(self) -> dict[str, Any]:
        """The row of the epoch whose student was the best on validation, the first such."""
        return max(self.history, key=lambda row: row["student"])


# --------------------------------------------------------------------------- the file
FILE = Format(
    "gpdfx run 2",
    key="facts",
    what="checkpoint",
    remedy="restore the file, or train in another folder; the file was left as it is",
)
write_state, read_state = FILE.write, FILE.read


def find_checkpoint(folder: Path) -> tuple[Tensors, Facts] | None:
    """The checkpoint in a folder, if there is one; refuse a folder with anything else in it."""
    if (folder / STATE).exists():
        return read_state(folder / STATE)
    strange = [p.name for p in folder.glob("*") if p.name != LOCK and not is_left_over(p)]
    if strange:
        raise InputError(
            f"the folder {folder} is not empty and holds no run: {', '.join(strange[:3])}",
            remedy="give a new folder",
        )
    return None


# --------------------------------------------------------------------------- what is in it
def flatten_module(module: nn.Module) -> Tensors:
    """All parameters and buffers by name, those that a ``state_dict`` leaves out too."""
    named: Iterable[tuple[str, Tensor]] = (*module.named_parameters(), *module.named_buffers())
    return {MODEL + name: x.detach() for name, x in named}


@torch.no_grad()
def restore_module(module: nn.Module, tensors: Tensors) -> None:
    """The way back from ``flatten_module``, in place.

    Raises ``InputError`` with the first tensor that is missing, unknown or of another size.
    """
    present = flatten_module(module)
    saved = {name: x for name, x in tensors.items() if name.startswith(MODEL)}
    sizes = (
        {name.removeprefix(MODEL): f"{str(x.dtype)[6:]} {tuple(x.shape)}" for name, x in y.items()}
        for y in (present, saved)
    )
    if difference := first_difference(*sizes, absent="absent"):
        name, mine, theirs = difference
        raise InputError(
            f"the checkpoint is of another network: {name} is {mine}, in the checkpoint {theirs}",
            remedy=SAME_NETWORK,
        )
    for name, x in present.items():
        x.copy_(saved[name])


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[Tensors, Facts]:
    """An optimizer's ``state_dict``: its tensors as ``optimizer.NUMBER.KEY``, the rest as JSON."""
    state, tensors = optimizer.state_dict(), Tensors()
    numbers: Facts = {}
    for number, held in state["state"].items():
        numbers[str(number)] = {k: v for k, v in held.items() if not isinstance(v, Tensor)}
        tensors |= {f"{OPTIMIZER}{number}.{k}": v for k, v in held.items() if isinstance(v, Tensor)}
    return tensors, {"state": numbers, "param_groups": state["param_groups"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors, facts: Facts) -> None:
    """The way back from ``flatten_optimizer``.

    Raises ``InputError`` if the optimizer has other parameters.
    """
    present, saved = (
        [group.get("param_names") for group in groups]
        for groups in (optimizer.param_groups, facts["param_groups"])
    )
    if present != saved:
        raise InputError("the checkpoint's optimizer has other parameters", remedy=SAME_NETWORK)
    state = {int(number): dict(held) for number, held in facts["state"].items()}
    for name, x in tensors.items():
        if name.startswith(OPTIMIZER):
            number, _, key = name.removeprefix(OPTIMIZER).partition(".")
            state[int(number)][key] = x.clone()  # aligned as new memory is: libraries round by that
    optimizer.load_state_dict({"state": state, "param_groups": facts["param_groups"]})


# --------------------------------------------------------------------------- whose it is
def as_json(value: Any) -> Any:
    """A dataclass, or anything JSON-able, as ``json.loads`` would give it back."""
    return json.loads(json.dumps(value, default=dataclasses.asdict))


def versions() -> dict[str, str]:
    """Of what computes."""
    return {"python": python_version(), "torch": torch.__version__, "gpdfx": version()}


def check_same(saved: Facts, given: Facts, path: AsPath) -> None:
    """Raise ``InputError`` with the first value in which a run's own facts differ from these."""
    if difference := first_difference(given, saved):
        name, now, before = difference
        raise InputError(
            f"{path} holds a run with other settings: {name} was {before!r} and is now {now!r}",
            remedy="give the settings of that run to continue it, or another folder",
        )
