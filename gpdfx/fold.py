"""Fold: one layer's branches and scales -> its weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .branches import Branch, BranchSet, Layer
from .kernels.fold import Site, elements, fold, register

EPS = 1e-5
MOMENTUM = 0.1


@dataclass(frozen=True)
class Branched:
    """A weight with branches, as the branch pass found it. ``bias``: the layer's, if it has one,
    which takes what normalized branches add to every pixel."""

    weight: str
    bias: str | None
    layer: Layer
    chosen: BranchSet


@dataclass(frozen=True)
class Lowered:
    """A weight's place in the fused fold, with branches or without, as the lowering pass found
    it. ``shares``: names of table and classes, if the fold multiplies by them."""

    site: Site
    shares: tuple[str, ...]


Make = Callable[[], Tensor]
Folded = Mapping[str, Tensor]
"""What graphs and student read instead of parameters, by these names:"""


def merged(name: str) -> str:
    """The weight (or bias) with all branches in it: the student's, and the teacher's in eval."""
    return name


def plain(name: str) -> str:
    """The weight without its normalized branches: the teacher's in train mode."""
    return f"{name} plain"


def kernel(name: str, branch: str) -> str:
    """The weight of one normalized branch alone."""
    return f"{name} {branch}"


def teachers(name: str) -> str:
    """The weight that the teacher reads, of the fused fold: with its shares."""
    return f"{name} teacher"


def students(name: str) -> str:
    """The weight that the student reads, of the fused fold: without shares, its part alone if the
    site has a ``cut``."""
    return f"{name} student"


PREFIX = "_branches"


def module_of(name: str) -> str:
    """Where the teacher keeps the branches of a weight."""
    return f"{PREFIX}.{name}"


class BranchNorm(nn.Module):
    """Batch norm of one branch's output, (batch, channels, ...) -> the same.

    ``weight * (y - mean) / sqrt(var + eps) + bias``; in a layer that has no ``bias`` to fold the
    shift into, ``weight * y / sqrt(var + eps)``: what follows such a layer takes the mean away,
    or the branch has to do without. ``weight`` begins at zero, so that the branch adds nothing.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layer: Layer, like: Tensor, *, shift: bool, live: float) -> None:
        super().__init__()
        channels, self.dim = layer.channels, layer.channel_dim
        self.weight = nn.Parameter(like.new_full((channels,), live))
        self.bias = nn.Parameter(like.new_zeros(channels)) if shift else None
        self.register_buffer("running_mean", like.new_zeros(channels))
        self.register_buffer("running_var", like.new_ones(channels))

    def forward(self, y: Tensor) -> Tensor:
        place = self.dim % y.ndim
        dims = [d for d in range(y.ndim) if d != place]
        shape = [-1, *[1] * (y.ndim - 1 - place)]
        var, mean = torch.var_mean(y, dims, correction=0)
        n = y.numel() // y.shape[place]
        with torch.no_grad():
            self.running_mean.lerp_(mean, MOMENTUM)
            self.running_var.lerp_(var * (n / max(n - 1, 1)), MOMENTUM)
        factor = (self.weight * (var + EPS).rsqrt()).view(shape)
        if self.bias is None:
            return y * factor
        return (y - mean.view(shape)) * factor + self.bias.view(shape)

    def factor(self) -> Tensor:
        """What the branch's weight is multiplied by in eval mode."""
        return self.weight * (self.running_var + EPS).rsqrt()

    def offset(self) -> Tensor | float:
        """What it adds to the layer's bias in eval mode."""
        if self.bias is None:
            return 0.0
        return self.bias - self.factor() * self.running_mean.clone()  # training overwrites it


