"""Every private name of PyTorch that is used, each behind one function that says what it relies on.

Tried with PyTorch 2.11, 2.14 and 2.15; ``tests/test_torch_private.py`` pins what is relied on.
Nothing else in the project names a private one, but for an operator's ``_schema``, which has no
other name, and the registries of a module (``_parameters``, ``_buffers``, ``_modules``).
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import maybe_get_bdim, maybe_get_level
from torch._functorch.predispatch import _remove_batch_dim
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import checkpoint as _checkpoint
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten

Function = TypeVar("Function", bound=Callable[..., Any])


# --------------------------------------------------------------------------- structures
TreeSpec = pytree.TreeSpec
"""A structure without its leaves: comparable, with the number of its leaves as ``num_leaves``."""


def tree_flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """Leaves and structure of containers, named tuples, and every class registered with pytree but
    ``torch.Size``, which it would make a tuple again: that is a leaf."""
    return pytree.tree_flatten(tree, is_leaf=_is_size)


def tree_unflatten(leaves: list[Any], spec: TreeSpec) -> Any:
    """The inverse of ``tree_flatten``."""
    return pytree.tree_unflatten(leaves, spec)


def tree_leaves(tree: Any, stop: Callable[[Any], bool] | None = None) -> list[Any]:
    """The leaves alone, in the order of ``tree_flatten``; so is all that ``stop`` holds for, which
    is asked of everything on the way."""
    return pytree.tree_leaves(tree, is_leaf=stop)


def tree_map(
    function: Callable[[Any], Any], tree: Any, stop: Callable[[Any], bool] | None = None
) -> Any:
    """The same structure with ``function`` of every leaf; ``stop``: see ``tree_leaves``."""
    return pytree.tree_map(function, tree, is_leaf=lambda x: _is_size(x) or bool(stop and stop(x)))


def tree_paths(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """The keys on the way to every leaf, and the leaf: ``.idx`` in a sequence, ``.key`` in a
    mapping."""
    return pytree.tree_flatten_with_path(tree, is_leaf=_is_size)[0]


def _is_size(x: Any) -> bool:
    return isinstance(x, torch.Size)


def attribute_key(name: str) -> Any:
    """The key of an attribute, as classes registered with pytree give it."""
    return pytree.GetAttrKey(name)


def item_key(key: Any) -> Any:
    """The same for what is in a mapping."""
    return pytree.MappingKey(key)


def key_text(path: tuple[Any, ...]) -> str:
    """Keys as Python spells them: ``[1]['boxes']``, ``[0].image_sizes[1]``."""
    return pytree.keystr(path)


# --------------------------------------------------------------------------- symbolic sizes
_SEEN: WeakKeyDictionary[Any, dict[Any, int]] = WeakKeyDictionary()
"""Environments of symbols -> those of their symbols that depend on values, in the example."""


def hint(size: Any) -> Any:
    """The example's value of a symbolic number; ``None`` for one that depends on values which were
    not seen, nor found to be another size. Relies on ``node.hint``: the public ways to it guard on
    the value, or refuse what has none."""
    if size.node.hint is not None:
        return size.node.hint
    environment = size.node.shape_env
    known = environment.backed_var_to_val | _SEEN.get(environment, {})
    found = size.node.expr.subs(known)
    return size.node.pytype(found) if found.is_number or found.is_Boolean else None


def see(size: Any, value: int) -> None:
    """Note what a symbol that depends on values is in the example. Of the environment itself it is
    not known: what it knows it takes for granted, where PyTorch asks."""
    if size.node.hint is None and size.node.expr.is_Symbol:
        _SEEN.setdefault(size.node.shape_env, {})[size.node.expr] = value


def expression(size: torch.SymInt) -> Any:
    """A symbolic size as a sympy expression, the replacements of its environment applied."""
    return size.node.expr


def guards(size: torch.SymInt) -> list[Any]:
    """The conditions that capture met so far in the environment of a size, as sympy expressions."""
    environment: Any = size.node.shape_env
    return [guard.expr for guard in environment.guards]


def python_text(condition: Any) -> str:
    """An expression of ``expression`` or ``guards`` as Python that may name ``math``,
    ``max`` and ``min``. sympy's own printer does not know torch's functions (``FloorDiv``).
    Importing it takes half a second: asked for only once there is an expression."""
    from torch.utils._sympy.printers import PythonPrinter

    return str(PythonPrinter().doprint(condition))


# --------------------------------------------------------------------------- regions
enter_autocast: Callable[..., Any] = _enter_autocast
"""``(device_type, dtype, enabled, cache) -> token``. The function itself, no wrapper: it is what
export traces an autocast region to, and what the compiler knows in a graph."""

exit_autocast: Callable[[Any], None] = _exit_autocast
"""Leaves what ``enter_autocast`` entered, by its token."""


def set_grad_enabled(enabled: bool) -> None:
    """Switch gradients on or off and leave them so, as one call that the compiler knows in a
    graph; the public ``torch.set_grad_enabled`` is a context manager with a state of its own."""
    torch._C._set_grad_enabled(enabled)


@contextmanager
def without_function_modes() -> Iterator[None]:
    """Switch off what sees the calls of functions in this thread, default devices included."""
    with ExitStack() as stack:
        for _ in range(torch._C._len_torch_function_stack()):
            stack.enter_context(torch.overrides._pop_mode_temporarily())
        yield


def without_modes() -> AbstractContextManager[Any]:
    """Switch off all dispatch modes (counters, fake tensors) around what is not theirs to see."""
    return _disable_current_modes()


# --------------------------------------------------------------------------- functions, checkpoints
@contextmanager
def functions(handle: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """Hand the calls of ``torch.autograd.Function.apply`` that this thread makes to
    ``handle(kind, args, kwargs)``, but those that are made inside ``handle``, or under a transform
    of ``torch.func``. Relies on ``apply`` being a class method that all functions inherit."""
    global _watchers
    stack = _STACK.__dict__.setdefault("functions", [])
    with _LOCK:
        _watchers += 1
        torch.autograd.Function.apply = classmethod(_apply)
    stack.append(handle)
    try:
        yield
    finally:
        stack.pop()
        with _LOCK:
            _watchers -= 1
            if not _watchers:
                torch.autograd.Function.apply = _APPLY


@contextmanager
def aliases(see: Callable[[Any, tuple[Any, ...]], None] | None = None) -> Iterator[None]:
    """While it lasts, a handler of ``functions`` gets the calls by another name, too: ``quantize =
    Round.apply`` is a function of C, which calls the class's ``forward``. For tracing alone: what
    the handler returns has the backward of the class, on a context that knows nothing. ``see(kind,
    args)`` is told of these calls instead. Relies on C looking up ``forward`` and ``setup_context``
    in the class. One thread at a time."""
    kinds: list[Any] = torch.autograd.Function.__subclasses__()
    for kind in kinds:  # it grows
        kinds += kind.__subclasses__()
    kinds = [kind for kind in kinds if not _has_apply(kind)]  # its forward has other arguments
    with _LOCK:
        own = [(kind, {n: vars(kind)[n] for n in _FORWARD if n in vars(kind)}) for kind in kinds]
        for kind, forward, context in [(k, k.forward, k.setup_context) for k in kinds]:
            new = context is not torch.autograd.Function.setup_context
            first = 0 if new else 1
            kind.forward = staticmethod(partial(_by_forward, kind, forward, first, see))
            if new:
                kind.setup_context = staticmethod(partial(_by_forward, kind, context, None, see))
    try:
        yield
    finally:
        with _LOCK:
            for kind, had in reversed(own):
                for name in _FORWARD:
                    if name in had:
                        setattr(kind, name, had[name])
                    elif name in vars(kind):
                        delattr(kind, name)


_FORWARD = ("forward", "setup_context")


def _has_apply(kind: Any) -> bool:
    """Whether a class of functions has an ``apply`` of its own, as those of operators have that
    take lists of tensors."""
    first = kind.__mro__.index(torch.autograd.Function)
    return any("apply" in vars(one) for one in kind.__mro__[:first])


def _by_forward(kind: Any, own: Any, first: int | None, see: Any, *args: Any, **kwargs: Any) -> Any:
    """``own`` of a class, or its handler on the arguments from ``first`` on."""
    if not getattr(_STACK, "functions", None) or torch._C._are_functorch_transforms_active():
        return own(*args, **kwargs)
    if see is not None:
        if first is not None:
            see(kind, args[first:])
        return own(*args, **kwargs)
    return None if first is None else _apply(kind, *args[first:], **kwargs)


_APPLY, _LOCK, _STACK = (
    torch.autograd.Function.__dict__["apply"],
    threading.Lock(),
    threading.local(),
)
_watchers = 0
"""How many handlers there are, in all threads."""


def plain_apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
    """``kind.apply``, handed to nobody."""
    return _APPLY.__get__(None, kind)(*args, **kwargs)


def _apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
    stack = getattr(_STACK, "functions", None)
    if not stack or torch._C._are_functorch_transforms_active():
        return plain_apply(kind, *args, **kwargs)
    handlers = stack[:]
    stack.clear()
    try:
        return handlers[-1](kind, args, kwargs)
    finally:
        stack[:] = handlers


def is_traced() -> bool:
    """True where calls become nodes of a graph; not in the kernel of an operator that has become
    one, where PyTorch itself runs functions (the backward of a custom operator)."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def is_exporting() -> bool:
    """True where ``torch.export`` or ``torch.jit.trace`` makes a program that runs without Python.
    ``torch.compiler.is_exporting`` is true in all compiled code of torch 2.11."""
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()  # type: ignore[attr-defined]


