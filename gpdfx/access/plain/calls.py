"""How a plain graph is called, and what it returns: as the teacher."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ...calls import tree
from ...calls.call import Call
from ...calls.sizes import Sizes
from ...errors import InputError
from ...torch_private import call_whole
from .retrace import Retrace, Seen

_SIMPLE = (bool, int, float, str, torch.dtype, torch.device, type(None))


def write_inputs(tracer: Retrace, call: Call, flat: list[Tensor]) -> list[Seen]:
    """Placeholders as of the student's forward, and what reads the tensors of a call out of them.
    What is no tensor in the example is checked."""
    args, kwargs = call.unflatten(flat)
    roots, positional, defaulted = dict[str, Seen](), list[str](), False
    for name, x, default, placed in _parameters(call, args, kwargs):
        needed = default is _NONE and not defaulted and placed
        defaulted |= not needed
        options = {} if needed else {"default_value": None if default is _NONE else default}
        roots[name] = tracer.seen(tracer.graph.placeholder(name, **options), x)
        positional += [name] if placed else []
        if type(x) in _SIMPLE:
            _check(tracer, roots[name], x, name)
    tensors = list[Seen]()
    every = zip(tree.paths((args, kwargs)), call.pattern.held, strict=True)
    for (part, first, *rest), held in every:
        name = str(first.key) if part.idx else positional[first.idx]
        place: Any = roots[name]
        for key in rest:
            if hasattr(key, "name"):
                place = tracer.create_proxy("call_function", getattr, (place, key.name), {})
            else:
                place = place[key.idx if hasattr(key, "idx") else key.key]
        if held is tree.Slot:
            tensors.append(place)
        elif rest and type(held) in _SIMPLE:
            _check(tracer, place, held, name)
    return tensors


_NONE = object()


def _parameters(
    call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[str, Any, Any, bool]]:
    """Name, the example's argument, default, and whether it may be positional; one for each of
    those in ``*args`` and ``**kwargs``. What is no tensor is its own default."""
    bound = call.signature.bind(*args, **kwargs).arguments
    for name, one in call.signature.parameters.items():
        placed = one.kind is not one.KEYWORD_ONLY
        if one.kind is one.VAR_POSITIONAL:
            for k, x in enumerate(bound.get(name, ())):
                yield f"{name}_{k}", x, _NONE, True
        elif one.kind is one.VAR_KEYWORD:
            for key, x in bound.get(name, {}).items():
                yield key, x, x if type(x) in _SIMPLE else _NONE, False
        else:
            x = bound.get(name, one.default)
            usual = _NONE if one.default is one.empty else None
            yield name, x, x if type(x) in _SIMPLE else usual, placed


def _check(tracer: Retrace, place: Seen, x: Any, name: str) -> None:
    """That an argument is the example's."""
    text = f"this network was made for {name} = {x!r}"
    if x is None or isinstance(x, bool):
        node = call_whole(tracer.graph, operator.is_, (place.node, x), {})
        check(tracer, tracer.seen(node, True), text)
    else:
        check(tracer, tracer.create_proxy("call_function", operator.eq, (place, x), {}), text)


def check(tracer: Retrace, holds: Any, text: str) -> None:
    """An assertion in the graph."""
    tracer.create_proxy("call_function", torch._assert, (holds, text), {})


def write_sizes(tracer: Retrace, sizes: Sizes, inputs: list[Seen], names: list[str]) -> None:
    """What the teacher asks of the sizes of its inputs."""
    for code, text in sizes.texts(names):
        try:
            holds = eval(code, {"math": math, "torch": torch}, {"flat": inputs})
        except (TypeError, AttributeError, ValueError):  # a function of numbers alone
            continue
        if isinstance(holds, Seen):
            check(tracer, holds, f"this network needs {text}")


def write_output(graph: fx.Graph, x: Any, places: Mapping[int, Any]) -> Any:
    """An output as an argument of a graph, made by its own class where that is not Python's.
    ``places``: what stands for a leaf, by its id."""
    if id(x) in places:
        return places[id(x)]
    if type(x) in _SIMPLE:
        return x
    if type(x) in (tuple, list, torch.Size):
        made = [write_output(graph, y, places) for y in x]
        return made if type(x) is list else tuple(made)
    if hasattr(x, "_asdict"):
        items = x._asdict()
    elif isinstance(x, dict):
        items = dict(x)
    elif dataclasses.is_dataclass(x):
        items = {one.name: getattr(x, one.name) for one in dataclasses.fields(x) if one.init}
    else:
        raise _unknown(x)
    own = {key: write_output(graph, y, places) for key, y in items.items()}
    if type(x) is dict:
        return own
    if not all(isinstance(key, str) and key.isidentifier() for key in own):
        raise _unknown(x)
    return call_whole(graph, type(x), (), own)


def _unknown(x: Any) -> InputError:
    return InputError(
        f"the network returns a {type(x).__name__}, which a graph cannot make",
        remedy="return tensors in tuples, lists, dicts or dataclasses (a language model: expand it "
        'with example_kwargs={"use_cache": False})',
    )
