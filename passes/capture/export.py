"""Capture: a module -> ATen graphs, one for ``train()``, one for ``eval()``, and one more where
the user left it in neither.

``torch.export`` bakes dropout, drop-path and batch norm, so each mode has its own graph; all name
the same tensors, by the student's own names. Arguments and results of any structure are flattened
by us. The user's model is never touched: copies are traced.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import operator
import re
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ...calls import progress, tree
from ...calls.call import Call
from ...calls.given import Watch
from ...calls.held import HeldTensors, registered, tensors_and_modules
from ...calls.integers import Integers
from ...calls.sparse import SparseTensors, is_size
from ...calls.tree import Pattern
from ...errors import CaptureError, InputError
from ...torch_private import Mapped, is_fake, is_vmap, see, take_hooks
from ..program import (
    ORDER,
    CallSite,
    Mode,
    Program,
    copied,
    draws,
    duplicate,
    memory_order,
    mutated,
    shape,
    source_line,
)
from . import intercept, limits, recurrent
from .branchless import StandIns, stand_back, without_branches
from .constants import Constants, compute
from .limits import LEVELS
from .modes import GIVEN, modes_of, set_flags


def whole(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[CallSite]:
    """The network as one piece, in all its modes."""
    call = Call(model, args, kwargs)
    tensors = tuple(map(tree.copied, call.flatten(args, kwargs)))  # one in two places becomes two
    return [CallSite("", mode, flags, call, tensors) for mode, flags in modes_of(model).items()]


def capture(
    student: nn.Module, sites: list[CallSite], functional: bool = False, dynamic: str = "sizes"
) -> Program:
    """Trace copies of one module of the student (see ``CallSite``); its graphs name the student's
    own tensors.

    ``dynamic``: which input sizes stay free, one of ``LEVELS``; where that fails, or takes too
    long, the next lower level is tried. ``functional``: every in-place op becomes a functional
    one, with a final copy to the buffer that it writes.
    Raises ``CaptureError`` with the reason and the user's source line if it does not export.
    """
    return with_module(bare(student), sites, functional, LEVELS[LEVELS.index(dynamic) :])


def bare(student: nn.Module) -> Program:
    """The student's tensors, and no graph yet."""
    parameters = student.named_parameters(remove_duplicate=False)
    buffers = student.named_buffers(remove_duplicate=False)
    names: dict[str, torch.Tensor] = dict(itertools.chain(parameters, buffers))
    first: dict[int, str] = {}
    alias = {n: first[id(t)] for n, t in names.items() if first.setdefault(id(t), n) != n}
    own = {n: t for n, t in names.items() if n not in alias}
    return Program(student, {}, own, alias, {}, flags=modes_of(student))


def with_module(
    program: Program, sites: list[CallSite], functional: bool, levels: Sequence[str]
) -> Program:
    """The program with the graphs of one module, as ``capture`` makes them, at the first of the
    levels that is possible."""
    modes, tensors, children = dict(program.modes), dict(program.tensors), dict(program.children)
    program = replace(program, modes=modes, tensors=tensors, children=children)
    exported, level = _export(program.student, sites, levels)
    for site, (export, out) in zip(sites, exported, strict=True):
        key = _key(site, modes)
        if functional or any(map(is_vmap, export.graph.nodes)):
            export = export.run_decompositions({})
            if _unknown(export.graph):  # it numbers them anew
                _see_sizes(export, site)
        module: Any = export.module(check_guards=False)
        for part in module.modules():  # regions have graphs of their own
            if isinstance(part, fx.GraphModule):
                for put_back in (intercept.put_back, stand_back, recurrent.put_back):
                    put_back(part.graph)
        _note_orders(module, site)
        graph = copied(module.graph)  # names are ours from here on, not its attributes
        lifted = set[str]()
        _drop_writes_to_itself(graph)
        for node in graph.nodes:
            if node.op == "get_attr":
                name = f"{site.path}.{node.target}".lstrip(".")
                name = program.alias.get(name, name)
                own = name in tensors
                node.target = name if own else _adopt(program, site, key, node.target, module)
                lifted |= set() if own else {node.target}
            if site.path and (stack := node.meta.get("nn_module_stack")):
                node.meta["nn_module_stack"] = {
                    k: (f"{site.path}.{path}".rstrip("."), kind)
                    for k, (path, kind) in stack.items()
                }
        compute(graph, tensors, lifted)
        modes[key] = Mode(graph, site, out, level)
    intercept.forget()
    return program


