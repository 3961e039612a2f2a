"""One table of networks that every test shares: name -> how to build it and what to feed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 3, 64, 64)
    tokens: int = 0  # vocabulary size; the input is then integer

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        draw = torch.Generator().manual_seed(seed)
        if self.tokens:
            return (torch.randint(0, self.tokens, self.shape, generator=draw),)
        return (torch.randn(self.shape, generator=draw),)


# --------------------------------------------------------------------------- written here
class UNet(nn.Module):
    """Skip connections by concatenation, transposed convolutions, instance norm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        w = width
        self.down = nn.ModuleList(
            [self.block(3, w), self.block(w, 2 * w), self.block(2 * w, 4 * w)]
        )
        self.up = nn.ModuleList(
            [
                nn.ConvTranspose2d(4 * w, 2 * w, 2, stride=2),
                nn.ConvTranspose2d(2 * w, w, 2, stride=2),
            ]
        )
        self.merge = nn.ModuleList([self.block(4 * w, 2 * w), self.block(2 * w, w)])
        self.head = nn.Conv2d(w, 5, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs),
            nn.InstanceNorm2d(outputs, affine=True),
            nn.LeakyReLU(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.down[0](x)
        b = self.down[1](F.max_pool2d(a, 2))
        c = self.down[2](F.avg_pool2d(b, 2))
        d = self.merge[0](torch.cat([self.up[0](c), b], dim=1))
        return self.head(self.merge[1](torch.cat([self.up[1](d), a], dim=1)))


class Attention(nn.Module):
    """Causal self-attention with packed qkv and dropout."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.view(b, n, self.heads, c // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.drop(self.proj(y.transpose(1, 2).reshape(b, n, c)))


class GPT(nn.Module):
    """A decoder with tied embeddings."""

    def __init__(self, vocab: int = 50, dim: int = 24, heads: int = 3, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.position = nn.Parameter(torch.randn(1, 16, dim) * 0.02)
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(dim),
                    "attention": Attention(dim, heads),
                    "norm2": nn.LayerNorm(dim),
                    "mlp": nn.Sequential(
                        nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(0.1)
                    ),
                }
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.drop(self.embed(tokens) + self.position[:, : tokens.shape[1]])
        for block in self.blocks:
            x = x + block["attention"](block["norm1"](x))
            x = x + block["mlp"](block["norm2"](x))
        return self.head(self.norm(x))


def spilled(x: Tensor) -> Tensor:
    """The first elements, in the places of the positive ones."""
    return x.masked_scatter(x > 0, x)


class Odd(nn.Module):
    """What has no rule (masked_scatter), or one that must see positions: conv over the channel
    axis (ECA), sort, cumsum, argmax, a softmax and statistics over channels, in-place writes to
    views."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=4, padding=1)
        self.norm = nn.GroupNorm(3, 12)
        self.eca = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.mix = nn.Conv2d(12, 12, 1)
        self.bank = nn.Linear(12, 6)
        self.fc = nn.Linear(12 + 12 + 6 + 1 + 12, 7)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.norm(self.stem(x))
        gate = self.eca(x.mean((2, 3)).unsqueeze(1)).squeeze(1).sigmoid()
        x = x * gate[:, :, None, None]
        x = self.mix(x).softmax(dim=1) + x.std(dim=1, keepdim=True)
        pooled = x.mean((2, 3))
        ordered = pooled.sort(dim=1)[0].cumsum(dim=1)
        bank = F.linear(pooled, spilled(self.bank.weight), self.bank.bias)
        place = pooled.argmax(dim=1, keepdim=True) / 12
        zeros = torch.zeros_like(pooled)
        zeros[:, :4] = pooled[:, 4:8]
        zeros[:, 4:].add_(1.0)
        return self.fc(torch.cat([pooled, ordered, bank, place, zeros], dim=1))


class Grouped(nn.Module):
    """Grouped, dilated, transposed grouped and depthwise-multiplier convolutions, 1d to 3d."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.b = nn.Conv2d(12, 24, 3, padding=2, dilation=2, groups=4)
        self.c = nn.Conv2d(24, 48, 3, padding="same", groups=24)
        self.d = nn.ConvTranspose2d(48, 12, 3, groups=3)
        self.e = nn.Conv1d(12, 18, 3, groups=2)
        self.f = nn.Conv3d(3, 6, (1, 3, 3))
        self.norm = nn.GroupNorm(4, 24)
        self.fc = nn.Linear(18 + 12, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm(self.b(F.relu6(self.a(x)))))
        y = self.d(F.glu(torch.cat([self.c(y), self.c(y)], dim=1), dim=1))
        z = self.e(y.mean(3)).amax(2)
        v = self.f(y.unflatten(1, (3, 4)))
        return self.fc(torch.cat([z, v.amax((2, 3, 4)), v.var((2, 3, 4), unbiased=True)], dim=1))


class Norms(nn.Module):
    """Every norm over widened axes, so that fractional ratios need weighted statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 10)
        self.layer = nn.LayerNorm(10)
        self.rms = nn.RMSNorm(10)
        self.group = nn.GroupNorm(2, 10)
        self.b = nn.Linear(10, 10)
        self.bias = nn.Parameter(torch.zeros(10))
        self.c = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rms(F.gelu(self.layer(self.a(x))))
        x = self.group(self.b(x)[:, :, None]).squeeze(2)
        x = F.normalize(x, dim=1) + x.logsumexp(1, keepdim=True) + x.norm(p=3, dim=1, keepdim=True)
        x = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, keepdim=True) + 1e-3)
        x = x + x.log_softmax(1) * x.sum(1, keepdim=True) + self.bias
        x = x + (x * 0).std(1, keepdim=True)  # its gradient is zero, not infinite
        return self.c(F.dropout(x, 0.2, self.training))


