"""Gap Preserving Distillation as a module: student, dynamic and static teacher in one forward.

    L_teacher = CE(T, y) + KD(T, static)
    L_student = CE(S, y) + KD(S, static) + lam * CE(S, softmax(sg(T)))

T are the dynamic teacher's logits, S the student's on the shared parameters, sg stops the gradient
(arXiv 2410.04140, section 3.4).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calls.given import apart
from ..compiler import expand
from ..control import covers
from ..errors import InputError, suggest
from ..passes.capture.modes import TRAIN
from ..teacher.collapse import collapse
from ..teacher.module import Teacher
from ..torch_private import gradient_hooks
from . import streams
from .collect import run_with_features
from .features import FeatureLoss
from .losses import KD, LogitLoss, soft_cross_entropy
from .outputs import Distilled as Distilled
from .outputs import Outputs, arguments
from .outputs import find_logits as find_logits

Criterion = Callable[[Tensor, Any], Tensor]
Distillation = LogitLoss


class GPD(nn.Module):
    """Train a student with a dynamic teacher that shares its parameters.

    ``forward(inputs, targets)`` runs all networks once and returns a ``Distilled``. Its parameters
    are the dynamic teacher's; optimize ``gpdfx.param_groups(gpd.teacher, ...)`` or
    ``gpd.parameters()``. ``collapse()`` gives the student. The static teacher is frozen, in eval
    mode, and no part of the state_dict.

    Args:
        student: any network that ``expand`` takes.
        static_teacher: a pre-trained network with the same classes, or ``None``.
        ratio, branches, options: see ``gpdfx.expand`` (``shares``, ``extract``, ``keep`` ...).
        kd: loss of logits against the static teacher's, called with (logits, static logits,
            targets): ``gpdfx.distill.KD()`` if not given. It counts for teacher and student.
        features: loss of features against the static teacher's, by names of modules, such as
            ``gpdfx.distill.ReviewKD``. Teacher and student have one each, with parameters of
            their own, which train along.
        lam: weight of the student's cross entropy with the dynamic teacher's softmax.
        temperature, smoothing: of that soft target.
        teacher_weight: of the dynamic teacher's own losses; 0 leaves it to the student's.
        start_epoch: the first epoch (``gpd.epoch``, which the training loop sets) in which
            ``lam`` counts (``gpd.gap_counts``).
        criterion: the task's loss, called with (logits, targets).
        unshared: patterns (see ``gpdfx.control``) of parameters that the student has for itself;
            ``"*"`` shares nothing.
        overlap_static: run the static teacher on a CUDA stream of its own, beside the other two;
            eager steps on a GPU only. Off by default: its worth was not measured yet.
        logits: picks the logits out of a network's output; by default the output itself, its
            ``logits`` or ``out``, or its first tensor.

    Raises:
        InputError: bad arguments; static and student logits of different shapes.
    """

    _static: nn.Module | None
    gap_counts: bool

    def __init__(
        self,
        student: nn.Module,
        static_teacher: nn.Module | None = None,
        *,
        ratio: float | Mapping[str, float] = 2,
        branches: Any = "auto",
        kd: Distillation | None = None,
        features: FeatureLoss | None = None,
        lam: float = 3.0,
        temperature: float = 1.0,
        smoothing: float = 0.1,
        teacher_weight: float = 1.0,
        start_epoch: int = 0,
        criterion: Criterion = F.cross_entropy,
        unshared: str | Sequence[str] = (),
        overlap_static: bool = False,
        logits: Callable[[Any], Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, value in (("lam", lam), ("smoothing", smoothing), ("temperature", temperature)):
            number = isinstance(value, Real) and value >= 0
            if not number or (name == "smoothing" and value > 1):
                raise InputError(f"{name} is {value!r}", remedy="pass a number of at least 0")
        if not isinstance(static_teacher, nn.Module | None):
            text = f"static_teacher is a {type(static_teacher).__name__}"
            raise InputError(text, remedy="pass a trained network, an nn.Module")
        if (kd is not None or features is not None) and static_teacher is None:
            raise InputError("kd needs a static teacher", remedy="pass static_teacher=")
        options |= {"features": features.student_layers} if features is not None else {}
        self.teacher: Teacher = expand(student, ratio, branches=branches, **options)
        if kd is None and static_teacher is not None and features is None:
            kd = KD()
        self.kd, self.lam, self.criterion = kd, lam, criterion
        self.temperature, self.smoothing = temperature, smoothing
        self.teacher_weight, self.start_epoch, self.epoch = teacher_weight, start_epoch, 0
        self.overlap_static = overlap_static
        self._logits = logits or find_logits
        plain = dict(collapse(self.teacher).named_parameters())
        self._own_names = _matching(unshared, list(plain))
        self._own = nn.ParameterList(
            nn.Parameter(plain[name].detach().clone(), requires_grad=plain[name].requires_grad)
            for name in self._own_names
        )
        for name, own in self.own_parameters().items():
            for hook in gradient_hooks(self.teacher.get_parameter(name)):
                own.register_hook(hook)
        if static_teacher is not None:
            static_teacher = static_teacher.eval().requires_grad_(False)
        object.__setattr__(self, "_static", static_teacher)
        self._student_layers = features.student_layers if features is not None else ()
        self._static_layers = features.static_layers if features is not None else ()
        self.features = nn.ModuleDict()
        if features is not None:
            self._build_features(features)

    def _build_features(self, features: FeatureLoss) -> None:
        """One loss for the teacher, one for the student, each for its own widths."""
        mode = self.teacher._modes.mode or TRAIN
        self.teacher.eval()
        with torch.no_grad():
            *both, static = self._run(*self.teacher._facts.example)
        self.teacher._enter(mode)
        assert static is not None
        for name, outputs in zip(("teacher", "student"), both, strict=True):
            loss = copy.deepcopy(features)
            loss.build(*([x.shape for x in of.features] for of in (outputs, static)))
            self.features[name] = loss

    @property
    def epoch(self) -> int:
        """The epoch that runs, from 0; the training loop sets it, after ``start_epoch``."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        # Compiled code is made again for every value that it reads: so it reads a flag.
        self._epoch, self.gap_counts = epoch, epoch >= self.start_epoch

    # ---- running
    def forward(self, inputs: Any, targets: Any) -> Distilled:
        """All networks on one batch.

        ``inputs``: a tensor, a tuple of positional or a dict of keyword inputs. ``targets``: what
        ``criterion`` takes.
        """
        teacher, student, static = self._run(*arguments(inputs))
        terms = {
            "teacher": self.teacher_weight * self.criterion(teacher.logits, targets),
            "student": self.criterion(student.logits, targets),
        }
        if self.gap_counts and self.lam:
            options = {"temperature": self.temperature, "smoothing": self.smoothing}
            soft = soft_cross_entropy(student.logits, teacher.logits.detach(), **options)
            terms["gap"] = self.lam * soft
        if static is not None:
            terms |= self._against_static(teacher, student, static, targets)
        loss = torch.stack([term.float() for term in terms.values()]).sum()
        static_logits = None if static is None else static.logits
        return Distilled(loss, student.logits, teacher.logits, static_logits, terms)

    def _against_static(
        self, teacher: Outputs, student: Outputs, static: Outputs, targets: Any
    ) -> dict[str, Tensor]:
        """The terms that compare logits and features with the static teacher's."""
        terms = {}
        if self.kd is not None:
            if static.logits.shape != student.logits.shape:
                raise InputError(
                    f"the static teacher's logits are {tuple(static.logits.shape)}, the student's "
                    f"{tuple(student.logits.shape)}",
                    remedy="use a static teacher with the same classes",
                )
            teacher_kd = self.kd(teacher.logits, static.logits, targets)
            terms["teacher_kd"] = self.teacher_weight * teacher_kd
            terms["student_kd"] = self.kd(student.logits, static.logits, targets)
        if self._student_layers:
            teacher_loss, student_loss = self.features["teacher"], self.features["student"]
            teacher_term = teacher_loss(teacher.features, static.features)
            terms["teacher_features"] = self.teacher_weight * teacher_term
            terms["student_features"] = student_loss(student.features, static.features)
        return terms

    def own_parameters(self) -> dict[str, Tensor]:
        """The student's parameters that are not shared."""
        return dict(zip(self._own_names, self._own, strict=True))

    def student(self, *args: Any, **kwargs: Any) -> Any:
        """The student alone."""
        folded = self.teacher._fold(teacher=False)
        return self.teacher._run_student(folded, args, kwargs, self.own_parameters())

    def _run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Outputs, Outputs, Outputs | None]:
        """Teacher, student and static teacher on one batch, the branches folded once."""
        call = args, kwargs
        static = streams.start(
            lambda: self._run_static(*apart(call)), call, beside=self.overlap_static
        )
        folded, features = self.teacher._fold(), []  # type: ignore[var-annotated]
        output = self.teacher._run_teacher(folded, *apart(call), features=features)
        teacher = Outputs(self._logits(output), features)
        output, features = run_with_features(
            self.teacher._student,
            self._student_layers,
            lambda: self.teacher._run_student(folded, *apart(call), own=self.own_parameters()),
        )
        return teacher, Outputs(self._logits(output), features), static()

    @torch.no_grad()
    def _run_static(self, args: Any, kwargs: Any) -> Outputs | None:
        net = self._static
        if net is None:
            return None
        output, features = run_with_features(net, self._static_layers, lambda: net(*args, **kwargs))
        return Outputs(self._logits(output).detach(), features)

    @torch.no_grad()
    def collapse(self) -> nn.Module:
        """The plain student (see ``gpdfx.collapse``), with the parameters that it does not
        share."""
        plain = collapse(self.teacher)
        for name, own in self.own_parameters().items():
            plain.get_parameter(name).copy_(own)
        return plain

    # ---- nn.Module's other duties
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> GPD:
        super()._apply(fn, recurse)
        if self._static is not None:
            self._static._apply(fn, recurse)
        return self


def _matching(patterns: str | Sequence[str], names: list[str]) -> list[str]:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        if not covers(pattern, names):
            remedy = suggest(pattern, names)
            raise InputError(f"unshared: {pattern!r} matches no parameter", remedy=remedy)
    return [name for name in names if any(covers(pattern, [name]) for pattern in patterns)]
