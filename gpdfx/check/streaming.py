"""A teacher for the check: wide parameters are gathered when they are read, and forgotten after.

A check needs every wide parameter at the student's values, but only one layer's at a time. So a
teacher that is only checked holds placeholders: its graphs gather a parameter where they read it;
what autograd would save of it for the backward is kept as how it was made, and made again. What a
network saves beside its parameters (activations) is saved as ever.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

from ..algebra.gather import gather, scatter
from ..calls.held import has_gradient, registered
from ..kernels import copies
from ..passes.folded import Folded, Lowered, Make, merged, plain, students, teachers
from ..passes.program import Mode, copied, duplicate, mutated
from ..teacher.captured import Section
from ..teacher.compiled import Compiled
from ..teacher.extract import Maps
from ..teacher.fold import Fold
from ..teacher.folding import Lazy
from ..teacher.module import Teacher
from ..torch_private import StorageReference, storage_key, storage_reference, version
from .probe import jitter

aten = torch.ops.aten

KEEP = 2**30
"""Bytes of wide parameters, in float64, up to which they are gathered once and kept (faster)."""


class _Made(NamedTuple):
    """A storage whose tensor can be made again."""

    storage: StorageReference  # keeps the address from being used again
    version: int
    make: Make


class _Gathered(torch.autograd.Function):
    """``wide``, which was gathered from ``own`` and multiplied by ``shares``, if there are any,
    with the gradient of that. ``memory``: what its backward may use."""

    @staticmethod
    def forward(
        ctx: Any, own: Tensor, wide: Tensor, maps: Maps, shares: Any, memory: _Memory
    ) -> Tensor:
        ctx.maps, ctx.shares, ctx.memory = maps, shares, memory
        return wide.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = grads
        if ctx.shares is not None:
            out = None if torch.is_grad_enabled() else ctx.memory.like(grad)
            grad = copies.share(grad, *ctx.shares, out=out)
        return scatter(grad, ctx.maps), None, None, None, None


class _Memory:
    """Large memory that is used again: to get it anew takes longer than to write to it."""

    def __init__(self) -> None:
        self.flat = torch.empty(0)
        self.wide: dict[str, Tensor] = {}

    def like(self, x: Tensor) -> Tensor | None:
        """Until the next call: a tensor that looks like this one."""
        if not x.is_contiguous():
            return None
        if self.flat.dtype is not x.dtype or self.flat.numel() < x.numel():
            self.flat = x.new_empty(x.numel())
        return self.flat[: x.numel()].view(x.shape)


class StreamingTeacher(Teacher):
    """A teacher whose parameters follow from those of the student that it was given last, its
    gradients too: by the chain rule those of the student, summed over copies.

    ``folded``: the smallest layer of each form of fused folds; branches of others have no values.
    ``names``: those that are gathered; one that a graph writes to is a real one. ``graphs``: as
    they run; ``sections``: made of them. ``noise``: a seed;
    every copy of a number then differs from the others, by a tenth at most.
    """

    def __init__(self, compiled: Compiled) -> None:
        program = compiled.program
        written = {x.target for _, n in program.each() for _, x in mutated(n) if x.op == "get_attr"}
        written |= {*compiled.python.written}
        sites = {name: one.site for name, one in program.lowered.items()}
        by_size = sorted(sites, key=lambda name: sites[name].layer.elements, reverse=True)
        self.__dict__.update(
            folded=frozenset({sites[name].form: name for name in by_size}.values()),
            _lowered=program.lowered,
            names=frozenset(
                name
                for name, tensor in program.tensors.items()
                if isinstance(tensor, nn.Parameter) and name not in written
            ),
            graphs={},
            sections={},
            noise=None,
            _given={},
            _attributes=compiled.python.kept,
            _kept={},
            _made={},
            _memory=_Memory(),
        )
        super().__init__(compiled)
        self._statistics = [
            {name: buffer.clone() for name, buffer in fold.named_buffers()} for fold in self.folds()
        ]
        self._size = sum(8 * self._net.get_parameter(name).numel() for name in self.names)
        self._folding.read_with(self._tensor)

    names: frozenset[str]
    folded: frozenset[str]
    graphs: dict[str, fx.Graph]
    sections: dict[str, Section]
    noise: int | None
    _lowered: Mapping[str, Lowered]
    _given: dict[str, Tensor]
    _kept: dict[tuple[str, bool], Tensor]  # name, and with shares or without
    _made: dict[int, _Made]
    _memory: _Memory

    def _draws(self, name: str) -> bool:
        return name in self.folded or name not in self._lowered

    def _section(self, key: str, mode: Mode, graph: fx.Graph, compiled: Compiled) -> Section:
        graph = self.graphs[key] = copied(graph)
        for node in graph.find_nodes(op="get_attr"):
            if node.target in self.names and node.users:
                with graph.inserting_before(min(node.users)):
                    node.replace_all_uses_with(graph.call_function(self.gather, (node.target,)))
                graph.erase_node(node)
        for node in graph.find_nodes(op="call_function", target=copies.share):
            node.target = self.share
        for node in graph.find_nodes(op="call_function", target=aten.conv2d.default):
            node.target = conv2d
        self.sections[key] = section = super()._section(key, mode, graph, compiled)
        return section

    def _initial(self, name: str, tensor: Tensor, maps: Maps) -> Tensor:
        if name not in self.names:
            return super()._initial(name, tensor, maps)
        empty = torch.empty([m.teacher for m in maps], dtype=tensor.dtype, device="meta")
        return nn.Parameter(empty, tensor.requires_grad)

    # ---- the student's values
    def load_student(self, student: nn.Module) -> None:
        """Gather from this one's parameters from now on; they must not change."""
        self.forget_student()
        for p in self.parameters():  # what the user's Python hung on them
            vars(p).clear()
        for name, p in student.named_parameters():
            self._given[name] = p.detach().requires_grad_(has_gradient(p))
        super().load_student(student)

    def forget_student(self) -> None:
        """Hold no tensors of a student any more."""
        self._forget_kept()
        self._given.clear()

    def _forget_kept(self) -> None:
        self._memory.wide |= {name: wide for (name, _), wide in self._kept.items()}
        self._kept.clear()

    def give_python_state(self, plain: nn.Module) -> None:
        """Let another student have what this one's Python keeps from call to call."""
        memo: dict[int, Any] = {}
        for named in (lambda module: dict(module.named_modules()), registered):
            others = named(plain)
            own = named(self._student)  # has also the modules that its forward made
            memo |= {id(x): others[name] for name, x in own.items() if name in others}
        keys: Sequence[tuple[str, str]] = self._attributes
        held = {key: vars(self._student.get_submodule(key[0])) for key in keys}
        kept = {key: of[key[1]] for key, of in held.items() if key[1] in of}
        for (path, name), value in duplicate(kept, memo, ours=True).items():
            vars(plain.get_submodule(path))[name] = value

    def forget_calls(self) -> None:
        """Let the user's Python between the parts have the state of the first call again, and the
        norms of branches their statistics (of no samples there are none)."""
        for fold, pristine in zip(self.folds(), self._statistics, strict=True):
            for name, buffer in fold.named_buffers():
                buffer.copy_(pristine[name])
        self._begin_parts()

    @torch.no_grad()
    def perturb(self, seed: int) -> None:
        """Change every parameter by at most a tenth, its copies by different numbers."""
        self.noise = seed
        self._forget_kept()
        draw = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            if p.is_floating_point() and not p.is_meta:
                jitter(p, draw)

    @property
    def sources(self) -> dict[str, Tensor]:
        """The leaves that gradients of the parameters come to, by name: the student's own, or,
        where a graph writes to it, the teacher's."""
        given = {n: p for n, p in self._given.items() if n in self.names and p.requires_grad}
        real = {n for n, p in self._given.items() if n not in given and p.requires_grad}
        return given | {n: self._net.get_parameter(n).requires_grad_() for n in sorted(real)}

    def sources_of(self, path: str, module: nn.Module) -> dict[str, Tensor]:
        """Those of the student's module at a path, by its names."""
        sources, prefix = self.sources, f"{path}." if path else ""
        names = (name for name, _ in module.named_parameters())
        return {n: sources[prefix + n] for n in names if prefix + n in sources}

    def own_gradient(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient of one of ``sources`` as that of the student's parameter."""
        return gradient if name in self.names else scatter(gradient, self._facts.maps[name])

    def _load(self, name: str, tensor: Tensor) -> None:
        if name not in self.names:
            super()._load(name, tensor)

    def _tensor(self, name: str) -> Tensor:
        first = self._facts.alias.get(name, name)
        return self.gather(first) if first in self.names else super()._tensor(name)

    def gather(self, name: str) -> Tensor:
        """One of the teacher's parameters."""
        own, maps = self._given[name], self._facts.maps[name]
        if self.noise is None and not any(m.wide for m in maps):
            return own
        wide = self._kept.get((name, False))
        if wide is None:
            wide = self._gather(name)
            if self._size <= KEEP:
                self._kept[name, False] = wide
            else:
                self._know(wide, partial(self._gather, name))
        return self._differentiable(own, wide, maps, None)

    def _differentiable(self, own: Tensor, wide: Tensor, maps: Maps, shares: Any) -> Tensor:
        if not own.requires_grad:
            return wide
        with torch.enable_grad():  # it may be read in a region without, and again outside
            made: Tensor = _Gathered.apply(own, wide, maps, shares, self._memory)
        return made

    @torch.no_grad()
    def _gather(self, name: str) -> Tensor:
        own = self._given[name].detach()
        wide = gather(own, self._facts.maps[name], self._memory.wide.pop(name, None))
        if self.noise is not None and wide.is_floating_point():
            wide = wide.clone() if wide is own else wide
            jitter(wide, torch.Generator().manual_seed(self.noise + zlib.crc32(name.encode())))
        return wide

    def share(self, x: Tensor, *rest: Any) -> Tensor:
        """``copies.share``; the result is made again where it is made of a parameter."""
        make, y = self._recipe(x), copies.share(x, *rest)
        return y if make is None else self._know(y, lambda: copies.share(make(), *rest))

    # ---- folded weights
    def _folded_once(self) -> AbstractContextManager[None]:
        """Branches add nothing at the start (``check.folds`` sees to that): weights are gathered,
        and multiplied by their shares, without folding them."""
        return self._folding.once(self._unfolded)

    def _unfolded(self) -> Folded:
        made: dict[str, Make] = {}
        for name, one in self._lowered.items():
            made[teachers(name)] = partial(self._shared, name, one)
            own = self._own if name in self._folding.cut else self.gather
            made[students(name)] = partial(own, name)
        for name in self._folds.keys() - self._lowered.keys():
            fold: Fold = self._net.get_submodule(self._folds[name])  # type: ignore[assignment]
            bias = fold.branched.bias
            made |= {
                merged(name): partial(self.gather, name),
                plain(name): partial(self.gather, name),
            }
            made |= {n: partial(self._of_branch, fold, n) for n in fold.names if n not in made}
            made |= {} if bias is None else {merged(bias): partial(self.gather, bias)}
        return Lazy(made)

    def _own(self, name: str) -> Tensor:
        own = self._given[name]
        return own if self.noise is None else self.narrow(name, self.gather(name))

    def _shared(self, name: str, one: Lowered) -> Tensor:
        """The teacher's weight in the fused fold."""
        how, own = one.site.share, self._given[name]
        if how is None:
            return self.gather(name)
        tables, split = map(super()._tensor, one.shares), list(how.split) if how.split else None
        shares: Any = (*tables, how.at, how.dim, split)
        if self._size > KEEP:
            return self.share(self.gather(name), *shares)
        key = name, True
        if key not in self._kept:
            with torch.no_grad():
                wide = self._gather(name)
                fresh = wide.data_ptr() != own.data_ptr()
                self._kept[key] = copies.share(wide, *shares, out=wide if fresh else None)
        return self._differentiable(own, self._kept[key], self._facts.maps[name], shares)

    def _of_branch(self, fold: Fold, name: str) -> Tensor:
        """The weight of one normalized branch, which the student does not have."""
        with torch.no_grad():
            folded: Folded = fold(self.gather(fold.branched.weight), None)
        return folded[name]

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

    def _know(self, x: Tensor, make: Make) -> Tensor:
        self._made[storage_key(x)] = _Made(storage_reference(x), version(x), make)
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


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Tensor:
    """PyTorch's, which in float64 reads the weight once for every sample; where that is most of the
    work, all samples in one product."""
    options = stride, padding, dilation
    plain = x.dtype is torch.float64 and x.is_cpu and x.ndim == 4 and groups == 1
    if plain and x.is_contiguous() and weight.is_contiguous() and weight.stride(-1) == 1:
        like = aten.conv2d.default(*(t.to("meta") for t in (x, weight)), None, *options)
        samples, channels = like.shape[:2]
        if 4 * like.numel() <= channels**2:
            both = [tuple(o) * (2 // len(o)) for o in (dilation, padding, stride)]
            columns = F.unfold(x, tuple(weight.shape[2:]), *both)
            rows = columns.transpose(1, 2).flatten(0, 1)  # sample and place: all that reads it
            y = F.linear(rows, weight.flatten(1), bias).view(samples, -1, channels)
            return y.transpose(1, 2).contiguous().view(like.shape)
    made: Tensor = aten.conv2d.default(x, weight, bias, *options, groups)
    return made
