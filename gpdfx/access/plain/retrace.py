"""A teacher's code once more as a graph, of torch's own ops alone.

The code runs on proxies that also hold what they stand for in the example call: so the package's
own functions decide by it what they would decide on tensors, and what they call is written down.
What does not depend on inputs or parameters is computed, and is a constant of the graph.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from ...algebra.frozen import Frozen
from ...errors import InputError
from ...kernels import copies, regions
from ...kernels.user_function import UserFunction
from ...passes.folded import Folded, merged, read, teachers
from ...teacher.captured import Region, _Code
from ...torch_private import (
    enter_autocast,
    exit_autocast,
    holds_ops,
    is_higher_order,
    is_overload,
    tree_leaves,
)

Variant = tuple[Any, ...]
"""What of a tensor is read: itself, its fold by the name of ``passes.folded``, or either times
which shares."""

RAW: Variant = ("raw",)


class Seen(fx.Proxy):
    """Stands for ``value`` in the example call."""

    value: Any

    def __getattr__(self, name: str) -> Any:
        if name in ("dtype", "ndim", "value"):  # "value": there is none yet
            return getattr(self.__dict__["value"], name)
        return _Attribute(self, name)

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        return (self[k] for k in range(len(self.value)))  # type: ignore[index]

    def __bool__(self) -> bool:
        return bool(self.value)


class _Attribute(Seen, fx.proxy.Attribute):
    """An attribute or a method of one."""

    def __init__(self, root: Seen, attr: str) -> None:
        fx.proxy.Attribute.__init__(self, root, attr)
        own = root.tracer.shapeless(root)  # type: ignore[attr-defined]
        self.root, self.value = own, getattr(root.value, attr)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


class Retrace(fx.proxy.GraphAppendingTracer):
    """Writes ``graph``. ``net``: the teacher's tensors; ``folded``: the weights that its branches
    fold into; ``maps``: the names of the student's tensors; ``apart``: those whose shares stay in
    the graph. Found: ``weights``, the values of each variant of a tensor by its name, and
    ``constants``; the nodes that read a variant have it in their ``meta``.
    """

    def __init__(
        self,
        net: nn.Module,
        folded: Folded,
        maps: Mapping[str, tuple[Frozen, ...]],
        apart: Collection[str],
        training: bool,
    ) -> None:
        super().__init__(fx.Graph())
        self.folded, self.maps, self.apart, self.training = folded, maps, apart, training
        self.owners = {spelled(name): name for name in maps for spelled in (merged, teachers)}
        self.net = _Net(self, net, "")
        self.weights: dict[str, dict[Variant, Tensor]] = {}
        self.proxies: dict[tuple[str, Variant], Seen] = {}
        self.constants: dict[str, Tensor] = {}
        self.known: dict[Any, str] = {}
        self.names: dict[int, str] = {}
        self.grad, self.without = True, set[fx.Node]()
        self.mine: dict[Any, Any] = {
            read: self._read,
            copies.share: self._share,
            copies.narrow: _narrow,
            regions.enter_grad: self._enter_grad,
            regions.exit_grad: self._enter_grad,
            regions.require_grad: lambda x: None,
            enter_autocast: self._enter_autocast,
            exit_autocast: lambda token: None,
        }

    # ---- nodes
    def proxy(self, node: fx.Node) -> Seen:
        return Seen(node, self)

    def seen(self, node: fx.Node, value: Any) -> Seen:
        """A proxy of a node."""
        made = self.proxy(node)
        made.value = value
        return made

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any
    ) -> Seen:
        made: Any = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        own, options = (_mapped(x, lambda p: p.value) for x in (tuple(args), dict(kwargs)))
        call = getattr(own[0], target) if kind == "call_method" else target
        made.value = call(*own[kind == "call_method" :], **options)
        if not self.grad and isinstance(made.value, Tensor):
            self.without.add(made.node)
        return made  # type: ignore[no-any-return]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self.graph.get_attr(self._constant(a))
        return super().create_arg(a)

    def _constant(self, x: Tensor) -> str:
        """The name of a constant; one for all that are equal."""
        small = x.numel() <= 4096 and x.dtype not in (torch.bfloat16, torch.float16)
        key = (x.dtype, x.device, *x.shape, str(x.tolist())) if small else id(x)
        if key not in self.known:
            self.known[key] = f"_constants.c{len(self.constants)}"
            self.constants[self.known[key]] = x  # alive, so that its id stays its own
        return self.known[key]

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """An op of the teacher's code."""
        found = list[Seen]()
        _mapped((args, kwargs), found.append)
        draws = torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())
        if found or draws:
            return self.create_proxy("call_function", op, args, kwargs)
        return op(*args, **kwargs)

    # ---- tensors
    def weight(self, name: str, variant: Variant, make: Callable[[], Tensor]) -> Seen:
        """A tensor of the student's, as it is read."""
        if (name, variant) not in self.proxies:
            own = self.weights.setdefault(name, {})
            value = own[variant] = make()
            self.proxies[name, variant] = self.seen(self.graph.get_attr(name), value)
            self.proxies[name, variant].node.meta["variant"] = variant
        return self.proxies[name, variant]

    def shapeless(self, x: Seen) -> Seen:
        """What to read an attribute of."""
        if not isinstance(x, _Attribute) and x.node.meta.get("variant"):  # all have the same
            return self.seen(self.graph.get_attr(str(x.node.target)), x.value)
        return x

    def _read(self, folded: Any, name: str) -> Seen:
        if name not in self.owners:
            raise InputError(
                f"in train mode {name.split()[0]} has branches with a batch norm of their own",
                remedy='take mode="eval", or expand with other branches',
            )
        return self.weight(self.owners[name], ("folded", name), lambda: self.folded[name])

    def _share(
        self, x: Any, table: Tensor, classes: Tensor, at: int, dim: int = 0, split: Any = None
    ) -> Any:
        given = (table, classes, at, dim, split)
        variant = x.node.meta.get("variant") if isinstance(x, Seen) else None
        name = str(x.node.target) if variant else ""
        if variant and name not in self.apart:
            key = (*variant, self.names[id(table)], self.names[id(classes)], at, dim, str(split))
            return self.weight(name, key, lambda: copies.share(x.value, *given))
        counts = table.index_select(at, classes).unique()
        if not table.is_floating_point() and counts.numel() == 1:  # all alike
            return x * (1 / counts.item())
        return copies.share(x, *given)

    # ---- regions and functions
    def _enter_grad(self, enabled: bool) -> bool:
        before, self.grad = self.grad, enabled
        return before

    def _enter_autocast(self, device: str, dtype: Any, enabled: bool, cache: Any) -> None:
        if enabled:
            raise InputError(
                "the network turns autocast on in a part of its forward",
                remedy="cast these modules, or call it under autocast as a whole",
            )

    def _region(self, region: Region, *inputs: Any) -> Any:
        return self.function(region.code)(None, *inputs)

    def _user_function(self, function: UserFunction, *given: Any) -> list[Any]:
        if self.training:
            raise InputError(
                f"{function.kind.__name__} has a backward of its own, which no plain graph has",
                remedy='take mode="eval"',
            )
        args, kwargs = function.arguments.fill(given)
        own = function.kind.setup_context is not torch.autograd.Function.setup_context
        context = () if own else (_context(len(args)),)
        results = tree_leaves(function.kind.forward(*context, *args, **kwargs))
        return [x for x in results if isinstance(x, Seen | Tensor)]

    def function(self, code: _Code) -> Callable[..., Any]:
        """Code that writes this graph."""
        scope = {name: self.replaced(held) for name, held in code.values.items()}
        for name, module in code.modules.items():
            own = importlib.import_module(module)
            scope[name] = _Torch(self, own) if own is torch else own
        exec(compile(code.source, "<gpdfx plain>", "exec"), scope)
        made: Callable[..., Any] = scope["forward"]
        return made

    def replaced(self, held: Any) -> Any:
        """What the code calls in the place of a function."""
        if isinstance(held, Region):
            return partial(self._region, held)
        if isinstance(held, UserFunction):
            return partial(self._user_function, held)
        if is_higher_order(held):
            return partial(_refuse, held)
        return self.mine.get(held, held) if callable(held) else held

    def detach(self) -> None:
        """What was made without gradients has none where it is used with some."""
        for node in [n for n in self.graph.nodes if n in self.without]:
            after = [user for user in node.users if user not in self.without]
            if after:
                with self.graph.inserting_after(node):
                    cut = self.graph.call_method("detach", (node,))
                for user in after:
                    user.replace_input_with(node, cut)


