"""All folds of a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..passes.names import Folded, Lowered, Make, students, teachers
from .chunks import Chunk, chunks, operator_get
from .fold import Fold


class Late(Mapping[str, Tensor]):
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
        self.fused = chunks(lowered, net)
        self.whole = chunks(lowered, net, math.inf)
        self.alone = chunks(lowered, net, 0)
        self.cut = frozenset(name for name, one in lowered.items() if one.site.cut is not None)
        self.kept: Folded | None = None

    def __call__(self, *, teacher: bool = True, student: bool = True) -> Folded:
        """The weights that the teacher reads, that the student does, or both."""
        if self.kept is not None:
            return self.kept
        folded: dict[str, Tensor] = {}
        for chunk in self.whole if self._on_gpu() else self.fused:
            folded |= chunk(teacher, student)
        for path in self.singles:
            folded |= self._single(path)
        return folded

    def late(self, *, teacher: bool = True, student: bool = True) -> Late:
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
        return Late(made)

    def for_call(self, *, teacher: bool = True, student: bool = True) -> Folded:
        """What one call reads."""
        late = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or self._on_gpu())
        make = self.late if late and self.kept is None else self
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
        return len(self.fused) > 0 and self.fused[0].on_gpu

    def _single(self, path: str) -> Folded:
        """The weights of one layer that is not in the fused fold."""
        fold: Fold = self.net.get_submodule(path)  # type: ignore[assignment]
        own = fold.branched
        bias = None if own.bias is None else operator_get(self.net, own.bias)
        folded: Folded = fold(operator_get(self.net, own.weight), bias)
        return folded

    @torch.no_grad()
    def _one_of_single(self, path: str, name: str) -> Tensor:
        return self._single(path)[name]


@torch.no_grad()
def _one_of(chunk: Chunk, name: str) -> Tensor:
    """One of the two weights of a chunk of one."""
    (weight,) = chunk.sites
    return chunk(name == teachers(weight), name == students(weight))[name]
