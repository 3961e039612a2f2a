"""All folds of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from itertools import chain

import torch
from torch import Tensor, nn

from ..kernels.fold import autocast_type, fold, key_of
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
        self.net, self.lowered, self.singles = net, lowered, tuple(singles)
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
        for chunk in self.whole if self._kind() == "cuda" else self.alone:
            folded |= chunk(teacher, student)
        for path in self.singles:
            folded |= self._single(path)
        return folded

    def lazy(self, *, teacher: bool = True, student: bool = True, grad: bool = False) -> Lazy:
        """The same, each made when it is read. With gradients this is once, and its backward then
        follows that of the op that read it, while the gradient is in the processor's cache;
        without, every time, so that one is in memory at a time."""
        later, made = partial(_as_now, self._kind(), grad), dict[str, Make]()
        for chunk in self.alone:
            (name,) = chunk.sites
            both = later(partial(chunk, teacher, student))
            for weight, asked in ((teachers, (teacher, False)), (students, (False, student))):
                if any(asked):
                    make = both if grad else later(partial(chunk, *asked))
                    made[weight(name)] = partial(_one_of, make, weight(name))
        for path in self.singles:
            fold: Fold = self.net.get_submodule(path)  # type: ignore[assignment]
            both = later(partial(self._single, path))
            made |= {name: partial(_one_of, both, name) for name in fold.names}
        return Lazy(made)

    def for_call(self, *, teacher: bool = True, student: bool = True, late: bool = True) -> Folded:
        """What one call reads. ``late``: it reads a weight just before its op, and nothing of the
        user's runs between."""
        grad = torch.is_grad_enabled()
        lazy = not (torch.compiler.is_compiling() or self._kind() == "cuda") and (late or not grad)
        if lazy and self.kept is None:
            return self.lazy(teacher=teacher, student=student, grad=grad)
        return self(teacher=teacher, student=student)

    def of_branches(self) -> Callable[[], Folded]:
        """Makes the weights of the layers that have branches, and no others."""
        branched = {name: one for name, one in self.lowered.items() if one.site.terms}
        parts = [branched] if self._kind() == "cuda" else [{n: x} for n, x in branched.items()]
        chunks = [Chunk(part, self.net) for part in parts if part]

        def make() -> Folded:
            made = [chunk(True, True) for chunk in chunks] + [*map(self._single, self.singles)]
            return {name: x for folded in made for name, x in folded.items()}

        return make

    @contextmanager
    def once(self, make: Callable[[], Folded]) -> Iterator[None]:
        """Use what ``make`` makes, without gradients, for all calls inside."""
        with torch.no_grad():
            self.kept = make()
        try:
            yield
        finally:
            self.kept = None

    def _kind(self) -> str:
        """Of device that it runs on."""
        origins = (chunk.origin for chunk in self.alone)
        singles = (self.net.get_submodule(path).get_parameter("scales") for path in self.singles)
        return next(chain(origins, singles), torch.empty(0)).device.type

    def _single(self, path: str) -> Folded:
        """The weights of one layer that is not in the fused fold."""
        fold: Fold = self.net.get_submodule(path)  # type: ignore[assignment]
        own = fold.branched
        bias = None if own.bias is None else self.read(own.bias)
        folded: Folded = fold(self.read(own.weight), bias)
        return folded


def _one_of(make: Callable[[], Folded], name: str) -> Tensor:
    return make()[name]


def _as_now(kind: str, grad: bool, make: Callable[[], Folded]) -> Callable[[], Folded]:
    """With gradients, once, or without; under the autocast of now, whatever the graph is in."""
    half = autocast_type(kind)

    def made() -> Folded:
        alike = autocast_type(kind) == half
        cast = nullcontext() if alike else torch.autocast(kind, half, enabled=half is not None)
        with torch.set_grad_enabled(grad), cast:
            return make()

    return cache(made) if grad else made


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
    def origin(self) -> Tensor:
        """Of the first layer."""
        return find(*self.places[0])

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