@contextmanager
def own_numbers(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Numbers that are read out of these tensors without data are unknown ones, of which no node of
    a graph that is traced has to give the value."""
    environments = (x.fake_mode.shape_env for x in tensors if isinstance(x, FakeTensor))
    environment = next(environments, None)
    with nullcontext() if environment is None else environment.ignore_fresh_unbacked_symbols():
        yield


class Checkpoints:
    """What becomes of the calls of ``torch.utils.checkpoint.checkpoint`` while ``checkpoints``
    lasts: reentrant ones become such as are not (the same gradients; these can be asked for by
    ``torch.autograd.grad``, and go to parameters that are no leaves)."""

    def region(
        self, reentrant: bool, preserve: bool, args: tuple[Any, ...]
    ) -> AbstractContextManager[Any] | None:
        """Where the function runs instead of under a checkpoint, if it does. ``preserve``: the
        random state."""
        return None

    def again(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What the backward runs in its place."""
        return function


@contextmanager
def checkpoints(handler: Checkpoints) -> Iterator[None]:
    """``handler`` for the checkpoints of this thread."""
    _redirect_checkpoints()
    stack = _STACK.__dict__.setdefault("handlers", [])
    stack.append(handler)
    try:
        yield
    finally:
        stack.pop()


@lru_cache(maxsize=1)
def _redirect_checkpoints() -> None:
    """Once in a process: let checkpoints ask for a handler of their thread; there is no public way
    to see them. Relies on ``checkpoint`` calling ``CheckpointFunction.apply`` or a generator by its
    name in the module."""
    name = "_checkpoint_without_reentrant_generator"
    name = f"{name}_impl" if hasattr(_checkpoint, f"{name}_impl") else name
    generator, kind = getattr(_checkpoint, name), _checkpoint.CheckpointFunction
    signature = inspect.signature(generator)

    def handler() -> Checkpoints | None:
        found = getattr(_STACK, "handlers", None)
        return found[-1] if found else None

    def generated(function: Any, *args: Any, **kwargs: Any) -> Any:
        if (own := handler()) is None:
            return generator(function, *args, **kwargs)
        given = signature.bind(function, *args, **kwargs).arguments
        preserve = given.get("preserve_rng_state", True)
        region = own.region(False, preserve, given.get("args", ()))
        if region is None:
            return generator(own.again(function), *args, **kwargs)
        return _around(region)

    def applied(function: Any, preserve: bool, *args: Any) -> Any:
        if (own := handler()) is None:
            return super(kind, kind).apply(function, preserve, *args)
        if (region := own.region(True, preserve, args)) is not None:
            with region:
                return function(*args)
        return reentrant(function, preserve, args)

    setattr(_checkpoint, name, generated)
    kind.apply = applied


def _around(region: AbstractContextManager[Any]) -> Iterator[None]:
    with region:
        yield


def reentrant(function: Any, preserve: bool, args: tuple[Any, ...]) -> Any:
    """As a reentrant checkpoint without being one: no gradient, not even of parameters, unless one
    of the arguments takes one; all of it is computed again."""
    if not any(isinstance(x, Tensor) and x.requires_grad for x in args):
        with torch.no_grad():
            return function(*args)
    with _checkpoint.set_checkpoint_early_stop(False):
        return recomputed(function, preserve, args)


def recomputed(function: Any, preserve: bool, args: tuple[Any, ...]) -> Any:
    """Under a checkpoint that is not reentrant and trusts the function to repeat itself."""
    return _checkpoint.checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=preserve,
        determinism_check="none",
    )


