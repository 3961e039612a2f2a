"""Physics, molecules, symmetries, operators, factorized and quantized layers, flows."""

from __future__ import annotations

import itertools
import pkgutil
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.libraries.entry import Table, floats, given, images, of

FNO = partial(of, "neuralop.models")


def mlp(*widths: int, last: nn.Module | None = None) -> nn.Sequential:
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    inner = (m for x in layers[1:] for m in (nn.ReLU(), x))
    return nn.Sequential(layers[0], *inner, *([last] if last else []))


class Equivariant(nn.Module):
    """Tensor products of features with spherical harmonics of places, gated (e3nn)."""

    def __init__(self, gates: Any) -> None:
        super().__init__()
        o3 = pkgutil.resolve_name("e3nn.o3")
        self.on_sphere, self.harmonics = o3.spherical_harmonics, "1x0e + 1x1o"
        self.gate = gates.Gate("8x0e", [torch.relu], "4x0e", [torch.sigmoid], "4x1o")
        self.first = o3.FullyConnectedTensorProduct(
            "5x0e", self.harmonics, self.gate.irreps_in, shared_weights=False
        )
        self.radial = gates.FullyConnectedNet([1, 16, self.first.weight_numel], torch.relu)
        self.norm, self.last = (
            gates.BatchNorm(self.gate.irreps_out),
            o3.Linear("8x0e + 4x1o", "3x0e"),
        )

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        sphere = self.on_sphere(self.harmonics, places, normalize=True)
        weight = self.radial(places.norm(dim=-1, keepdim=True))
        y: Tensor = self.last(self.norm(self.gate(self.first(x, sphere, weight))))
        return y


class Rotated(nn.Module):
    """Convolutions that turn with their input by quarters (e2cnn)."""

    def __init__(self, e2cnn: Any) -> None:
        super().__init__()
        space, layers = e2cnn.gspaces.Rot2dOnR2(4), e2cnn.nn
        self.kind = layers.FieldType(space, [space.trivial_repr])
        inner = layers.FieldType(space, [space.regular_repr] * 4)
        self.layers = layers.SequentialModule(
            *(layers.R2Conv(self.kind, inner, 3, padding=1), layers.InnerBatchNorm(inner)),
            *(layers.ReLU(inner), layers.R2Conv(inner, inner, 3), layers.GroupPooling(inner)),
        )
        self.wrap, self.last = layers.GeometricTensor, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.layers(self.wrap(x, self.kind)).tensor.mean((2, 3)))
        return y


class Layered(nn.Module):
    """Features, a layer, a head."""

    def __init__(self, width: int, layer: nn.Module, after: int) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(6, width), layer, nn.Linear(after, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.layer(self.first(x).relu()))
        return y


class Ode(nn.Module):
    """Features that follow a differential equation between two linear layers."""

    def __init__(self, package: Any, method: str, adjoint: bool = False) -> None:
        super().__init__()
        self.solve = package.odeint_adjoint if adjoint else package.odeint
        self.method, self.first, self.last = method, nn.Linear(6, 8), nn.Linear(8, 3)
        self.slope = Slope()

    def forward(self, x: Tensor) -> Tensor:
        times = torch.linspace(0, 1, 3)
        y: Tensor = self.last(self.solve(self.slope, self.first(x), times, method=self.method)[-1])
        return y


class Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        z: Tensor = self.layers(y) - t * y
        return z


