"""The value that passes hand to each other: graphs over one set of named tensors."""

from __future__ import annotations

import copy
import os
import re
import traceback
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import fx, nn

from ..calls.call import Call
from ..calls.held import ATOMIC, copy_functions, identity, places, tensors_and_modules
from ..calls.tree import Pattern
from ..control import ExpandOptions
from ..errors import InputError
from ..kernels import copies
from ..kernels.regions import REGION
from ..torch_private import hint

aten = torch.ops.aten

T = TypeVar("T")
Kind = TypeVar("Kind", bound="Program")
_LIBRARIES = [Path(str(library.__file__)).parent for library in (torch, np)]
_FOLDERS = (*_LIBRARIES, Path(__file__).parents[1], Path(__file__).resolve().parent)
_NOT_THE_USERS = ("<", copy.__file__, *(f"{folder}{os.sep}" for folder in _FOLDERS))
"""How paths of code begin that is a library's, the package's (its passes are really elsewhere), or
generated."""


Flags = tuple[bool, ...]
"""``training`` of a module and of all in it, in the order of ``modules()``."""


@dataclass(frozen=True)
class CallSite:
    """What is captured: a module of the student, in a mode, for a call of one structure.

    ``path``: of the module, empty for the whole network; ``mode``: of the network, see
    ``capture.modes``; ``flags``: of the module, when it is called; ``tensors``: those of the
    example call.
    """

    path: str
    mode: str
    flags: Flags
    call: Call
    tensors: tuple[torch.Tensor, ...]

    @property
    def training(self) -> bool:
        return self.flags[0]

    @property
    def state(self) -> str | Flags:
        """What tells its graph from those of other modes: two of these may have the same graph of
        a part; the flags of a network may be no more than a part of what its ``train()`` does."""
        return self.flags if self.path else self.mode


@dataclass(frozen=True)
class Mode:
    """One captured graph: flat tensor inputs to flat outputs. ``out``: the structure of what the
    module returns; ``level``: which input sizes capture left free."""

    graph: fx.Graph
    site: CallSite
    out: Pattern
    level: str

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)


@dataclass(frozen=True)
class Program:
    """A network as data.

    ``student``: a private copy of the user's module, with the tensors that the graphs name.
    ``modes``: ``train`` and ``eval``, and ``given`` where that is another (``flags``: of the
    student's modules in each); or, where the network was captured in parts, one for every
    part, mode and structure of call. ``tensors``: what ``get_attr`` nodes name, by the student's
    own names; ``alias``: other name -> name, for tied tensors. ``children``: sub-graphs that
    higher-order ops call. ``apart``: modules that stay the user's Python -> why. ``functional``:
    captured without in-place ops. ``options``: what the user asked for.
    """

    student: nn.Module
    modes: dict[str, Mode]
    tensors: dict[str, torch.Tensor]
    alias: dict[str, str]
    children: dict[str, nn.Module]
    apart: dict[str, str] = field(default_factory=dict)
    functional: bool = False
    flags: dict[str, Flags] = field(default_factory=dict)
    options: ExpandOptions = field(default_factory=ExpandOptions, kw_only=True)

    @property
    def parts(self) -> list[str]:
        """The paths of the modules that were captured; one empty path if it is all of it."""
        return list(dict.fromkeys(mode.site.path for mode in self.modes.values()))

    @property
    def names(self) -> dict[str, list[str]]:
        """Tensor -> all its names, its own first: a tied one has several."""
        found = {name: [name] for name in self.tensors}
        for other, name in self.alias.items():
            found[name].append(other)
        return found

    def copied(self) -> Program:
        """The same over copies of its graphs, for a pass to edit."""
        modes = {name: replace(mode, graph=copied(mode.graph)) for name, mode in self.modes.items()}
        return replace(self, modes=modes)

    def each(self) -> Iterator[tuple[str, fx.Node]]:
        """Every node of every mode."""
        for name, mode in self.modes.items():
            for node in mode.graph.nodes:
                yield name, node

    def check(self) -> None:
        """Legality, after every pass: well-formed graphs, and every name they use exists."""
        known = {*self.tensors, *self.children}
        for name, mode in self.modes.items():
            check_graph(name, mode.graph, known)


