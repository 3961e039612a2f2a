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
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from .program import Mode, Program, source_line


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    functional: bool = False,
    dynamic: bool = True,
) -> Program:
    """Trace a copy of the model in both modes.

    ``dynamic``: the batch (dim 0 of tensor inputs) stays free. ``functional``: every in-place op
    becomes a functional one, with a final copy to the buffer that it writes.
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
    for mode in ("train", "eval"):
        traced = copy.deepcopy(student).train(mode == "train")
        exported = _export(traced, args, kwargs, mode, dynamic)
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
    return Program(student, modes, tensors, alias, children)


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


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_kind = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return same_kind and torch.equal(a, b)


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str, dynamic: bool
) -> ExportedProgram:
    errors = []
    for shapes in (dynamic_batch(model, args, kwargs) if dynamic else None, None):
        try:
            with _quiet():
                return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # export raises everything; the first reason is the useful one
            errors.append(error)
    trace = "".join(traceback.format_exception(errors[0]))
    reason = str(errors[0]).strip().splitlines() or [type(errors[0]).__name__]
    raise CaptureError(
        f"torch.export cannot capture {type(model).__name__} in {mode} mode: {reason[0][:300]}",
        source=source_line(trace) or None,
        remedy="remove control flow that depends on tensor values from forward (torch.where, "
        "torch.cond), or expand the sub-modules that do export one by one",
    ) from errors[0]


def dynamic_batch(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """Dynamic shapes for ``torch.export``: dim 0 of every tensor that shares the batch size."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    sizes = [x.shape[0] for x in tensors if x.ndim]
    if not sizes or sizes[0] < 2:
        return None

    def spec(x: Any) -> dict[int, Any] | None:
        shared = isinstance(x, torch.Tensor) and x.ndim and x.shape[0] == sizes[0]
        return {0: Dim.AUTO} if shared else None

    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(spec, arg) for name, arg in bound.items()}


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
