"""Capture: a module -> ATen graphs, one for ``train()`` and one for ``eval()``.

``torch.export`` bakes dropout, drop-path and batch norm, so each mode has its own graph; both name
the same tensors, by the student's own names. Arguments and results of any structure are flattened
by us. The user's model is never touched: copies are traced.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import re
import traceback
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ...calls import tree
from ...calls.call import Call
from ...calls.tree import Pattern
from ...errors import CaptureError, InputError
from ..program import CallSite, Mode, Program, duplicate, shape, source_line
from .limits import (
    LEVELS,
    PATIENCE,
    TooSlowError,
    dynamic_shapes,
    has_unknown_size,
    quiet,
    time_limit,
)


def whole(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[CallSite]:
    """The network as one piece, in both modes."""
    call = Call(model, args, kwargs)
    tensors = tuple(call.flatten(args, kwargs))
    return [CallSite("", training, call, tensors) for training in (True, False)]


def capture(
    student: nn.Module,
    sites: list[CallSite],
    functional: bool = False,
    dynamic: str = "sizes",
    *,
    lower: bool = True,
    known: Collection[str] = (),
) -> Program:
    """Trace copies of one module of the student (see ``CallSite``); its graphs name the student's
    own tensors.

    ``dynamic``: which input sizes stay free, one of ``LEVELS``; where that fails, or takes too
    long, the next lower level is tried, unless ``lower`` is false. ``functional``: every in-place
    op becomes a functional one, with a final copy to the buffer that it writes.
    Raises ``CaptureError`` with the reason and the user's source line if it does not export.
    """
    names, alias = _names(student)
    tensors = {name: tensor for name, tensor in names.items() if name not in alias}
    children: dict[str, nn.Module] = {}
    modes: dict[str, Mode] = {}
    levels = LEVELS[LEVELS.index(dynamic) :] if lower else (dynamic,)
    exported, level = _export(student, sites, levels)
    for site, (program, out) in zip(sites, exported, strict=True):
        key = _key(site, (*known, *modes))
        module = (program.run_decompositions({}) if functional else program).module(
            check_guards=False
        )
        assert isinstance(module, fx.GraphModule)
        graph = module.graph
        graph.set_codegen(fx.graph.CodeGen())
        graph.owning_module = None  # names are ours from here on, not its attributes
        prefix = f"{site.path}." if site.path else ""
        for node in graph.nodes:
            if node.op == "get_attr" and (name := prefix + node.target) in names:
                node.target = alias.get(name, name)
            elif node.op == "get_attr":
                node.target = _adopt(key, node.target, module, tensors, children, bool(prefix))
            elif node.op == "output":
                node.args = (tuple(pytree.tree_leaves(node.args[0])),)
            if prefix and (stack := node.meta.get("nn_module_stack")):
                node.meta["nn_module_stack"] = {
                    k: (f"{site.path}.{path}".rstrip("."), kind)
                    for k, (path, kind) in stack.items()
                }
        modes[key] = Mode(graph, site, out, level)
    return Program(student, modes, tensors, alias, children, functional=functional)


def _key(site: CallSite, known: Collection[str]) -> str:
    """``train``, or ``backbone_train``, ``backbone_train_1`` for parts."""
    key = base = f"{site.path}.{site.mode}".lstrip(".").replace(".", "_")
    number = itertools.count(1)
    while key in known:
        key = f"{base}_{next(number)}"
    return key


def _names(student: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All parameters and buffers by name, and for tied ones: other name -> first name."""
    names = dict(
        itertools.chain(
            student.named_parameters(remove_duplicate=False),
            student.named_buffers(remove_duplicate=False),
        )
    )
    first: dict[int, str] = {}
    alias = {n: first[id(t)] for n, t in names.items() if first.setdefault(id(t), n) != n}
    return names, alias


def _adopt(
    key: str,
    target: str,
    module: fx.GraphModule,
    tensors: dict[str, torch.Tensor],
    children: dict[str, nn.Module],
    part: bool,
) -> str:
    """Name what export made itself: lifted constants, and sub-graphs of higher-order ops."""
    made = operator.attrgetter(target)(module)
    shared = isinstance(made, torch.Tensor) and not part
    name = ("_constant_" if shared else f"_{key}_") + target.replace(".", "_")
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


