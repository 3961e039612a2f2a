"""A lean teacher: wide parameters are gathered when they are read, and forgotten after.

A check needs every wide parameter at the student's values, but only one layer's at a time. So a
teacher that is only checked holds placeholders: without a graph, reading one gathers it from the
student's; what autograd would save of it for the backward is kept as how it was made, and made
again. What a network saves beside its parameters (activations) is saved as ever.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ..algebra.gather import gather
from ..kernels import copies
from ..kernels.fold import each, reference
from ..passes.folded import Folded, Make, teachers
from ..passes.program import mutated
from ..teacher.folding import Chunk, Lazy
from ..teacher.placeholders import placeholder

if TYPE_CHECKING:
    from ..teacher.module import Teacher

KEEP = 2**30
"""Bytes of wide parameters, in float64, up to which they are gathered once and kept (faster)."""


# --------------------------------------------------------------------------- placeholders


class _Gathering(dict[str, Any]):
    """The parameters of a module, of which some are made when they are read by name."""

    def __init__(self, parameters: dict[str, Any], made: dict[str, Make]) -> None:
        super().__init__(parameters)
        self.made = made

    def __getitem__(self, name: str) -> Any:
        return self.made[name]() if name in self.made else super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self.made[name]() if name in self.made else super().get(name, default)


# --------------------------------------------------------------------------- the teacher's side
class _Made(NamedTuple):
    """A storage whose tensor can be made again; ``name``: of the parameter that it is."""

    storage: StorageWeakRef  # keeps the address from being used again
    version: int
    make: Make
    name: str | None


class Lean:
    """The wide parameters of a teacher, as they follow from ``own``, the student's.

    ``names``: those that are gathered. A parameter that a graph writes to stays a real one.
    ``noise``: a seed; every copy of a number then differs from the others, by a tenth at most.
    """

    def __init__(self, teacher: Teacher, graphs: dict[str, fx.Graph]) -> None:
        self.own: dict[str, Tensor] = {}
        self.noise: int | None = None
        self.teacher = teacher
        self._kept: dict[str, Tensor] = {}
        self._made: dict[int, _Made] = {}
        written, self._once = _written(graphs), _once_shared(graphs)
        self.names = frozenset(
            name
            for name, maps in teacher._maps.items()
            if any(m.wide for m in maps) and name not in written
        )
        self._size = 0
        for path, module in list(teacher._net.named_modules()):
            self._take_over(path, module)
        teacher.__dict__["_parameters"] = teacher._net.__dict__["_parameters"]
        for part in teacher._parts.values():
            for section in part.sections:
                section.code.exchange(copies.share, self.share)

    def _take_over(self, path: str, module: nn.Module) -> None:
        made: dict[str, Make] = {}
        parameters = dict(module._parameters)
        for leaf, p in parameters.items():
            name = f"{path}.{leaf}".lstrip(".")
            name = self.teacher._alias.get(name, name)
            if p is not None and name in self.names:
                parameters[leaf] = placeholder(p)
                made[leaf] = partial(self.gather, name)
                self._size += 8 * p.numel()
        if made:
            module.__dict__["_parameters"] = _Gathering(parameters, made)

    def load(self, student: nn.Module | None) -> None:
        """Gather from this one's parameters from now on; they must not change. ``None``: hold
        none."""
        self._kept.clear()
        named = () if student is None else student.named_parameters()
        self.own = {name: p.detach() for name, p in named}

    def gather(self, name: str) -> Tensor:
        """One wide parameter."""
        if name in self._kept:
            return self._kept[name]
        wide = gather(self.own[name], self.teacher._maps[name])
        if self.noise is not None and wide.is_floating_point():
            draw = torch.Generator().manual_seed(self.noise + zlib.crc32(name.encode()))
            noise = torch.rand(wide.shape[-1:], generator=draw, dtype=torch.float64)
            wide.mul_(1 + 0.1 * noise.to(wide))
        if self._size <= KEEP:
            self._kept[name] = wide
        return self._know(wide, partial(self.gather, name), name)

    def share(self, x: Tensor, *rest: Any) -> Tensor:
        """``copies.share``; the result is made again where it is made of a parameter, and takes
        the place of one that is used for nothing else."""
        make, made = self._recipe(x), self._made.get(x.untyped_storage()._cdata)
        if make is None or made is None:
            return copies.share(x, *rest)
        fresh = made.name is not None and made.name not in self._kept

        def again() -> Tensor:
            x = make()
            return copies.share(x, *rest, out=x if fresh else None)

        y = copies.share(x, *rest, out=x if fresh and made.name in self._once else None)
        return self._know(y, again)

    # ---- folded weights
    def fold(self) -> Folded:
        """``Teacher.fold`` for calls without a graph of the parameters; of a large teacher every
        weight is made when it is read."""
        if self._size <= KEEP:
            return self.teacher.fold()
        made: dict[str, Make] = dict(self.teacher.lazy().made)
        for chunk in self.teacher._folding.alone:
            (name,) = chunk.sites
            if name in self.names:
                made[teachers(name)] = partial(self._in_place, chunk)
        return Lazy({name: partial(self._known, make) for name, make in made.items()})

    @torch.no_grad()
    def _in_place(self, chunk: Chunk) -> Tensor:
        """The teacher's weight of a chunk of one, in the place of the parameter."""
        ((site, tensors),) = each(chunk.key, chunk.index, chunk.tensors())
        wide, _ = reference.forward(site, tensors, True, False, into=tensors[0])
        assert wide is not None
        return wide

    # ---- what autograd saves
    @contextmanager
    def saving(self) -> Iterator[None]:
        """Calls of the teacher inside save recipes for the backward in place of wide tensors."""
        if self._size <= KEEP:
            yield
            return
        try:
            with saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._made.clear()

    def _known(self, make: Make) -> Tensor:
        return self._know(make(), make)

    def _know(self, x: Tensor, make: Make, name: str | None = None) -> Tensor:
        storage = x.untyped_storage()
        self._made[storage._cdata] = _Made(StorageWeakRef(storage), x._version, make, name)
        return x

    def _recipe(self, x: Tensor) -> Make | None:
        """How a tensor, or what it is a view of, was made; ``None`` if it is not known or was
        written to since."""
        made = self._made.get(x.untyped_storage()._cdata)
        if made is None or made.version != x._version:
            return None
        make, size, stride, offset = made.make, x.size(), x.stride(), x.storage_offset()
        return lambda: make().as_strided(size, stride, offset)

    def _pack(self, x: Tensor) -> Any:
        return self._recipe(x) or (x, x._version)

    def _unpack(self, kept: Any) -> Tensor:
        if callable(kept):
            made: Tensor = kept()
            return made
        x, version = kept
        if x._version != version:  # autograd leaves this check to the hooks
            raise RuntimeError(
                "a tensor that the gradient needs has been modified by an inplace operation"
            )
        result: Tensor = x
        return result


def _written(graphs: dict[str, fx.Graph]) -> set[str]:
    """The tensors that graphs write to."""
    return {
        str(x.target)
        for graph in graphs.values()
        for node in graph.nodes
        for _, x in mutated(node)
        if x.op == "get_attr"
    }


def _once_shared(graphs: dict[str, fx.Graph]) -> set[str]:
    """The tensors that graphs do nothing with but multiply by shares, once."""
    nodes = [node for graph in graphs.values() for node in graph.find_nodes(op="get_attr")]
    others = {
        str(node.target)
        for node in nodes
        if len(node.users) > 1 or any(user.target is not copies.share for user in node.users)
    }
    return {str(node.target) for node in nodes} - others
