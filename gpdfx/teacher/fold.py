"""One layer's branches and scales -> its weight, in plain torch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..branches.kinds import Branch
from ..branches.layer import Layer
from ..passes.folded import Branched, Folded, kernel, merged, plain

EPS = 1e-5
MOMENTUM = 0.1


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
        kind = torch.promote_types(y.dtype, self.running_mean.dtype)  # under autocast y is narrower
        var, mean = torch.var_mean(y.to(kind), dims, correction=0)
        n = y.numel() // y.shape[place]
        with torch.no_grad():
            self.running_mean.lerp_(mean, MOMENTUM)
            self.running_var.lerp_(var * (n / max(n - 1, 1)), MOMENTUM)
        factor = (self.weight * (var + EPS).rsqrt()).view(shape)
        if self.bias is None:
            return (y * factor).to(y.dtype)
        return ((y - mean.view(shape)) * factor + self.bias.view(shape)).to(y.dtype)

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
    they begin as for training from scratch. Branches that are not ``drawn`` have no values.
    """

    def __init__(
        self,
        branched: Branched,
        like: Tensor,
        seed: int,
        *,
        live: bool = False,
        drawn: bool = True,
    ) -> None:
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
            with contextlib.nullcontext() if drawn else torch.device("meta"):
                parameters, constants = branch.init(layer, draw), branch.constants(layer)
            for key, value in parameters.items():
                own.register_parameter(key, nn.Parameter(value.to(like) if drawn else value))
            for key, value in constants.items():
                own.register_buffer(key, value.to(like) if drawn else value, persistent=False)
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
        """``sum_b scales[b] * kernel_b(params_b)``, as the layer stores it; the origin, if there is
        one, comes first. Nothing is kept for the backward but the parameters themselves."""
        layer, owners = self.branched.layer, map(self.get_submodule, branches)
        tensors = [{**own._parameters, **own._buffers} for own in owners]

        def call() -> Tensor:
            made = [] if origin is None else [layer.view(origin)]
            for branch, own in zip(branches.values(), tensors, strict=True):
                made.append(branch.kernel(layer, own).to(scales))  # type: ignore[arg-type]
            rows = map(layer.per_channel, scales)
            total = sum(x * row for x, row in zip(made, rows, strict=True))
            return layer.store(total.expand(layer.shape))  # type: ignore[union-attr]

        if not torch.is_grad_enabled():
            return call()
        result: Tensor = checkpoint(call, use_reentrant=False, preserve_rng_state=False)
        return result
