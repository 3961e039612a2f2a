"""A captured module as the teacher runs it: generated code for every mode and structure of call."""

from __future__ import annotations

import importlib
import operator
import types
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import fx, nn

from ..calls.given import Given, settle
from ..calls.sizes import Sizes
from ..errors import InputError
from ..kernels.regions import exit_recompute, recompute
from ..passes.folded import Folded, read, reads
from ..passes.program import Flags, Mode, copied
from ..torch_private import in_transform, twin
from .hooked import ModuleCalls, find_regions, hooked


class Section:
    """One graph of a part: which calls it takes, its code, and the structure it returns.
    ``unknown``: modules of which its code with ``hooks`` runs none -> why."""

    def __init__(
        self, mode: Mode, graph: fx.Graph, sizes: Sizes, calls: ModuleCalls | None = None
    ) -> None:
        self.reads_folded = bool(reads(graph))
        self.site, self.call, self.out = mode.site, mode.site.call, mode.out
        self.sizes = sizes
        self.writes = any(isinstance(x, Given) for x in self.out.held)  # or returns such
        self.code = _Code.of(graph)
        regions, self.unknown = find_regions(mode, calls or {})
        self.hooked = _Code.of(hooked(graph, mode, regions)) if regions else self.code

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The tensors of a call. Raises ``InputError`` for one that the graph does not hold for."""
        flat = self.call.flatten(args, kwargs)
        self.sizes.check(flat, self.call.names)
        return flat

    def __call__(
        self,
        net: nn.Module,
        folded: Folded,
        flat: list[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        features: list[Any] | None = None,
        hooks: bool = False,
    ) -> Any:
        """Run on the teacher's tensors, and on the weights that its branches fold into; ``flat``:
        the tensors of the call. ``features``: takes what comes out beside the outputs; ``hooks``:
        run those of its modules."""
        code = self.hooked if hooks else self.code
        results = code.function(net, *flat, *([folded] if self.reads_folded else ()))
        own = sum(self.out.slots)
        if features is not None:
            features += results[own:]
        outcome = self.out.fill(results[:own])
        return settle(outcome, self.call.containers(args, kwargs)) if self.writes else outcome[0]


class Part:
    """A module of the student, or all of it, as graphs."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.sections: list[Section] = []

    def __call__(
        self,
        net: nn.Module,
        folded: Folded,
        state: str | Flags,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        features: list[Any] | None = None,
        plain: nn.Module | None = None,
        hooks: bool = False,
    ) -> Any:
        """Run the first graph that holds for a call in a state (see ``CallSite``). What the example
        never called like this (a branch that it did not take) runs as the user's own module
        ``plain``, if it is given. Raises ``InputError`` for other sizes, or another structure."""
        refused: list[InputError] = []
        unlike: list[InputError] = []
        for section in (s for s in self.sections if s.site.state == state):
            errors = unlike
            try:
                flat = section.call.flatten(args, kwargs)
                errors = refused
                section.sizes.check(flat, section.call.names)
            except InputError as error:
                errors.append(error)
                continue
            return section(net, folded, flat, args, kwargs, features, hooks)
        if refused or plain is None:
            raise (refused + unlike)[0]
        plain.training = bool(state[0])
        return plain(*args, **kwargs)

    def take_over(self, module: nn.Module, net: nn.Module, folded: Folded) -> None:
        """Let a user's module run this instead of its forward; its hooks are in the graph.
        ``folded``: filled when it runs."""
        plain = twin(module)
        module.__dict__.update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
        module.forward = partial(self._forward, net, folded, list(module.modules()), plain)

    def _forward(
        self,
        net: nn.Module,
        folded: Folded,
        modules: list[nn.Module],
        plain: nn.Module,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if in_transform():  # the code of a graph is not made for what that wraps
            return plain(*args, **kwargs)
        flags = tuple(m.training for m in modules)
        return self(net, folded, flags, args, kwargs, plain=plain)


def _read_late(graph: fx.Graph) -> None:
    """Move the reading of every tensor to its first use: one that is made when it is read is then
    held for no longer than it is used."""
    for node in (*graph.find_nodes(op="get_attr"), *reads(graph).values()):
        if node.users:
            min(node.users).prepend(node)


def _outlined(graph: fx.Graph) -> fx.Graph:
    """With every region that is computed again as one call of a function, innermost first."""
    while ends := graph.find_nodes(op="call_function", target=exit_recompute):
        end = min(ends)
        _outline(graph, end.args[0], end)
    return graph


def _outline(graph: fx.Graph, start: fx.Node, end: fx.Node) -> None:
    given, reentrant, preserve = start.args
    _modules_as_inputs(graph, start, end)
    inside, node = list[fx.Node](), start.next
    while node is not end:
        inside += [] if node.op == "get_attr" or node.target is read else [node]
        node = node.next
    own = set(inside)
    inputs = dict.fromkeys(x for n in inside for x in n.all_input_nodes if x not in own)
    results = [n for n in inside if any(user not in own for user in n.users)]
    body, inner = fx.Graph(), dict[fx.Node, fx.Node]()
    first = [body.placeholder(f"given_{k}") for k in range(len(given))]  # type: ignore[arg-type]
    for x in inputs:
        inner[x] = body.placeholder(x.name)
    for n in inside:
        inner[n] = body.node_copy(n, inner.__getitem__)
    body.output(tuple(inner[n] for n in results))
    with graph.inserting_before(end):
        region = Region(_Code.written(body), len(first), reentrant, preserve)  # type: ignore[arg-type]
        made = graph.call_function(region, (*given, *inputs))  # type: ignore[misc]
        for k, n in enumerate(results):
            n.replace_all_uses_with(
                graph.call_function(operator.getitem, (made, k)), lambda user: user not in own
            )
    for n in (end, *reversed(inside), start):
        graph.erase_node(n)


def _modules_as_inputs(graph: fx.Graph, start: fx.Node, end: fx.Node) -> None:
    """A region has no ``self``: the modules that it calls are read outside."""
    for node in [n for n in graph.find_nodes(op="call_module") if start < n < end]:
        with graph.inserting_before(start):
            module = graph.get_attr(str(node.target))
        with graph.inserting_before(node):
            called = graph.call_function(_called, (module, *node.args), node.kwargs)
        node.replace_all_uses_with(called)
        graph.erase_node(node)


def _called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


class Region:
    """Code of which no activation is saved, as a graph calls it."""

    def __init__(self, code: _Code, given: int, reentrant: bool, preserve: bool) -> None:
        self.code, self.rest = code, (given, reentrant, preserve)
        self.__name__ = self.__qualname__ = "region"
        self.__module__ = __name__

    def __call__(self, *inputs: Any) -> Any:
        return recompute(partial(self.code.function, None), *self.rest, *inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Region, (self.code, *self.rest)


class _Code:
    """A graph as Python source. fx graphs do not pickle across versions; source does."""

    def __init__(self, source: str, values: dict[str, Any], modules: dict[str, str]) -> None:
        self.source, self.values, self.modules = source, values, modules
        scope = values | {k: importlib.import_module(name) for k, name in modules.items()}
        exec(compile(source, "<gpdfx teacher>", "exec"), scope)
        self.function: Callable[..., Any] = scope["forward"]

    @staticmethod
    def of(graph: fx.Graph) -> _Code:
        """Of a graph that may have regions, and read its tensors early."""
        graph = _outlined(copied(graph))
        _read_late(graph)
        return _Code.written(graph)

    @staticmethod
    def written(graph: fx.Graph) -> _Code:
        """``modules``: those among the global names of the source, which do not pickle."""
        code = graph.python_code("self")
        modules = {
            k: v.__name__ for k, v in code.globals.items() if isinstance(v, types.ModuleType)
        }
        values = {k: v for k, v in code.globals.items() if k not in modules}
        return _Code(code.src, values, modules)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Code, (self.source, self.values, self.modules)
