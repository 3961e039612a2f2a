"""The dynamic teacher, and the way back from it (channel-branch reparameterization, CBR)."""

from __future__ import annotations

import copy
import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from .axes import Frozen
from .errors import InputError
from .explain import make_story
from .passes.program import Program
from .passes.widen import Widened, gather
from .sizes import input_sizes

if TYPE_CHECKING:
    from .report import Report


_REGISTRIES = frozenset(nn.Module().__dict__)


class Teacher(nn.Module):
    """A wider network with the student's function, call signature and state_dict names.

    Made by ``gpdfx.expand``. ``teacher(*args)`` runs the dynamic teacher,
    ``teacher.student(*args)`` the student's own module on parameters read out of the teacher's
    (the first copy of every index): differentiable, so that one loss over both trains the shared
    parameters. The student's buffers (batch-norm statistics) are its own, under
    ``student_buffers`` in the state_dict.
    """

    _student: nn.Module  # the user's module; hidden from nn.Module's registries
    _net: nn.Module  # what generated code runs on

    def __init__(self, widened: Widened, call: Call) -> None:
        super().__init__()
        program = widened.program
        self._call = call
        self._maps = {n: widened.maps[n] for n in widened.maps}
        self._alias = dict(program.alias)
        self._code = {mode: _Code(graph) for mode, graph in widened.graphs.items()}
        self._out_specs = {mode: m.out_spec for mode, m in program.modes.items()}
        self._sizes = {mode: input_sizes(m.graph) for mode, m in program.modes.items()}
        self._report: Report | None = None
        self._story = make_story(widened)
        self._caches: list[tuple[str, str, Any]] = []
        # The user's module hides from nn.Module: its tensors are placeholders for the teacher's.
        object.__setattr__(self, "_student", copy.deepcopy(program.student))
        self._register(program, widened)
        # Generated code names tensors as attributes; `_net` has the same registries and none of
        # this class's methods, so a student may call its own submodules `student` or `report`.
        net = nn.Module()
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            net.__dict__[registry] = self.__dict__[registry]
        object.__setattr__(self, "_net", net)

    # ---- construction
    def _register(self, program: Program, widened: Widened) -> None:
        made: dict[str, Tensor] = {}
        for name, tensor in program.tensors.items():
            own = tensor.detach()
            wide = gather(own, widened.maps[name])
            wide = own.clone() if wide is own else wide
            if isinstance(tensor, nn.Parameter):
                wide = nn.Parameter(wide, requires_grad=tensor.requires_grad)
            made[name] = wide
        lasting = set(program.student.state_dict(keep_vars=True))
        for name, wide in made.items():
            _attach(self, name, wide, persistent=name in lasting)
        for name, canonical in program.alias.items():
            _attach(self, name, made[canonical], persistent=name in lasting)
        for name, table in widened.shares.items():
            _attach(self, name, table, persistent=True)
        for name, index in widened.constants.items():
            _attach(self, name, index, persistent=False)
        for name, child in program.children.items():
            self._modules[name] = child
        self._buffers_name = "student_buffers"
        while self._buffers_name in self._modules:
            self._buffers_name += "_"
        self._modules[self._buffers_name] = nn.Module()
        for name, buffer in program.student.named_buffers():
            own = buffer.detach().clone()
            _attach(self, f"{self._buffers_name}.{name}", own, persistent=name in lasting)

    # ---- running
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the dynamic teacher. Raises ``InputError`` for inputs of another structure than the
        example's, or of another size where the network has that size baked in."""
        mode = "train" if self.training else "eval"
        flat = self._call.flatten(args, kwargs)
        self._sizes[mode].check(flat, self._call.names)
        results = self._code[mode](self._net, flat)
        return pytree.tree_unflatten(results, self._out_specs[mode])

    def student(self, *args: Any, **kwargs: Any) -> Any:
        """Run the student on the teacher's parameters; gradients flow into the teacher's."""
        self._student.train(self.training)
        tensors = dict(self.student_parameters())
        tensors |= dict(self._modules[self._buffers_name].named_buffers())  # type: ignore[union-attr]
        try:
            return functional_call(self._student, tensors, args, kwargs, tie_weights=True)
        finally:
            for path, attribute, pristine in self._caches:
                module = self._student.get_submodule(path)
                module.__dict__[attribute] = copy.copy(pristine)

    def student_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """CBR: the student's parameters as views of (or gathers from) the teacher's."""
        for name, parameter in self._student.named_parameters():
            wide = operator_get(self._net, name)
            del parameter
            yield name, take_first(wide, self._maps[name])

    def find_caches(self, args: Any, kwargs: Any) -> None:
        """Find tensors that the student keeps outside its registries (LeViT's bias cache): they
        are put back after every call, so that new weights count."""
        before = {
            (path, k): copy.copy(v)
            for path, module in self._student.named_modules()
            for k, v in module.__dict__.items()
            if isinstance(v, dict | list | Tensor | type(None)) and k not in _REGISTRIES
        }
        probe = copy.deepcopy(self._student)
        with torch.no_grad():
            for training in (True, False):
                probe.train(training)(*args, **kwargs)
        for (path, k), old in before.items():
            new = probe.get_submodule(path).__dict__.get(k)
            if isinstance(old, dict | list) and isinstance(new, dict | list):
                changed = len(old) != len(new)
            else:
                changed = (old is None) != (new is None)
            if changed:
                self._caches.append((path, k, old))

    def pin(self, level: str) -> None:
        """Accept only the example's input sizes but for those of ``level`` (see ``LEVELS``)."""
        flat = self._call.flatten(self._call.args, self._call.kwargs)
        self._sizes = {mode: s.pinned(flat, level) for mode, s in self._sizes.items()}

    @torch.no_grad()
    def load_student(self, student: nn.Module) -> None:
        """IR: take over all parameters and buffers of a module like the student."""
        own = dict(student.named_parameters())
        for name, tensor in own.items():
            self._load(name, tensor)
        for name, p in self._student.named_parameters():
            p.copy_(own[name])
        self.load_buffers(student)

    @torch.no_grad()
    def load_buffers(self, student: nn.Module) -> None:
        """``load_student`` for the buffers alone."""
        buffers = dict(self._modules[self._buffers_name].named_buffers())  # type: ignore[union-attr]
        for name, buffer in student.named_buffers():
            self._load(name, buffer)
            buffers[name].copy_(buffer)

    def _load(self, name: str, tensor: Tensor) -> None:
        maps = self._maps[self._alias.get(name, name)]
        operator_get(self._net, name).copy_(gather(tensor, maps))

    def report(self) -> Report:
        """What widened, what did not and why, parameters, multiply-adds, measured error."""
        assert self._report is not None
        return self._report

    # ---- nn.Module's other duties
    def train(self, mode: bool = True) -> Teacher:
        super().train(mode)
        self._student.train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Teacher:
        super()._apply(fn, recurse)
        self._student._apply(fn, recurse)
        return self