class _Ran(fx.Interpreter):
    """Runs a graph, and notes the memory order of what random ops read."""

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if isinstance(found, torch.Tensor) and any(map(_deals, n.users)):
            n.meta[ORDER] = memory_order(found)
        return found


def _deals(node: fx.Node) -> bool:
    """Whether it draws; dropout that is off does not."""
    return draws(node) and not any(x is False for x in node.args)


def _note_orders(module: fx.GraphModule, site: CallSite) -> None:
    """Random numbers are dealt out in the memory order that the student's tensors really have."""
    if not any(map(_deals, module.graph.nodes)):
        return
    before = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    with _aside():
        with contextlib.suppress(Exception):
            _Ran(module, graph=module.graph).run(*(x.clone() for x in site.tensors))
        for buffer, old in before:
            buffer.copy_(old)


def _key(site: CallSite, known: Collection[str]) -> str:
    """``train``, or ``backbone_train``, ``backbone_train_1`` for parts."""
    base = f"{site.path}.{site.mode}".lstrip(".").replace(".", "_")
    numbered = (f"{base}_{number}" for number in itertools.count(1))
    return next(key for key in itertools.chain([base], numbered) if key not in known)


def _adopt(program: Program, site: CallSite, key: str, target: str, module: nn.Module) -> str:
    """Name what export made itself: lifted constants, and sub-graphs of higher-order ops."""
    made = operator.attrgetter(target)(module)
    shared = isinstance(made, torch.Tensor) and not site.path
    name = ("_constant_" if shared else f"_{key}_") + target.replace(".", "_")
    if isinstance(made, nn.Module):
        program.children[name] = made
        return name
    while name in program.tensors and not _identical(program.tensors[name], made):
        name += "_"
    program.tensors[name] = made
    return name


def _drop_replacements(graph: fx.Graph) -> None:
    """Where forward replaces a buffer by one of another shape, export writes a copy that cannot
    be. What such a buffer holds is made anew in every call: nothing is lost without it."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        target: Any = node.args[0]
        if target.op == "placeholder":
            old, new = shape(target)[::-1], shape(node.args[1])[::-1]
            if len(new) > len(old) or any(map(lambda a, b: a not in (b, 1), new, old)):
                graph.erase_node(node)


def _drop_writes_to_itself(graph: fx.Graph) -> None:
    """Export ends a graph with a copy to each buffer that it wrote to. What was written in place is
    there already, and once more would be a change to autograd."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        target, written = node.args
        while written is not target and (inside := mutated(written)):
            written = inside[0][1]
        if written is target and not node.users:
            graph.erase_node(node)


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_kind = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return same_kind and torch.equal(a, b)


# --------------------------------------------------------------------------- free sizes


def _export(
    student: nn.Module, sites: list[CallSite], levels: Sequence[str]
) -> tuple[list[tuple[ExportedProgram, Pattern]], str]:
    """All sites at the first level of free sizes that is possible for all, and that level."""
    failed: list[tuple[str, Exception]] = []
    for level in levels:
        shapes = [limits.dynamic_shapes(site.tensors, level) for site in sites]
        if level != "none" and not any(shapes):
            continue
        patience = limits.PATIENCE if level == "sizes" and len(levels) > 1 else None
        done = []
        try:
            for site, free in zip(sites, shapes, strict=True):
                done.append(_export_site(student, site, free, patience))
            return done, level
        except limits.TooSlowError:
            continue
        except InputError:
            raise
        except _RaisedError as raised:
            failed.append((site.mode, raised.error))
        except Exception as error:  # export raises everything
            failed.append((site.mode, error))
    mode, first = failed[0]
    kind = type(student.get_submodule(sites[0].path)).__name__
    raise CaptureError(
        f"torch.export cannot capture {kind} in {mode} mode: {first_line(first)[:300]}",
        source=source_line("".join(traceback.format_exception(first))) or None,
        remedy="remove control flow that depends on tensor values from forward (torch.where, "
        "torch.cond), or expand the sub-modules that do export one by one",
    ) from first