class DeepKernel(nn.Module):
    """The covariance of learned features (deep kernel learning)."""

    def __init__(self, package: Any) -> None:
        super().__init__()
        self.features = mlp(6, 16, 2)
        self.kernel = package.kernels.ScaleKernel(package.kernels.RBFKernel(ard_num_dims=2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.kernel(self.features(x)).to_dense()
        return y


class Poincare(nn.Module):
    """Distances of features on the ball to learned places on it (geoopt)."""

    def __init__(self, package: Any) -> None:
        super().__init__()
        self.ball, self.first = package.PoincareBall(), mlp(6, 16, 4)
        places = self.ball.expmap0(torch.randn(5, 4) / 4)
        self.places = package.ManifoldParameter(places, manifold=self.ball)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ball.dist(self.ball.expmap0(self.first(x))[:, None], self.places)
        return y


class Molecules(nn.Module):
    """A message passing network on molecules that are made of its tensors (chemprop)."""

    def __init__(self, package: Any, kind: str) -> None:
        super().__init__()
        layers = package.nn
        self.batch, self.norm = package.data.collate.BatchMolGraph, nn.BatchNorm1d(16)
        self.passing = getattr(layers, kind)(d_v=5, d_e=3, d_h=16)
        self.pool, self.last = layers.MeanAggregation(), nn.Linear(16, 2)

    def forward(self, v: Tensor, e: Tensor, edge: Tensor, back: Tensor, of: Tensor) -> Tensor:
        graph = object.__new__(self.batch)
        graph.V, graph.E, graph.edge_index, graph.rev_edge_index, graph.batch = v, e, edge, back, of
        y: Tensor = self.last(self.norm(self.pool(self.passing(graph), of)))
        return y


def _bonds() -> tuple[Tensor, ...]:
    """A ring of six atoms and a chain of four: every bond there and back."""
    pairs = torch.tensor([(k, (k + 1) % 6) for k in range(6)] + [(6, 7), (7, 8), (8, 9)])
    edge = torch.stack([pairs, pairs.flip(1)], 1).flatten(0, 1).T
    return edge, torch.arange(edge.shape[1]) ^ 1, (torch.arange(10) >= 6).long()


def _ani(package: Any) -> nn.Module:
    potential: nn.Module = package.arch.simple_ani(
        ("H", "C", "O"), lot="wb97x-631gd", ensemble_size=1, repulsion=False
    )
    return potential


def _bounded() -> tuple[Any, Any]:
    """Quantizers of brevitas, without and with sign, whose bounds are given, not collected from the
    first calls."""
    scalers = pkgutil.resolve_name("brevitas.quant.scaled_int")
    above = type("Above", (scalers.Uint8ActPerTensorFloatMaxInit,), {"max_val": 6.0})
    bounds = {"min_val": -6.0, "max_val": 6.0}
    return above, type("Between", (scalers.Int8ActPerTensorFloatMinMaxInit,), bounds)


def _quantized(q: Any) -> nn.Module:
    above, between = _bounded()
    return nn.Sequential(
        q.QuantIdentity(act_quant=between),
        *(q.QuantConv2d(3, 8, 3, weight_bit_width=4), nn.BatchNorm2d(8)),
        q.QuantReLU(act_quant=above, bit_width=4),
        q.QuantConv2d(8, 12, 3, groups=2),
        q.QuantReLU(act_quant=above),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), q.QuantLinear(12, 3)),
    )


def _quantized_lstm(q: Any) -> nn.Module:
    above, between = _bounded()
    names = ("io_quant", "gate_acc_quant", "tanh_quant", "cell_state_quant")
    model: nn.Module = q.QuantLSTM(6, 8, sigmoid_quant=above, **dict.fromkeys(names, between))
    return model


def _quantized_attention(q: Any) -> nn.Module:
    above, between = _bounded()
    names = ("in_proj_input", "q_scaled", "k_transposed", "v", "out_proj_input")
    quantizers = {f"{name}_quant": between for name in names}
    model: nn.Module = q.QuantMultiheadAttention(
        *(16, 2), packed_in_proj=False, attn_output_weights_quant=above, **quantizers
    )
    return model


_IN = floats(4, 6)
_SPECIES = torch.tensor([[6, 1, 1, 8], [8, 1, 1, 6]])

