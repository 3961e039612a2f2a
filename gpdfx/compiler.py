"""``expand``: the pipeline from the user's module to the teacher."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from . import passes
from .calls import progress
from .calls.examples import example_call, two_samples
from .check import laws
from .check.certificate import Check
from .check.faults.python import REMEDY, python_of
from .check.observe import keep_rng
from .check.visit import BUG
from .control import ExpandOptions, make_control
from .custom_ops import check_rules, learn_functions
from .errors import CaptureError, GpdfxError, InputError, LossyError, check_choice
from .memory import give_back
from .passes import PASSES
from .passes.assign import assign
from .passes.capture.export import capture, whole
from .passes.capture.hooks import hooked_modules, hooked_parameters
from .passes.capture.limits import LEVELS
from .passes.capture.sized import sized
from .passes.capture.submodules import capture_parts, record
from .passes.infer import NeedsFunctional
from .passes.program import Program, duplicate, raised_at
from .passes.rules.writer import DynamicAxis
from .passes.widen import Widened
from .report.report import Report, make_report
from .teacher.compiled import Compiled, Inputs, Python, find_caches
from .teacher.hooked import module_calls
from .teacher.module import Teacher
from .torch_private import (
    is_compiled,
    is_fake,
    local_norms,
    without_function_modes,
    without_modes,
)

LARGE = 2**28
"""Bytes of parameters from which on copies of them are looked for and freed."""
FLOAT_FUNCTIONALS = (torch.ao.nn.quantized.FloatFunctional, torch.ao.nn.quantized.FXFloatFunctional)
"""Of torch's quantized modules those that compute with floating numbers, in training."""
APART = 8
"""Modules that are taken apart because of what the check found."""


