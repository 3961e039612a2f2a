"""Logits of any form as rows of classes: where the classes are, and which positions count.

Token logits are (B, T, V) with targets (B, T), classes last; maps are (B, C, H, W) with targets
(B, H, W), classes in dimension 1. A criterion need not count every position: it may ignore some
(``ignore_index``), or shift the labels, as language models do. What it leaves out is asked of the
criterion itself, once a step: a position counts if the criterion has a gradient there, where all
logits are zero (so that nothing is lost to rounding, or to a margin that is met).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calls import tree
from ..calls.held import has_gradient
from ..errors import GpdfxError, InputError, described
from ..passes.program import raised_at

Criterion = Callable[[Tensor, Any], Tensor]
IGNORED = -100
"""PyTorch's ``ignore_index``."""


def is_classes(targets: Any) -> bool:
    """True for whole numbers, not for soft targets."""
    return isinstance(targets, Tensor) and not has_gradient(targets)


def ask(criterion: Criterion, logits: Tensor, targets: Any, *dim: int) -> Tensor:
    """The criterion's loss. Raises ``InputError`` where it fails on these targets."""
    if torch.compiler.is_compiling():
        return criterion(logits, targets, *dim)
    try:
        return criterion(logits, targets, *dim)
    except (GpdfxError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a user's criterion raises
        kind = type(targets).__name__
        given = f"{kind} {tuple(targets.shape)}" if isinstance(targets, Tensor) else kind
        raise InputError(
            f"the criterion fails on logits {tuple(logits.shape)} and targets ({given}): "
            f"{described(error)}",
            source=raised_at(error),
            remedy="pass targets that it takes, or criterion=, a function of (logits, targets) "
            "that takes these",
        ) from error


def find_class_dim(criterion: Criterion, logits: Tensor, targets: Any) -> int:
    """The dimension of the classes: the one that the targets lack; where that does not tell, the
    one over which the criterion's gradient adds up to zero, as that of any softmax does. Raises
    ``InputError`` if it is not to be found."""
    if logits.ndim <= 2:
        return 1
    fit = sorted({1, logits.ndim - 1})
    if is_classes(targets):
        fit = [d for d in fit if targets.shape == _positions(logits, d)] or fit
    if len(fit) > 1 and not (isinstance(criterion, CrossEntropy) or torch.compiler.is_compiling()):
        g = _gradient(criterion, logits, targets)
        fit = [] if g is None else [d for d in fit if g.sum(d).abs().max() <= 1e-3 * g.abs().max()]
    if len(fit) != 1:
        of = f"targets {tuple(targets.shape)}" if isinstance(targets, Tensor) else "these targets"
        raise InputError(
            f"which dimension of logits {tuple(logits.shape)} holds the classes, for {of}?",
            remedy="pass class_dim= to GPD: 1 for maps (B, C, ...), -1 for tokens (B, T, V); for "
            "targets of another size criterion=, too",
        )
    return fit[0]


def find_counts(criterion: Criterion, logits: Tensor, targets: Any, dim: int) -> Tensor | None:
    """Which positions a criterion counts, of the shape of the logits without the classes; ``None``
    for all."""
    if isinstance(criterion, partial):  # of which compiled code of torch 2.11 reads no __dict__
        base, options = criterion.func, criterion.keywords
    else:
        base, options = criterion, getattr(criterion, "__dict__", {})
    if base is F.cross_entropy or isinstance(base, CrossEntropy | nn.CrossEntropyLoss):
        aligned = is_classes(targets) and targets.shape == _positions(logits, dim)
        return targets != options.get("ignore_index", IGNORED) if aligned else None
    if logits.ndim <= 2 and not is_classes(targets):  # soft ones leave nothing out
        return None
    gradient = _gradient(criterion, logits, targets)
    return None if gradient is None else (gradient != 0).any(dim)


def _positions(logits: Tensor, dim: int) -> tuple[int, ...]:
    return (*logits.shape[:dim], *logits.shape[dim + 1 :])


def _gradient(criterion: Criterion, logits: Tensor, targets: Any) -> Tensor | None:
    """Of a criterion by logits that are zero; ``None`` if it has none."""
    options: Any = {"dtype": torch.float32, "device": logits.device}
    if torch.compiler.is_compiling():  # which knows no autograd inside
        zeros = torch.zeros(logits.shape, **options)
        found: Tensor = torch.func.grad(lambda x: criterion(x, targets))(zeros)
        return found
    targets = tree.copied(targets) if torch.is_inference_mode_enabled() else targets
    with torch.inference_mode(False), torch.enable_grad():
        zeros = torch.zeros(logits.shape, requires_grad=True, **options)
        loss = criterion(zeros, targets)
        if not loss.requires_grad:
            return None
        return torch.autograd.grad(loss, zeros, allow_unused=True)[0]


def rows(logits: Tensor, dim: int) -> Tensor:
    """Classes in dimension 1: tokens (B, T, V) become (B T, V), a view; maps stay."""
    if logits.ndim > 2 and dim == logits.ndim - 1:
        return logits.flatten(0, -2)
    return logits if dim == 1 else logits.movedim(dim, 1)


class CrossEntropy:
    """The criterion where none is given: cross entropy of classes in dimension ``dim``; -100 is
    ignored."""

    def __call__(self, logits: Tensor, targets: Any, dim: int | None = None) -> Tensor:
        dim = find_class_dim(self, logits, targets) if dim is None else dim
        tokens = is_classes(targets) and 1 < dim == logits.ndim - 1
        return F.cross_entropy(rows(logits, dim), targets.flatten() if tokens else targets)
