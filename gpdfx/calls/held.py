"""What a module holds in Python beside its registries: modules, tensors and functions in lists,
dicts, objects and closures; found, replaced, and put back.

``copy.deepcopy`` follows all of it but functions, which it takes for constants: a wrapper that a
user sets as ``model.forward`` would go on to run the user's own model in every copy of it.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import functools
import itertools
import operator
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..torch_private import drops_values, storage_key
from .tree import Pattern, Slot

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)

Place = tuple[Any, Any, Any]
"""A holder, the key under which it holds something (``None`` where that cannot be replaced but with
the holder: in a tuple, a method), and what."""

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device))
_CLOSED = (Tensor, type, types.ModuleType)
_ITEMS = (dict, list, deque)
_FIXED = (tuple, set, frozenset)
_CACHED: type = type(functools.lru_cache(len))
ATOMIC = (types.FunctionType, weakref.ref, _CACHED)
"""What ``copy`` takes for constants, whatever they name."""
_CONTAINERS = frozenset((dict, OrderedDict, list, tuple, set))
_NAMED = (Tensor, nn.Module, types.MethodType, types.FunctionType)


# --------------------------------------------------------------------------- finding
def places(
    root: Any, hops: int | None = None, closed: Sequence[Any] = ()
) -> Iterator[tuple[str, Place]]:
    """All places of a structure, with the path of the module or attribute that they are in; what is
    replaced meanwhile is followed as it is then. ``hops``: through how many functions to follow
    what they read as globals; ``None``: not into functions, as ``copy`` does not go. ``closed``:
    what is not looked into."""
    roots = root.named_modules() if isinstance(root, nn.Module) else [("", root)]
    waiting = deque((path, one, True, hops) for path, one in roots)
    seen = {id(one): one for one in closed}  # they live: no other gets the same id
    while waiting:
        path, holder, opens, left = waiting.popleft()
        if id(holder) in seen:
            continue
        seen[id(holder)] = holder
        inside = entries(holder)
        if isinstance(holder, types.FunctionType):
            if left is None:
                continue
            named = _read_globals(holder) if left else []
            yield from ((path, (holder, None, one)) for one in named)
            waiting.extend((path, one, False, left - 1) for one in named)
        module = isinstance(holder, nn.Module)
        for key, held in inside:
            if type(held) in _PLAIN or (type(held) in _CONTAINERS and not held):
                continue
            registry = module and key in _REGISTRIES
            inner = f"{path}.{key}".strip(".") if opens and not registry else path
            yield inner, (holder, key, held)
            held = held if key is None else _get(holder, key)
            if not isinstance(held, _CLOSED):
                waiting.append((inner, held, registry or isinstance(held, nn.Module), left))


def entries(x: Any) -> list[tuple[Any, Any]]:
    """What something holds, by key (see ``Place``)."""
    if isinstance(x, nn.Module):
        return list(vars(x).items())
    found: list[tuple[Any, Any]] = []
    if isinstance(x, dict):
        found += x.items()
    elif isinstance(x, list | deque):
        found += enumerate(x)
    elif isinstance(x, _FIXED):
        found += ((None, one) for one in x)
    elif isinstance(x, types.MethodType):
        return [(None, x.__self__), (None, x.__func__)]
    elif isinstance(x, types.BuiltinMethodType):
        return [(None, x.__self__)]
    elif isinstance(x, types.CellType):
        return [("cell_contents", x.cell_contents)] if x != types.CellType() else []
    elif isinstance(x, types.FunctionType):
        found += ((None, cell) for cell in x.__closure__ or ())
        found += [("__defaults__", x.__defaults__), (None, x.__kwdefaults__)]
    elif isinstance(x, functools.partial):
        found += [(None, x.func), (None, x.args), (None, x.keywords)]
    if type(x) in _CONTAINERS:
        return found
    slots = (getattr(kind, "__slots__", ()) for kind in type(x).__mro__)
    for name in itertools.chain.from_iterable((s,) if isinstance(s, str) else s for s in slots):
        with contextlib.suppress(AttributeError):  # not set, or of a mangled name
            found.append((name, object.__getattribute__(x, name)))
    inside = getattr(x, "__dict__", None)
    if isinstance(inside, dict):
        plain = not isinstance(x, _ITEMS)  # else its attributes are not its items
        found += inside.items() if plain else [(None, inside)]
    return found


def _read_globals(function: types.FunctionType) -> list[Any]:
    """What a function reads as a global; no containers, which it may fill anew in every call."""
    read = {i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"}
    return [x for x in map(function.__globals__.get, read) if isinstance(x, _NAMED)]


def tensors_and_modules(root: Any, hops: int | None = None) -> Iterator[tuple[str, Any]]:
    """Those in all places, the root itself first."""
    yield "", root
    for path, (_, _, held) in places(root, hops):
        if isinstance(held, Tensor | nn.Module):
            yield path, held


def reached(x: Any) -> Iterator[Any]:
    """The modules and tensors in a structure, and those that functions in it name."""
    return (held for _, held in itertools.islice(tensors_and_modules([x], hops=2), 1, None))


def holds_modules(arguments: Pattern) -> bool:
    """Whether what is no tensor in the arguments of a call is a module, or names one."""
    return any(True for x in arguments.held if x is not Slot for _ in reached(x))


def identity(held: Any) -> Any:
    """The same for tensors that share memory."""
    if isinstance(held, Tensor) and held.layout == torch.strided:
        return "storage", storage_key(held)
    return id(held)


# --------------------------------------------------------------------------- replacing
def _get(holder: Any, key: Any) -> Any:
    if isinstance(holder, _ITEMS):
        return holder[key]
    inside = getattr(holder, "__dict__", {})
    return inside[key] if key in inside else object.__getattribute__(holder, key)


def _put(holder: Any, key: Any, held: Any) -> None:
    """Past what classes make of it: a module would register a parameter."""
    if not isinstance(holder, _ITEMS):
        inside = getattr(holder, "__dict__", {})
        if key not in inside:
            return object.__setattr__(holder, key, held)
        holder = inside
    kind: Any = next(kind for kind in _ITEMS if isinstance(holder, kind))
    kind.__setitem__(holder, key, held)


def substituted(x: Any, new: Callable[[Any], Any]) -> Any:
    """``new(x)``; what cannot be written to (a tuple, a set, a method, a partial) is made again of
    what ``new`` gives for what is in it, if that is another."""
    if isinstance(x, _FIXED):
        inside: list[Any] = list(x)
    elif isinstance(x, types.MethodType):
        inside = [x.__func__, x.__self__]
    elif isinstance(x, functools.partial):
        inside = [x.func, *x.args, *x.keywords.values()]
    else:
        return new(x)
    made: list[Any] = [substituted(one, new) for one in inside]
    if all(map(operator.is_, made, inside)):
        return x
    if isinstance(x, types.MethodType):
        return types.MethodType(*made)
    if isinstance(x, functools.partial):
        count = 1 + len(x.args)
        keywords = dict(zip(x.keywords, made[count:], strict=True))
        twin = type(x)(made[0], *made[1:count], **keywords)
        vars(twin).update(vars(x))
        return twin
    kind: Any = type(x)
    return kind(*made) if hasattr(x, "_fields") else kind(made)


def has_gradient(x: Tensor) -> bool:
    """Whether autograd knows its dtype."""
    return x.is_floating_point() or x.is_complex()


def registered(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers, tied ones once."""
    return dict(itertools.chain(module.named_parameters(), module.named_buffers()))