# --------------------------------------------------------------------------- tensors without data
_OPAQUE = frozenset(
    (aten.mkldnn_rnn_layer.default, aten._cudnn_rnn.default, aten.miopen_rnn.default)
)
"""Operators that keep a workspace for the backward whose size only their kernel knows."""


class FakeMode(FakeTensorMode):
    """A context in which calls compute sizes and types, and no values. ``from_tensor`` makes a
    tensor without data, on a storage that says how many bytes it would have; real ones in a call
    are taken for such. What asks for a value raises, and so do operators whose fake result has
    another number of bytes than the real one."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OPAQUE:
            raise NotImplementedError(f"{func} has no fake result that is true to size")
        return super().__torch_dispatch__(func, types, args, kwargs)


def is_fake(x: Any) -> bool:
    """True for a tensor without data, of a fake mode."""
    return isinstance(x, FakeTensor)


def wrapper(kind: type[Tensor], size: Sequence[Any], like: Tensor) -> Any:
    """A tensor of a class of ours that has no storage: a size, a dtype and a device."""
    return Tensor._make_wrapper_subclass(kind, size, dtype=like.dtype, device=like.device)


@contextmanager
def known_values(values: Sequence[tuple[Any, Tensor]]) -> Iterator[None]:
    """While it lasts, tensors without data that have one element give a value where C++ asks for
    one (an integer argument)."""
    for x, value in values:
        x.constant = value
    try:
        yield
    finally:
        for x, _ in values:
            x.constant = None


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` (``vmap``, ``grad``, ``jvp``) is at work: tensors may
    be wrapped ones."""
    return bool(torch._C._are_functorch_transforms_active())


