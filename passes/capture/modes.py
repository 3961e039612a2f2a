"""Modes: with which of its modules in train and which in eval mode a network is captured.

``train`` and ``eval`` are what the network's own ``train()`` makes of them (which may keep a norm
frozen); ``given`` is how the user left them, where that is neither of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from ...errors import InputError
from ..program import Flags, duplicate

Module = TypeVar("Module", bound=nn.Module)
TRAIN, EVAL, GIVEN = "train", "eval", "given"


def flags_of(module: nn.Module) -> Flags:
    """What a module and those in it have."""
    return tuple(part.training for part in module.modules())


def set_flags(module: Module, flags: Flags) -> Module:
    """Give them to a module and those in it, whatever its own ``train()`` would do."""
    for part, flag in zip(module.modules(), flags, strict=False):  # forward may have made more
        part.training = flag
    return module


def modes_of(student: nn.Module) -> dict[str, Flags]:
    """The modes of a network as the user left it -> the flags of its modules."""
    given = flags_of(student)
    found = {TRAIN: (True,) * len(given), EVAL: (False,) * len(given)}
    if any(type(m).train is not nn.Module.train or "train" in vars(m) for m in student.modules()):
        copy = duplicate(student)
        try:
            found = {mode: flags_of(enter(copy, mode, {})) for mode in found}
        except Exception as error:  # an exported program's
            raise InputError(
                f"its train() or eval() raises {type(error).__name__}: {error}",
                module_path=f"(root) ({type(student).__name__})",
                remedy="let the model change its mode; of an exported program, expand the module "
                "that it was made from",
            ) from error
    return found if given in found.values() else {**found, GIVEN: given}


def enter(student: Module, mode: str, modes: Mapping[str, Flags]) -> Module:
    """Bring a copy of a network into one of its modes."""
    if mode == GIVEN:
        return set_flags(student, modes[mode])
    student.train(mode == TRAIN)
    return student