def expand(
    model: nn.Module,
    ratio: float | Mapping[str, float] = 2,
    *,
    keep: str | Sequence[str] = (),
    round_to: int = 1,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    branches: Any = "auto",
    scales: str = "preserve",
    shares: str = "random",
    extract: str = "first",
    features: Sequence[str] = (),
    randomness: str = "shared",
    dynamic: str = "sizes",
    seed: int = 0,
    verify: bool = True,
) -> Teacher:
    """Compile a network into a wider dynamic teacher that computes the same function.

    Every channel axis of the model's parameters gets ``round(size * ratio)`` indices (inverse
    reparameterization, arXiv 2410.04140, section 3.2); what must stay, stays, and the report says
    why. The model itself is not changed, nor are the example inputs, which are copied first, and
    the random generators. Of several threads one expands at a time.

    Args:
        model: the student, any ``nn.Module`` that ``torch.export`` can capture.
        ratio: width of the teacher relative to the student, a real number >= 1; 1 is the identity.
            Or a mapping from patterns (see ``gpdfx.control``) to such numbers, of which the last
            that covers a parameter counts, and 1 where none does: ``{"*": 2, "layer4": 1.5}``.
            A parameter's ratio speaks for the axes that it brings (a layer's output channels);
            ``report().conflicts`` lists those that were given several.
        keep: patterns of modules and parameters all of whose axes stay at the student's size,
            and with them whatever meets these axes.
        round_to: widened axes of parameters become multiples of this number, rounded up, where
            there is such a width; ``report().unrounded`` lists the others.
        example_inputs: a tuple of positional inputs, batch first, a batch of two or more; inferred
            for timm and torchvision models and for models that begin with a conv, linear or
            embedding layer.
        example_kwargs: keyword inputs.
        branches: what the teacher's weights are made of beside themselves (see
            ``gpdfx.branches``). ``"auto"``: the paper's set ``"orepa"`` for kernels of more than
            one element, ``"lowrank"`` for linear layers and 1x1 convolutions. Or another set by
            name, a list of branches, ``None`` for none; or a mapping from patterns to these, of
            which the last that covers a weight counts.
        scales: of the branches. ``"preserve"``: zero, so that the function is the student's;
            ``"scratch"``: live, for training from scratch: the function changes.
        shares: how much of the student's weight each copy carries where an axis is contracted.
            ``"random"`` (per output row and copy, seeded) lets copies grow apart under every
            optimizer; ``"uniform"`` is the paper's.
        extract: how the student is read out of the copies: ``"first"``, the paper's, or
            ``"mean"``, weighted by shares (see ``gpdfx.teacher.extract``).
        features: modules of the student whose results ``GPD`` takes out of the teacher, at its
            width, to distill them.
        randomness: ``"shared"`` draws dropout at the student's shape and order, so that equal
            seeds give equal functions; ``"independent"`` draws at the teacher's shape.
        dynamic: which input sizes may differ from the example's later on. ``"sizes"``: all that
            the model leaves free (height, width, length), as far as they are found within
            seconds; ``"batch"``; ``"none"``. The lower, the faster the capture. The report says
            what came of it, and other sizes are refused by name.
        seed: of the shares and of the check's probe.
        verify: check that the teacher equals the student, on a probe and on the real weights, in
            eval and train mode (see ``gpdfx.check.laws``).

    Returns:
        The teacher, its modules in train or eval mode as the model's, with its dtype and device.

    Raises:
        InputError: a bad argument, a model in a form that cannot be expanded, or a teacher that
            does not fit into memory.
        CaptureError: the model does not export; names the reason and the source line.
        LossyError: the check failed: a bug in gpdfx, with the first node that differs.
    """
    clock = Clock()
    _check_arguments(model)
    for name, given, known in (
        ("scales", scales, ("preserve", "scratch")),
        ("shares", shares, ("random", "uniform")),
        ("extract", extract, ("first", "mean")),
        ("randomness", randomness, ("shared", "independent")),
        ("dynamic", dynamic, LEVELS),
    ):
        check_choice(name, given, known)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed!r}", remedy="pass a whole number from 0 to 2**32 - 1")
    named = isinstance(features, Sequence) and all(isinstance(path, str) for path in features)
    if not named or isinstance(features, str):
        remedy = 'pass names of modules: features=["layer1", "layer2"]'
        raise InputError(f"features is {features!r}", remedy=remedy)
    hooks = hooked_parameters(model)
    control = make_control(model, ratio, keep, round_to, branches).without(hooks)
    options = ExpandOptions(
        control, scales, shares, extract, tuple(features), randomness, dynamic, seed
    )
    with _undisturbed(model), progress.shown():
        progress.at("capturing")
        own = example_call(model, example_inputs, example_kwargs)
        example = two_samples(*own)
        caches = find_caches(model, example)  # first: what fails here is the user's to mend
        python = python_of(model, example, seed, caches)
        clock.lap("capture")
        compiled, check = _checked(model, example, options, python, clock, verify)
        if example is not own and not compiled.takes(record(duplicate(model), *own)):
            example = own  # one sample goes another way than two
            compiled, check = _checked(model, example, options, python, clock, verify)
        program = compiled.program

        def describe(teacher: Teacher) -> Report:
            clock.lap("transform")
            if check:
                laws.check_values(program, teacher)
                clock.lap("verify")
            progress.at("reporting")
            laps = partial(clock.lap, "report")
            return make_report(program, teacher, control, example, laps, check, scales, python)

        calls = module_calls(model, *example) if program.parts == [""] else {}
        teacher = Teacher(replace(compiled, calls=calls), describe)
        for name, of in hooks.items():
            for hook in of:
                teacher.get_parameter(name).register_hook(hook)
    return teacher


