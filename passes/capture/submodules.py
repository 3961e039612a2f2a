"""Capture in parts: where the whole network does not export, the largest modules that do.

One run in each mode records how every module is called. From the root down, a module that exports
for all of its recorded calls is a part; of one that does not, the children are tried. What stands
between the parts stays the user's Python, and sees the student's widths.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...calls.call import Call
from ...calls.sizes import fits
from ...errors import CaptureError
from ..program import CallSite, Mode, Program, duplicate
from .export import capture

Calls = dict[str, list[CallSite]]

GRAPHS = 8
"""Structures of calls of one module; one with more is taken apart."""


def capture_parts(
    student: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    functional: bool,
    dynamic: str,
    why: CaptureError,
) -> Program:
    """As ``capture`` of the whole network, which failed (``why``). Raises it again if no module
    with parameters can be captured."""
    calls = _steady(record(student, args, kwargs), record(_shuffled(student), args, kwargs))
    program = Program(student, {}, {}, {}, {}, {"": _reason(why)}, functional)
    for name, child in student.named_children():
        program = _add(program, name, child, calls, functional, dynamic, set())
    if not program.modes:
        raise why
    return program


def _add(
    program: Program,
    path: str,
    module: nn.Module,
    calls: Calls,
    functional: bool,
    dynamic: str,
    seen: set[nn.Module],
) -> Program:
    """The program with what can be captured of one module."""
    if module in seen or not any(True for _ in module.parameters()):
        return program
    seen.add(module)
    if path in calls:
        try:
            return _part(program, calls[path], functional, dynamic)
        except CaptureError as error:
            apart = {**program.apart, path: _reason(error)}
            program = replace(program, apart=apart)
    for name, child in module.named_children():
        program = _add(program, f"{path}.{name}", child, calls, functional, dynamic, seen)
    return program


def _reason(error: CaptureError) -> str:
    """What export said, and about which line of the user's."""
    said = str(error).splitlines()[0].partition(" mode: ")[2] or str(error).splitlines()[0]
    return f"{said} ({error.source})" if error.source else said


def _part(program: Program, sites: list[CallSite], functional: bool, dynamic: str) -> Program:
    """The program with one module, a graph for every structure and mode of its calls."""
    graphs: list[Mode] = []
    for site in sites:
        if any(_takes(mode, site) for mode in graphs):
            continue
        if len(graphs) == GRAPHS:
            raise CaptureError(f"it is called in more than {GRAPHS} ways")
        student, known, larger = program.student, program.modes, _enlarged(site)
        try:
            new = capture(student, [larger], functional, dynamic, known=known)
        except CaptureError:
            if larger is site:
                raise
            new = capture(student, [site], functional, dynamic, known=known)
        graphs += new.modes.values()
        program = join_programs(program, new)
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


def _takes(mode: Mode, site: CallSite) -> bool:
    """True if a captured graph is right for another call of its module."""
    return _alike(mode.site, site) and fits(mode.graph, site.tensors)


def _alike(a: CallSite, b: CallSite) -> bool:
    return a.training == b.training and a.call.pattern.same(b.call.pattern)


def join_programs(a: Program, b: Program) -> Program:
    """Two captures of one student."""
    return Program(
        a.student,
        a.modes | b.modes,
        a.tensors | b.tensors,
        a.alias | b.alias,
        a.children | b.children,
        a.apart | b.apart,
        a.functional,
    )


def recapture(
    program: Program, student: nn.Module, dtype: torch.dtype, functional: bool
) -> Program:
    """The same sites at the same levels, of a student in another dtype."""
    result = Program(student, {}, {}, {}, {})
    for mode in program.modes.values():
        cast = tuple(x.to(dtype) if x.is_floating_point() else x for x in mode.site.tensors)
        site = replace(mode.site, tensors=cast)
        new = capture(student, [site], functional, mode.level, lower=False, known=result.modes)
        result = join_programs(result, new)
    return result


# --------------------------------------------------------------------------- recording
def record(student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Calls:
    """How every module is called in one run of each mode, up to where it fails if it does."""
    calls: Calls = {}
    for training in (True, False):
        run = duplicate(student).train(training)
        with contextlib.suppress(Exception), recording(run, calls):
            run(*args, **kwargs)
    return calls


def _steady(calls: Calls, others: Calls) -> Calls:
    """Without the modules whose arguments other than tensors follow from values (how many tokens
    an expert gets): with other weights they are called in another way."""
    return {
        path: sites
        for path, sites in calls.items()
        if all(any(_alike(a, b) for a in sites) for b in others.get(path, []))
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
def recording(run: nn.Module, calls: Calls, paths: Sequence[str] | None = None) -> Iterator[None]:
    """While it lasts, the calls of the modules (all, or ``paths``) are written down; gradients are
    on, as in training, so that no module takes a shortcut for inference."""

    def hook(path: str) -> Any:
        def write(module: nn.Module, args: Any, kwargs: Any) -> None:
            with contextlib.suppress(TypeError, ValueError):  # a forward without signature
                call = Call(module, args, kwargs)
                tensors = tuple(x.detach() for x in call.flatten(args, kwargs))
                calls.setdefault(path, []).append(CallSite(path, module.training, call, tensors))

        return write

    handles = [
        module.register_forward_pre_hook(hook(path), prepend=True, with_kwargs=True)
        for path, module in run.named_modules()
        if paths is None or path in paths
    ]
    try:
        with slow_attention(), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def slow_attention() -> Iterator[None]:
    """Without the fused inference path of ``nn.TransformerEncoder``: it goes round its layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