def collapse(teacher: Teacher) -> nn.Module:
    """The plain student: the user's own class, state_dict keys and ties, trained values.

    Parameters are the first copies of the teacher's, bit for bit; buffers are those the student
    gathered itself. The teacher is unchanged and shares no memory with the result.
    """
    if not isinstance(teacher, Teacher):
        raise InputError(
            f"collapse takes a teacher, not {type(teacher).__name__}",
            remedy="pass what gpdfx.expand returned",
        )
    plain: nn.Module = copy.deepcopy(teacher._student)
    buffers = dict(teacher._modules[teacher._buffers_name].named_buffers())  # type: ignore[union-attr]
    with torch.no_grad():
        own = dict(plain.named_parameters())
        for name, derived in teacher.student_parameters():
            own[name].copy_(derived)
        for name, buffer in plain.named_buffers():
            buffer.copy_(buffers[name])
    return plain.train(teacher.training)


# --------------------------------------------------------------------------- parameters
def take_first(tensor: Tensor, maps: tuple[Frozen, ...]) -> Tensor:
    """CBR of one tensor: the first copy of every student index; a view where it can be one."""
    for dim, frozen in enumerate(maps):
        if not frozen.wide:
            continue
        outer, wide, narrow = frozen.blocks
        if outer == 1:
            tensor = tensor.narrow(dim, 0, narrow)
        elif outer:
            parts = tensor.unflatten(dim, (outer, wide)).narrow(dim + 1, 0, narrow)
            tensor = parts.flatten(dim, dim + 1)
        else:
            index = torch.from_numpy(frozen.first).to(tensor.device)
            tensor = tensor.index_select(dim, index)
    return tensor