# --------------------------------------------------------------------------- counting
class _Untracked:
    """In the place of a counter's tracker of modules, whose hooks keep a forward from
    differentiating, and cannot be put on a parameter that is passed on."""

    parents = frozenset(("Global",))

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


def flop_counter() -> Any:
    """PyTorch's counter of multiply-adds (times two), without a table by module. Importing it
    imports triton: asked for only when something is counted."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Untracked()  # type: ignore[assignment]
    return counter


# --------------------------------------------------------------------------- memory
def storage_key(x: Tensor) -> int:
    """The same number for all tensors on one storage, as long as that lives."""
    return int(x.untyped_storage()._cdata)


StorageReference = StorageWeakRef
"""While it lives, the ``storage_key`` of its storage is nobody else's, though the memory is freed;
``expired()`` says that it is."""


def storage_reference(x: Tensor) -> StorageReference:
    """Of the storage that a tensor is on."""
    return StorageWeakRef(x.untyped_storage())


def version(x: Tensor) -> int:
    """How often a tensor was written to in place; inference tensors do not count that."""
    return x._version


# --------------------------------------------------------------------------- hooks
def gradient_hooks(p: Tensor) -> list[Callable[..., Any]]:
    """What ``register_hook`` was given."""
    return [*(p._backward_hooks or {}).values()]


def accumulation_hooks(p: Tensor) -> list[Callable[..., Any]]:
    """What ``register_post_accumulate_grad_hook`` was given."""
    return [*(p._post_accumulate_grad_hooks or {}).values()]


# --------------------------------------------------------------------------- hooks on modules
def twin(module: nn.Module) -> nn.Module:
    """Another module over the same registries; ``copy`` is a class's to override."""
    other = object.__new__(type(module))
    vars(other).update(vars(module))
    return other


def take_hooks(module: nn.Module) -> Callable[..., Any]:
    """The module's forward together with its forward hooks, which a call of the module itself no
    longer runs. Relies on ``_call_impl``."""
    if not (module._forward_hooks or module._forward_pre_hooks):
        return module.forward
    plain = twin(module)
    module.__dict__.update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
    return plain._call_impl


def drops_values(fn: Callable[..., Any]) -> bool:
    """Whether what ``Module._apply`` is given is ``to_empty``'s. Relies on its name."""
    return getattr(fn, "__qualname__", "").startswith("Module.to_empty.")


