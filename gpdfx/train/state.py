"""The state of a training run in one file, which appears whole or not at all.

    write_state("run/state.safetensors", tensors, {"epoch": 3, "config": {...}})
    tensors, facts = read_state("run/state.safetensors")

A safetensors file: tensors by name, and in its metadata ``facts`` as JSON with a SHA-256 over both.
Nothing in it is code. A file that is cut short, changed by a bit, or not ours is refused by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import InputError

FORMAT = "gpdfx run 1"
Facts = dict[str, Any]
Tensors = dict[str, Tensor]
AsPath = str | os.PathLike[str]


# --------------------------------------------------------------------------- the file
def write_state(path: AsPath, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able facts, durably: whoever is killed meanwhile leaves the file that
    was there before."""
    text = json.dumps(dict(facts))
    own = {name: _plain(x) for name, x in tensors.items()}
    metadata = {"format": FORMAT, "facts": text, "sha256": _checksum(text, own)}
    with Replacing(path) as fresh:
        save_file(own, fresh, metadata)


def read_state(path: AsPath) -> tuple[Tensors, Facts]:
    """What ``write_state`` wrote: tensors on the CPU, and the facts.

    Raises:
        InputError: no such file; not a file of a run; cut short or changed since.
    """
    remedy = "restore the file, or train in another folder; the file was left as it is"
    try:
        with safe_open(str(path), "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}", remedy="name a run's folder") from None
    except Exception as error:  # whatever a damaged header may lead to
        raise InputError(
            f"the checkpoint {path} is corrupt or no safetensors file: {error}", remedy=remedy
        ) from error
    if metadata.get("format") != FORMAT or not {"facts", "sha256"} <= metadata.keys():
        raise InputError(f"{path} is no checkpoint of a gpdfx run", remedy=remedy)
    if _checksum(metadata["facts"], tensors) != metadata["sha256"]:
        raise InputError(
            f"the checkpoint {path} is corrupt: its checksum does not fit", remedy=remedy
        )
    facts: Facts = json.loads(metadata["facts"])
    return tensors, facts


class Replacing:
    """``with Replacing(path) as fresh:`` a path beside it to write to, which then takes its place:
    after a flush to the disk, in one step, and not at all after an error."""

    def __init__(self, path: AsPath) -> None:
        self.path = Path(path)
        self.fresh = self.path.with_name(f"{self.path.name}.tmp")

    def __enter__(self) -> Path:
        return self.fresh

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.fresh.unlink(missing_ok=True)
            return
        _flush(self.fresh)
        os.replace(self.fresh, self.path)
        _flush(self.path.parent)


def write_text(path: AsPath, text: str) -> None:
    """A text file that appears whole or not at all."""
    with Replacing(path) as fresh:
        fresh.write_text(text)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain(x: Tensor) -> Tensor:
    """On the CPU, contiguous, in memory of its own."""
    return x.detach().to("cpu", copy=True).contiguous()


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        x = tensors[name]
        sha.update(f"\n{name} {x.dtype} {tuple(x.shape)}\n".encode())
        sha.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def hash_file(path: AsPath) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------- what is in it
def flatten_module(module: nn.Module, prefix: str = "model.") -> Tensors:
    """All parameters and buffers by name, those that a ``state_dict`` leaves out too."""
    named: Iterable[tuple[str, Tensor]] = (*module.named_parameters(), *module.named_buffers())
    return {prefix + name: x.detach() for name, x in named}


@torch.no_grad()
def restore_module(
    module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "model."
) -> None:
    """The way back from ``flatten_module``, in place.

    Raises ``InputError`` with the first tensor that is missing, unknown or of another size.
    """
    own = flatten_module(module, prefix)
    given = {name: x for name, x in tensors.items() if name.startswith(prefix)}
    for name in dict.fromkeys((*own, *given)):
        mine, theirs = (
            f"{str(x[name].dtype)[6:]} {tuple(x[name].shape)}" if name in x else "absent"
            for x in (own, given)
        )
        if mine != theirs:
            raise InputError(
                f"the checkpoint is of another network: {name.removeprefix(prefix)} is {mine}, in "
                f"the checkpoint {theirs}",
                remedy="use the network that the run began with, or another folder",
            )
    for name, x in own.items():
        x.copy_(given[name])


def flatten_optimizer(
    state: Mapping[str, Any], prefix: str = "optimizer."
) -> tuple[Tensors, Facts]:
    """An optimizer's ``state_dict``: its tensors as ``optimizer.NUMBER.KEY``, the rest as JSON."""
    tensors: Tensors = {}
    numbers: dict[str, dict[str, Any]] = {}
    for number, held in state["state"].items():
        numbers[str(number)] = {k: v for k, v in held.items() if not isinstance(v, Tensor)}
        for key, value in held.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}{number}.{key}"] = value
    return tensors, {"state": numbers, "param_groups": list(state["param_groups"])}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    prefix: str = "optimizer.",
) -> None:
    """The way back from ``flatten_optimizer``.

    Raises ``InputError`` if the optimizer has other parameters.
    """
    state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in facts["state"].items()}
    for name, x in tensors.items():
        if name.startswith(prefix):
            number, _, key = name.removeprefix(prefix).partition(".")
            state[int(number)][key] = x
    groups = [
        {k: tuple(v) if k == "betas" else v for k, v in group.items()}
        for group in facts["param_groups"]
    ]
    for mine, theirs in zip(optimizer.param_groups, groups, strict=False):
        if mine.get("param_names") != theirs.get("param_names"):
            break
    else:
        if len(groups) == len(optimizer.param_groups):
            optimizer.load_state_dict({"state": state, "param_groups": groups})
            return
    raise InputError(
        "the checkpoint's optimizer has other parameters",
        remedy="use the network that the run began with, or another folder",
    )


# --------------------------------------------------------------------------- whose it is
def as_json(value: Any) -> Any:
    """A dataclass, or anything JSON-able, as ``json.loads`` would give it back."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
    return json.loads(json.dumps(plain))


def check_same(saved: Any, given: Any, path: AsPath, name: str = "") -> None:
    """Raise ``InputError`` with the first value in which a run's own facts differ from these."""
    if isinstance(saved, dict) and isinstance(given, dict):
        for key in dict.fromkeys((*given, *saved)):
            inner = f"{name}.{key}" if name else key
            check_same(saved.get(key), given.get(key), path, inner)
    elif saved != given:
        raise InputError(
            f"{path} holds a run with other settings: {name} was {saved!r} and is now {given!r}",
            remedy="give the settings of that run to continue it, or another folder",
        )
