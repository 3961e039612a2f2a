"""The networks of ``benchmarks.mutations``: small enough that one check takes part of a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor, nn

from benchmarks import zoo_transformers
from tests import random_networks
from tests.networks import WRITTEN

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Network:
    """``make``: the student, and positional and keyword inputs; ``options``: of the expansion."""

    make: Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]
    ratio: float = 2.0
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> tuple[nn.Module, Call]:
        """The same at every call."""
        torch.manual_seed(0)
        model, args, kwargs = self.make()
        return model, (args, kwargs)


# --------------------------------------------------------------------------- written here
class Stages(nn.Module):
    """A layer of each kind that takes branches, one of them called twice; statistics, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.twice, self.point = nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.Conv2d(6, 8, 1)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.twice(self.twice(x).relu())
        return self.head(self.drop(self.point(x).mean((2, 3))))


class Parts(nn.Module):
    """Does not export as a whole: goes round a layer as often as the values say, counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU())
        self.step = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, 8))
        self.head = nn.Linear(8, 5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        y = self.stem(x).transpose(1, 2)
        for _ in range(2 + int(y.detach().mean() > 1e9)):
            y = y + self.step(y)
        return {"logits": self.head(y.mean(1)), "features": y}


class Several(nn.Module):
    """Several inputs, a mask with rows that attend to nothing but themselves, several outputs of
    one shape, an average kept in a buffer, and a cast to float32 on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Embedding(20, 12), nn.MultiheadAttention(12, 3, 0.1)
        self.up, self.down = nn.Linear(12, 18), nn.Linear(18, 12)
        self.register_buffer("average", torch.zeros(12))

    def forward(self, tokens: Tensor, mask: Tensor, bias: Tensor) -> tuple[Tensor, dict[str, Any]]:
        x = self.embed(tokens).transpose(0, 1)
        x = self.attend(x, x, x, attn_mask=mask.masked_fill(mask.triu(1) > 0, -torch.inf))[0]
        if self.training:
            self.average.lerp_(x.detach().mean((0, 1)), 0.1)
        y = F.gelu(self.up(x + self.average)).float() * bias
        y = self.down(y.to(x.dtype))
        return y, {"x": x, "sums": (y.sum(0), x.sum(0))}


def _image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _several() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    tokens = torch.arange(14).view(2, 7) % 20
    return Several(), (tokens, torch.ones(7, 7)), {"bias": _image(7, 1, 18)}


# --------------------------------------------------------------------------- from tables
def _written(name: str) -> Callable[[], Any]:
    case = WRITTEN[name]
    return lambda: (case.build(), case.inputs(), {})


def _timm(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: (
        timm.create_model(name, num_classes=5, **options),
        (_image(4, 3, 32, 32),),
        {},
    )


def _transformer(name: str) -> Callable[[], Any]:
    return lambda: zoo_transformers.build(name)


def _drawn(number: int) -> Callable[[], Any]:
    """The longest of some networks that are drawn with this seed."""
    sources: list[str] = []

    @seed(number)
    @settings(
        max_examples=12,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(random_networks.networks())
    def draw(code: str) -> None:
        sources.append(code)

    def make() -> Any:
        draw()
        return random_networks.build(max(sources, key=len)), (_image(4, 3, 8, 8),), {}

    return make


NETWORKS: dict[str, Network] = {
    "stages": Network(lambda: (Stages(), (_image(4, 3, 6, 6),), {}), 2, {"branches": "auto"}),
    "stages-normed": Network(
        lambda: (Stages(), (_image(4, 3, 6, 6),), {}), 1.5, {"branches": "mobileone"}
    ),
    "stages-mean": Network(
        lambda: (Stages(), (_image(4, 3, 6, 6),), {}), 1.5, {"branches": "acnet", "extract": "mean"}
    ),
    "parts": Network(lambda: (Parts(), (_image(4, 3, 9),), {}), 1.5, {"branches": "auto"}),
    "several": Network(_several, 1.5),
    "norms": Network(_written("norms"), 1.5),
    "regions": Network(_written("regions"), 2, {"branches": "auto"}),
    "experts": Network(_written("experts"), 1.5),
    "branching": Network(_written("branching")),
    "scatter": Network(_written("scatter"), 1.5),
    "cached": Network(_written("cached")),
    "odd": Network(_written("odd"), 1.5),
    "grouped": Network(_written("grouped"), 2, {"shares": "uniform"}),
    "gpt": Network(_written("gpt"), 1.5),
    "held": Network(_written("held")),
    "unet": Network(_written("unet"), 1.5, {"shares": "uniform"}),
    "recurrent": Network(_written("recurrent")),
    **{f"random-{k}": Network(_drawn(k), 1.5 if k % 2 else 2) for k in range(5)},
    "resnet": Network(_timm("test_resnet"), 1.5),
    "convnext": Network(_timm("test_convnext3"), 1.5),
    "efficientnet": Network(_timm("test_efficientnet"), 1.5, {"branches": "auto"}),
    "vit": Network(_timm("test_vit", img_size=32, drop_rate=0.1), 1.5),
    **{
        f"hf-{name}": Network(_transformer(model), 1.5)
        for name, model in (
            ("bert", "BertForSequenceClassification"),
            ("gpt2", "GPT2LMHeadModel"),
            ("t5", "T5ForConditionalGeneration"),
            ("llama", "LlamaForCausalLM"),
        )
    },
}
"""By name, the quickest first."""