def check_graph(name: str, graph: fx.Graph, known: Container[Any], modules: bool = False) -> None:
    """Raise ``AssertionError`` for a graph that is not well-formed, names a tensor that is not
    ``known``, or calls what is no op (``modules``: a module may be called)."""
    graph.lint()
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in known:
            raise AssertionError(f"{name}: {node.name} names the unknown tensor {node.target}")
        if node.op == "call_method" or (node.op == "call_module" and not modules):
            raise AssertionError(f"{name}: {node.name} is no ATen call: {node.op}")


def extended(kind: type[Kind], program: Program, **found: Any) -> Kind:
    """A program of a richer kind: what ``program`` has, and what a pass ``found``."""
    names = [f.name for f in fields(kind)]
    return kind(**{n: getattr(program, n) for n in names if hasattr(program, n)} | found)


def copied(graph: fx.Graph) -> fx.Graph:
    """Another graph of the same nodes."""
    twin = fx.Graph()
    twin.output(twin.graph_copy(graph, {}))
    return twin


def unused(name: str, known: Container[Any]) -> str:
    """A name like this one that is not ``known`` yet."""
    while name in known:
        name += "_"
    return name


def duplicate(held: T, memo: dict[int, Any] | None = None, *, ours: bool = False) -> T:
    """A deep copy of a module (or of what holds some), also of one that holds computed tensors (the
    old ``weight_norm``, or a list of results), which ``copy`` alone refuses, and functions that
    name it, which ``copy`` shares. ``memo``: what is shared, by ``id``; ``ours``: a copy already,
    which shares nothing.

    Raises ``InputError`` for a module that cannot be copied, or whose copy would share more.
    """
    memo = {} if memo is None else memo
    shared = {identity(x) for x in memo.values() if isinstance(x, torch.Tensor)}
    own: dict[Any, tuple[str, Any]] = {}
    for place, one in tensors_and_modules(held):
        own.setdefault(identity(one), (place, one))
    atomic = set[int]()
    for _, (_, _, one) in places(held, hops=0):
        if isinstance(one, torch.Tensor) and id(one) not in memo:
            if not one.is_leaf or one.layout != torch.strided:  # ``copy`` refuses them, or some
                memo[id(one)] = one.detach().clone()
        elif isinstance(one, ATOMIC):
            atomic.add(id(one))
        elif isinstance(one, torch.jit.ScriptFunction):  # ``copy`` refuses what never changes
            memo[id(one)] = one
    try:
        _copy_traced([one for _, one in own.values() if isinstance(one, fx.GraphModule)], memo)
        twin = copy_functions(copy.deepcopy(held, memo), memo, own, atomic)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a __deepcopy__ raises
        raise InputError(
            f"{type(held).__name__} cannot be copied: {type(error).__name__}: {error}",
            source=source_line("".join(traceback.format_exception(error))) or None,
            remedy="expand works on copies: keep locks, files and the like out of the model's "
            "attributes, or give the class that holds them a __deepcopy__",
        ) from error
    if ours:
        return twin
    for _, one in tensors_and_modules(held if twin is None else twin, hops=3):
        place, original = own.get(identity(one), ("", None))
        if original is not None and identity(one) not in shared:
            raise InputError(
                "a copy of the model shares a module or a tensor with it",
                module_path=f"{place or '(root)'} ({type(original).__name__})",
                remedy="expand works on copies: a __deepcopy__ must copy this, too, and a function "
                "that an object holds (model.forward = wrapper, a hook) must not read it as a "
                "global: let it be a local variable, an argument or a default of the function",
            )
    if isinstance(held, nn.Module) and isinstance(twin, nn.Module):
        made = dict(twin.named_parameters())
        lost = [n for n, p in held.named_parameters() if memo.get(id(p)) is not made.get(n)]
        for path, module in held.named_modules() if lost else ():
            if hasattr(module, "__deepcopy__") and lost[0].startswith(path):
                raise InputError(
                    f"__deepcopy__ makes the parameter {lost[0]} anew, and not as expand needs it",
                    module_path=f"{path or '(root)'} ({type(module).__name__})",
                    remedy="let it copy by the memo that it is given, as "
                    "copy.deepcopy(vars(self), memo) does, or leave the method out",
                )
    return twin


def _copy_traced(modules: list[fx.GraphModule], memo: dict[int, Any]) -> None:
    """Copy them as any module into ``memo``: their own copies hold what their graph names, and not
    their hooks, their attributes, or another forward."""
    made = [(one, type(one).__new__(type(one))) for one in modules if id(one) not in memo]
    memo.update((id(one), twin) for one, twin in made)
    for one, twin in made:
        vars(twin).update(copy.deepcopy(vars(one), memo))
        twin.graph = twin.graph  # makes its code
        type(twin).__name__ = type(one).__name__


