"""Forward hooks on modules inside a teacher, whose graphs have no modules.

How the student calls its modules on the example says which of a graph's nodes stand for their
arguments and results. So a graph is made that runs the hooks there; it is used once a hook is
registered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..calls import tree
from ..passes.capture.modes import enter, modes_of
from ..passes.capture.submodules import slow_attention
from ..passes.program import Mode, copied, duplicate, is_tensor, shape, value
from ..torch_private import is_sharding_hook

Kind = tuple[tuple[int, ...], Any]
"""Shape and dtype of a tensor."""
_PLAIN = (bool, int, float, str, type(None))


# --------------------------------------------------------------------------- of the student
@dataclass(frozen=True)
class ModuleCall:
    """A call of a module. ``given``: the structure of ``(args, kwargs)``, with numbers of tensors
    in its slots; ``None`` if it holds what is neither a tensor nor a plain constant. ``tensors``:
    these; ``result``: what it returned, if that is one tensor."""

    given: tree.Pattern | None
    numbers: tuple[int, ...]
    tensors: tuple[Kind, ...]
    result: Kind | None


ModuleCalls = Mapping[tuple[str, str], list[ModuleCall]]
"""Mode and path -> the calls of a module, in order."""


def module_calls(student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModuleCalls:
    """How a network calls its modules in each of its modes; up to where it fails, if it does."""
    calls: dict[tuple[str, str], list[ModuleCall]] = {}
    modes = modes_of(student)
    for mode in modes:
        run = enter(duplicate(student), mode, modes)
        slow_attention(run)
        for path, module in run.named_modules():
            note = partial(_note, calls.setdefault((mode, path), []))
            module.register_forward_hook(note, with_kwargs=True)
        own_args, own_kwargs = tree.fresh((args, kwargs))
        with suppress(Exception), torch.enable_grad():  # whatever the user's forward raises
            run(*own_args, **own_kwargs)
    return calls


def _note(calls: list[ModuleCall], module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
    given, tensors = tree.pattern((args, kwargs), (Tensor,))
    distinct = {id(x): x for x in tensors}
    numbers = {one: k for k, one in enumerate(distinct)}
    plain = all(x is tree.Slot or isinstance(x, _PLAIN) for x in given.held)
    call = ModuleCall(
        given if plain else None,
        tuple(numbers[id(x)] for x in tensors),
        tuple((tuple(x.shape), x.dtype) for x in distinct.values()),
        (tuple(result.shape), result.dtype) if isinstance(result, Tensor) else None,
    )
    calls.append(call)


# --------------------------------------------------------------------------- in a graph
@dataclass(frozen=True)
class Region:
    """One call of a module in a graph of the student's: nodes in it, those of its distinct tensors,
    and its result."""

    path: str
    call: ModuleCall
    inside: frozenset[str]
    tensors: tuple[fx.Node, ...]
    result: fx.Node


def find_regions(mode: Mode, calls: ModuleCalls) -> tuple[list[Region], dict[str, str]]:
    """Calls of modules in a graph, inner ones first; and modules -> why theirs are not known."""
    places: dict[str, dict[str, dict[fx.Node, None]]] = defaultdict(lambda: defaultdict(dict))
    for node in mode.nodes:
        for one, (path, _) in (node.meta.get("nn_module_stack") or {}).items():  # call -> module
            places[path.partition("@")[0]][one][node] = None
    regions, unknown = list[Region](), dict[str, str]()
    for (name, path), noted in calls.items():
        if name != mode.site.mode or not path or not noted:
            continue
        try:
            if any(call.result is None for call in noted):
                raise LookupError("it returns something else than one tensor")
            if not places[path]:
                raise LookupError("it does nothing")
            if len(places[path]) != len(noted):
                raise LookupError("the graph has other calls of it")
            pairs = zip(noted, places[path].values(), strict=True)
            regions += [_region(path, call, inside) for call, inside in pairs]
        except LookupError as error:
            unknown[path] = f"{error} (in {name}())"
    regions.sort(key=lambda region: len(region.inside))
    return regions, unknown


def _region(path: str, call: ModuleCall, inside: Mapping[fx.Node, None]) -> Region:
    if call.given is None:
        raise LookupError("it is called with other things than tensors and constants")
    leaving = [n for n in inside if is_tensor(n) and any(user not in inside for user in n.users)]
    inputs = [x for n in inside for x in n.all_input_nodes if x not in inside]
    entering = dict.fromkeys(x for x in inputs if x.op != "get_attr" and is_tensor(x))
    result = _the_one(leaving, call.result, "result")
    tensors = tuple(_the_one([*entering], kind, "argument") for kind in call.tensors)
    if len(set(tensors)) != len(tensors):
        raise LookupError("two of its arguments are of one shape")
    return Region(path, call, frozenset(n.name for n in inside), tensors, result)


def _the_one(nodes: list[fx.Node], kind: Kind | None, what: str) -> fx.Node:
    """The node of a shape and dtype."""
    found = [n for n in nodes if (shape(n), value(n).dtype) == kind]
    if len(found) != 1:
        raise LookupError(f"{len(found)} of the graph's nodes may be its {what}")
    return found[0]


def hooked(graph: fx.Graph, mode: Mode, regions: list[Region]) -> fx.Graph:
    """The teacher's graph of a mode, with the hooks of modules run where it leaves them."""
    graph = copied(graph)
    names = [n.name for n in mode.nodes if n.op == "placeholder"]
    found = dict(zip(names, graph.find_nodes(op="placeholder"), strict=False))
    found |= {n.meta["student"]: n for n in graph.nodes if "student" in n.meta}
    for region in regions:
        result = found[region.result.name]
        with graph.inserting_after(result):
            module = graph.get_attr(region.path)
        with graph.inserting_after(module):
            given = (found[n.name] for n in region.tensors)
            new = graph.call_function(RunHooks(region.call), (module, result, *given))

        def outside(user: fx.Node, new: fx.Node = new, inside: Any = region.inside) -> bool:
            return user is not new and user.meta.get("of") not in inside

        result.replace_all_uses_with(new, outside)
        new.meta["of"] = region.result.name
        found[region.result.name] = new
    return graph


class RunHooks:
    """The hooks of a module, as a graph calls them; what they return takes the result's place."""

    def __init__(self, call: ModuleCall) -> None:
        self.call = call
        self.__name__ = self.__qualname__ = "run_hooks"
        self.__module__ = __name__

    def __call__(self, module: nn.Module, result: Any, *tensors: Tensor) -> Any:
        for key, hook in tuple(module._forward_hooks.items()):
            if is_sharding_hook(hook):
                continue
            assert self.call.given is not None
            args, kwargs = self.call.given.fill(tensors[k] for k in self.call.numbers)
            given = (args, kwargs) if key in module._forward_hooks_with_kwargs else (args,)
            new = hook(module, *given, result)
            result = result if new is None else new
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return RunHooks, (self.call,)
