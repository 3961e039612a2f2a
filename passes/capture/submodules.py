"""Capture in parts: where the whole network does not export, the largest modules that do.

One run in each mode records how every module is called. From the root down, a module that exports
for all of its recorded calls is a part; of one that does not, the children are tried. What stands
between the parts stays the user's Python, and sees the student's widths.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ...calls import tree
from ...calls.call import Call
from ...calls.examples import seed_all
from ...calls.sizes import fits
from ...errors import CaptureError
from ...torch_private import FUSED, in_transform
from ..program import CallSite, Program, duplicate
from .branchless import unknown
from .export import bare, first_line, with_module
from .limits import LEVELS
from .modes import enter, flags_of, modes_of

Calls = dict[str, list[CallSite]]

RUNS = 8
"""How often a network is run, at most, to see all of its modules called."""
GRAPHS = 8
"""Structures of calls of one module; one with more is taken apart."""


def capture_parts(
    student: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    functional: bool,
    dynamic: str,
    why: CaptureError,
    apart: Mapping[str, str],
) -> Program:
    """As ``capture`` of the whole network, which failed (``why``). Raises it again if no module
    with parameters can be captured. ``apart``: modules that must not be, as one -> why."""
    calls = _steady(record(student, args, kwargs), record(_shuffled(student), args, kwargs))
    program = replace(bare(student), apart={"": _reason(why)} | dict(apart))
    levels = LEVELS[LEVELS.index(dynamic) :]
    for path, module in student.named_modules():  # a module before those in it
        inside = any(path.startswith(f"{part}.") for part in program.parts)
        above = any(f"{one}.".startswith(f"{path}.") for one in apart)
        owns = path in calls and any(True for _ in module.parameters())
        if path and owns and not inside and not above:
            try:
                program = _with_part(program, calls[path], functional, levels)
            except CaptureError as error:
                program = replace(program, apart={**program.apart, path: _reason(error)})
    if not program.modes:
        if found := unknown(student):
            said = str(why).splitlines()[0]
            raise CaptureError(said, module_path=found[0], remedy=found[1]) from why
        raise why
    return program


def _reason(error: CaptureError) -> str:
    """What export said, and about which line of the user's."""
    said = first_line(error.__cause__ or error)[:300]
    return f"{said} ({error.source})" if error.source else said


def _with_part(
    program: Program, sites: list[CallSite], functional: bool, levels: Sequence[str]
) -> Program:
    """The program with one module, a graph for every structure and mode of its calls."""
    for site in sites:
        graphs = [mode for mode in program.modes.values() if mode.site.path == site.path]
        if any(alike(mode.site, site) and fits(mode.graph, site.tensors) for mode in graphs):
            continue
        if len(graphs) == GRAPHS:
            raise CaptureError(f"it is called in more than {GRAPHS} ways")
        larger = _enlarged(site)
        try:
            program = with_module(program, [larger], functional, levels)
        except CaptureError:
            if larger is site:
                raise
            program = with_module(program, [site], functional, levels)
    return program


def _enlarged(site: CallSite) -> CallSite:
    """A call with fewer than two samples (tokens of an expert, boxes of an image) would be baked:
    the same with three."""
    first = next((x.shape[0] for x in site.tensors if x.ndim), 2)
    if first > 1:
        return site

    def three(x: torch.Tensor) -> torch.Tensor:
        if not x.ndim or x.shape[0] != first:
            return x
        return x.expand(3, *x.shape[1:]).clone() if first else x.new_zeros((3, *x.shape[1:]))

    return replace(site, tensors=tuple(map(three, site.tensors)))


def alike(a: CallSite, b: CallSite) -> bool:
    """True for calls of one module that differ in their tensors alone."""
    return a.path == b.path and a.flags == b.flags and a.call.pattern.same(b.call.pattern)


def recapture(
    program: Program,
    student: nn.Module,
    dtype: torch.dtype,
    functional: bool,
    level: str | None = None,
) -> Program:
    """The same sites, of a student in another dtype, at the same levels or at one of them all."""
    result = bare(student)
    for mode in program.modes.values():
        cast = tuple(x.to(dtype) if x.is_floating_point() else x for x in mode.site.tensors)
        site = replace(mode.site, tensors=cast)
        result = with_module(result, [site], functional, (level or mode.level,))
    return result


# --------------------------------------------------------------------------- recording
def record(student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Calls:
    """How every module is called in one run of each mode, up to where it fails if it does; in
    further ones, with other random numbers, if there are some that are not (layer drop)."""
    calls, modes = Calls(), modes_of(student)
    owners = {path for path, part in student.named_modules() if list(part.parameters())}
    for mode in modes:
        known: set[str] = set()
        for seed in range(RUNS):
            met: Calls = {}
            run = enter(duplicate(student), mode, modes)
            own_args, own_kwargs = tree.fresh((args, kwargs))
            if seed:
                seed_all(seed)
            with contextlib.suppress(Exception), recording(run, met, mode=mode):
                run(*own_args, **own_kwargs)
            new = met.keys() - known
            for path in new:
                calls.setdefault(path, []).extend(met[path])
            known |= new
            if owners <= known or (seed >= 3 and not new):
                break
    return calls


def _steady(calls: Calls, others: Calls) -> Calls:
    """Without the modules whose arguments other than tensors follow from values (how many tokens
    an expert gets): with other weights they are called in another way."""
    return {
        path: sites
        for path, sites in calls.items()
        if all(any(alike(a, b) for a in sites) for b in others.get(path, []))
    }


def _shuffled(student: nn.Module) -> nn.Module:
    """A copy with every parameter's values in another order."""
    other, draw = duplicate(student), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in other.parameters():
            order = torch.randperm(p.numel(), generator=draw).to(p.device)
            p.copy_(p.flatten()[order].view_as(p))
    return other


@contextlib.contextmanager
def recording(
    run: nn.Module, calls: Calls, paths: Sequence[str] | None = None, mode: str = ""
) -> Iterator[None]:
    """While it lasts, the calls of the modules (all, or ``paths``) are written down; gradients are
    on, as in training, so that no module takes a shortcut for inference. None is of a module that
    is called with other parameters than its own (``functional_call``) or under a transform of
    ``torch.func``."""
    lent = set[str]()
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [calls.pop(path, None) for path in lent])
        for path, module in run.named_modules():
            if paths is None or path in paths:
                note = partial(_note, calls, path, mode, [*map(id, module.parameters())], lent)
                handle = module.register_forward_pre_hook(note, prepend=True, with_kwargs=True)
                stack.enter_context(handle)
        slow_attention(run)
        stack.enter_context(torch.enable_grad())
        yield


def _note(
    calls: Calls,
    path: str,
    mode: str,
    own: list[int],
    lent: set[str],
    module: nn.Module,
    args: Any,
    kwargs: Any,
) -> None:
    if in_transform() or own != [*map(id, module.parameters())]:
        lent.add(path)
        return
    with contextlib.suppress(TypeError, ValueError):  # a forward without signature
        call = Call(module, args, kwargs)
        tensors = tuple(x.detach() for x in call.flatten(args, kwargs))
        site = CallSite(path, mode, flags_of(module), call, tensors)
        calls.setdefault(path, []).append(site)


def slow_attention(module: nn.Module) -> None:
    """Rule out the fused inference path of ``nn.TransformerEncoder`` in a copy of the user's module
    for good: it goes round its layers."""
    for part in module.modules():
        for kind, switch in FUSED.items():
            if isinstance(part, kind):
                setattr(part, switch, False)