# --------------------------------------------------------------------------- reading nodes
def bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by schema name, defaults filled in."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    positional = [a.name for a in arguments if not a.kwarg_only]
    defaults = {a.name: a.default_value for a in arguments}
    return defaults | dict(zip(positional, node.args, strict=False)) | node.kwargs


def size_hint(size: Any) -> int:
    """A size as a number; a symbolic one at the sizes of the example."""
    return int(hint(size) if isinstance(size, torch.SymInt) else size)


def value(node: Any) -> Any:
    """The fake value of a node, or the constant itself."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def shape(node: Any) -> tuple[int, ...]:
    """The shape of a node's tensor at the sizes of the example."""
    return tuple(size_hint(s) for s in value(node).shape)


def number(node: Any) -> int:
    """An integer argument, or the example's value of the node that computes it."""
    return size_hint(value(node))


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(value(node), torch.Tensor)


def is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def mutated(node: fx.Node) -> list[tuple[str, fx.Node]]:
    """The tensor arguments that a call writes to, by schema name."""
    if not is_mutable(node):
        return []
    args, schema = bind(node), node.target._schema  # type: ignore[union-attr]
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    return [(name, args[name]) for name in written if is_tensor(args[name])]


# --------------------------------------------------------------------------- provenance
@dataclass(frozen=True)
class Origin:
    """Where a node comes from: the user's module (``kind``: its class; both empty if unknown), and
    the user's line, ``resnet.py:92 out = self.conv1(x)``."""

    path: str
    kind: str
    source: str

    def __str__(self) -> str:
        return f"{self.path or '(root)'} ({self.kind})" if self.kind else ""


def origin(node: fx.Node) -> Origin:
    """The innermost module, and the last line before torch's own."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    path, kind = list(stack.values())[-1]
    kind = kind if isinstance(kind, str) else kind.__name__
    source = source_line(node.meta.get("stack_trace") or "")
    return Origin(path.split("@")[0], kind.rsplit(".", 1)[-1], source)


def module_path(node: fx.Node) -> str:
    """``"layer1.0.conv1 (Conv2d)"``: the user's module that made the node."""
    return str(origin(node))


def source(node: fx.Node) -> str:
    """``"resnet.py:92 out = self.conv1(x)"``: the user's last line before torch's own."""
    return origin(node).source


_FRAME = re.compile(r'^[ \t]*File "(.+)", line (\d+).*(?=(?:\n(.*))?)', re.MULTILINE)


def source_line(trace: str) -> str:
    """The last frame of a formatted traceback that lies outside torch and this package."""
    for path, line, code in reversed(_FRAME.findall(trace)):
        if not path.startswith(_NOT_THE_USERS):
            return f"{os.path.basename(path)}:{line} {code.strip()}"
    return ""


def raised_at(error: BaseException) -> str | None:
    """The user's last line that an error came through, if it came through one."""
    return source_line("".join(traceback.format_tb(error.__traceback__))) or None


def describe(node: fx.Node) -> str:
    """One line: module, source, op."""
    where = origin(node)
    return f"{where}, {where.source}: {node.target}".lstrip(", ")


_STATISTICS = {aten.batch_norm.default: "training", aten.instance_norm.default: "use_input_stats"}
"""Ops that write to statistics without their schema saying so -> the argument that says when."""


ORDER, DOUBLE = "memory_order", "memory_order_in_float64"
"""In the ``meta`` of what a random op reads: its dimensions, from the largest stride to the
smallest, when the student really ran; kernels need not lay out memory as their fakes say."""


def memory_order(x: torch.Tensor) -> list[int]:
    """The dimensions of a tensor from the largest stride to the smallest."""
    strides = [size_hint(s) for s in x.stride()]
    return sorted(range(len(strides)), key=lambda d: (-strides[d], d))


def draws(node: fx.Node) -> bool:
    """True if it moves the random state: without it every later draw would be another."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or node.target is copies.dropout_mask


def has_effect(node: fx.Node) -> bool:
    """True for what writes, draws random numbers, or enters or leaves a region."""
    if node.is_impure() or is_mutable(node) or draws(node) or node.target in REGION:
        return True
    return node.target in _STATISTICS and bool(bind(node)[_STATISTICS[node.target]])