class _RaisedError(Exception):
    """Holds what forward raised: of an error that export knows it prints all of the graph."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _export_site(
    student: nn.Module, site: CallSite, free: Any, patience: float | None
) -> tuple[ExportedProgram, Pattern]:
    """Export a copy of a module, once more wherever ``int`` of a tensor is what failed."""
    integers = Integers()
    while True:
        try:
            return _export_copy(student, site, free, patience, integers)
        except Exception as error:
            if not integers.more(error):
                raise


def _export_copy(
    student: nn.Module, site: CallSite, free: Any, patience: float | None, integers: Integers
) -> tuple[ExportedProgram, Pattern]:
    """Export a copy of a module whose forward takes and returns flat tensors."""
    original = student.get_submodule(site.path)
    others = {id(t): t for t in registered(student).values()}
    for t in registered(original).values():
        del others[id(t)]
    module = _called(duplicate(original, dict(others)), site)
    without_branches(module)
    forward, returned, also = take_hooks(module), list[Pattern](), HeldTensors(module)
    if isinstance(module, fx.GraphModule):  # export would run its graph, and not what is given here
        module.__class__ = nn.Module  # type: ignore[assignment]

    def flat(*tensors: Any) -> tuple[Any, ...]:
        args, kwargs = site.call.unflatten(list(tensors))
        watch = Watch((args, kwargs))
        try:
            constants = Constants(others.values())
            with also.filled(registered(module)), _written(module), Mapped(), constants:
                out, values = tree.pattern(watch.outcome(forward(*args, **kwargs)))
        except Exception as error:
            raise _RaisedError(error) from error
        watch.undo()
        if any(is_fake(x) for _, x in tensors_and_modules([*out.held], hops=0)):
            raise TypeError("it returns a function, or an object, that holds tensors of the call")
        leaves = (x for x in tree.leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        held = [x for x in leaves if not is_size(x)]
        if {id(x) for x in held} - {id(x) for x in tensors}:
            raise TypeError("it puts tensors into an object that it is called with")
        returned[:] = [out]
        return tuple(values)

    names = [re.sub(r"\W+", "_", name).strip("_") for name in site.call.names]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    unique = [n if names.count(n) == 1 else f"{n}_{k}" for k, n in enumerate(names)]
    flat.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in unique])  # type: ignore[attr-defined]
    module.forward = flat
    name = site.path or type(original).__name__
    progress.at("capturing", f"{name} in {site.mode} mode")
    with limits.quiet(), limits.time_limit(patience), _stood_in(), integers:
        shapes = dict(zip(unique, free, strict=True)) if free else None
        exported = torch.export.export(module, site.tensors, dynamic_shapes=shapes, strict=False)
    if _unknown(exported.graph):
        _see_sizes(exported, site)
    _check_constants(module, exported, others)
    _drop_replacements(exported.graph)
    if not site.training:
        _check_faithful(student, site, exported)
    return exported, returned[0]


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """What runs in it is no part of the user's training: no gradients, warnings or random state."""
    with torch.no_grad(), limits.quiet(), torch.random.fork_rng(devices=[]):
        yield


@contextlib.contextmanager
def _stood_in() -> Iterator[None]:
    """While it lasts, what export cannot trace is something else."""
    with intercept.intercepted(), StandIns(), recurrent.FreeLength(), SparseTensors():
        yield


def _unknown(graph: fx.Graph) -> bool:
    return any(limits.has_unknown_size(node.meta.get("val")) for node in graph.nodes)


