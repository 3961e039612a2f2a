"""What the examples share: scikit-learn's handwritten digits, a small network, and its accuracy."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def load() -> tuple[TensorDataset, Tensor, Tensor]:
    """1500 images (1, 8, 8) in 10 classes to train on, and 297 others with their classes."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(data.target)
    return TensorDataset(x[:1500], y[:1500]), x[1500:], y[1500:]


def cnn() -> nn.Module:
    """Three convolutions, 6,090 parameters."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        nn.MaxPool2d(2),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Of a network that returns logits, in eval mode."""
    return (network.eval()(x).argmax(1) == y).float().mean().item()


def check(name: str, plain: nn.Module, student: Tensor, x: Tensor, y: Tensor) -> None:
    """The collapsed student gives what the student inside the GPD gave, and has learned."""
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), student, rtol=1e-4, atol=1e-5)
    found = accuracy(plain, x, y)
    assert found > 0.85, found
    print(f"{name}: {found:.1%} of {len(y)} digits")
