"""The dynamic teacher as a module."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ..algebra.frozen import Frozen
from ..algebra.gather import gather
from ..calls import sharded, tree
from ..calls.given import apart
from ..calls.held import apply_keeping, importable
from ..control import covers
from ..errors import InputError, suggest
from ..passes.capture.export import first_line
from ..passes.capture.modes import EVAL, TRAIN
from ..passes.folded import Folded, merged, module_of, students
from ..passes.program import Mode, duplicate, unused
from ..passes.widen import Widened
from ..torch_private import gradient_hooks
from .captured import Part, Section
from .compiled import Compiled, Facts
from .decay import matcher_of, undecayed
from .extract import Mean, settle, take_first
from .fold import Fold
from .folding import Folding, Lazy, operator_get
from .hooked import ModuleCalls
from .inner import Inner, Modes, Ordered, add_module, attach, refuse_other
from .python import StudentCode, missing, moves_its_student, placeholder

if TYPE_CHECKING:
    from ..report.report import Report

_PICKLED = ("__getstate__", "__reduce__", "__reduce_ex__")
_HIDDEN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


@moves_its_student
class Teacher(nn.Module):
    """A wider network with the student's function, call signature and state_dict names.

    Made by ``gpdfx.expand``. ``teacher(*args)`` runs the dynamic teacher,
    ``teacher.student(*args)`` the student's own module on parameters read out of the teacher's
    (the first copy of every index): differentiable, so that one loss over both trains the shared
    parameters. The student's buffers (batch-norm statistics) are its own, under
    ``student_buffers`` in the state_dict.

    Where the network was captured in parts, the user's Python runs between them, on the student's
    view of the parameters.

    ``describe``: makes the report, once everything else is there.
    """

    _net: nn.Module  # what generated code runs on

    def __init__(
        self, compiled: Compiled, describe: Callable[[Teacher], Report] | None = None
    ) -> None:
        super().__init__()
        program = compiled.program
        options, student = program.options, program.student
        dtypes = {name: x.dtype for name, x in program.tensors.items()}
        self._facts = Facts(
            program.maps, program.alias, program.uses, options, compiled.example, dtypes
        )
        for maps in program.maps.values():
            settle(maps)
        self._parts = {path: Part(path) for path in program.parts}
        for key, mode in program.modes.items():
            section = self._section(key, mode, program.graphs[key], compiled)
            self._parts[mode.site.path].sections.append(section)
        # The user's module hides from nn.Module: its parameters are placeholders for the teacher's.
        hidden: dict[int, Any] = {id(p): placeholder(p) for p in student.parameters()}
        self._code = StudentCode(duplicate(student, hidden), compiled.python)
        self._modes = Modes(self._student, program.flags, self._unhooked(compiled.calls))
        self._register(program)
        # Generated code names tensors as attributes; `_net` has the same registries and none of
        # this class's methods, so a student may call its own submodules `student` or `report`.
        net = nn.Module()
        for registry in _HIDDEN:
            net.__dict__[registry] = self.__dict__[registry]
        object.__setattr__(self, "_net", net)
        self._folds = {one.weight: module_of(one.weight) for one in program.branched}
        self._modules.update({name.split(".")[0]: Ordered() for name in self._folds.values()})
        for one in program.branched:
            weight = program.tensors[program.alias.get(one.weight, one.weight)]
            seed = options.seed + zlib.crc32(one.weight.encode())
            live, drawn = options.scales == "scratch", self._draws(one.weight)
            fold = Fold(one, weight.detach(), seed, live=live, drawn=drawn)
            add_module(self, module_of(one.weight), fold)
        self._means: dict[str, Mean] = {}
        for name, _ in self._student.named_parameters() if options.extract == "mean" else ():
            if any(m.wide for m in program.maps[name]):
                self._means[name] = Mean(program.maps[name], program.uses.get(name))
                add_module(self, f"_extraction.{name}", self._means[name])
        singles = [path for name, path in self._folds.items() if name not in program.lowered]
        self._folding = Folding(net, program.lowered, singles)
        self._begin_parts()
        self._enter(self._modes.mode or TRAIN)
        self._lasting: dict[str, Tensor] = {}
        self._report = describe(self) if describe else None

    # ---- construction
    def _draws(self, name: str) -> bool:
        """Whether branches of a weight get values."""
        return True

    def _section(self, key: str, mode: Mode, graph: fx.Graph, compiled: Compiled) -> Section:
        """A graph as code."""
        return Section(mode, graph, compiled.sizes[key], compiled.calls)

    def _unhooked(self, calls: ModuleCalls) -> dict[str, str]:
        """The student's modules of which no hook can be run -> why."""
        called = {path for (_, path), noted in calls.items() if noted}
        never = "it is never called" if calls else "the network was captured in parts"
        paths = {path for path, _ in self._student.named_modules(remove_duplicate=False)}
        reasons = dict.fromkeys(paths - called, never)
        for section in (section for part in self._parts.values() for section in part.sections):
            reasons |= section.unknown
        return reasons

    def _initial(self, name: str, tensor: Tensor, maps: tuple[Frozen, ...]) -> Tensor:
        """IR of one of the student's parameters or buffers."""
        own = tensor.detach()
        wide = gather(own, maps)
        wide = own.clone() if wide is own else wide
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(wide, requires_grad=tensor.requires_grad)
        return wide

    def _register(self, program: Widened) -> None:
        tensors = {n: self._initial(n, t, program.maps[n]) for n, t in program.tensors.items()}
        tensors |= {name: tensors[first] for name, first in program.alias.items()}
        for path, module in program.student.named_modules(remove_duplicate=False):
            if path:
                add_module(self, path, Inner.of(module, path, self._modes))
        lasting = {*program.student.state_dict(keep_vars=True), *program.shares}
        for name, tensor in tensors.items():
            attach(self, name, tensor, persistent=name in lasting)
        self._modules.update({name.split(".")[0]: Ordered() for name in program.shares})
        for name, tensor in (program.shares | program.constants).items():
            attach(self, name, tensor, persistent=name in lasting)
        self._modules.update(program.children)
        self._buffers_name = unused("student_buffers", self._modules)
        self._modules[self._buffers_name] = self._modes.buffers = nn.Module()
        self._own_name = unused("student_own", self._modules)
        for name, buffer in program.student.named_buffers():
            own = buffer.detach().clone()
            attach(self, f"{self._buffers_name}.{name}", own, persistent=name in lasting)

    def _begin_parts(self) -> None:
        """Let the user's Python between parts, if there are some, be as it was given."""
        if "" not in self._parts:
            self._code.begin_parts(self._parts, self._net)
            self._modes.runs[:] = self._code.modules

    @property
    def _student(self) -> nn.Module:
        """The user's module."""
        return self._code.student

    # ---- running
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the dynamic teacher. Raises ``InputError`` for inputs of another structure than the
        example's, or of another size where the network has that size baked in."""
        return sharded.run(self._call, args, kwargs, inside=self)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        whole = self._code.shell is None
        folded = self._folding.for_call(student=not whole, late=whole)
        return self._run_teacher(folded, args, kwargs)

    def student(self, *args: Any, **kwargs: Any) -> Any:
        """Run the student on the teacher's parameters; gradients flow into the teacher's."""
        return sharded.run(self._call_student, args, kwargs, inside=self, callers=(self,))

    def _call_student(self, *args: Any, **kwargs: Any) -> Any:
        return self._run_student(self._folding.for_call(teacher=False), args, kwargs)

    def both(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """``(teacher(...), teacher.student(...))``, the branches folded once for both. Where these
        put results into a dict or list that they are called with, it is each one's own copy."""
        return sharded.run(self._call_both, args, kwargs, inside=self, callers=(self,))  # type: ignore[no-any-return]

    def _call_both(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        folded, call = self._folding.for_call(late=self._code.shell is None), (args, kwargs)
        teacher = self._run_teacher(folded, *apart(call))
        return teacher, self._run_student(folded, *apart(call))

    def _fold(self, *, teacher: bool = True, student: bool = True) -> Folded:
        """The weights that branches fold into, by the names of ``passes.folded``: those that the
        teacher reads, those that the student does, or both."""
        return self._folding(teacher=teacher, student=student)

    def _fold_lazily(self, *, teacher: bool = True, student: bool = True) -> Lazy:
        """``_fold`` without gradients; every weight is made when it is read."""
        return self._folding.lazy(teacher=teacher, student=student)

    def _folded_once(self) -> AbstractContextManager[None]:
        """Fold the branches once for all calls inside, as an evaluation wants it: parameters must
        not change meanwhile, and get no gradient."""
        return self._folding.once(sharded.whole(self)(self._fold))

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """While it lasts, all parameters are whole, and in the dtype that they are kept in."""
        sharded.release(self)
        for name, p in self._student.named_parameters():
            if (found := self._tensor(name).dtype) != p.dtype:
                raise InputError(
                    f"{name} is {found} for a forward that is over, and kept in {p.dtype}",
                    remedy="call reshard() of the module that fully_shard was applied to first",
                )
        with sharded.whole(self):
            yield

    def folds(self) -> Iterator[Fold]:
        """The branches of each layer."""
        for path in self._folds.values():
            yield self._net.get_submodule(path)  # type: ignore[misc]

    def _run_teacher(
        self, folded: Folded, args: Any, kwargs: Any, features: list[Tensor] | None = None
    ) -> Any:
        """``features``: takes those that were asked for (``features=`` of ``expand``)."""
        if self._code.shell is None:
            if self._modes.mode is None:
                raise self._modes.refusal()
            run = partial(
                self._parts[""], self._net, folded, self._modes.mode, hooks=self._modes.hooked
            )
            if torch.compiler.is_compiling():
                return run(args, kwargs, features)
            try:
                return run(args, kwargs, features)
            except (RuntimeError, NotImplementedError) as error:
                if not (other := self._unlike_example(args, kwargs)):
                    raise
                raise InputError(
                    f"the call fails, and {other}: {first_line(error)}",
                    remedy="cast or move the inputs, or the teacher (teacher.to(...))",
                ) from error
        tensors = dict(self._shared_parameters(folded))
        for name, _ in self._student.named_buffers():
            tensors[name] = take_first(self._tensor(name), self._facts.maps_of(name))
        return self._code.run(self._code.shell, tensors, args, kwargs, folded)

    def _unlike_example(self, args: Any, kwargs: Any) -> str:
        """What is of another kind in a call than in the example's; nothing if all is alike."""
        calls = ((args, kwargs), self._facts.example)
        given, own = ([x for x in tree.leaves(c) if isinstance(x, Tensor)] for c in calls)
        for k, (x, y) in enumerate(zip(given, own, strict=False)):
            for what, a, b in (("is", x.dtype, y.dtype), ("is on", x.device, y.device)):
                if a != b:
                    return f"its tensor {k} {what} {a}, the example's {b}"
        return ""

    def _run_student(self, folded: Folded, args: Any, kwargs: Any) -> Any:
        tensors = dict(self.student_parameters(folded)) | self._student_buffers()
        return self._code.run(self._student, tensors, args, kwargs)

    # ---- between student and teacher
    def unshare(self, patterns: str | Sequence[str]) -> None:
        """Give the student parameters of its own, which begin as they are read out of the teacher
        and then train apart: all that patterns (see ``gpdfx.control``) cover.

        Raises ``InputError`` for a pattern that matches no parameter.
        """
        shared = dict(self._shared_parameters())
        known = [*shared]
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        for pattern in patterns:
            if not covers(pattern, known):
                remedy = suggest(pattern, known)
                raise InputError(f"unshared: {pattern!r} matches no parameter", remedy=remedy)
        for name in known:
            if any(covers(pattern, [name]) for pattern in patterns):
                wide = self._tensor(name)
                own = nn.Parameter(shared[name].detach().clone(), requires_grad=wide.requires_grad)
                for hook in gradient_hooks(wide):
                    own.register_hook(hook)
                attach(self, f"{self._own_name}.{name}", own, persistent=True)

    def own_parameters(self) -> dict[str, Tensor]:
        """The student's parameters that are not shared, by its names."""
        own = self._modules.get(self._own_name)
        return {} if own is None else dict(own.named_parameters())

    def student_parameters(self, folded: Folded | None = None) -> Iterator[tuple[str, Tensor]]:
        """CBR: the student's parameters. Branches are merged (``folded``: what they fold into, if
        it is known), then the first copies taken: views where they can be. Those that are the
        student's own are read from nowhere else."""
        own = self.own_parameters()
        for name, shared in self._shared_parameters(folded):
            yield name, own.get(name, shared)

    def _shared_parameters(self, folded: Folded | None = None) -> Iterator[tuple[str, Tensor]]:
        folded = self._folding.for_call(teacher=False) if folded is None else folded
        for name, _ in self._student.named_parameters():
            wide = folded.get(students(name), folded.get(merged(name)))
            wide = self._tensor(name) if wide is None else wide
            yield name, wide if name in self._folding.cut else self.narrow(name, wide)

    def narrow(self, name: str, wide: Tensor) -> Tensor:
        """A tensor like the student's parameter ``name``, out of one like the teacher's: the first
        copies, or their mean (``extract``)."""
        if name in self._means:
            mean: Tensor = self._means[name](wide, self._tensor)
            return mean
        return take_first(wide, self._facts.maps_of(name))

    def widen(self, name: str, own: Tensor) -> Tensor:
        """A tensor like the teacher's parameter or buffer ``name``, out of one like the student's:
        every copy takes the student's value."""
        maps = self._facts.maps_of(name)
        if own.shape != (size := tuple(m.student for m in maps)):
            text = f"the student's {name} is {size}, and this is {tuple(own.shape)}"
            raise InputError(text, remedy="pass a tensor of the student's size")
        return gather(own, maps)

    @torch.no_grad()
    def load_student(self, student: nn.Module) -> None:
        """IR: take over all parameters and buffers of a module like the student; branches add
        nothing to them at first."""
        if any(map(sharded.is_sharded, self.parameters())):
            raise InputError(
                "the teacher's parameters are spread over processes",
                remedy="load the student before fully_shard, or gpdfx.to_teacher(state, teacher) "
                "by torch.distributed.checkpoint.state_dict.set_model_state_dict",
            )
        own = self.own_parameters()
        for name, tensor in student.named_parameters():
            self._load(name, tensor)
            if name in own:
                own[name].copy_(tensor)
        for fold in self.folds():
            fold.reset()
        self._load_buffers(student)

    @torch.no_grad()
    def _load_buffers(self, student: nn.Module) -> None:
        """``load_student`` for the buffers alone."""
        buffers = self._student_buffers()
        for name, buffer in student.named_buffers():
            self._load(name, buffer)
            buffers[name].copy_(buffer)

    def _load(self, name: str, tensor: Tensor) -> None:
        wide = self.widen(name, tensor)
        self._tensor(name).copy_(wide)

    def _tensor(self, name: str) -> Tensor:
        """One of the teacher's parameters or buffers."""
        return operator_get(self._net, name)

    def _student_buffers(self) -> dict[str, Tensor]:
        """The student's own, by all of its names: ``to`` parts tied ones."""
        own = dict(self._modules[self._buffers_name].named_buffers())  # type: ignore[union-attr]
        return own | {n: own[first] for n, first in self._facts.alias.items() if first in own}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that a weight decay leaves alone: norms, biases, scales of branches,
        and what the student's own ``no_weight_decay()`` names (a protocol of timm's)."""
        return undecayed(self)

    @property
    def group_matcher(self) -> Callable[..., Any]:
        """The layers of parameters (a protocol of timm's), where the student says them."""
        return matcher_of(self)

    def report(self) -> Report:
        """What widened, what did not and why, parameters, multiply-adds, measured error."""
        assert self._report is not None
        return self._report

    # ---- nn.Module's other duties
    def train(self, mode: bool = True) -> Teacher:
        """What the student's own does: it may keep a norm frozen."""
        return self._enter(TRAIN if mode else EVAL)

    def _enter(self, mode: str) -> Teacher:
        """One of the modes that were captured."""
        self._modes.enter(mode)
        for module in self.modules():
            if not isinstance(module, Inner | Teacher):
                module.training = self._student.training
        return self

    @property
    def training(self) -> bool:  # that of the student, which it stands for
        return self._student.training

    @training.setter
    def training(self, training: bool) -> None:
        if "_modes" in self.__dict__:  # nn.Module sets it before there are any
            self._modes.set("", "training", training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise missing(self, self.__dict__.get("_code"), name) from None

    def add_module(self, name: str, module: nn.Module | None) -> None:
        refuse_other(self, name, module)
        super().add_module(name, module)

    def get_submodule(self, target: str) -> nn.Module:
        """By the student's names, also where a method is called the same (``student``)."""
        return self._net.get_submodule(target) if target else self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Teacher:
        """What no state_dict holds keeps its values, also where ``to_empty`` or the meta device
        takes those of everything else."""
        move = partial(super()._apply, fn, recurse)
        apply_keeping(self._lasting, self._constants, fn, move)
        options = {} if recurse else {"recurse": False}  # which an override need not know
        self._code.apply(fn, **options)
        return self

    def _constants(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers that are not in the state_dict."""
        for path, module in self.named_modules():
            for leaf in module._non_persistent_buffers_set:
                if (x := module._buffers.get(leaf)) is not None:
                    yield f"{path}.{leaf}", x

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        """As ``expand`` copies: whatever the student's Python holds."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update(duplicate(vars(self), memo, ours=True))
        twin._code.find_held()  # in functions that are its own by now
        return twin

    def __getstate__(self) -> dict[str, Any]:
        for path, part in self._student.named_modules():
            if all(getattr(type(part), name) is getattr(nn.Module, name) for name in _PICKLED):
                for name, held in vars(part).items():
                    if not importable(held):
                        raise InputError(
                            f"Python cannot pickle a teacher whose student holds a function that "
                            f"has no name in its module: {name}",
                            module_path=f"{path or '(root)'} ({type(part).__name__})",
                            remedy="gpdfx.save(teacher, path) and gpdfx.load need no pickle",
                        )
        return vars(self)