def call_with(
    module: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``torch.func.functional_call``, after which a module that has two names has its own tensors
    again, too. What forward replaces is in ``tensors`` after."""
    every = (module.named_parameters, module.named_buffers)
    named = itertools.chain.from_iterable(walk(remove_duplicate=False) for walk in every)
    names = {id(t): name for name, t in named if name in tensors}
    places = {
        f"{path}.{leaf}".lstrip("."): names[id(t)]
        for path, part in module.named_modules()
        for leaf, t in itertools.chain(part._parameters.items(), part._buffers.items())
        if t is not None and id(t) in names
    }
    given = {place: tensors[name] for place, name in places.items()}
    try:
        return functional_call(module, given, args, kwargs, tie_weights=False)
    finally:
        tensors |= {n: given[p] for p, n in places.items() if given[p] is not tensors[n]}


def importable(held: Any) -> bool:
    """False for a function made in another, or by ``lambda``: ``pickle`` finds none by its name."""
    found: list[Any] = []
    inside = list(held.values()) if isinstance(held, dict) else [held]
    for one in inside:
        substituted(one, lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
    return not any(isinstance(x, types.FunctionType) and "<" in x.__qualname__ for x in found)


class HeldTensors:
    """Where a module's Python holds its parameters and buffers beside its registries, by their
    names: a plain list or dict, an object, a closure. Nothing of torch's that gives a module other
    tensors for a call reaches these. ``closed``: what is not the user's in it."""

    def __init__(self, module: nn.Module, closed: Sequence[Any] = ()) -> None:
        self.names = {id(t): name for name, t in registered(module).items()}
        own = {id(vars(part)[name]) for part in module.modules() for name in _REGISTRIES}
        self.places: list[Place] = []
        for _, (holder, key, held) in places(module, 0, closed):
            if key is not None and id(holder) not in own and self._in(held):
                self.places.append((holder, key, held))

    def _in(self, held: Any) -> bool:
        found: list[Any] = []
        substituted(held, lambda x: found.append(id(x)) or x)  # type: ignore[func-returns-value]
        return not self.names.keys().isdisjoint(found)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Let all places hold others, by name."""
        for holder, key, held in self.places:
            other = substituted(held, lambda x: tensors.get(self.names.get(id(x), ""), x))
            _put(holder, key, other)

    @contextlib.contextmanager
    def filled(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """While it lasts."""
        self.fill(tensors)
        try:
            yield
        finally:
            for place in self.places:
                with contextlib.suppress(IndexError):  # of a list that is shorter now
                    _put(*place)


def cast(module: Module, dtype: torch.dtype) -> Module:
    """``module.to(dtype)``, but for complex numbers, which that would make real."""
    if any(x.is_complex() for x in registered(module).values()):
        module._apply(lambda x: cast_tensor(x, dtype))
    else:
        module.to(dtype)
    return module


@torch.no_grad()
def cast_each(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """In place: parameters and buffers in dtypes of their own, by name; the others stay."""
    for name, x in registered(module).items():
        if (dtype := dtypes.get(name, x.dtype)) != x.dtype:
            x.grad, x.data = None, x.data.to(dtype)


def cast_tensor(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, if it has one that autograd knows; a complex one stays complex."""
    if not has_gradient(x):
        return x
    return x.to(dtype.to_complex() if x.is_complex() else dtype)


@torch.no_grad()
def apply_keeping(
    kept: dict[str, Tensor],
    named: Callable[[], Iterable[tuple[str, Tensor]]],
    fn: Callable[..., Any],
    move: Callable[[], Any],
) -> None:
    """``move()``, which is ``_apply(fn)`` of a module; ``named`` tensors of it keep their values
    where ``to_empty`` or the meta device takes them. ``kept``: by name, while they are on meta."""
    before = {name: x.detach() for name, x in named()}
    move()
    for name, x in named():
        own = kept.pop(name, before[name])
        if x.is_meta:
            kept[name] = own
        elif before[name].is_meta or drops_values(fn):
            x.copy_(own)


def converted(module: Module, dtype: torch.dtype) -> Module:
    """``cast``; where its Python holds a buffer, too, that is the new one."""
    held = HeldTensors(module)
    cast(module, dtype)
    held.fill(registered(module))
    return module


# --------------------------------------------------------------------------- copying
def copy_functions(
    twin: T, memo: dict[int, Any], own: Mapping[Any, Any], atomic: Collection[int]
) -> T:
    """Give a deep copy functions of its own, in place, for those that name a module, or a tensor of
    the original, in their closure or as a default, and for those made in another function, which
    may count in its variables. What caches the results of such a function and weak references to a
    module are constants to ``copy``, too.

    ``memo``: of the deep copy; ``own``: what the original holds, by ``identity``; ``atomic``: the
    ``id`` of all of ``ATOMIC`` in it (a ``__deepcopy__`` may have made others).
    """
    known, made = dict[int, bool](), dict[int, Any]()

    def names(x: Any) -> bool:
        if id(x) not in known:
            known[id(x)] = any(own_or_module(held) for _, (_, _, held) in places(x, hops=0))
        return known[id(x)]

    def own_or_module(x: Any) -> bool:
        if isinstance(x, weakref.ref):
            return id(x()) in own
        if isinstance(x, types.FunctionType) and "<locals>" in x.__qualname__:
            return True
        return isinstance(x, nn.Module) or (isinstance(x, Tensor) and identity(x) in own)

    def other(x: Any) -> Any:
        if id(x) not in atomic or not (own_or_module(x) or names(x)):
            return x
        if isinstance(x, weakref.ref):
            return weakref.ref(memo.get(id(x()), x()))
        if id(x) not in made and isinstance(x, types.FunctionType):
            made[id(x)] = function(x)
        elif id(x) not in made:
            wrapped = substituted(copy.deepcopy(x.__wrapped__, memo), other)
            made[id(x)] = functools.lru_cache(**x.cache_parameters())(wrapped)
        return made[id(x)]

    def function(x: types.FunctionType) -> types.FunctionType:
        cells = tuple(map(cell, x.__closure__ or ()))
        twin = types.FunctionType(x.__code__, x.__globals__, x.__name__, None, cells)
        functools.update_wrapper(twin, x, updated=())
        vars(twin).clear()
        vars(twin).update(copy.deepcopy(vars(x), memo))
        twin.__defaults__ = copy.deepcopy(x.__defaults__, memo)
        twin.__kwdefaults__ = copy.deepcopy(x.__kwdefaults__, memo)
        return twin

    def cell(x: types.CellType) -> types.CellType:
        if id(x) not in made:  # two functions may share it
            twin = made[id(x)] = types.CellType()
            for _, held in entries(x):
                twin.cell_contents = held
                with contextlib.suppress(Exception):  # a lock, a module: there is only one
                    twin.cell_contents = copy.deepcopy(held, memo)
        found: types.CellType = made[id(x)]
        return found

    for _, (holder, key, held) in places(twin, hops=0):
        if key is not None and (replaced := substituted(held, other)) is not held:
            _put(holder, key, replaced)
    return twin
