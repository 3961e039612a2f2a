"""Every row of the benchmarks' tables builds, runs, and gives the same finite outputs twice."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks import networks

HEAVY = re.compile(r"tasks:(mvit|s3d|swin3d|maskrcnn|keypointrcnn|ssd300|.*resnet101)")
EVERY = 8  # the others are slow tests
ROWS = [
    pytest.param(name, marks=pytest.mark.slow if k % EVERY or HEAVY.match(name) else ())
    for suite in networks.ZOOS
    for k, name in enumerate(networks.zoo(suite))
]


def tensors(outputs: object) -> list[Tensor]:
    return [y for y in pytree.tree_leaves(outputs) if isinstance(y, Tensor)]


@pytest.mark.parametrize("name", ROWS)
def test_every_row_runs(name: str) -> None:
    if name.startswith("transformers:"):
        pytest.importorskip("transformers")
    model, args, kwargs = networks.build(name, size=0)
    model.eval()
    with torch.no_grad():
        first, second = (tensors(model(*args, **kwargs)) for _ in range(2))
    assert first
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert not a.is_floating_point() or bool(a.isfinite().all())