class Fold(nn.Module):
    """The parameters of a layer's branches, beside the layer's own weight, the origin.

    ``scales``: (1 + branches, channels), of those that are not normalized; the origin's begin at
    1, the others at 0, so that nothing changes, and each gets a gradient at once; with ``live``
    they begin as for training from scratch.
    """

    def __init__(self, branched: Branched, like: Tensor, seed: int, *, live: bool = False) -> None:
        super().__init__()
        self.branched = branched
        layer, chosen = branched.layer, branched.chosen
        named = chosen.named()
        self.linear = {name: b for name, b in named.items() if not b.norm}
        self.normed = {name: b for name, b in named.items() if b.norm}
        first = [chosen.live if live else 1.0]
        rest = [b.live if live else 0.0 for b in self.linear.values()]
        scales = torch.tensor(first + rest).unsqueeze(1).repeat(1, layer.channels)
        self.scales = nn.Parameter(scales.to(like))
        draw = torch.Generator().manual_seed(seed)
        for name, branch in named.items():
            own = nn.Module()
            for key, value in branch.init(layer, draw).items():
                own.register_parameter(key, nn.Parameter(value.to(like)))
            for key, value in branch.constants(layer).items():
                own.register_buffer(key, value.to(like), persistent=False)
            self.add_module(name, own)
        shift = branched.bias is not None
        self.norms: Mapping[str, BranchNorm] = nn.ModuleDict(  # type: ignore[assignment]
            {
                name: BranchNorm(layer, like, shift=shift, live=b.live if live else 0.0)
                for name, b in self.normed.items()
            }
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of what a call gives."""
        name, bias = self.branched.weight, self.branched.bias
        if not self.normed:
            return (merged(name),)
        kernels = (kernel(name, k) for k in self.normed)
        return (plain(name), *kernels, merged(name), *(() if bias is None else (merged(bias),)))

    @torch.no_grad()
    def reset(self) -> None:
        """Scales at which the origin alone counts."""
        self.scales.zero_()
        self.scales[0] = 1
        for norm in self.norms.values():
            norm.weight.zero_()
            if norm.bias is not None:
                norm.bias.zero_()

    def forward(self, origin: Tensor, bias: Tensor | None) -> Folded:
        """Everything that graphs and student read of this layer. ``origin``, ``bias``: as the
        layer stores them."""
        name = self.branched.weight
        base = self._merge(origin, self.scales, self.linear)
        if not self.normed:
            return {merged(name): base}
        folded: dict[str, Tensor] = {plain(name): base}
        for k, b in self.normed.items():
            folded[kernel(name, k)] = self._merge(None, torch.ones_like(self.scales[:1]), {k: b})
        norms = [self.norms[k] for k in self.normed]
        factors = torch.stack([norm.factor() for norm in norms])
        folded[merged(name)] = base + self._merge(None, factors, self.normed)
        if self.branched.bias is not None and bias is not None:
            for norm in norms:
                bias = bias + norm.offset()
            folded[merged(self.branched.bias)] = bias
        return folded

    def _merge(
        self, origin: Tensor | None, scales: Tensor, branches: Mapping[str, Branch]
    ) -> Tensor:
        """``merge``, keeping nothing for the backward but the parameters themselves."""
        owners = [self.get_submodule(name) for name in branches]
        tensors = [{**own._parameters, **own._buffers} for own in owners]
        names = tuple(tuple(own) for own in tensors)
        flat = [t for own in tensors for t in own.values()]
        call = partial(merge, self.branched.layer, tuple(branches.values()), names)
        if not torch.is_grad_enabled():
            return call(origin, scales, *flat)  # type: ignore[arg-type]
        result: Tensor = checkpoint(
            call, origin, scales, *flat, use_reentrant=False, preserve_rng_state=False
        )
        return result


def merge(
    layer: Layer,
    branches: tuple[Branch, ...],
    names: tuple[tuple[str, ...], ...],
    origin: Tensor | None,
    scales: Tensor,
    *flat: Tensor,
) -> Tensor:
    """``sum_b scales[b] * kernel_b(params_b)``, as the layer stores it; the origin, if there is
    one, comes first. ``names``: of the tensors of each branch in ``flat``."""
    rows, rest = list(scales), list(flat)
    total = None if origin is None else layer.view(origin) * layer.per_channel(rows.pop(0))
    for branch, own in zip(branches, names, strict=True):
        row = rows.pop(0)
        params = {name: rest.pop(0) for name in own}
        made = branch.kernel(layer, params) * layer.per_channel(row)
        total = made if total is None else total + made
    assert total is not None
    return layer.store(total.expand(layer.shape))


# --------------------------------------------------------------------------- many layers at once
CHUNK = 2**20
"""Elements of weights in one fold on the CPU. A chunk's backward begins when the gradients of all
its weights are known, and they wait in memory until then; on a GPU launches count for more."""


class Chunk:
    """Neighbouring layers that are folded together; ``sites`` by weight; ``places``: path, module
    and name of each of their tensors; ``index``: whose place each site's tensors have."""

    def __init__(self) -> None:
        self.sites: dict[str, Site] = {}
        self.places: dict[str, tuple[nn.Module, str]] = {}
        self.index: tuple[int, ...] = ()
        self.key = ""

    @property
    def on_gpu(self) -> bool:
        return find(*next(iter(self.places.values()))).is_cuda

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register(tuple(self.sites.values()))  # in this process

    def add(self, name: str, lowered: Lowered, net: nn.Module) -> None:
        own = module_of(name)
        self.sites[name] = lowered.site
        branches: Fold | None = net.get_submodule(own) if lowered.site.branches else None  # type: ignore[assignment]
        paths = [name, *([f"{own}.scales"] if branches else []), *lowered.shares]
        for key, names in zip(branches.linear if branches else (), lowered.site.names, strict=True):
            paths += [f"{own}.{key}.{tensor}" for tensor in names]
        for path in paths:
            parent, _, leaf = path.rpartition(".")
            self.places.setdefault(path, (net.get_submodule(parent), leaf))
        places = list(self.places)
        self.index += tuple(places.index(path) for path in paths)
        self.key = register(tuple(self.sites.values()))

    def tensors(self) -> list[Tensor]:
        """Those of its places."""
        return [find(module, leaf) for module, leaf in self.places.values()]

    def __call__(self, teacher: bool, student: bool) -> Folded:
        tensors = self.tensors()
        folded: dict[str, Tensor] = {}
        weights = fold(self.key, self.index, tensors, teacher=teacher, student=student)
        for name, (wide, own) in zip(self.sites, weights, strict=True):
            if wide is not None:
                folded[teachers(name)] = wide
            if own is not None:
                folded[students(name)] = own
        return folded


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


def chunks(lowered: Mapping[str, Lowered], net: nn.Module, limit: float = CHUNK) -> list[Chunk]:
    """All layers of the fused fold, in order, in chunks of about ``limit`` elements."""
    found: list[Chunk] = []
    held = 0
    for name, one in lowered.items():
        size = elements(one.site.layer)
        if not found or held + size > limit:
            found.append(Chunk())
            held = 0
        found[-1].add(name, one, net)
        held += size
    return found


def find(module: nn.Module, leaf: str) -> Tensor:
    """A parameter or buffer."""
    tensor = module._parameters.get(leaf)
    found = module._buffers[leaf] if tensor is None else tensor
    assert found is not None
    return found