def _checked(
    model: nn.Module,
    example: Inputs,
    options: ExpandOptions,
    python: Python,
    clock: Clock,
    verify: bool,
) -> tuple[Compiled, Check | None]:
    """What the teacher is built from, and its certificate. A module of which the check finds that
    its graph is not its function is taken apart, too; if that does not help, the first error
    counts."""
    apart, first = {**hooked_modules(model), **python.apart}, None
    tries = 0
    while True:
        tries += 1
        try:
            compiled = Compiled.of(
                compile_program(model, example, options, clock, apart, python.written),
                example,
                python,
            )
        except CaptureError as error:
            raise first or error from error
        if not verify:
            return compiled.unseen(), None
        _make_room(model)
        progress.at("checking")
        try:
            check = laws.verify(_to_check(compiled), seed=options.seed)
            return replace(compiled, sizes=check.sizes), check
        except LossyError as error:
            first = first or error
            if error.apart is None or error.apart in apart or tries > APART:
                raise first from error
            apart = {**_alike(model, error.apart, apart), **apart}
            apart[error.apart] = str(error).splitlines()[0]
        finally:  # before the teacher is made: both would not always fit
            _make_room(model)
            clock.lap("verify")


def _alike(model: nn.Module, guilty: str, apart: Mapping[str, str]) -> dict[str, str]:
    """The modules of the same class, of the user's, as one whose graph is not its function, once
    that is the second one."""
    kind = type(model.get_submodule(guilty))
    alike = [path for path, module in model.named_modules() if type(module) is kind]
    known = next((apart[path] for path in alike if path in apart), None)
    of_torch = kind.__module__.startswith("torch.nn.")
    return {} if known is None or of_torch else dict.fromkeys(alike, known)


def compile_program(
    model: nn.Module,
    example: Inputs,
    options: ExpandOptions,
    clock: Clock | None = None,
    apart: Mapping[str, str] = MappingProxyType({}),
    written: Collection[str] = (),
) -> Widened:
    """Capture and run the passes; captured again, functionally or with fewer free sizes, if a pass
    asks. ``apart``: modules that are not captured as one -> why; ``written``: parameters that
    forward writes to: where it may be Python that does so, it has to meet the teacher's own."""
    clock = clock or Clock()
    functional, dynamic = False, options.dynamic
    while True:
        progress.at("capturing")
        program = capture_model(model, example, functional, dynamic, apart)
        control = options.control.without(written if program.apart else ())
        own = replace(options, control=control)
        program = replace(program, options=own, functional=functional)
        dynamic = min((mode.level for mode in program.modes.values()), key=LEVELS.index)
        clock.lap("capture")
        try:
            learn_functions(program)
            widened: Widened = passes.run(program)
            check_rules(widened)
            return widened
        except NeedsFunctional:
            if functional:
                raise
            functional = True
        except DynamicAxis:
            if dynamic == LEVELS[-1]:
                raise
            dynamic = LEVELS[LEVELS.index(dynamic) + 1]
        finally:
            clock.lap("transform")


def capture_model(
    model: nn.Module,
    example: Inputs,
    functional: bool,
    dynamic: str,
    apart: Mapping[str, str] = MappingProxyType({}),
) -> Program:
    """The network as a program: in one piece if it exports, else, or if some of it is to be taken
    ``apart``, in parts."""
    student = sized(duplicate(model), *example)
    try:
        if apart:
            raise CaptureError(next(iter(apart.values())), remedy=REMEDY)
        return capture(student, whole(student, *example), functional, dynamic)
    except CaptureError as why:
        return capture_parts(student, *example, functional, dynamic, why, apart)


def _to_check(compiled: Compiled) -> Compiled:
    """What the check can compare: of networks that draw at the teacher's shape equal seeds say
    nothing, so that it is the form with shared draws."""
    program = compiled.program
    if program.options.randomness == "shared":
        return compiled
    shared = replace(program, options=replace(program.options, randomness="shared"))
    return replace(compiled, program=passes.run(shared, PASSES[PASSES.index(assign) :]))


def _make_room(model: nn.Module) -> None:
    """Free copies of a large network's weights that wait for the garbage collector."""
    if sum(p.numel() * p.element_size() for p in model.parameters()) >= LARGE:
        gc.collect()
        give_back()


class Clock:
    """Seconds by stage, none left out: a lap begins where the last one ended."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, name: str) -> dict[str, float]:
        """End a lap; all so far."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._start
        self._start = now
        return self.laps