# --------------------------------------------------------------------------- fully_shard
def is_sharding_hook(hook: Any) -> bool:
    """Whether a hook on a module is one of ``torch.distributed.fsdp.fully_shard``."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


def sharding_hooks(module: nn.Module) -> tuple[list[Any], list[Any]]:
    """Those of a module: ``(module, args, kwargs) -> (args, kwargs)`` before its forward, and
    ``(module, args, result) -> result`` after it, either ``None`` for no change. Relies on these
    being all that gathers the parameters of its group, there and, by what they put on ``result``,
    in the backward."""
    registries: Any = module._forward_pre_hooks, module._forward_hooks
    before, after = ([h for h in one.values() if is_sharding_hook(h)] for one in registries)
    return before, after


def in_sharded_forward(module: Any) -> bool:
    """Whether the forward of a module of ``fully_shard`` is running that has this one in it."""
    return module._get_fsdp_state()._state_ctx.iter_forward_root is not None


# --------------------------------------------------------------------------- kinds
BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._BatchNorm,)
"""The base of all batch norms, the synchronized one too."""


@contextmanager
def local_norms() -> Iterator[None]:
    """While it lasts, a ``SyncBatchNorm`` is a batch norm of this process alone. Relies on its
    forward being the same then."""
    own = nn.SyncBatchNorm.forward
    nn.SyncBatchNorm.forward = _LOCAL  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.SyncBatchNorm.forward = own  # type: ignore[method-assign]


_LOCAL = nn.modules.batchnorm._BatchNorm.forward


def norms_are_local() -> bool:
    """Whether ``local_norms`` lasts."""
    return nn.SyncBatchNorm.forward is _LOCAL


def can_synchronize(x: Tensor) -> bool:
    """Whether ``SyncBatchNorm`` has kernels for a tensor's device."""
    return x.device.type in ("cuda", "hpu", "xpu", torch._C._get_privateuse1_backend_name())


def synchronized_batch_norm(*args: Any) -> Any:
    """What it computes: of input, weight, bias, running mean and variance, which it writes to, eps,
    momentum, process group and the group's size."""
    kind: Any = nn.modules.batchnorm
    return kind.sync_batch_norm.apply(*args)


NORMS: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._NormBase,)
"""The base of all batch and instance norms."""

LEARNED_STEPS: tuple[Any, Any] = (
    torch._fake_quantize_learnable_per_tensor_affine,
    torch._fake_quantize_learnable_per_channel_affine,
)
"""Fake quantization with a gradient for scale and zero point, in one range and by channel: of
``(x, scale, zero_point, [axis,] quant_min, quant_max, grad_factor)``."""

FUSED: dict[type[nn.Module], str] = {
    nn.TransformerEncoder: "use_nested_tensor",
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
}
"""Layers that have a fused path for inference -> the attribute that, if false, rules it out."""


def compile_error() -> type[Exception]:
    """What ``torch.compile`` raises for code that it cannot compile. Importing it takes seconds:
    asked for only once something was raised."""
    return torch._dynamo.exc.TorchDynamoException


def is_compiled(module: nn.Module) -> bool:
    """True for what ``torch.compile`` returned for a module. By name: importing the compiler for
    its class takes seconds."""
    kind = type(module)
    return kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch._dynamo")


def is_packet(op: Any) -> bool:
    """True for ``torch.ops.aten.add``: all overloads of a name."""
    return isinstance(op, torch._ops.OpOverloadPacket)


def is_overload(op: Any) -> bool:
    """True for ``torch.ops.aten.add.Tensor``."""
    return isinstance(op, torch._ops.OpOverload)


def op_name(op: Any) -> str:
    """``"add"`` for ``torch.ops.aten.add.Tensor``."""
    return str(op._opname)


def custom_overload(op: Any) -> Any:
    """The overload behind what ``torch.library.custom_op`` returns; anything else as it is."""
    return getattr(op, "_opoverload", op)