def _export(
    student: nn.Module, sites: list[CallSite], levels: tuple[str, ...]
) -> tuple[list[tuple[ExportedProgram, Pattern]], str]:
    """All sites at the first level of free sizes that is possible for all, and that level."""
    failed: dict[str, Exception] = {}
    for level in levels:
        shapes = [dynamic_shapes(site.tensors, level) for site in sites]
        if level != "none" and not any(shapes):
            continue
        patience = PATIENCE if level == "sizes" and len(levels) > 1 else None
        done = []
        try:
            for site, free in zip(sites, shapes, strict=True):
                done.append(_export_site(student, site, free, patience))
            return done, level
        except TooSlowError:
            continue
        except InputError:
            raise
        except Exception as error:  # export raises everything
            failed.setdefault(site.mode, error)
    mode, first = next(iter(failed.items()))
    trace = "".join(traceback.format_exception(first))
    reason = str(first).strip().splitlines() or [type(first).__name__]
    name = type(student.get_submodule(sites[0].path)).__name__
    raise CaptureError(
        f"torch.export cannot capture {name} in {mode} mode: {reason[0][:300]}",
        source=source_line(trace) or None,
        remedy="remove control flow that depends on tensor values from forward (torch.where, "
        "torch.cond), or expand the sub-modules that do export one by one",
    ) from first


def _export_site(
    student: nn.Module, site: CallSite, free: Any, patience: float | None
) -> tuple[ExportedProgram, Pattern]:
    """Export a copy of a module whose forward takes and returns flat tensors."""
    module = duplicate(student.get_submodule(site.path)).train(site.training)
    forward, returned = module.forward, list[Pattern]()

    def flat(*tensors: Any) -> tuple[Any, ...]:
        args, kwargs = site.call.unflatten(list(tensors))
        out, values = tree.pattern(forward(*args, **kwargs))
        held = [x for x in tree.leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if {id(x) for x in held} - {id(x) for x in tensors}:
            raise TypeError("it puts tensors into an object that it is called with")
        returned[:] = [out]
        return tuple(values)

    names = [re.sub(r"\W+", "_", name).strip("_") for name in site.call.names]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    unique = [n if names.count(n) == 1 else f"{n}_{k}" for k, n in enumerate(names)]
    flat.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in unique])  # type: ignore[attr-defined]
    module.forward = flat
    with quiet(), time_limit(patience):
        shapes = dict(zip(unique, free, strict=True)) if free else None
        exported = torch.export.export(module, site.tensors, dynamic_shapes=shapes, strict=False)
    if any(has_unknown_size(node.meta.get("val")) for node in exported.graph.nodes):
        raise TypeError("a size in it depends on values")
    _check_constants(module, exported)
    _drop_replacements(exported.graph)
    if not site.training:
        _check_faithful(student, site, exported)
    return exported, returned[0]


def _check_constants(module: nn.Module, exported: ExportedProgram) -> None:
    """A parameter that forward takes out of a plain list is a constant for export: no teacher, no
    optimizer's step and no ``functional_call`` would ever reach it."""
    storages = {p.untyped_storage().data_ptr(): name for name, p in module.named_parameters()}
    for constant in exported.constants.values():
        if not isinstance(constant, torch.Tensor) or not constant.numel():
            continue
        if name := storages.get(constant.untyped_storage().data_ptr()):
            raise InputError(
                f"forward reads the parameter {name} out of a plain list or dict",
                module_path=type(module).__name__,
                remedy="hold it in an nn.ParameterList or nn.ParameterDict, or read it as an "
                "attribute of its module",
            )


def _check_faithful(student: nn.Module, site: CallSite, exported: ExportedProgram) -> None:
    """Some models ask whether they are traced, and then compute something else."""
    eager = duplicate(student.get_submodule(site.path)).eval()
    args, kwargs = site.call.unflatten([x.clone() for x in site.tensors])
    with torch.no_grad(), quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # dropout may be on in eval mode, too
        want = tree.leaves(eager(*args, **kwargs))
        torch.manual_seed(0)
        got = exported.module(check_guards=False)(*(x.clone() for x in site.tensors))
    want = [x for x in want if isinstance(x, torch.Tensor) and x.is_floating_point()]
    got = [x for x in got if isinstance(x, torch.Tensor) and x.is_floating_point()]
    for x, y in zip(want, got, strict=True):
        finite = x.abs() < 1e30
        gap, size = (x - y)[finite].abs(), x[finite].abs()
        if gap.numel() and float(gap.max()) > 1e-2 * float(size.max()):  # far from rounding
            raise TypeError("its graph is not its function: it asks whether it is traced")