class _Seen(fx.Interpreter):
    """Runs a graph, and notes what the sizes in it that depend on values are."""

    def run_node(self, n: fx.Node) -> Any:
        found, val = super().run_node(n), n.meta.get("val")
        pairs: Iterable[tuple[Any, Any]] = [(val, found)]
        if isinstance(val, torch.Tensor):
            pairs = zip(val.shape, found.shape, strict=True)
        for size, number in pairs:
            if isinstance(size, torch.SymInt):
                see(size, number)
        return found


def _see_sizes(exported: ExportedProgram, site: CallSite) -> None:
    """Sizes that depend on values (``x[mask]``, ``nonzero``) are such as the example has them, for
    all that asks for numbers; the graph itself was captured for any."""
    module: Any = exported.module(check_guards=False)
    with _aside():
        _Seen(module).run(*(x.clone() for x in site.tensors))
    if _unknown(exported.graph):
        raise TypeError("a size in it depends on values")


@contextlib.contextmanager
def _written(module: nn.Module) -> Iterator[None]:
    """A buffer that forward replaces (``self.average = new``) is written to instead, at the end:
    export forgets what a module's attribute is by then."""
    before = [(part, leaf, b) for part in module.modules() for leaf, b in part._buffers.items()]
    yield
    for part, leaf, old in before:
        new = part._buffers.get(leaf)
        if old is not None and new is not None and new is not old and new.shape == old.shape:
            with torch.no_grad():
                part._buffers[leaf] = old.copy_(new)


def _called(module: nn.Module, site: CallSite) -> nn.Module:
    """A copy of a module as it is when it is called. Its ``train()`` may do more than set flags."""
    if site.mode != GIVEN:
        module.train(site.training)
    return set_flags(module, site.flags)


def _check_constants(
    module: nn.Module, exported: ExportedProgram, others: Mapping[int, torch.Tensor]
) -> None:
    """A parameter that forward takes out of what is not looked into (an array of objects) is a
    constant for export: no teacher, no optimizer's step and no ``functional_call`` would ever reach
    it. So is one of ``others``, which are not in the module but in the student."""
    storages = {p.untyped_storage().data_ptr(): name for name, p in module.named_parameters()}
    outside = {t.untyped_storage().data_ptr() for t in others.values()}
    for constant in exported.constants.values():
        if is_fake(constant):
            raise TypeError("it keeps a tensor of the trace from call to call")
        if not (isinstance(constant, torch.Tensor) and constant.numel()):
            continue
        if (place := constant.untyped_storage().data_ptr()) in outside:
            raise TypeError("it reads a parameter or buffer that is not in it, but in the model")
        if name := storages.get(place):
            raise InputError(
                f"forward reads the parameter {name} from where no call can give it another value",
                module_path=type(module).__name__,
                remedy="hold it as an attribute of a module or an object, in a list or a dict",
            )


def _check_faithful(student: nn.Module, site: CallSite, exported: ExportedProgram) -> None:
    """Some models ask whether they are traced, and then compute something else."""
    eager = _called(duplicate(student.get_submodule(site.path)), site)
    args, kwargs = site.call.unflatten([x.clone() for x in site.tensors])
    with _aside():
        torch.manual_seed(0)  # dropout may be on in eval mode, too
        watch = Watch((args, kwargs))
        want = _floating(watch.outcome(eager(*args, **kwargs)))
        torch.manual_seed(0)
        got = _floating(exported.module(check_guards=False)(*(x.clone() for x in site.tensors)))
    for x, y in zip(want, got, strict=True):
        finite = x.abs() < 1e30
        gap, size = (x - y)[finite].abs(), x[finite].abs()
        if gap.numel() and float(gap.max()) > 1e-2 * float(size.max()):  # far from rounding
            raise TypeError("its graph is not its function: it asks whether it is traced")


def _floating(result: Any) -> list[torch.Tensor]:
    leaves = tree.leaves(result)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]
