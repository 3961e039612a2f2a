"""Losses of logits: soft labels from the dynamic teacher, distillation from the static one.

The *dynamic* teacher trains with the student: ``soft_cross_entropy`` on its detached logits is the
lambda term of GPD (arXiv 2410.04140, section 3). The *static* teacher is trained beforehand and
never changes. A **logit loss** against it is any callable

    loss(student_logits, static_logits, targets) -> scalar

such as ``KD`` and ``DKD``. For losses of features see ``gpdfx.distill.features``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calls.held import has_gradient
from ..errors import InputError

LogitLoss = Callable[..., Tensor]
"""(student logits, static logits, targets) -> scalar; see ``gpdfx.distill.gpd`` for ``counts``."""


def soft_cross_entropy(
    logits: Tensor,
    soft_targets_logits: Tensor,
    *,
    temperature: float = 1.0,
    smoothing: float = 0.0,
    counts: Tensor | None = None,
) -> Tensor:
    """Cross entropy against a teacher's smoothed softmax: the lambda term of arXiv 2410.04140.

    ``-T^2 sum_c q_c log softmax(logits / T)_c`` with
    ``q = (1 - smoothing) softmax(soft_targets_logits / T) + smoothing / C``.

    Both are (N, C) or (N, C, d1, ...), classes in dimension 1; the result is the mean over all
    other dimensions, of the positions that ``counts``: booleans (N,) or (N, d1, ...), by default
    all. Gradients flow into both: detach the teacher's. The paper smooths by 0.1.

    Raises ``InputError`` for shapes that differ, a temperature that is not positive, or a
    smoothing outside of 0 to 1.
    """
    _check_temperature(temperature)
    if not 0 <= smoothing <= 1:
        raise InputError(f"smoothing is {smoothing}", remedy="take one from 0 to 1")
    ours, soft = _logits(logits, soft_targets_logits, temperature, counts)
    reduction = "mean" if counts is None else "none"
    each = F.cross_entropy(ours, soft.softmax(1), label_smoothing=smoothing, reduction=reduction)
    return temperature**2 * _mean(each, counts)


@dataclass(frozen=True)
class KD:
    """``weight T^2 KL(softmax(static / T) || softmax(student / T))`` (Hinton et al., 2015).

    Logits are (N, C) or (N, C, d1, ...), classes in dimension 1; the result is the mean over all
    other dimensions, of the positions that ``counts``. The static logits get no gradient; the
    targets do not matter.
    """

    temperature: float = 4.0
    weight: float = 0.9

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def __call__(
        self,
        student_logits: Tensor,
        static_logits: Tensor,
        targets: Any,
        counts: Tensor | None = None,
    ) -> Tensor:
        student, static = _logits(student_logits, static_logits.detach(), self.temperature, counts)
        divergence = _kl(static.log_softmax(1), student.log_softmax(1), counts)
        return self.weight * self.temperature**2 * divergence


@dataclass(frozen=True)
class DKD:
    """Decoupled distillation, ``T^2 (alpha TCKD + beta NCKD)`` (Zhao et al., arXiv 2203.08679).

    With ``p = softmax(logits / T)`` and ``t`` the target class, ``TCKD`` is the divergence of the
    pair ``(p_t, 1 - p_t)``, and ``NCKD`` that of the other classes among themselves,
    ``p_c / (1 - p_t)``; both are KL(static || student), means over samples. GPD takes
    ``beta=0.5`` for ResNet-18 and 2 for MobileNet.

    Logits are (N, C). Targets are classes (N,), or soft targets (N, C), as mixup and cutmix make,
    of which the largest counts. ``counts``: as of ``KD``. The static logits get no gradient.
    ``warmup``: the number of epochs in which the loss grows to its full weight, by the factor
    ``ramp(epoch)`` that whoever calls it multiplies it with.

    Raises ``InputError`` for other shapes, and for targets (N,) that are not integers.
    """

    alpha: float = 1.0
    beta: float = 0.5
    temperature: float = 1.0
    warmup: int = 0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def __call__(
        self,
        student_logits: Tensor,
        static_logits: Tensor,
        targets: Any,
        counts: Tensor | None = None,
    ) -> Tensor:
        student, static = _logits(student_logits, static_logits.detach(), self.temperature, counts)
        target = _classes(student, targets)
        target = target if counts is None else target * counts
        ours, our_others = _decouple(student, target)
        theirs, their_others = _decouple(static, target)
        tckd, nckd = _kl(theirs, ours, counts), _kl(their_others, our_others, counts)
        return self.temperature**2 * (self.alpha * tckd + self.beta * nckd)

    def ramp(self, epoch: int) -> float:
        """``min((epoch + 1) / warmup, 1)``; the first epoch is 0."""
        return min((epoch + 1) / self.warmup, 1.0) if self.warmup else 1.0


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise InputError(f"the temperature is {temperature}", remedy="take a positive one")


def _logits(
    student: Tensor, teacher: Tensor, temperature: float, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both divided by the temperature, in float32 or better; what does not count may be NaN."""
    if student.ndim < 2 or student.shape != teacher.shape:
        raise InputError(
            f"the logits are {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}",
            remedy="give both as (N, C) or (N, C, d1, ...), of the same shape",
        )
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    if counts is not None and counts.shape != (*student.shape[:1], *student.shape[2:]):
        text = f"counts is {tuple(counts.shape)} for logits {tuple(student.shape)}"
        raise InputError(text, remedy="give it the shape of the logits without the classes")
    if counts is not None:
        student, teacher = (x.masked_fill(~counts.unsqueeze(1), 0) for x in (student, teacher))
    return student.to(dtype) / temperature, teacher.to(dtype) / temperature


def _mean(each: Tensor, counts: Tensor | None) -> Tensor:
    """The mean of what counts; zero if nothing does."""
    return each.mean() if counts is None else (each * counts).sum() / counts.sum().clamp(min=1)


def _kl(p: Tensor, q: Tensor, counts: Tensor | None) -> Tensor:
    """KL(p || q) of logarithms (N, C, ...), the mean over all positions that count."""
    return _mean((p.exp() * (p - q)).sum(1), counts)


def _classes(logits: Tensor, targets: Tensor) -> Tensor:
    """The target classes (N,)."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise InputError(
            f"DKD of logits {tuple(logits.shape)}", remedy="give (N, C) with C > 1, or use KD"
        )
    if targets.shape == logits.shape:
        return targets.argmax(1)
    integers = not has_gradient(targets)
    if targets.shape != logits.shape[:1] or not integers:
        raise InputError(
            f"DKD of targets {tuple(targets.shape)}, {targets.dtype}",
            remedy=f"give classes ({len(logits)},), integers, or soft targets "
            f"{tuple(logits.shape)}",
        )
    return targets.long()


def _decouple(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C) -> log of (p_t, 1 - p_t), (N, 2), and log of p_c / (1 - p_t), (N, C - 1)."""
    target = target.unsqueeze(1)
    rank = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = logits.gather(1, rank + (rank >= target))  # all columns but the target's
    pair = torch.cat([logits.gather(1, target), others.logsumexp(1, keepdim=True)], 1)
    return pair.log_softmax(1), others.log_softmax(1)