def operator_get(module: nn.Module, name: str) -> Tensor:
    """``module.a.b.c`` by a dotted name."""
    *path, leaf = name.split(".")
    module = module.get_submodule(".".join(path))
    tensor = module._parameters.get(leaf)
    found = module._buffers[leaf] if tensor is None else tensor
    assert found is not None
    return found


def _attach(root: nn.Module, name: str, tensor: Tensor, persistent: bool) -> None:
    *path, leaf = name.split(".")
    for part in path:
        root = root._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        root._parameters[leaf] = tensor
    else:
        root._buffers[leaf] = tensor
        if not persistent:
            root._non_persistent_buffers_set.add(leaf)


# --------------------------------------------------------------------------- calling
class Call:
    """How the example called the model; flattens later calls of the same structure."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.signature = inspect.signature(model.forward)
        self.args, self.kwargs = self._normal(args, kwargs)
        leaves, self.spec = pytree.tree_flatten((self.args, self.kwargs))
        self.constants = [None if isinstance(x, Tensor) else x for x in leaves]
        self.tensors = [isinstance(x, Tensor) for x in leaves]
        paths = pytree.tree_flatten_with_path((self.args, self.kwargs))[0]
        parameters = list(self.signature.parameters)
        self.names = [_name(path, parameters) for path, _ in paths]

    def _normal(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = self.signature.bind(*args, **kwargs)
        for name, parameter in self.signature.parameters.items():
            given = bound.arguments.get(name)
            if name in bound.arguments and given is parameter.default:
                del bound.arguments[name]
        return bound.args, bound.kwargs

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        if not kwargs and len(args) == 1 == len(self.tensors) and isinstance(args[0], Tensor):
            return [args[0]]
        try:
            leaves, spec = pytree.tree_flatten(self._normal(args, kwargs))
        except TypeError as error:
            raise InputError(f"the call does not fit the model's forward: {error}") from error
        fits = spec == self.spec and all(
            isinstance(x, Tensor) == tensor and (tensor or x == constant)
            for x, tensor, constant in zip(leaves, self.tensors, self.constants, strict=True)
        )
        if not fits:
            raise InputError(
                "the call differs in structure, or in an argument that is no tensor, from the "
                f"example that the model was expanded with ({', '.join(self.names)})",
                remedy="expand the model with example_inputs and example_kwargs of this structure",
            )
        return leaves


def _name(path: Any, parameters: list[str]) -> str:
    first, second, *rest = path
    root = parameters[min(second.idx, len(parameters) - 1)] if first.idx == 0 else second.key
    return str(root) + pytree.keystr(tuple(rest))


class _Code:
    """A graph as Python source. fx graphs do not pickle across versions; source does."""

    def __init__(self, graph: fx.Graph) -> None:
        python = graph.python_code("self")
        self.source = python.src
        self.globals = {
            k: ("module", v.__name__) if isinstance(v, types.ModuleType) else ("value", v)
            for k, v in python.globals.items()
        }
        self.function: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "function": None}

    def __call__(self, net: nn.Module, flat: list[Any]) -> Any:
        if self.function is None:
            self.function = self._compile()
        return self.function(net, *flat)

    def _compile(self) -> Callable[..., Any]:
        scope: dict[str, Any] = {
            k: importlib.import_module(v) if kind == "module" else v
            for k, (kind, v) in self.globals.items()
        }
        exec(compile(self.source, "<gpdfx teacher>", "exec"), scope)
        function: Callable[..., Any] = scope["forward"]
        return function
