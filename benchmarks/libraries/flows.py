"""Normalizing flows, autoregressive networks and variational autoencoders."""

from __future__ import annotations

import pkgutil
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.libraries.entry import Entry, Table, floats, given, net, of

_IN = floats(4, 6)


class Flow(nn.Module):
    """What a method of a flow gives: the log density of a batch."""

    def __init__(self, flow: Any, method: str = "log_prob") -> None:
        super().__init__()
        self.flow, self.method = flow, method

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = getattr(self.flow, self.method)(x)
        return y


def _nets(*widths: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(widths[0], 16), nn.ReLU(), nn.Linear(16, widths[1]))


def _normflows(m: Any, kind: str) -> nn.Module:
    if kind == "realnvp":
        steps = [m.flows.AffineCouplingBlock(m.nets.MLP([3, 16, 6])), m.flows.Permute(6, "swap")]
    elif kind == "spline":
        steps = [m.flows.AutoregressiveRationalQuadraticSpline(6, 1, 16)]
    else:
        steps = [m.flows.MaskedAffineAutoregressive(6, 16), m.flows.ActNorm(6)]
    return Flow(m.NormalizingFlow(m.distributions.DiagGaussian(6), [*steps, *steps[:1]]))


def _freia(blocks: Any) -> nn.Module:
    inn: Any = pkgutil.resolve_name("FrEIA.framework:SequenceINN")(6)
    for kind in (blocks.RNVPCouplingBlock, blocks.AllInOneBlock, blocks.GLOWCouplingBlock):
        inn.append(kind, subnet_constructor=_nets)
    network: nn.Module = inn
    return network


class Zuko(nn.Module):
    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y: Tensor = self.flow(context).log_prob(x)
        return y


def _vae(kind: str, **more: Any) -> Entry:
    def make(m: Any) -> nn.Module:
        config = getattr(m, f"{kind}Config", None) or getattr(m, f"{kind}_Config")
        network: nn.Module = getattr(m, kind)(config(input_dim=(1, 6, 6), latent_dim=4, **more))
        return network

    return of("pythae.models", make, given({"data": floats(4, 1, 6, 6)()[0].sigmoid()}))


def _zuko(make: Any) -> Entry:
    return of("zuko.flows", lambda m: Zuko(make(m)), _IN, floats(4, 3))


TABLE: Table = {
    "normflows": {
        kind: of("normflows", partial(_normflows, kind=kind), _IN)
        for kind in ("realnvp", "spline", "masked")
    },
    "nflows": {
        "SimpleRealNVP": of("nflows.flows", lambda m: Flow(m.SimpleRealNVP(6, 16, 2, 2)), _IN),
        "MaskedAutoregressiveFlow": of(
            "nflows.flows", lambda m: Flow(m.MaskedAutoregressiveFlow(6, 16, 2, 2)), _IN
        ),
    },
    "zuko": {
        "MAF": _zuko(lambda m: m.MAF(6, 3, transforms=2, hidden_features=(16, 16))),
        "NSF": _zuko(lambda m: m.NSF(6, 3, transforms=2, hidden_features=(16, 16))),
    },
    "freia": {"SequenceINN": of("FrEIA.modules", _freia, _IN)},
    "pyro-ppl": {
        "AutoRegressiveNN": net(
            "pyro.nn:AutoRegressiveNN", _IN, 6, [16, 18], skip_connections=True
        ),
    },
    "pythae": {
        "VAE": _vae("VAE"),
        "VQVAE": _vae("VQVAE", num_embeddings=8),
    },
}