class Regions(nn.Module):
    """no_grad and autocast regions, a deliberate cast, weights computed from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 4)
        self.scale = nn.Parameter(torch.ones(10, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        with torch.no_grad():
            gate = self.b(y).sigmoid()
            with torch.enable_grad():
                gate = gate * 2
        with torch.autocast("cpu", enabled=False):
            weight = F.normalize(self.b.weight, dim=1) * self.scale
            y = F.linear(y, weight / weight.var(1, keepdim=True).add(1).sqrt(), self.b.bias)
        return self.c(y * gate)


class Scatter(nn.Module):
    """Writes to parts of tensors, functionally and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.a(x), self.b(x)
        y = torch.slice_scatter(y, z, 2, 1, 6)
        y = torch.slice_scatter(y, self.a(x)[:, 1:3], 1, 0, 2)
        t = torch.select_scatter(y, z[:, 0, :1].expand(-1, 8), 1, 2)
        rows, columns = torch.tensor([0, 1])[:, None], torch.tensor([0, 2])
        t = torch.index_put(t, (rows, columns), z[:2, :2, :1])
        u = t.scatter(1, torch.zeros(t.shape[0], 1, 8, dtype=torch.long), y[:, :1])
        places = torch.tensor([3, 4, 1]).expand(t.shape[0], u.shape[1], 3)
        u = u.scatter_add(2, places, y[:, :, :3])
        v = y.clone()
        v[:, 1:3] = u[:, :2]
        v[:, :, 2:4] = 0
        return self.c(u * v)


