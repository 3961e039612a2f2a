"""The dynamic teacher, and the way back from it (channel-branch reparameterization, CBR)."""

from __future__ import annotations

import copy
import itertools
import zlib
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..algebra.gather import gather
from ..control import ExpandOptions
from ..passes.capture.submodules import slow_attention
from ..passes.folded import Folded, merged, module_of, students
from ..passes.program import Program, duplicate
from ..passes.widen import Widened
from .captured import Part, Section
from .extract import Mean, take_first
from .fold import Fold
from .folding import Folding, Lazy, operator_get
from .placeholders import apply_to, placeholder

if TYPE_CHECKING:
    from ..check.streaming import Lean
    from ..report.report import Report


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
    _python_shell: nn.Module | None  # the user's Python between the parts, which it calls

    def __init__(
        self,
        widened: Widened,
        *,
        seed: int = 0,
        live: bool = False,
        extract: str = "first",
        empty: bool = False,
    ) -> None:
        """``empty``: wide parameters get no values yet (see ``gpdfx.lean``)."""
        super().__init__()
        program = widened.program
        self._maps = {n: widened.maps[n] for n in widened.maps}
        self._alias = dict(program.alias)
        self._parts = {path: Part(path) for path in program.parts}
        for key, mode in program.modes.items():
            self._parts[mode.site.path].sections.append(Section(mode, widened.graphs[key]))
        self._report: Report | None = None
        self._options: ExpandOptions | None = None
        self._evidence: Any = None
        self._caches: list[tuple[str, str, Any]] = []
        self._lean: Lean | None = None
        # The user's module hides from nn.Module: its parameters are placeholders for the teacher's.
        placeholders: dict[int, Any] = {id(p): placeholder(p) for p in program.student.parameters()}
        object.__setattr__(self, "_student", duplicate(program.student, placeholders))
        self._register(program, widened, empty)
        # Generated code names tensors as attributes; `_net` has the same registries and none of
        # this class's methods, so a student may call its own submodules `student` or `report`.
        net = nn.Module()
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            net.__dict__[registry] = self.__dict__[registry]
        object.__setattr__(self, "_net", net)
        self._folds = {one.weight: module_of(one.weight) for one in widened.branched}
        for one in widened.branched:
            own = program.tensors[program.alias.get(one.weight, one.weight)]
            fold = Fold(one, own.detach(), seed + zlib.crc32(one.weight.encode()), live=live)
            _place(self, module_of(one.weight), fold)
        self._uses = dict(widened.uses)
        self._means: dict[str, Mean] = {}
        if extract == "mean":
            for name, _ in self._student.named_parameters():
                if any(m.wide for m in self._maps[name]):
                    self._means[name] = Mean(self._maps[name], widened.uses.get(name))
                    _place(self, f"_extraction.{name}", self._means[name])
        fused = dict(widened.lowered)
        for name in self._means.keys() & fused.keys():  # a mean needs all of the copies
            fused[name] = replace(fused[name], site=replace(fused[name].site, cut=None))
        singles = [path for name, path in self._folds.items() if name not in fused]
        self._folding = Folding(net, fused, singles)
        # what the parts read while the user's Python runs between them
        self._held: ChainMap[str, Tensor] = ChainMap()
        between = None if "" in self._parts else self._make_python_shell()
        object.__setattr__(self, "_python_shell", between)

    # ---- construction
    def _register(self, program: Program, widened: Widened, empty: bool) -> None:
        made: dict[str, Tensor] = {}
        for name, tensor in program.tensors.items():
            own, maps = tensor.detach(), widened.maps[name]
            if empty and isinstance(tensor, nn.Parameter) and any(m.wide for m in maps):
                own = own.to("meta")
            wide = gather(own, maps)
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

    def _make_python_shell(self) -> nn.Module:
        """The student's Python, whose parts run their graphs; its own tensors are not used."""
        tensors = itertools.chain(self._student.parameters(), self._student.buffers())
        between = duplicate(self._student, {id(t): t for t in tensors})
        for path, part in self._parts.items():
            part.take_over(between.get_submodule(path), self._net, self._held)
        return between

    # ---- running
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the dynamic teacher. Raises ``InputError`` for inputs of another structure than the
        example's, or of another size where the network has that size baked in."""
        return self._run_teacher(
            self._folding.for_call(student=self._python_shell is not None), args, kwargs
        )

    def student(self, *args: Any, **kwargs: Any) -> Any:
        """Run the student on the teacher's parameters; gradients flow into the teacher's."""
        return self._run_student(self._folding.for_call(teacher=False), args, kwargs)

    def both(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """``(teacher(...), teacher.student(...))``, the branches folded once for both."""
        folded = self.fold()
        return self._run_teacher(folded, args, kwargs), self._run_student(folded, args, kwargs)

    def fold(self, *, teacher: bool = True, student: bool = True) -> Folded:
        """The weights that branches fold into, by the names of ``gpdfx.fold``: those that the
        teacher reads, those that the student does, or both."""
        return self._folding(teacher=teacher, student=student)

    def lazy(self, *, teacher: bool = True, student: bool = True) -> Lazy:
        """``fold`` without gradients; every weight is made when it is read."""
        return self._folding.lazy(teacher=teacher, student=student)

    def folded_once(self) -> AbstractContextManager[None]:
        """Fold the branches once for all calls inside, as an evaluation wants it: parameters must
        not change meanwhile, and get no gradient."""
        return self._folding.once(self.fold if self._lean is None else self._lean.fold)

    def folds(self) -> Iterator[Fold]:
        """The branches of each layer."""
        for path in self._folds.values():
            yield self._net.get_submodule(path)  # type: ignore[misc]

    def _run_teacher(
        self, folded: Folded, args: Any, kwargs: Any, features: list[Tensor] | None = None
    ) -> Any:
        """``features``: takes the features that were asked for (``features=`` of ``expand``)."""
        if self._python_shell is None:
            return self._parts[""](self._net, folded, self.training, args, kwargs, features)
        tensors = dict(self.student_parameters(folded))
        for name, _ in self._student.named_buffers():
            wide = operator_get(self._net, name)
            tensors[name] = take_first(wide, self._maps[self._alias.get(name, name)])
        self._held.maps[:] = [folded]  # type: ignore[list-item]
        try:
            with slow_attention():
                return self._run(self._python_shell, tensors, args, kwargs)
        finally:
            self._held.maps[:] = [{}]

    def _run_student(
        self, folded: Folded, args: Any, kwargs: Any, own: Mapping[str, Tensor] | None = None
    ) -> Any:
        """``own``: parameters that the student does not share."""
        self._student.train(self.training)
        tensors = dict(self.student_parameters(folded)) | dict(own or {})
        tensors |= dict(self._modules[self._buffers_name].named_buffers())  # type: ignore[union-attr]
        return self._run(self._student, tensors, args, kwargs)

    def _run(
        self, module: nn.Module, tensors: dict[str, Tensor], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Run the user's module on other tensors; what it keeps of them is forgotten after, also
        a buffer that it registers, but one that it replaces by another is written down."""
        own = {name: tensors[name] for name, _ in module.named_buffers()}
        held = [(part, dict(part._buffers)) for part in module.modules()]
        try:
            result = functional_call(module, tensors, args, kwargs, tie_weights=True)
            with torch.no_grad():
                for name, buffer in own.items():
                    if tensors[name] is not buffer and tensors[name].shape == buffer.shape:
                        buffer.copy_(tensors[name])
            return result
        finally:
            for part, before in held:
                for leaf in [k for k, b in part._buffers.items() if b is not before.get(k, b)]:
                    part._buffers[leaf] = before[leaf]
                for leaf in part._buffers.keys() - before:
                    del part._buffers[leaf]
            for path, attribute, pristine in self._caches:
                module.get_submodule(path).__dict__[attribute] = copy.copy(pristine)

    def student_parameters(self, folded: Folded | None = None) -> Iterator[tuple[str, Tensor]]:
        """CBR: the student's parameters. Branches are merged (``folded``: what ``fold`` gave, if
        it is known), then the first copies taken: views where they can be."""
        folded = self._folding.for_call(teacher=False) if folded is None else folded
        for name, _ in self._student.named_parameters():
            wide = folded.get(students(name), folded.get(merged(name)))
            wide = operator_get(self._net, name) if wide is None else wide
            yield name, wide if name in self._folding.cut else self.narrow(name, wide)

    def narrow(self, name: str, wide: Tensor) -> Tensor:
        """A tensor like the student's parameter ``name``, out of one like the teacher's: the first
        copies, or their mean (``extract``)."""
        if name in self._means:
            mean: Tensor = self._means[name](wide, lambda key: operator_get(self._net, key))
            return mean
        first = take_first(wide, self._maps[name])
        return first if self._lean is None else first.clone()  # a view would hold all of it

    def widen(self, name: str, own: Tensor) -> Tensor:
        """A tensor like the teacher's parameter or buffer ``name``, out of one like the student's:
        every copy takes the student's value."""
        return gather(own, self._maps[self._alias.get(name, name)])

    def find_caches(self, args: Any, kwargs: Any, student: nn.Module) -> None:
        """Find tensors that the student keeps outside its registries (LeViT's bias cache): they
        are put back after every call, so that new weights count. ``student``: one with values."""
        before = {
            (path, k): copy.copy(v)
            for path, module in self._student.named_modules()
            for k, v in module.__dict__.items()
            if isinstance(v, dict | list | Tensor | type(None)) and k not in _REGISTRIES
        }
        probe = duplicate(student)
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
        if self._python_shell is None or module is None:
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
        """IR: take over all parameters and buffers of a module like the student; branches add
        nothing to them at first."""
        if self._lean is not None:
            self._lean.load(student)
        for name, tensor in student.named_parameters():
            if self._lean is None or name not in self._lean.names:
                self._load(name, tensor)
        for fold in self.folds():
            fold.reset()
        self.load_buffers(student)

    @torch.no_grad()
    def load_buffers(self, student: nn.Module) -> None:
        """``load_student`` for the buffers alone."""
        buffers = dict(self._modules[self._buffers_name].named_buffers())  # type: ignore[union-attr]
        for name, buffer in student.named_buffers():
            self._load(name, buffer)
            buffers[name].copy_(buffer)

    def _load(self, name: str, tensor: Tensor) -> None:
        operator_get(self._net, name).copy_(self.widen(name, tensor))

    def report(self) -> Report:
        """What widened, what did not and why, parameters, multiply-adds, measured error."""
        assert self._report is not None
        return self._report

    # ---- nn.Module's other duties
    def train(self, mode: bool = True) -> Teacher:
        super().train(mode)
        self._student.train(mode)
        if self._python_shell is not None:
            self._python_shell.train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Teacher:
        super()._apply(fn, recurse)
        self._student._apply(lambda t: apply_to(fn, t), recurse)
        return self


# --------------------------------------------------------------------------- tensors by name
def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *way, leaf = path.split(".")
    for part in way:
        root = root._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
    root._modules[leaf] = module


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