def _mapped(x: Any, change: Callable[[Seen], Any]) -> Any:
    """A structure of arguments with other things for proxies."""
    return fx.node.map_aggregate(x, lambda y: change(y) if isinstance(y, Seen) else y)


def _refuse(op: Any, *_: Any, **__: Any) -> NoReturn:
    raise InputError(
        f"the network calls {op}, which torch.fx does not trace, nor unpickle",
        remedy="write it without torch.cond and the like, or export the teacher itself "
        "(torch.export.export(teacher, inputs))",
    )


def _narrow(x: Seen, dim: int, first: Tensor, rest: Tensor, owner: Tensor, counts: Tensor) -> Any:
    """``copies.narrow`` without ``index_add``, which ONNX has not: a term for each further copy, in
    which an index that has none takes its first, and so adds nothing."""
    head: Any = x.index_select(dim, first)
    if not (x.dtype.is_floating_point or x.dtype.is_complex):
        return head
    total, places = head, [rest[owner == k] for k in range(len(first))]
    shape = [-1, *[1] * (x.ndim - dim - 1)]
    share = torch.tensor([1 / (1 + len(own)) for own in places], dtype=torch.float64)
    share = share.to(first.device, x.dtype).view(shape)
    for k in range(max(map(len, places), default=0)):
        others = [own[k] if k < len(own) else first[n] for n, own in enumerate(places)]
        delta = x.index_select(dim, torch.stack(others)) - head
        if x.dtype.is_floating_point:  # -inf - -inf, as in attention masks, is no difference
            delta = delta.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        total = total + delta * share
    return total