class Cached(nn.Module):
    """Positions made in forward: kept in a buffer of another size, and cast to the weights' type
    (in float32 capture drops that cast; the network in half precision needs it). And a bias that
    forward registers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.position, self.head = nn.Linear(6, 8), nn.Linear(3, 8), nn.Linear(8, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.register_buffer("table", torch.zeros(1, 3), persistent=False)
        self.register_buffer("bias", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        if self.table.shape[0] != n:
            table = torch.zeros(n, 3)
            table[:, 0] = torch.arange(n) / n
            table[:, 1] = table[:, 0] ** 2
            self.table = table.to(self.a.weight.dtype)
        if self.bias is None:
            self.register_buffer("bias", torch.arange(8.0).to(x) / 8, persistent=False)
        y = self.a(x) + self.position(self.table) + self.bias
        return self.head(torch.cat([self.token.expand(y.shape[0], -1, -1), y], dim=1).tanh())


class Recurrent(nn.Module):
    """Every recurrent layer: stacked, both directions, projected, and a cell in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 5)
        self.lstm = nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(12, 6, batch_first=True, bias=False)
        self.rnn = nn.RNN(6, 4, nonlinearity="relu")
        self.projected = nn.LSTM(4, 8, proj_size=3)
        self.cell = nn.LSTMCell(3, 5)
        self.head = nn.Linear(5 + 3 + 12, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.lstm(self.embed(tokens))[0]  # torch 2.11 captures its final states wrongly
        y = self.rnn(self.gru(x)[0].transpose(0, 1))[0]
        y = self.projected(y)[0]
        state = None
        for step in y[:3]:
            state = self.cell(step, state)
        assert state is not None
        return self.head(torch.cat([state[1], y[-1], x[:, -1]], dim=1))


class Branching(nn.Module):
    """Free in height and width, but for the paths it takes: an even height, at most 64 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.shape[2] % 2:
            y = y[:, :, 1:]
        b, c, h, w = y.shape
        y = y.view(b, c, h // 2, 2, w // 2, 2).sum((3, 5))
        if y.shape[2] > 64:
            y = y * 2
        return self.head(self.b(y.relu()).flatten(2).mean(2))


class Held(nn.Module):
    """Everything a module may hold: parametrised and composed weights, ties, a module called
    twice, statistics that nobody reads, a frozen parameter, plain tensors, its last results."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(30, 8, mode="mean")
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 12))
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(12, 8))
        self.old = nn.utils.weight_norm(nn.Conv1d(8, 8, 3, padding=1), dim=1)
        self.attend = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.hyper = nn.Linear(8, 8 * 6)
        self.twice = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.twice.weight
        self.side = nn.BatchNorm1d(8)
        self.still = nn.Parameter(torch.randn(8), requires_grad=False)
        self.plain = torch.linspace(0.5, 1.5, 8)
        self.results = [torch.zeros(1)]
        self.register_buffer("passing", torch.randn(8), persistent=False)
        self.head = nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.weighted(F.gelu(self.spectral(self.bag(tokens))))
        x = self.tied(self.twice(self.twice(x).relu())) * self.still + self.passing
        self.side(x)
        self.results[0] = x
        sequence = torch.stack([x, x * self.plain, x.roll(1, 0)], 1)
        sequence = self.attend(sequence, sequence, sequence)[0]
        sequence = self.old(sequence.transpose(1, 2)).mean(2)
        weight = self.hyper(x).view(-1, 6, 8) + self.hyper.weight.view(6, 8, 8).mean(2)
        return self.head(torch.einsum("boi,bi->bo", weight, sequence))


class Experts(nn.Module):
    """A mixture: every token goes through its two best experts, weighed by a router."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.router = nn.Linear(8, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 8)) for _ in range(experts)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        value, chosen = self.router(y).softmax(-1).topk(2, dim=-1)
        gate = torch.zeros_like(y[..., :1]).expand(*y.shape[:-1], len(self.experts))
        gate = gate.scatter(-1, chosen, value)
        return self.head(sum(gate[..., k, None] * e(y) for k, e in enumerate(self.experts)) + y)


WRITTEN: dict[str, Case] = {
    "unet": Case(UNet, (2, 3, 16, 16)),
    "gpt": Case(GPT, (2, 12), tokens=50),
    "odd": Case(Odd, (3, 3, 16, 16)),
    "grouped": Case(Grouped, (2, 3, 16, 16)),
    "norms": Case(Norms, (4, 6)),
    "regions": Case(Regions, (4, 6)),
    "scatter": Case(Scatter, (4, 4, 6)),
    "recurrent": Case(Recurrent, (4, 6), tokens=20),
    "cached": Case(Cached, (4, 5, 6)),
    "branching": Case(Branching, (2, 3, 16, 16)),
    "held": Case(Held, (6, 4), tokens=30),
    "experts": Case(Experts, (4, 3, 5)),
}


def _vision(name: str) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name)


ZOO: dict[str, Case] = {
    name: Case(_vision(name))
    for name in (
        "resnet18",
        "resnext50_32x4d",
        "densenet121",
        "mobilenet_v3_small",
        "shufflenet_v2_x1_0",
        "efficientnet_b0",
        "convnext_tiny",
        "swin_t",
    )
}
ZOO["vit_tiny"] = Case(
    lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, drop_rate=0.1)
)
ZOO["regnet_x_400mf"] = Case(_vision("regnet_x_400mf"))
NETWORKS: dict[str, Case] = WRITTEN | ZOO


def tensors_equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Bit-identical, same keys in the same order."""
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
