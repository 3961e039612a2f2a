"""What stands in a teacher for the modules of its student: they hold tensors, and are not called.

So what a user does to one of them counts where it can (``train()``, ``eval()``, the momentum of a
batch norm, the switches of a fake quantizer), and is refused where nothing would come of it (hooks,
another module in its place).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase

from ..errors import InputError
from ..passes.capture.modes import EVAL, TRAIN, enter
from ..passes.program import Flags
from ..torch_private import BATCH_NORMS, is_sharding_hook


class Modes:
    """Which of its modes a teacher is in: ``mode``, as of the flags of its student's modules;
    ``None`` if it was not captured so. ``runs``: the student, and other copies of it that run;
    ``buffers``: holds the student's buffers; ``hooked``: one of its modules has had a hook, and
    ``unhooked``: those whose hooks could not be run -> why."""

    buffers: nn.Module

    def __init__(
        self, student: nn.Module, captured: Mapping[str, Flags], unhooked: Mapping[str, str]
    ) -> None:
        self.captured, self.runs = captured, [student]
        self.hooked, self.unhooked = False, unhooked
        self.paths = [path for path, _ in student.named_modules()]  # forward may make more
        self._settle(TRAIN if student.training else EVAL)

    @property
    def student(self) -> nn.Module:
        return self.runs[0]

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {path: self.student.get_submodule(path) for path in self.paths}

    def train(self, path: str, mode: bool) -> None:
        """``train(mode)`` of the student, or of one of its modules."""
        for run in self.runs:
            run.get_submodule(path).train(mode)
        self._settle("" if path else TRAIN if mode else EVAL)

    def set(self, path: str, name: str, value: Any) -> None:
        """An attribute of one module alone."""
        for run in self.runs:
            setattr(run.get_submodule(path), name, value)
        self._settle("")

    def enter(self, mode: str) -> None:
        """One of those that were captured."""
        for run in self.runs:
            enter(run, mode, self.captured)
        self._settle(mode)

    def _settle(self, asked: str) -> None:
        flags = tuple(module.training for module in self.modules.values())
        fits = [mode for mode, of in self.captured.items() if of == flags]
        self.mode = asked if asked in fits else next(iter(fits), None)

    def refusal(self) -> InputError:
        """For a call in a mode that was not captured."""
        near = max(self.captured.values(), key=lambda flags: sum(self._alike(flags)))
        pairs = zip(self.modules.items(), self._alike(near), strict=True)
        other = [
            f"{path or '(root)'} ({type(m).__name__}) in {TRAIN if m.training else EVAL}()"
            for (path, m), alike in pairs
            if not alike
        ]
        return InputError(
            f"the teacher was not captured with {', '.join(other[:3])}"
            + (f" and {len(other) - 3} more" if len(other) > 3 else ""),
            remedy="bring the model into these modes before expand: it is captured in train(), in "
            "eval(), and as it is given",
        )

    def _alike(self, flags: Flags) -> list[bool]:
        pairs = zip(self.modules.values(), flags, strict=True)
        return [module.training == flag for module, flag in pairs]


class Inner(nn.Module):
    """A module of the student, in the teacher. Its ``training`` is that of the student's, and so is
    its momentum, if it is a batch norm."""

    _kind: type[nn.Module] = nn.Module
    _path: str
    _modes: Modes
    _own: nn.Module

    @staticmethod
    def of(module: nn.Module, path: str, modes: Modes) -> Inner:
        """For a module of the student."""
        kinds = (kind for kind in _CLASSES if isinstance(module, kind))
        made = _blank(next(kinds))
        made.__dict__.update(_path=path, _modes=modes, _own=modes.student.get_submodule(path))
        names = {*made._baked} - {"momentum", "num_features"}
        made.__dict__.update({name: vars(module).get(name) for name in names})
        return made

    @property
    def _baked(self) -> list[str]:
        """Attributes that the graphs of the teacher hold as numbers."""
        return getattr(self._kind, "__constants__", [])

    @property
    def training(self) -> bool:
        return self._own.training

    @training.setter
    def training(self, training: bool) -> None:
        if "_modes" in self.__dict__:  # nn.Module sets it before there are any
            self._modes.set(self._path, "training", training)

    def train(self, mode: bool = True) -> Inner:
        self._modes.train(self._path, mode)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "momentum" and name in self._baked:
            self._modes.set(self._path, name, value)
        elif name in self._baked:
            self._refuse(f"{name} of a module inside a teacher is a number in its graphs", _AGAIN)
        elif name == "qconfig":  # torch.ao.quantization sets it on every module before it begins
            self._refuse("a teacher is not quantized: it is a graph", _QUANTIZE)
        else:
            super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        refuse_other(self, name, module)
        super().add_module(name, module)

    def _refuse(self, why: str, remedy: str) -> NoReturn:
        raise InputError(why, module_path=self._path, remedy=remedy)

    def _refuse_hook(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("this hook on a module inside a teacher would never run: it is a graph", _HOOK)

    def register_forward_pre_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_sharding_hook(hook):  # which run around the teacher's calls
            self._refuse_hook()
        return super().register_forward_pre_hook(hook, *args, **kwargs)

    def register_forward_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        """It runs when the graph leaves the module: with arguments and result of the teacher's
        widths; what it returns takes the result's place. Raises ``InputError`` where the graph does
        not show what the module is called with, or returns."""
        if not is_sharding_hook(hook):
            if why := self._modes.unhooked.get(self._path):
                self._refuse(f"a hook on this module inside a teacher cannot run: {why}", _OTHER)
            self._modes.hooked = True
        return super().register_forward_hook(hook, *args, **kwargs)

    register_full_backward_hook = register_full_backward_pre_hook = _refuse_hook
    register_backward_hook = _refuse_hook

    def __getitem__(self, key: int | str) -> nn.Module:
        """A child, as the student's own module gives it: a ``Sequential``, a ``ModuleList``."""
        own: Any = self._own
        names = {id(child): name for name, child in own._modules.items()}
        return self.get_submodule(names[id(own[key])])

    def extra_repr(self) -> str:
        return f"of {type(self._own).__name__}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self._kind,), self.__dict__