TABLE: Table = {
    "e3nn": {
        "gate": of("e3nn.nn", Equivariant, floats(7, 5), floats(7, 3)),
        "FullyConnectedNet": of(
            "e3nn.nn", lambda m: m.FullyConnectedNet([6, 16, 16, 3], torch.tanh), _IN
        ),
    },
    "e2cnn": {"R2Conv": of("e2cnn", Rotated, images(1, 13))},
    "chemprop": {
        kind: of("chemprop", partial(Molecules, kind=kind), floats(10, 5), floats(18, 3), _bonds)
        for kind in ("BondMessagePassing", "AtomMessagePassing")
    },
    "torchani": {"ANI": of("torchani", _ani, given((_SPECIES, torch.rand(2, 4, 3) * 3)))},
    "neuraloperator": {
        "FNO/1d": FNO(lambda m: m.FNO((6,), 2, 3, 8, n_layers=2), floats(2, 2, 16)),
        "FNO/2d": FNO(
            lambda m: m.FNO((6, 6), 2, 3, 8, n_layers=2, norm="instance_norm"), images(2, 16, 2)
        ),
        "TFNO": FNO(
            lambda m: m.TFNO((6, 6), 2, 3, 8, n_layers=2, factorization="tucker", rank=0.5),
            images(2, 16, 2),
        ),
        "FNO/separable": FNO(
            lambda m: m.FNO((6, 6), 2, 3, 8, n_layers=2, separable=True), images(2, 16, 2)
        ),
        "UNO": FNO(
            lambda m: m.UNO(
                *(2, 3, 8, 16, 16),
                **{"n_layers": 3, "uno_out_channels": [8, 12, 8], "channel_mlp_skip": "linear"},
                **{"uno_n_modes": [[4, 4]] * 3, "uno_scalings": [[1, 1], [0.5, 0.5], [2, 2]]},
            ),
            images(2, 16, 2),
        ),
        "CODANO": FNO(
            lambda m: m.CODANO(
                *(1, 8, 4, 8),
                **{"n_layers": 2, "n_modes": [[4, 4]] * 2, "n_heads": [1, 1]},
                **{"per_layer_scaling_factors": [[1, 1]] * 2, "attention_scaling_factors": [1, 1]},
            ),
            images(2, 16, 2),
        ),
    },
    "tensorly-torch": {
        "FactorizedLinear": of(
            "tltorch", lambda m: Layered(16, m.FactorizedLinear((4, 4), (3, 4), rank=0.5), 12), _IN
        ),
        "FactorizedConv": of(
            "tltorch",
            lambda m: nn.Sequential(
                nn.Conv2d(3, 8, 3),
                m.FactorizedConv(8, 12, 3, order=2, rank=0.5),
                nn.ReLU(),
                nn.Conv2d(12, 3, 1),
            ),
            images(3, 16, 2),
        ),
        "TRL": of(
            "tltorch",
            lambda m: nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.ReLU(), m.TRL((8, 6, 6), (4,), rank=0.5)
            ),
            images(3, 8),
        ),
        "TCL": of(
            "tltorch",
            lambda m: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), m.TCL((8, 6, 6), (4, 3, 3))),
            images(3, 8),
        ),
    },
    "pykan": {
        "KAN": of("kan", lambda m: m.KAN([4, 5, 2], auto_save=False), floats(8, 4)),
        "KANLayer": of("kan.KANLayer", lambda m: m.KANLayer(6, 4), _IN),
    },
    "torchdiffeq": {
        "euler": of("torchdiffeq", partial(Ode, method="euler"), _IN),
        "dopri5": of("torchdiffeq", partial(Ode, method="dopri5"), _IN),
        "adjoint": of("torchdiffeq", partial(Ode, method="rk4", adjoint=True), _IN),
    },
    "gpytorch": {"deep_kernel": of("gpytorch", DeepKernel, _IN)},
    "geoopt": {"PoincareBall": of("geoopt", Poincare, _IN)},
    "brevitas": {
        "conv": of("brevitas.nn", _quantized, images(3, 12)),
        "QuantLSTM": of("brevitas.nn", _quantized_lstm, floats(5, 4, 6)),
        "QuantMultiheadAttention": of(
            "brevitas.nn",
            _quantized_attention,
            floats(5, 4, 16, count=3),
        ),
    },
}
