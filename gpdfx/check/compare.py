"""Student and teacher, run once and compared in everything that is observed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.gather import gather
from ..calls import tree
from ..errors import InputError, LossyError
from ..passes.program import duplicate
from .observe import GRADIENTS, HUGE, difference, floating, observe
from .streaming import StreamingTeacher

EVERY = ("every output",)
BUG = "this is a bug in gpdfx: please report it with the network"


class WrittenError(Exception):
    """A student writes to its own parameters."""


def copy_of(student: nn.Module, borrow: bool) -> nn.Module:
    """A copy, with buffers of its own; ``borrow``: with the student's parameters."""
    return duplicate(student, {id(p): p for p in student.parameters()} if borrow else None)


def _digest(student: nn.Module) -> list[str]:
    return [str(p.detach().sum().item()) for p in student.parameters()]


def compare(
    student: nn.Module,
    teacher: StreamingTeacher,
    inputs: tuple[Any, Any],
    training: bool,
    seed: int,
    *,
    dead: bool = True,
    borrow: bool = False,
) -> tuple[dict[str, float], set[str], tuple[str, ...], str]:
    """Errors of everything observed in one mode; parameters that moved an output (only with
    ``dead``: their gradients are most of the cost); outputs that are zero, or in part not numbers;
    which of ``GRADIENTS`` the student has. ``borrow``: run copies of the student that share its
    parameters; raises ``WrittenError`` if they are written to."""
    teacher.train(training)
    mode = "train" if training else "eval"
    for gradients in GRADIENTS:
        run, before = copy_of(student, borrow).train(training), _digest(student) if borrow else []
        named = run.named_parameters()
        wrt = {n: p.requires_grad_(dead) for n, p in named if p.is_floating_point()}
        wrt = wrt if dead else {}
        try:
            mine = observe(run, *inputs, seed, wrt, teacher._parts_in(run), gradients=gradients)
            break
        except RuntimeError as error:
            if gradients == GRADIENTS[-1]:
                raise InputError(
                    f"the model itself fails in {mode} mode: {error}",
                    remedy="mend the model, or pass verify=False if it is never used in this mode",
                ) from error
    if borrow and _digest(student) != before:
        raise WrittenError
    for p in wrt.values():
        p.requires_grad_(False)
    student = run
    try:
        between = teacher._parts_in(teacher._python_shell)
        with teacher.saving():
            theirs = observe(teacher, *inputs, seed, parts=between, given=mine, gradients=gradients)
    except Exception as error:  # whatever torch raises when widths do not fit
        raise LossyError(
            f"the teacher fails where the student runs: {error}",
            remedy=BUG,
        ) from error
    moved = {n for n in wrt if _moved(mine.pop(f"gradient of {n}", None))}
    moved |= set(wrt) if gradients == "none" else set()  # unknown
    wide = dict(teacher.named_buffers())
    for name, buffer in student.named_buffers():
        facts = teacher._facts
        maps = facts.maps.get(facts.alias.get(name, name))
        if maps is None or tuple(m.student for m in maps) != buffer.shape:
            continue  # registered in forward, or replaced by one of another shape: a cache
        mine[f"buffer {name}"] = gather(buffer, maps)
        theirs[f"buffer {name}"] = wide[name]
    for n in [n for n in mine if n.startswith("gradient") and n in theirs]:
        mine[n], theirs[n] = _where_finite(mine[n], theirs[n])
    errors = {n: difference(x, theirs.get(n), floor_of(n, mine, inputs)) for n, x in mine.items()}
    extra = {name: math.inf for name in theirs if name not in mine}
    shown = {n: x for n, x in mine.items() if n.startswith("output") and x.numel()}
    blank = tuple(n for n, x in shown.items() if floating(x) and not x[x.isfinite()].any())
    partial = tuple(n for n, x in shown.items() if n not in blank and x.isnan().any())
    zero = (*blank, *partial) if len(blank) < len(shown) else EVERY
    return errors | extra, moved, zero, gradients


def _where_finite(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Without the gradients that the student itself does not have: a root at zero, say, of the
    distance between boxes. The teacher must lack the same ones."""
    missing = ~mine.isfinite()
    if mine.shape != theirs.shape or not torch.equal(missing, ~theirs.isfinite()):
        return mine, theirs
    return mine.masked_fill(missing, 0), theirs.masked_fill(missing, 0)


def floor_of(name: str, seen: dict[str, Tensor], inputs: tuple[Any, Any]) -> float:
    """Below what size a value is zero but for rounding: a mean is measured by the standard
    deviation, a gradient by 1e-6 of output over input (instance norm has a gradient of zero)."""
    variance = seen.get(name.removesuffix("mean") + "var") if name.endswith("_mean") else None
    if variance is not None:
        return math.sqrt(float(variance.max()))
    if name.startswith("gradient of input"):
        outputs = [x for n, x in seen.items() if n.startswith("output") and floating(x)]
        x = tree.leaves(inputs)[int(name.rsplit(" ", 1)[1])]
        size = float(x.abs().max()) if x.numel() else 0.0
        finite = (y.abs()[y.abs() < HUGE] for y in outputs)
        largest = max((float(y.max()) for y in finite if y.numel()), default=0.0)
        return 1e-6 * largest / size if size else 0.0
    return 0.0


def _moved(grad: Tensor | None) -> bool:
    return grad is not None and bool((grad != 0).any())
