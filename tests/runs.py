"""Short training runs. ``python -m tests.runs train ...`` is ``gpdfx train ...`` whose last
checkpoint keeps its tensors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpdfx
from gpdfx.cli import main
from gpdfx.train import run
from gpdfx.train.config import TrainConfig
from gpdfx.train.recipes import RECIPES, with_changes

TINY = with_changes(RECIPES["digits"], epochs=2, batch_size=26, warmup_epochs=0, lr=0.05)


def config(out: Path, **changes: Any) -> TrainConfig:
    """Five steps an epoch, two epochs."""
    usual: dict[str, Any] = {
        "student": "tests.small_networks:tiny",
        "data": "digits",
        "labels": 13,
        "recipe": TINY,
        "device": "cpu",
        "verify": False,
        "time_steps": 0,
    }
    return TrainConfig(out=str(out), **(usual | changes))


def go(out: Path, **changes: Any) -> dict[str, Any]:
    return run.train(config(out, **changes), quiet=True)


def keep_last_checkpoint(patch: pytest.MonkeyPatch) -> None:
    """Let a run that ends leave its checkpoint whole."""
    patch.setattr(run.Run, "_close", lambda self: None)


def command(out: Path, *more: str) -> list[str]:
    """The run of ``config(out)`` as a command."""
    recipe = ["--epochs", "2", "--batch-size", "26", "--warmup-epochs", "0", "--lr", "0.05"]
    name = ["--student", "tests.small_networks:tiny", "--data", "digits", "--labels", "13"]
    return [
        "train",
        *name,
        *recipe,
        "--out",
        str(out),
        "--device",
        "cpu",
        "--no-verify",
        "--time-steps",
        "0",
        *more,
    ]


X, Y = torch.randn(6, 3, 9, 9), torch.tensor([0, 1, 2, 3, 4, 0])


def make(static: bool = True, **options: Any) -> gpdfx.GPD:
    torch.manual_seed(0)
    options = {"example_inputs": (X,), "verify": False, "dynamic": "batch", **options}
    return gpdfx.GPD(Net(), Net(12) if static else None, **options)


class Net(nn.Module):
    def __init__(self, width: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width)
        self.b, self.head = nn.Conv2d(width, width, 3), nn.Linear(width, classes)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        out: Tensor = self.head(self.drop(F.relu(self.b(x)).mean((2, 3))))
        return out


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        keep_last_checkpoint(patch)
        code = main()
    sys.exit(code)
