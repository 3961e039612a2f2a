"""Gap Preserving Distillation as a module: student, dynamic and static teacher in one forward.

    L_teacher = CE(T, y) + KD(T, static)
    L_student = CE(S, y) + KD(S, static) + lam * CE(S, softmax(sg(T)))

T are the dynamic teacher's logits, S the student's on the shared parameters, sg stops the gradient
(arXiv 2410.04140, section 3.4).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .. import storage
from ..access.collapse import collapse, filled
from ..access.find import OF_GPD
from ..access.states import check_keys
from ..calls import sharded
from ..calls.given import apart
from ..calls.held import apply_keeping, registered
from ..compiler import expand
from ..errors import InputError
from ..files import AsPath
from ..passes.capture.modes import TRAIN
from ..passes.program import duplicate
from ..report.report import Report
from ..teacher.decay import matcher_of
from ..teacher.module import Teacher
from ..teacher.python import missing
from . import streams
from .collect import run_with_features
from .features import FeatureLoss
from .losses import KD, LogitLoss, soft_cross_entropy
from .outputs import Distilled as Distilled
from .outputs import Outputs, arguments
from .outputs import find_logits as find_logits
from .own_loss import LABELS, own_loss, takes_labels
from .positions import Criterion as Criterion
from .positions import CrossEntropy, ask, find_class_dim, find_counts, rows
from .unheld import warn_of_unheld

Distillation = LogitLoss
SETTINGS = ("lam", "temperature", "smoothing", "teacher_weight", "start_epoch", "class_dim")
"""Numbers that a file holds."""


class GPD(nn.Module):
    """Train a student with a dynamic teacher that shares its parameters.

    ``forward(inputs, targets)`` runs all networks once and returns a ``Distilled``. Its parameters
    are the dynamic teacher's; optimize ``gpdfx.param_groups(gpd, weight_decay)`` or
    ``gpd.parameters()``. ``collapse()`` gives the student. The static teacher is run in eval mode,
    without gradients, and is no part of the state_dict; the module that is passed is not changed.

    Args:
        student: any network that ``expand`` takes; or a teacher, as ``gpdfx.load`` makes it, which
            is then trained itself (and what is of ``expand`` below is given already).
        static_teacher: a pre-trained network with the same classes, or ``None``.
        kd: loss of logits against the static teacher's, called with (logits, static logits,
            targets): ``gpdfx.distill.KD()`` if not given. It counts for teacher and student. One
            that has an argument ``counts`` is given logits with the classes in dimension 1 (of
            tokens (B T, V)), and which positions the criterion counts.
        features: loss of features against the static teacher's, by names of modules, such as
            ``gpdfx.distill.ReviewKD``. Teacher and student have one each, with parameters of
            their own, which train along.
        lam: weight of the student's cross entropy with the dynamic teacher's softmax.
        temperature, smoothing: of that soft target.
        teacher_weight: of the dynamic teacher's own losses; 0 leaves it to the student's.
        start_epoch: the first epoch (``gpd.epoch``, which the training loop sets) in which
            ``lam`` counts (``gpd.gap_counts``).
        criterion: the task's loss, called with (logits, targets). By default what the network
            itself computes from ``labels``, if it does so as those of Hugging Face do
            (``loss_function``); else cross entropy.
        class_dim: where the classes are in logits of more than two dimensions; found out by the
            targets' shape if not given: last for tokens (B, T, V), 1 for maps (B, C, ...).
        counts: targets -> which positions count for the gap and for ``kd``, booleans of the shape
            of the logits without the classes. By default those that the criterion counts
            (``ignore_index``, padding, shifted labels), for which one of your own runs once more
            on logits that are zero.
        unshared: patterns (see ``gpdfx.control``) of parameters that the student has for itself;
            ``"*"`` shares nothing.
        overlap_static: run the static teacher on a CUDA stream of its own, beside the other two;
            eager steps on a GPU only. Off by default: its worth was not measured yet.
        logits: picks the logits out of a network's output; by default the output itself, its
            ``logits`` or ``out``, or its first tensor.
        ratio, branches, keep, round_to, example_inputs, example_kwargs, scales, shares, extract,
            randomness, dynamic, seed, verify: see ``gpdfx.expand``.

    Raises:
        InputError: bad arguments; static and student logits of different shapes.
    """

    _static: nn.Module | None
    gap_counts: bool
    accepts_loss_kwargs = False  # Hugging Face's Trainer: the loss is a mean over this batch alone

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
        criterion: Criterion | None = None,
        class_dim: int | None = None,
        counts: Callable[[Any], Tensor] | None = None,
        unshared: str | Sequence[str] = (),
        overlap_static: bool = False,
        logits: Callable[[Any], Tensor] | None = None,
        keep: str | Sequence[str] = (),
        round_to: int = 1,
        example_inputs: tuple[Any, ...] | None = None,
        example_kwargs: dict[str, Any] | None = None,
        scales: str = "preserve",
        shares: str = "random",
        extract: str = "first",
        randomness: str = "shared",
        dynamic: str = "sizes",
        seed: int = 0,
        verify: bool = True,
    ) -> None:
        super().__init__()
        numbers = {"lam": lam, "smoothing": smoothing, "temperature": temperature}
        for name, value in (numbers | {"teacher_weight": teacher_weight}).items():
            number = isinstance(value, Real) and value >= 0
            if not number or (name == "smoothing" and value > 1):
                raise InputError(f"{name} is {value!r}", remedy="pass a number of at least 0")
        if not temperature > 0:
            raise InputError(f"temperature is {temperature!r}", remedy="pass a positive number")
        if not isinstance(static_teacher, nn.Module | None):
            text = f"static_teacher is a {type(static_teacher).__name__}"
            raise InputError(text, remedy="pass a trained network, an nn.Module")
        called = {"criterion": criterion, "kd": kd, "counts": counts, "logits": logits}
        for name, function in called.items():
            if function is not None and not callable(function):
                text = f"{name} is {function!r}, which cannot be called"
                raise InputError(text, remedy=f"pass a function or a module as {name}")
        if (kd is not None or features is not None) and static_teacher is None:
            raise InputError("kd needs a static teacher", remedy="pass static_teacher=")
        layers = features.student_layers if features is not None else ()
        options = {
            **{"ratio": ratio, "branches": branches, "keep": keep, "round_to": round_to},
            **{"example_inputs": example_inputs, "example_kwargs": example_kwargs},
            **{"scales": scales, "shares": shares, "extract": extract, "seed": seed},
            **{"randomness": randomness, "dynamic": dynamic, "verify": verify},
        }
        self.teacher: Teacher = _made(student, options, layers)
        if unshared:
            self.teacher.unshare(unshared)
        if kd is None and static_teacher is not None and features is None:
            kd = KD()
        self.kd, self.lam = kd, lam
        self._kd_counts = kd is not None and "counts" in _arguments_of(kd)
        self.temperature, self.smoothing = temperature, smoothing
        self.teacher_weight, self.start_epoch, self.epoch = teacher_weight, start_epoch, 0
        self.overlap_static = overlap_static
        self._logits = logits or find_logits
        if criterion is None:
            criterion = self._own_loss() or CrossEntropy()
        self.criterion, self.class_dim, self.counts = criterion, class_dim, counts
        self._labels_stay = LABELS in self.teacher._facts.example[1]
        self._lasting: dict[str, Tensor] = {}
        object.__setattr__(self, "_static", _frozen(static_teacher))
        self._student_layers = layers
        self._static_layers = features.static_layers if features is not None else ()
        self.features = nn.ModuleDict()
        if features is not None:
            self._build_features(features)
        warn_of_unheld(self)

    def _own_loss(self) -> Criterion | None:
        """The loss that the network computes from labels, if it takes such."""
        student = self.teacher._student
        if not takes_labels(student):
            return None
        return own_loss(filled(self.teacher, student), self.teacher._facts.example)

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
    def forward(
        self, inputs: Any = None, targets: Any = None, *, labels: Any = None, **keywords: Any
    ) -> Distilled:
        """All networks on one batch.

        ``inputs``: a tensor, a tuple of positional or a dict of keyword inputs; or the keyword
        inputs themselves, ``gpd(**batch)``. ``targets``: what ``criterion`` takes; if they are not
        given, ``labels`` among the keyword inputs.
        """
        args, kwargs = arguments({} if inputs is None else inputs)
        kwargs |= keywords if labels is None else {**keywords, LABELS: labels}
        if targets is None:
            if LABELS not in kwargs:
                text = "the targets are missing, and there are no labels among the inputs"
                raise InputError(text, remedy="gpd(inputs, targets), or gpd(**batch) with labels")
            targets = kwargs[LABELS] if self._labels_stay else kwargs.pop(LABELS)
        teacher, student, static = self._run(args, kwargs)
        gap, kd = self.gap_counts and self.lam, static is not None and self._kd_counts
        dim, counts = 1, None
        if gap or kd or isinstance(self.criterion, CrossEntropy):
            dim = self._dim_of_classes(student.logits, targets)
        terms = {
            "teacher": self.teacher_weight * self._task_loss(teacher.logits, targets, dim),
            "student": self._task_loss(student.logits, targets, dim),
        }
        if gap or kd:
            counts = self._counted(student.logits, targets, dim)
        if gap:
            ours, soft = rows(student.logits, dim), rows(teacher.logits.detach(), dim)
            options = {"temperature": self.temperature, "smoothing": self.smoothing}
            terms["gap"] = self.lam * soft_cross_entropy(ours, soft, counts=counts, **options)
        if static is not None:
            terms |= self._against_static(teacher, student, static, targets, dim, counts)
        loss = torch.stack([term.float() for term in terms.values()]).sum()
        static_logits = None if static is None else static.logits
        return Distilled(loss, student.logits, teacher.logits, static_logits, terms)

    def _dim_of_classes(self, logits: Tensor, targets: Any) -> int:
        if logits.ndim <= 2:
            return 1
        dim = self.class_dim
        if dim is None:
            dim = find_class_dim(self.criterion, logits, targets)
            if not torch.compiler.is_compiling():  # whose code would be made again for it
                self.class_dim = dim
        return dim % logits.ndim

    def _task_loss(self, logits: Tensor, targets: Any, dim: int) -> Tensor:
        own = isinstance(self.criterion, CrossEntropy)
        return ask(self.criterion, logits, targets, *((dim,) if own else ()))

    def _counted(self, logits: Tensor, targets: Any, dim: int) -> Tensor | None:
        """Which rows (see ``rows``) of logits count."""
        if self.counts is None:
            counts = find_counts(self.criterion, logits, targets, dim)
        else:
            counts = self.counts(targets)
        tokens = counts is not None and 1 < dim == logits.ndim - 1
        return counts.flatten() if tokens else counts  # type: ignore[union-attr]

    def _against_static(
        self,
        teacher: Outputs,
        student: Outputs,
        static: Outputs,
        targets: Any,
        dim: int,
        counts: Tensor | None,
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
            each = [of.logits for of in (teacher, student, static)]
            options = {"counts": counts} if self._kd_counts else {}
            wide, own, fixed = [rows(x, dim) for x in each] if self._kd_counts else each
            terms["teacher_kd"] = self.teacher_weight * self.kd(wide, fixed, targets, **options)
            terms["student_kd"] = self.kd(own, fixed, targets, **options)
        if self._student_layers:
            teacher_loss, student_loss = self.features["teacher"], self.features["student"]
            teacher_term = teacher_loss(teacher.features, static.features)
            terms["teacher_features"] = self.teacher_weight * teacher_term
            terms["student_features"] = student_loss(student.features, static.features)
        return terms

    def own_parameters(self) -> dict[str, Tensor]:
        """The student's parameters that are not shared, by its names."""
        return self.teacher.own_parameters()

    def student(self, *args: Any, **kwargs: Any) -> Any:
        """The student alone."""
        function, callers = self.teacher._call_student, (self, self.teacher)
        return self._sharded(function, args, kwargs, callers)

    def report(self) -> Report:
        """The teacher's (see ``gpdfx.Report``)."""
        return self.teacher.report()

    def save(self, path: AsPath) -> None:
        """Write it to a file, without the static teacher (see ``gpdfx.save``)."""
        storage.save(self, path)

    @classmethod
    def load(
        cls,
        path: AsPath,
        student: nn.Module,
        static_teacher: nn.Module | None = None,
        *,
        example_inputs: tuple[Any, ...] | None = None,
        example_kwargs: dict[str, Any] | None = None,
        branches: Any = None,
        **keywords: Any,
    ) -> GPD:
        """Make the ``GPD`` of a file again, also of one that holds a teacher alone.

        Args:
            path, student, example_inputs, example_kwargs, branches: as of ``gpdfx.load``.
            static_teacher, keywords: as of ``GPD``, for what a file does not hold: functions
                (``criterion``, ``kd``, ``logits``, ``counts``) and the loss of ``features``, whose
                parameters it does hold. Numbers (``lam``, ``temperature`` ...) are the file's if
                they are not given.

        Raises:
            InputError: as ``gpdfx.load``; losses of features that are not those of the file.
        """
        stored = storage.read_file(path)
        settings = dict(stored.header["gpd"])
        if unknown := settings.keys() - {*SETTINGS, "epoch"}:
            text = f"the header of {path} has settings that are unknown: {', '.join(unknown)}"
            raise InputError(text, remedy=storage.FILE.remedy)
        teacher = storage.make(stored, student, example_inputs, example_kwargs, branches)
        epoch = settings.pop("epoch", 0)
        made = cls(teacher, static_teacher, **{**settings, **keywords})
        made.epoch = epoch
        check_keys(stored.more, made.features.state_dict(), "the losses of features")
        made.features.load_state_dict(stored.more)
        return made

    def stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file holds of it beside the teacher: settings, and tensors."""
        settings = {name: getattr(self, name) for name in (*SETTINGS, "epoch")}
        return settings, self.features.state_dict()

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that a weight decay leaves alone (see ``Teacher``)."""
        vectors = {name for name, p in self.features.named_parameters("features") if p.ndim < 2}
        return vectors | {OF_GPD + name for name in self.teacher.no_weight_decay()}

    @property
    def group_matcher(self) -> Callable[..., Any]:
        """The layers of parameters (a protocol of timm's), where the student says them."""
        return matcher_of(self.teacher, OF_GPD)

    def _run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Outputs, Outputs, Outputs | None]:
        """Teacher, student and static teacher on one batch, the branches folded once."""
        call = args, kwargs
        static = streams.start(
            lambda: self._run_static(*apart(call)), call, beside=self.overlap_static
        )
        teacher, student = self._sharded(self._call_both, args, kwargs, (self.teacher,))
        return teacher, student, static()

    def _sharded(self, function: Any, args: Any, kwargs: Any, callers: Any) -> Any:
        """A function on the teacher's parameters, also where these are spread over processes."""
        inside = self.teacher
        return sharded.run(function, args, kwargs, inside=inside, callers=callers, within=self)

    def _call_both(self, *args: Any, **kwargs: Any) -> tuple[Outputs, Outputs]:
        """Teacher and student."""
        call = args, kwargs
        folded, features = self.teacher._fold(), []  # type: ignore[var-annotated]
        output = self.teacher._run_teacher(folded, *apart(call), features=features)
        teacher = Outputs(self._logits(output), features)
        output, features = run_with_features(
            self.teacher._student,
            self._student_layers,
            lambda: self.teacher._run_student(folded, *apart(call)),
        )
        return teacher, Outputs(self._logits(output), features)

    @torch.no_grad()
    def _run_static(self, args: Any, kwargs: Any) -> Outputs | None:
        net = self._static
        if net is None:
            return None
        output, features = run_with_features(net, self._static_layers, lambda: net(*args, **kwargs))
        return Outputs(self._logits(output).detach(), features)

    def collapse(self, *, average: bool | None = None) -> nn.Module:
        """The plain student (see ``gpdfx.collapse``)."""
        return collapse(self, average=average)

    # ---- nn.Module's other duties
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            teacher = self.__dict__.get("_modules", {}).get("teacher")
            raise missing(self, getattr(teacher, "_code", None), name) from None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> GPD:
        super()._apply(fn, recurse)
        if (static := self._static) is not None:  # which no state_dict gives its values again
            named, move = lambda: registered(static).items(), partial(static._apply, fn, recurse)
            apply_keeping(self._lasting, named, fn, move)
        return self


def _made(student: Any, options: dict[str, Any], features: Sequence[str]) -> Teacher:
    """The teacher to train."""
    if not isinstance(student, Teacher):
        return expand(student, **options, features=features)
    known = inspect.signature(expand).parameters
    given = [name for name, value in options.items() if value is not known[name].default]
    given += ["features"] if not {*features} <= {*student._facts.options.features} else []
    if given:
        raise InputError(
            f"{', '.join(given)}: the teacher is made already",
            remedy="give this to expand, or pass GPD the student",
        )
    return student


def _frozen(static: nn.Module | None) -> nn.Module | None:
    """A static teacher that never trains: the module itself if it is so already, else one like it
    with the same weights in the same memory."""
    if static is None or not (static.training or any(p.requires_grad for p in static.parameters())):
        return static
    memo: dict[int, Any] = {}
    for p in static.parameters():
        memo[id(p)] = nn.Parameter(p.detach(), requires_grad=False)
    return duplicate(static, memo).eval()


def _arguments_of(function: Any) -> Sequence[str]:
    try:
        return [*inspect.signature(function).parameters]
    except (TypeError, ValueError):  # built in
        return ()
