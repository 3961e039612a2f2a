"""All folds of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..kernels.fold import fold, key_of
from ..passes.folded import Folded, Lowered, Make, module_of, students, teachers
from .fold import Fold


class Lazy(Mapping[str, Tensor]):
    """Folded weights that are made when they are read, each time."""

    def __init__(self, made: Mapping[str, Make]) -> None:
        self.made = made

    def __getitem__(self, name: str) -> Tensor:
        return self.made[name]()

    def __contains__(self, name: object) -> bool:
        return name in self.made

    def __iter__(self) -> Iterator[str]:
        return iter(self.made)

    def __len__(self) -> int:
        return len(self.made)


class Folding:
    """Folds the branches of a network whose tensors have names in ``net``: the ``lowered`` layers
    by the fused fold, the others by the modules at the paths of ``singles``."""

    def __init__(
        self, net: nn.Module, lowered: Mapping[str, Lowered], singles: Sequence[str]
    ) -> None:
        self.net, self.singles = net, tuple(singles)
        self.alone = [Chunk({name: one}, net) for name, one in lowered.items()]
        self.whole = [Chunk(lowered, net)] if lowered else []
        self.cut = frozenset(name for name, one in lowered.items() if one.site.cut is not None)
        self.kept: Folded | None = None
        self.read = partial(operator_get, net)

    def read_with(self, read: Callable[[str], Tensor]) -> None:
        """Take tensors from ``read``, by name, and not out of the network."""
        self.read = read  # type: ignore[assignment]
        for chunk in (*self.whole, *self.alone):
            chunk.read = read

    def __call__(self, *, teacher: bool = True, student: bool = True) -> Folded:
        """The weights that the teacher reads, that the student does, or both."""
        if self.kept is not None:
            return self.kept
        folded: dict[str, Tensor] = {}
        for chunk in self.whole if self._on_gpu() else self.alone:
            folded |= chunk(teacher, student)
        for path in self.singles:
            folded |= self._single(path)
        return folded

    def lazy(self, *, teacher: bool = True, student: bool = True) -> Lazy:
        """The same without gradients, for calls that read a weight once: one is in memory at a
        time."""
        made: dict[str, Make] = {}
        for chunk in self.alone:
            (name,) = chunk.sites
            if teacher:
                made[teachers(name)] = partial(_one_of, chunk, teachers(name))
            if student:
                made[students(name)] = partial(_one_of, chunk, students(name))
        for path in self.singles:
            fold: Fold = self.net.get_submodule(path)  # type: ignore[assignment]
            made |= {name: partial(self._one_of_single, path, name) for name in fold.names}
        return Lazy(made)

    def for_call(self, *, teacher: bool = True, student: bool = True) -> Folded:
        """What one call reads."""
        lazy = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or self._on_gpu())
        make = self.lazy if lazy and self.kept is None else self
        return make(teacher=teacher, student=student)

    @contextmanager
    def once(self, make: Callable[[], Folded]) -> Iterator[None]:
        """Use what ``make`` makes, without gradients, for all calls inside."""
        with torch.no_grad():
            self.kept = make()
        try:
            yield
        finally:
            self.kept = None

    def _on_gpu(self) -> bool:
        return any(chunk.on_gpu for chunk in self.whole)

    def _single(self, path: str) -> Folded:
        """The weights of one layer that is not in the fused fold."""
        fold: Fold = self.net.get_submodule(path)  # type: ignore[assignment]
        own = fold.branched
        bias = None if own.bias is None else self.read(own.bias)
        folded: Folded = fold(self.read(own.weight), bias)
        return folded

    @torch.no_grad()
    def _one_of_single(self, path: str, name: str) -> Tensor:
        return self._single(path)[name]


@torch.no_grad()
def _one_of(chunk: Chunk, name: str) -> Tensor:
    """One of the two weights of a chunk of one."""
    (weight,) = chunk.sites
    return chunk(name == teachers(weight), name == students(weight))[name]


class Chunk:
    """Layers that are folded together: on a GPU all, for launches count; on a CPU each, so that its
    backward begins when the gradient of its weight is known. ``sites`` by weight; ``names`` and
    ``places`` (module and name) of their tensors; ``index``: whose place each site's have."""

    def __init__(self, lowered: Mapping[str, Lowered], net: nn.Module) -> None:
        self.sites = {name: one.site for name, one in lowered.items()}
        self.key = key_of(tuple(self.sites.values()))
        numbers: dict[str, int] = {}
        paths = [path for name, one in lowered.items() for path in _paths(name, one, net)]
        self.index = tuple(numbers.setdefault(path, len(numbers)) for path in paths)
        ends = [path.rpartition(".") for path in numbers]
        self.places = [(net.get_submodule(parent), leaf) for parent, _, leaf in ends]
        self.names = list(numbers)
        self.read: Callable[[str], Tensor] | None = None

    @property
    def on_gpu(self) -> bool:
        return find(*self.places[0]).is_cuda

    def tensors(self) -> list[Tensor]:
        """Those of its places."""
        if self.read is not None:
            return [self.read(name) for name in self.names]
        return [find(module, leaf) for module, leaf in self.places]

    def __call__(self, teacher: bool, student: bool) -> Folded:
        """The weights of teacher and student."""
        tensors = self.tensors()
        folded: dict[str, Tensor] = {}
        sites = tuple(self.sites.values())
        weights = fold(sites, self.key, self.index, tensors, teacher=teacher, student=student)
        for name, (wide, own) in zip(self.sites, weights, strict=True):
            if wide is not None:
                folded[teachers(name)] = wide
            if own is not None:
                folded[students(name)] = own
        return folded


def _paths(name: str, lowered: Lowered, net: nn.Module) -> list[str]:
    """The tensors of a site, in its order."""
    own = module_of(name)
    if not lowered.site.terms:
        return [name, *lowered.shares]
    branches: Fold = net.get_submodule(own)  # type: ignore[assignment]
    rest = zip(branches.linear, lowered.site.terms, strict=True)
    theirs = [f"{own}.{key}.{tensor}" for key, term in rest for tensor in term.names]
    return [name, f"{own}.scales", *lowered.shares, *theirs]


def find(module: nn.Module, leaf: str) -> Tensor:
    """A parameter or buffer."""
    tensor = module._parameters.get(leaf)
    found = module._buffers[leaf] if tensor is None else tensor
    assert found is not None
    return found


def operator_get(module: nn.Module, name: str) -> Tensor:
    """``module.a.b.c`` by a dotted name."""
    path, _, leaf = name.rpartition(".")
    return find(module.get_submodule(path), leaf)
