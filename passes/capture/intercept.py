"""What tracing would look through: functions with a backward of their own, hooks on gradients, and
checkpoints.

``torch.export`` traces the forward of a ``torch.autograd.Function`` and forgets its backward. So
while it traces each of these calls becomes an operator of ours, under a number; in the finished
graph that operator makes way for the call itself: a ``UserFunction``, or the entry and exit of a
region whose activations are computed again in the backward.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ...calls.held import holds_modules
from ...calls.tree import Pattern, pattern
from ...kernels.regions import enter_recompute, exit_recompute, require_grad
from ...kernels.user_function import Hooked, UserFunction
from ...torch_private import (
    Checkpoints,
    aliases,
    calls_may_fail,
    checkpoints,
    functions,
    in_transform,
    is_traced,
    own_numbers,
    version,
)

_LIBRARY = torch.library.Library("gpdfx", "FRAGMENT")
_LIBRARY.define("user_function(Tensor[] tensors, SymInt[] sizes, int number) -> Tensor[]")
_LIBRARY.define("enter_recompute(Tensor[] given, int number) -> ()")
_LIBRARY.define("exit_recompute(int number) -> ()")
_LIBRARY.define("require_grad(Tensor x) -> ()")
_FUNCTION = torch.ops.gpdfx.user_function.default
_ENTER, _EXIT = torch.ops.gpdfx.enter_recompute.default, torch.ops.gpdfx.exit_recompute.default
_REQUIRE = torch.ops.gpdfx.require_grad.default
_NUMBERS = itertools.count()
_FUNCTIONS: dict[int, tuple[UserFunction, list[bool]]] = {}
_RESULTS: dict[int, Pattern] = {}
_REGIONS: dict[int, tuple[bool, bool]] = {}
"""What stands behind a number while its graph is made. Of a function's arguments: which are
tensors; of its result: the structure; of a region: whether it is reentrant, and preserves the
random state."""


def _run(tensors: list[Tensor], sizes: list[Any], number: int) -> list[Tensor]:
    function, kinds = _FUNCTIONS[number]
    versions = list(map(version, tensors))
    result = function.apply(*_merged(tensors, sizes, kinds))
    _RESULTS[number], made = pattern(result, (Tensor,))
    if versions != list(map(version, tensors)):
        raise TypeError(f"{function} writes to its arguments")
    return [y.clone() if any(y is x for x in tensors) else y for y in made]


def _run_fake(tensors: list[Tensor], sizes: list[Any], number: int) -> list[Tensor]:
    """The same on tensors without values: a number that it reads out of them (``alpha.item()``) is
    unknown, and its own affair."""
    with own_numbers(tensors), torch.no_grad():
        return _run(tensors, sizes, number)


def _merged(tensors: Iterable[Any], sizes: Iterable[Any], kinds: list[bool]) -> tuple[Any, ...]:
    rest = {True: iter(tensors), False: iter(sizes)}
    return tuple(next(rest[is_tensor]) for is_tensor in kinds)


_LIBRARY.impl("user_function", _run, "CompositeExplicitAutograd")
torch.library.register_fake("gpdfx::user_function", _run_fake, lib=_LIBRARY)
for _name in ("enter_recompute", "exit_recompute", "require_grad"):
    _LIBRARY.impl(_name, lambda *_: None, "CompositeExplicitAutograd")
for _op in (_FUNCTION, _ENTER, _EXIT, _REQUIRE):
    fx.node.has_side_effect(_op)  # export must not drop them as unused


# --------------------------------------------------------------------------- while export traces
@contextlib.contextmanager
def intercepted() -> Iterator[None]:
    """While it lasts, what this thread calls becomes operators in a trace; errors that forward
    catches leave it whole. Raises ``TypeError`` for what cannot be one node: such a module stays
    the user's Python."""
    with calls_may_fail(), aliases(), functions(_function), checkpoints(_Regions()), _Hooks():
        yield


