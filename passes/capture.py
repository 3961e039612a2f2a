"""Capture: the user's module -> ATen graphs, one for ``train()`` and one for ``eval()``.

``torch.export`` bakes dropout, drop-path and batch norm, so each mode has its own graph; both name
the same tensors, by the student's own names. The user's model is never touched: a copy is traced.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import itertools
import logging
import operator
import signal
import threading
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from .program import Mode, Program, shape, source_line


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    functional: bool = False,
    dynamic: str = "sizes",
    lower: bool = True,
) -> Program:
    """Trace a copy of the model in both modes.

    ``dynamic``: which input sizes stay free, one of ``LEVELS``; where that fails, or takes too
    long, the next lower level is tried, unless ``lower`` is false. ``functional``: every in-place
    op becomes a functional one, with a final copy to the buffer that it writes.
    Raises ``CaptureError`` with the reason and the user's source line if it does not export.
    """
    student = copy.deepcopy(model)
    names = dict(
        itertools.chain(
            student.named_parameters(remove_duplicate=False),
            student.named_buffers(remove_duplicate=False),
        )
    )
    first: dict[int, str] = {}
    alias = {n: first[id(t)] for n, t in names.items() if first.setdefault(id(t), n) != n}
    tensors = {name: tensor for name, tensor in names.items() if name not in alias}
    children: dict[str, nn.Module] = {}
    modes = {}
    levels = LEVELS[LEVELS.index(dynamic) :] if lower else (dynamic,)
    both, dynamic = _export(student, args, kwargs, levels)
    for mode, exported in both.items():
        if functional:
            exported = exported.run_decompositions({})
        module = exported.module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        graph = module.graph
        graph.set_codegen(fx.graph.CodeGen())
        graph.owning_module = None  # names are ours from here on, not its attributes
        for node in graph.nodes:
            if node.op == "get_attr" and node.target not in names:
                node.target = _adopt(mode, node.target, module, tensors, children)
            elif node.op == "get_attr":
                node.target = alias.get(node.target, node.target)
            elif node.op == "output":
                node.args = (tuple(pytree.tree_leaves(node.args[0])),)
        spec = exported.call_spec.out_spec
        assert spec is not None
        leaves = pytree.tree_leaves((args, kwargs))
        constants = tuple(None if isinstance(x, torch.Tensor) else x for x in leaves)
        modes[mode] = Mode(graph, spec, constants)
    return Program(student, modes, tensors, alias, children, dynamic)


def _adopt(
    mode: str,
    target: str,
    module: fx.GraphModule,
    tensors: dict[str, torch.Tensor],
    children: dict[str, nn.Module],
) -> str:
    """Name what export made itself: lifted constants, and sub-graphs of higher-order ops."""
    made = operator.attrgetter(target)(module)
    prefix = "_constant_" if isinstance(made, torch.Tensor) else f"_{mode}_"
    name = prefix + target.replace(".", "_")
    if isinstance(made, nn.Module):
        children[name] = made
        return name
    while name in tensors and not _identical(tensors[name], made):
        name += "_"
    tensors[name] = made
    return name


def _drop_replacements(graph: fx.Graph) -> None:
    """Where forward replaces a buffer by one of another shape, export writes a copy that cannot
    be. What such a buffer holds is made anew in every call: nothing is lost without it."""
    for node in list(graph.nodes):
        target = node.args[0] if node.target is torch.ops.aten.copy_.default else None
        if isinstance(target, fx.Node) and target.op == "placeholder":
            old, new = shape(target), shape(node.args[1])
            fits = all(a in (b, 1) for a, b in zip(new[::-1], old[::-1], strict=False))
            if not fits or len(new) > len(old):
                graph.erase_node(node)


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_kind = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return same_kind and torch.equal(a, b)


# --------------------------------------------------------------------------- free sizes
LEVELS = ("sizes", "batch", "none")
"""Which input sizes stay free: every one that the model leaves free, the batch, none."""

PATIENCE = 10.0
"""Seconds of processor time for a mode with all sizes free; some networks take minutes."""


def _export(
    student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], levels: tuple[str, ...]
) -> tuple[dict[str, ExportedProgram], str]:
    """Both modes at the first level of free sizes that is possible for both, and that level."""
    failed: dict[str, Exception] = {}
    for level in levels:
        shapes = dynamic_shapes(student, args, kwargs, level)
        if shapes is None and level != "none":
            continue
        both = {}
        patience = PATIENCE if level == "sizes" and len(levels) > 1 else None
        try:
            for mode in ("train", "eval"):
                model = copy.deepcopy(student).train(mode == "train")
                with _quiet(), _patience(patience):
                    both[mode] = torch.export.export(
                        model, args, kwargs, dynamic_shapes=shapes, strict=False
                    )
                _drop_replacements(both[mode].graph)
            return both, level
        except _TooSlowError:
            continue
        except Exception as error:  # export raises everything
            failed.setdefault(mode, error)
    mode, first = next(iter(failed.items()))
    trace = "".join(traceback.format_exception(first))
    reason = str(first).strip().splitlines() or [type(first).__name__]
    raise CaptureError(
        f"torch.export cannot capture {type(student).__name__} in {mode} mode: {reason[0][:300]}",
        source=source_line(trace) or None,
        remedy="remove control flow that depends on tensor values from forward (torch.where, "
        "torch.cond), or expand the sub-modules that do export one by one",
    ) from first


def dynamic_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], level: str
) -> dict[str, Any] | None:
    """Dynamic shapes for ``torch.export``: dim 0 of every tensor that shares the batch size, and
    for ``sizes`` all dimensions of all tensors; export bakes those that the model does not leave
    free."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    sizes = [x.shape[0] for x in tensors if x.ndim]
    if level == "none" or not sizes or sizes[0] < 2:
        return None

    def spec(x: Any) -> dict[int, Any] | None:
        if not isinstance(x, torch.Tensor) or not x.ndim:
            return None
        dims = range(1, x.ndim) if level == "sizes" else ()
        batch = [0] if x.shape[0] == sizes[0] else []
        return {d: Dim.AUTO for d in (*batch, *dims) if x.shape[d] > 1} or None

    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(spec, arg) for name, arg in bound.items()}


class _TooSlowError(BaseException):
    """No ``Exception``: nothing on its way out may take it for one of the model's."""


@contextlib.contextmanager
def _patience(seconds: float | None) -> Iterator[None]:
    """Stop the block after some seconds of processor time. Needs a POSIX timer and the main
    thread; elsewhere nothing is tried that would need it."""
    if seconds is None:
        yield
        return
    timer = getattr(signal, "setitimer", None)
    if timer is None or threading.current_thread() is not threading.main_thread():
        raise _TooSlowError

    def stop(*_: Any) -> None:
        raise _TooSlowError

    before = signal.signal(signal.SIGVTALRM, stop)
    timer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        timer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A failed export prints its partial graph to stderr; keep the terminal for our own error."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
