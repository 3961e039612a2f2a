"""Students that train in a moment."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def tiny(num_classes: int, in_chans: int) -> nn.Module:
    """With statistics and dropout, so that a run has all that a checkpoint must hold."""
    conv = nn.Conv2d(in_chans, 4, 3, 2, bias=False)
    head = nn.Sequential(nn.Dropout(0.2), nn.Flatten(), nn.Linear(36, num_classes))
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), head)


class Smooth(nn.Module):
    """Without statistics, and with a layer that nothing depends on."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(in_chans, 4, 3, 2), nn.Linear(36, num_classes)
        self.idle = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).flatten(1))