def _function(kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not is_traced():
        return kind.apply(*args, **kwargs)
    arguments, given = pattern((args, kwargs))
    if holds_modules(arguments):
        raise TypeError(f"{kind.__name__}.apply is called with a module")
    if not all(isinstance(x, Tensor | torch.SymInt) for x in given):
        raise TypeError(f"{kind.__name__}.apply is called with a number that follows from sizes")
    number = next(_NUMBERS)
    _FUNCTIONS[number] = UserFunction(kind, arguments), [isinstance(x, Tensor) for x in given]
    tensors = [x for x in given if isinstance(x, Tensor)]
    made = _FUNCTION(tensors, [x for x in given if isinstance(x, torch.SymInt)], number)
    for y in made:  # export has no kernel for its gradient: what forward asks of it is true
        if torch.is_grad_enabled() and y.is_floating_point() and not y.requires_grad:
            y.requires_grad = any(x.requires_grad for x in tensors)
    return _RESULTS[number].fill(made)


class _Regions(Checkpoints):
    """Checkpoints run inside markers, and no longer are any."""

    @contextlib.contextmanager
    def region(self, reentrant: bool, preserve: bool, args: tuple[Any, ...]) -> Iterator[None]:
        number = next(_NUMBERS)
        _REGIONS[number] = reentrant, preserve
        _ENTER([x for x in args if isinstance(x, Tensor)], number)
        yield
        _EXIT(number)


class _Hooks(TorchFunctionMode):
    """A hook on a tensor's gradient becomes a function that the tensor goes through; one that
    begins to take a gradient (``requires_grad_``) does so in the graph."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if torch.compiler.is_dynamo_compiling() or in_transform():
            return func(*args, **(kwargs or {}))
        if func is Tensor.requires_grad_ and not isinstance(args[0], nn.Parameter):
            result = func(*args, **(kwargs or {}))
            if result.requires_grad:
                _REQUIRE(result)
            return result
        if func is not Tensor.register_hook:
            return func(*args, **(kwargs or {}))
        x, hook = (*tuple(args), *dict(kwargs or {}).values())
        if not x.requires_grad:
            return func(x, hook)  # it raises
        if isinstance(x, nn.Parameter):
            raise TypeError("forward registers a hook on a parameter")
        Hooked.apply(x, hook)
        return RemovableHandle(OrderedDict())


# --------------------------------------------------------------------------- afterwards
def forget() -> None:
    """Nothing refers to what was met so far any more."""
    _FUNCTIONS.clear()
    _RESULTS.clear()
    _REGIONS.clear()


def put_back(graph: fx.Graph) -> None:
    """Replace the operators in a finished graph by what they stand for."""
    tokens: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        number: Any = node.args[-1] if node.op == "call_function" and node.args else None
        if node.target is _FUNCTION:
            function, kinds = _FUNCTIONS[number]
            tensors, sizes, _ = node.args
            node.target, node.args = function, _merged(tensors, sizes, kinds)
            if function.kind is Hooked:
                _through(graph, node)
        elif node.target is _REQUIRE:
            node.target = require_grad
        elif node.target in (_ENTER, _EXIT):
            with graph.inserting_before(node):
                if node.target is _ENTER:
                    given = (node.args[0], *_REGIONS[number])
                    tokens[number] = graph.call_function(enter_recompute, given)
                else:
                    graph.call_function(exit_recompute, (tokens[number],))
            graph.erase_node(node)


def _through(graph: fx.Graph, node: fx.Node) -> None:
    """All that use a tensor that has a hook use what comes out of its function."""
    x: Any = node.args[0]
    last = max(graph.find_nodes(op="placeholder")) if x.op == "placeholder" else x
    last.append(node)
    with graph.inserting_after(node):
        hooked = graph.call_function(operator.getitem, (node, 0))
    hooked.meta = {**node.meta, "val": x.meta["val"]}
    x.replace_all_uses_with(hooked, lambda user: user is not node)
