"""The dynamic teacher, and the way back from it (channel-branch reparameterization, CBR)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .axes import Frozen
from .errors import InputError
from .explain import make_story
from .part import Part, Section
from .passes.parts import slow_attention
from .passes.program import Program, duplicate
from .passes.widen import Widened, gather

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

    Where the network was captured in parts, the user's Python runs between them, on the student's
    view of the parameters.
    """

    _student: nn.Module  # the user's module; hidden from nn.Module's registries
    _net: nn.Module  # what generated code runs on
    _between: nn.Module | None  # the user's Python between the parts, which it calls

    def __init__(self, widened: Widened) -> None:
        super().__init__()
        program = widened.program
        self._maps = {n: widened.maps[n] for n in widened.maps}
        self._alias = dict(program.alias)
        self._parts = {path: Part(path) for path in program.parts}
        for key, mode in program.modes.items():
            self._parts[mode.site.path].sections.append(Section(mode, widened.graphs[key]))
        self._report: Report | None = None
        self._story = make_story(widened)
        self._caches: list[tuple[str, str, Any]] = []
        # The user's module hides from nn.Module: its tensors are placeholders for the teacher's.
        object.__setattr__(self, "_student", duplicate(program.student))
        self._register(program, widened)
        # Generated code names tensors as attributes; `_net` has the same registries and none of
        # this class's methods, so a student may call its own submodules `student` or `report`.
        net = nn.Module()
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            net.__dict__[registry] = self.__dict__[registry]
        object.__setattr__(self, "_net", net)
        between = None if "" in self._parts else self._make_between()
        object.__setattr__(self, "_between", between)

    # ---- construction
    def _register(self, program: Program, widened: Widened) -> None:
        made: dict[str, Tensor] = {}
        for name, tensor in program.tensors.items():
            own = tensor.detach()
            wide = gather(own, widened.maps[name])
            wide = own.clone() if wide is own else _in_format_of(own, wide)
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

    def _make_between(self) -> nn.Module:
        """The student's Python, whose parts run their graphs; its own tensors are not used."""
        tensors = itertools.chain(self._student.parameters(), self._student.buffers())
        between = duplicate(self._student, {id(t): t for t in tensors})
        for path, part in self._parts.items():
            part.take_over(between.get_submodule(path), self._net)
        return between

    # ---- running
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the dynamic teacher. Raises ``InputError`` for inputs of another structure than the
        example's, or of another size where the network has that size baked in."""
        if self._between is None:
            return self._parts[""](self._net, self.training, args, kwargs)
        tensors = dict(self.student_parameters())
        for name, _ in self._student.named_buffers():
            wide = operator_get(self._net, name)
            tensors[name] = take_first(wide, self._maps[self._alias.get(name, name)])
        with slow_attention():
            return self._run(self._between, tensors, args, kwargs)

    def student(self, *args: Any, **kwargs: Any) -> Any:
        """Run the student on the teacher's parameters; gradients flow into the teacher's."""
        self._student.train(self.training)
        tensors = dict(self.student_parameters())
        tensors |= dict(self._modules[self._buffers_name].named_buffers())  # type: ignore[union-attr]
        return self._run(self._student, tensors, args, kwargs)

    def _run(
        self, module: nn.Module, tensors: dict[str, Tensor], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Run the user's module on other tensors; what it keeps of them is forgotten after, but a
        buffer that it replaces by another is written down."""
        own = {name: tensors[name] for name, _ in module.named_buffers()}
        try:
            result = functional_call(module, tensors, args, kwargs, tie_weights=True)
            with torch.no_grad():
                for name, buffer in own.items():
                    if tensors[name] is not buffer and tensors[name].shape == buffer.shape:
                        buffer.copy_(tensors[name])
            return result
        finally:
            for path, attribute, pristine in self._caches:
                module.get_submodule(path).__dict__[attribute] = copy.copy(pristine)

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
        probe = duplicate(self._student)
        with torch.enable_grad():  # what is computed from parameters then says so
            for training in (True, False):
                probe.train(training)(*args, **kwargs)
        for (path, k), old in before.items():
            new = probe.get_submodule(path).__dict__.get(k)
            if isinstance(old, Tensor) and isinstance(new, Tensor):
                changed = not new.is_leaf
            elif isinstance(old, dict | list) and isinstance(new, dict | list):
                changed = len(old) != len(new)
            else:
                changed = (old is None) != (new is None)
            if changed:
                self._caches.append((path, k, old))

    def parts_of(self, module: nn.Module | None) -> dict[str, nn.Module]:
        """The modules of a student that were captured one by one; none if it was in one piece."""
        if self._between is None or module is None:
            return {}
        return {path: module.get_submodule(path) for path in self._parts}

    def pin(self, levels: dict[str, str]) -> None:
        """Accept, part by part, only the example's input sizes but for those of a level of
        ``LEVELS``."""
        for path, level in levels.items():
            for section in self._parts[path].sections:
                section.sizes = section.sizes.pinned(section.call.shapes, level)

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
        if self._between is not None:
            self._between.train(mode)
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
    plain: nn.Module = duplicate(teacher._student)
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


def _in_format_of(own: Tensor, wide: Tensor) -> Tensor:
    """Channels-last weights stay so."""
    if not own.is_contiguous():
        for rank, kind in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if own.ndim == rank and own.is_contiguous(memory_format=kind):
                return wide.contiguous(memory_format=kind)
    return wide


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