def constant_result(function: Function) -> Function:
    """Tell ``torch.compile`` that a function always gives the same for the same arguments, as
    ``torch.compiler.assume_constant_result`` does; that one imports the compiler, half of what
    importing torch takes."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_vmap(node: torch.fx.Node) -> bool:
    """Whether a node of an export enters or leaves ``torch.vmap``, or moves a tensor there: Python
    functions, which no longer stand in the graph when it is decomposed."""
    return str(getattr(node.target, "__module__", "")).startswith("torch._functorch.")


class Mapped(TorchFunctionMode):
    """While a module is traced, inside the trace: ``torch.vmap`` puts the mapped dimension of a
    result where it belongs by an operation in the trace. PyTorch's own does it where no trace sees
    it: it would hold a tensor without data for a constant."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _remove_batch_dim or maybe_get_level(args[0]) != args[1]:
            return func(*args, **(kwargs or {}))
        x, level, size, place = args
        now = maybe_get_bdim(x)
        return func(x, level, size, now).movedim(now, place)


@contextmanager
def calls_may_fail() -> Iterator[None]:
    """While it lasts, a traced call of a module that raises leaves the tracer's stack of modules as
    it was: forward may catch the error. Relies on ``fx.Tracer.call_module`` and ``module_stack``:
    it takes what it put there away only after a call that returns."""
    plain = torch.fx.Tracer.call_module

    def call_module(self: Any, *args: Any) -> Any:
        before = list(self.module_stack.items())
        try:
            return plain(self, *args)
        except BaseException:
            self.module_stack.clear()
            self.module_stack.update(before)
            raise

    torch.fx.Tracer.call_module = call_module  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.fx.Tracer.call_module = plain  # type: ignore[method-assign]


# --------------------------------------------------------------------------- composite operators
def is_composite(op: Any, autocast: bool = False) -> bool:
    """True for an operator on tensors whose one kernel calls others, which also differentiate it;
    under ``autocast`` only if that would not cast for it as a whole."""
    if not is_overload(op) or not torch._C._dispatch_has_kernel(op.name()):
        return False
    if not any("Tensor" in str(a.type) for a in op._schema.returns):
        return False
    cast = (f"Autocast{kind}" for kind in ("CPU", "CUDA"))
    if autocast and any(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), k) for k in cast):
        return False
    return op._can_decompose() or _IMPLICIT in op.py_kernels


def aten_names() -> list[str]:
    """Of all of torch's own operators that have a kernel."""
    found = (name.split("::", 1) for name in torch._C._dispatch_get_all_op_names())
    names = {name.split(".")[0] for library, name in found if library == "aten"}
    return sorted(name for name in names if hasattr(aten, name))


_IMPLICIT = torch._C.DispatchKey.CompositeImplicitAutograd


def composed(op: Any, arguments: Callable[[list[Any]], Any], values: list[Any]) -> torch.fx.Graph:
    """The calls that a composite operator makes, as a graph of these values, which ``arguments``
    makes ``(args, kwargs)`` of. The values are those of an export's graph; real tensors are taken
    for fake ones."""
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = next((x.fake_mode for x in values if is_fake(x)), None)

    def given(x: Any) -> Any:  # each a tensor of its own, whose gradient counts
        if not isinstance(x, Tensor):
            return x
        if mode is not None and not is_fake(x):
            x = mode.from_tensor(x, static_shapes=True)
        x = x.detach()
        floats = x.is_floating_point() or x.is_complex()
        return x.requires_grad_(floats and not op._schema.is_mutable)

    def call(*values: Any) -> Any:
        args, kwargs = arguments(list(values))
        return op(*args, **kwargs)

    trace = make_fx(call, decomposition_table={op: op.decompose}, pre_dispatch=True)
    return trace(*map(given, values)).graph


# --------------------------------------------------------------------------- writing graphs
def is_higher_order(held: Any) -> bool:
    """True for an op that calls graphs (``cond``), which no tracer of ``torch.fx`` takes."""
    return isinstance(held, torch._ops.HigherOrderOperator)


def holds_ops(held: Any) -> bool:
    """True for the parts of a path to one: ``torch.ops``, ``torch.ops.aten``, ``.add``."""
    kinds = torch._ops._Ops | torch._ops._OpNamespace | torch._ops.OpOverloadPacket
    return isinstance(held, kinds)


def call_whole(
    graph: fx.Graph, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> fx.Node:
    """A call that no tracer looks into, as of ``fx.wrap``; of no function of torch."""
    node = graph.call_function(function, args, kwargs)
    node.meta["is_wrapped"] = True
    return node
