"""A teacher for the check: wide parameters are gathered when they are read, and forgotten after.

A check needs every wide parameter at the student's values, but only one layer's at a time. So a
teacher that is only checked holds placeholders: its graphs gather a parameter where they read it;
what autograd would save of it for the backward is kept as how it was made, and made again. What a
network saves beside its parameters (activations) is saved as ever.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

from ..algebra.frozen import Frozen
from ..kernels import copies
from ..kernels.fold import each, reference
from ..passes.folded import Folded, Make, teachers
from ..passes.program import Mode, copied, mutated
from ..teacher.captured import Section
from ..teacher.compiled import Compiled
from ..teacher.folding import Chunk, Lazy
from ..teacher.module import Teacher
from ..torch_private import StorageReference, storage_key, storage_reference, version

KEEP = 2**30
"""Bytes of wide parameters, in float64, up to which they are gathered once and kept (faster)."""


class _Made(NamedTuple):
    """A storage whose tensor can be made again; ``name``: of the parameter that it is."""

    storage: StorageReference  # keeps the address from being used again
    version: int
    make: Make
    name: str | None


class StreamingTeacher(Teacher):
    """A teacher whose wide parameters follow from those of the student that it was given last.

    ``names``: those that are gathered; one that a graph writes to is a real one. ``graphs``: as
    they run. ``noise``: a seed; every copy of a number then differs from the others, by a tenth at
    most.
    """

    def __init__(self, compiled: Compiled) -> None:
        program = compiled.program
        written, once = _written(program.graphs), _once_shared(program.graphs)
        self.__dict__.update(
            names=frozenset(
                name
                for name, maps in program.maps.items()
                if isinstance(program.tensors[name], nn.Parameter)
                and any(m.wide for m in maps)
                and name not in written
            ),
            graphs={},
            noise=None,
            _once=once,
            _given={},
            _kept={},
            _made={},
        )
        super().__init__(compiled)
        self._size = sum(8 * self._net.get_parameter(name).numel() for name in self.names)
        self._folding.read_with(self._tensor)

    names: frozenset[str]
    graphs: dict[str, fx.Graph]
    noise: int | None
    _once: set[str]
    _given: dict[str, Tensor]
    _kept: dict[str, Tensor]
    _made: dict[int, _Made]

    def _section(self, key: str, mode: Mode, graph: fx.Graph, compiled: Compiled) -> Section:
        graph = self.graphs[key] = copied(graph)
        for node in graph.find_nodes(op="get_attr"):
            if node.target in self.names and node.users:
                with graph.inserting_before(min(node.users)):
                    node.replace_all_uses_with(graph.call_function(self.gather, (node.target,)))
                graph.erase_node(node)
        for node in graph.find_nodes(op="call_function", target=copies.share):
            node.target = self.share
        return super()._section(key, mode, graph, compiled)

    def _initial(self, name: str, tensor: Tensor, maps: tuple[Frozen, ...]) -> Tensor:
        if name not in self.names:
            return super()._initial(name, tensor, maps)
        empty = tensor.detach().to("meta")
        return super()._initial(name, nn.Parameter(empty, tensor.requires_grad), maps)

    # ---- the student's values
    def load_student(self, student: nn.Module) -> None:
        """Gather from this one's parameters from now on; they must not change."""
        self.forget_student()
        self._given.update({name: p.detach() for name, p in student.named_parameters()})
        super().load_student(student)

    def forget_student(self) -> None:
        """Hold no tensors of a student any more."""
        self._kept.clear()
        self._given.clear()

    def _load(self, name: str, tensor: Tensor) -> None:
        if name not in self.names:
            super()._load(name, tensor)

    def _tensor(self, name: str) -> Tensor:
        first = self._facts.alias.get(name, name)
        return self.gather(first) if first in self.names else super()._tensor(name)

    def narrow(self, name: str, wide: Tensor) -> Tensor:
        return super().narrow(name, wide).clone()  # a view would hold all of it

    def gather(self, name: str) -> Tensor:
        """One wide parameter."""
        if name in self._kept:
            return self._kept[name]
        wide = self.widen(name, self._given[name])
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
        make, made = self._recipe(x), self._made.get(storage_key(x))
        if make is None or made is None:
            return copies.share(x, *rest)
        fresh = made.name is not None and made.name not in self._kept

        def again() -> Tensor:
            x = make()
            return copies.share(x, *rest, out=x if fresh else None)

        y = copies.share(x, *rest, out=x if fresh and made.name in self._once else None)
        return self._know(y, again)

    # ---- folded weights
    def _folded_once(self) -> AbstractContextManager[None]:
        return self._folding.once(self._fold_to_check)

    def _fold_to_check(self) -> Folded:
        """``_fold`` for calls without a graph of the parameters; of a large teacher every weight is
        made when it is read."""
        if self._size <= KEEP:
            return self._fold()
        made: dict[str, Make] = dict(self._fold_lazily().made)
        for chunk in self._folding.alone:
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
        self._made[storage_key(x)] = _Made(storage_reference(x), version(x), make, name)
        return x

    def _recipe(self, x: Tensor) -> Make | None:
        """How a tensor, or what it is a view of, was made; ``None`` if it is not known or was
        written to since."""
        made = self._made.get(storage_key(x))
        if made is None or made.version != version(x):
            return None
        make, size, stride, offset = made.make, x.size(), x.stride(), x.storage_offset()
        return lambda: make().as_strided(size, stride, offset)

    def _pack(self, x: Tensor) -> Any:
        return self._recipe(x) or (x, version(x))

    def _unpack(self, kept: Any) -> Tensor:
        if callable(kept):
            made: Tensor = kept()
            return made
        x, before = kept
        if version(x) != before:  # autograd leaves this check to the hooks
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