# --------------------------------------------------------------------------- bad input
def _check_arguments(model: Any) -> None:
    if isinstance(model, Teacher):
        raise InputError(
            "this is a teacher already", remedy="expand the student, or gpdfx.collapse(teacher)"
        )
    if not isinstance(model, nn.Module):
        raise InputError(
            f"expand takes an nn.Module, not {type(model).__name__}",
            remedy="pass a constructed model, not its class or its state_dict",
        )
    for path, module in nn.Module.named_modules(model):
        if refused := _refusal(module):
            where = f"{path or '(root)'} ({type(module).__name__})"
            raise InputError(refused[0], module_path=where, remedy=refused[1])
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if refused := _refused_tensor(tensor):
            raise InputError(f"{name} {refused[0]}", remedy=refused[1])


def _refusal(module: nn.Module) -> tuple[str, str] | None:
    """Why a module cannot be expanded in this form, and what to do; None if it can."""
    kind = type(module)
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return "the model is wrapped for data parallelism", "expand model.module, then wrap"
    if is_compiled(module):
        return "the model is compiled", "expand model._orig_mod, then torch.compile the teacher"
    if isinstance(module, torch.jit.ScriptModule):
        return "the model is TorchScript", "expand the Python module it was made from"
    quantized = ".quantized" in kind.__module__ and kind.__module__.startswith("torch.")
    if quantized and not isinstance(module, FLOAT_FUNCTIONALS):
        return "the model is quantized", "expand the float model, quantize the collapsed student"
    for name in ("named_parameters", "named_buffers", "named_modules"):
        own, plain = getattr(kind, name), getattr(nn.Module, name)
        if own is plain:
            continue
        found, there = ([(path, id(x)) for path, x in named(module)] for named in (own, plain))
        if found != there:
            remedy = "give the method another name (trainable_parameters, say, for an optimizer)"
            return f"{kind.__name__}.{name} hides or renames what a teacher has to know", remedy
    return None


def _refused_tensor(x: Tensor) -> tuple[str, str] | None:
    """The same for a parameter or buffer."""
    if isinstance(x, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
        return "is lazy: it has no shape yet", "run the model once, then expand it"
    if x.is_meta or is_fake(x):
        remedy = "load or initialise the weights first (model.to_empty, load_state_dict)"
        return "is on the meta device: it has no values", remedy
    if x.layout != torch.strided:
        return f"is {x.layout}", "hold it dense (x.to_dense()), or pass it as an input of forward"
    if x.is_quantized or (x.is_floating_point() and x.itemsize == 1):
        return f"is quantized ({x.dtype})", "expand the float model, quantize the collapsed student"
    if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        remedy = "expand the model with plain tensors, then wrap, shard or quantize"
        return f"is a {type(x).__name__}, which computes in its own way", remedy
    return None


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What the user's own code raises when it is run once more, as the user's to mend."""
    try:
        yield
    except (GpdfxError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        source = raised_at(error)
        if not source:  # nothing of the user's was running
            text = f"expand fails on this network: {type(error).__name__}: {error}"
            raise CaptureError(text, remedy=BUG) from error
        raise InputError(
            f"the model's code fails where expand runs it: {type(error).__name__}: {error}",
            source=source,
            remedy="let it run any number of times on copies of the model, in train and in eval "
            "mode, with gradients and without",
        ) from error


# --------------------------------------------------------------------------- the process
_ONE = threading.RLock()
"""torch.export is not made for threads, and the random generators are everybody's."""


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """One ``expand`` at a time, whatever state the caller's thread is in (gradients, inference,
    autocast, default device, modes), and all random generators as they were after it."""
    devices = {x.device for x in (*model.parameters(), *model.buffers())}
    kinds = {"cpu", *(d.type for d in devices)}
    cuda = [d for d in devices if d.type == "cuda"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ONE)
        stack.enter_context(without_function_modes())
        stack.enter_context(without_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in filter(torch.amp.is_autocast_available, sorted(kinds)):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(local_norms())  # others need not expand now
        stack.enter_context(keep_rng(cuda))
        stack.enter_context(_told())
        yield