_AGAIN = "change the model, and expand it then"
_CONVERT = "expand (or give to GPD) nn.SyncBatchNorm.convert_sync_batchnorm(model) instead"
_QUANTIZE = (
    "quantize gpdfx.collapse(teacher), or gpdfx.plain_teacher(teacher) for the wide network; or "
    "prepare the model and expand it then"
)
_HOOK = (
    "register_forward_hook takes hooks that get arguments and result, and a tensor's register_hook "
    "such as get its gradient; or register the hook on the model, and expand it then"
)
_OTHER = "register it on a module around this one, or in it; or on the model, and expand it then"


def refuse_other(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Raise ``InputError`` if a module is to stand where one of a teacher does, as
    ``SyncBatchNorm.convert_sync_batchnorm`` has it."""
    own = parent._modules.get(name)
    if isinstance(own, Inner) and module is not own:
        remedy = _CONVERT if isinstance(module, nn.SyncBatchNorm) else _AGAIN
        own._refuse("another module inside a teacher would never run: it is a graph", remedy)


class _Norm(Inner):
    """A batch norm."""

    @property
    def momentum(self) -> float | None:
        own: Any = self._own
        return own.momentum  # type: ignore[no-any-return]

    @property
    def process_group(self) -> Any:
        """Of a ``SyncBatchNorm``."""
        own: Any = self._own
        return own.process_group

    @property
    def num_features(self) -> int:
        tensors = (*self.parameters(), *self.buffers())
        return tensors[0].numel() if tensors else self._own.num_features  # type: ignore[return-value]


class _FakeQuantizer(Inner):
    """One of ``torch.ao.quantization``: its switches are the student's, too."""

    forward = calculate_qparams = nn.Module.forward

    def enable_observer(self, enabled: bool = True) -> None:
        self._switch("observer_enabled", enabled)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        self._switch("fake_quant_enabled", enabled)

    def _switch(self, name: str, on: bool) -> None:
        for module in (self, self._modes.buffers.get_submodule(self._path)):
            module.get_buffer(name).fill_(int(on))


_Kinds = tuple[type[nn.Module], ...]
_NORMS: _Kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, *BATCH_NORMS)
_DROPOUTS: _Kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_DROPOUTS += (nn.AlphaDropout, nn.FeatureAlphaDropout)
_CLASSES: dict[type[nn.Module], type[Inner]] = {
    **{kind: type(kind.__name__, (_Norm, kind), {"_kind": kind}) for kind in _NORMS},
    **{kind: type(kind.__name__, (Inner, kind), {"_kind": kind}) for kind in _DROPOUTS},
    FakeQuantizeBase: type(
        "FakeQuantize", (_FakeQuantizer, FakeQuantizeBase), {"_kind": FakeQuantizeBase}
    ),
    nn.Module: Inner,
}
"""What is looked for in a network by its class, to freeze it or to let it run on -> what is found
there in a teacher."""


def _blank(kind: type[nn.Module]) -> Inner:
    made = object.__new__(_CLASSES[kind])
    nn.Module.__init__(made)
    return made


# --------------------------------------------------------------------------- tensors by name
class Ordered(nn.Module):
    """Shares and branches, which are no images: they keep their memory order where a module is
    moved to ``channels_last``, which is for tensors of four or five dimensions."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Ordered:
        def moved(t: Tensor) -> Tensor:
            wide = t[(None,) * 6]
            made: Tensor = fn(wide)
            return t if made is wide else made[(0,) * 6]

        super()._apply(moved, recurse)
        return self


def add_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register a module under a dotted name."""
    parent, leaf = _parent(root, path)
    parent._modules[leaf] = module


def attach(root: nn.Module, name: str, tensor: Tensor, persistent: bool) -> None:
    """Register a parameter or buffer under a dotted name."""
    module, leaf = _parent(root, name)
    if isinstance(tensor, nn.Parameter):
        module._parameters[leaf] = tensor
    else:
        module._buffers[leaf] = tensor
        if not persistent:
            module._non_persistent_buffers_set.add(leaf)


def _parent(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module, made where there is none, that has the last part of a dotted name."""
    *parents, leaf = name.split(".")
    for part in parents:
        root = root._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
    return root, leaf