def _context(count: int) -> Any:
    """What a function keeps for its backward goes nowhere."""
    names = ("save_for_backward", "mark_dirty", "mark_non_differentiable", "set_materialize_grads")
    ignore: dict[str, Any] = dict.fromkeys((*names, "save_for_forward"), lambda *_: None)
    return SimpleNamespace(needs_input_grad=(False,) * count, **ignore)


class _Net:
    """The teacher, as its code reads it."""

    def __init__(self, tracer: Retrace, module: nn.Module, path: str) -> None:
        self.__own = (tracer, module, path)

    def __getattr__(self, name: str) -> Any:
        tracer, module, path = self.__own
        full = f"{path}.{name}" if path else name
        registries = (module._parameters, module._buffers, module._modules)
        held: Any = next((r[name] for r in registries if name in r), None)
        held = getattr(module, name) if held is None else held
        if isinstance(held, Tensor) and full in tracer.maps:
            return tracer.weight(full, RAW, lambda: held.detach().clone())
        if isinstance(held, Tensor):
            tracer.names[id(held)] = full
        elif isinstance(held, nn.Module):
            return _Net(tracer, held, full)
        return held


class _Torch:
    """A namespace of torch, as the teacher's code calls it."""

    def __init__(self, tracer: Retrace, held: Any) -> None:
        self.__own = (tracer, held)

    def __getattr__(self, name: str) -> Any:
        tracer, held = self.__own
        found = getattr(held, name)
        if is_overload(found):
            return partial(tracer.call, found)
        inside = holds_ops(found) or isinstance(found, ModuleType)
        return _Torch(tracer, found) if inside else tracer.replaced(found)


def keep_traceable(graph: fx.Graph, parameters: Collection[str], identity: str) -> bool:
    """Let nothing be made of buffers alone, or of nothing: tracers, and so Python's pickle, would
    make it once and for all. ``identity``: a module that gives what it is given, into which they do
    not look; returns whether there is a call of it."""
    traced, used = set[fx.Node](), False
    for node in list(graph.nodes):
        if node.op == "get_attr" and node.target not in parameters:
            continue
        if node.op in ("call_function", "call_method") and traced.isdisjoint(node.all_input_nodes):
            with graph.inserting_before(node):
                if inputs := node.all_input_nodes:
                    used = True
                    node.replace_input_with(inputs[0], graph.call_module(identity, (inputs[0],)))
                elif parameters:
                    like = graph.get_attr(min(parameters))
                    device = graph.call_function(getattr, (like, "device"))
                    node.kwargs = {**node.kwargs, "device": device}
        traced.add(node)
    return used
