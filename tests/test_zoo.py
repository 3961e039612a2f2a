"""Rows of the benchmarks' tables: each builds and runs, and a few small ones widen losslessly."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import gpdfx
from benchmarks import networks

from .networks import tensors_equal

HEAVY = re.compile(r"tasks:(mvit|s3d|swin3d|maskrcnn|keypointrcnn|ssd300|.*resnet101)")
EVERY = 8  # the others are slow tests
ROWS = [
    pytest.param(name, marks=pytest.mark.slow if k % EVERY or HEAVY.match(name) else ())
    for suite in networks.ZOOS
    for k, name in enumerate(networks.zoo(suite))
]
# Fourier mixing, attention over text and over patches, grouped convolutions.
SMALL = (
    "transformers:FNetForSequenceClassification",
    "transformers:DistilBertForSequenceClassification",
    "transformers:IJepaForImageClassification",
    "transformers:RegNetForImageClassification",
)


def tensors(outputs: object) -> list[Tensor]:
    return [y for y in pytree.tree_leaves(outputs) if isinstance(y, Tensor)]


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    if name.startswith("transformers:"):
        pytest.importorskip("transformers")
    return networks.build(name, size=0)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_runs(name: str) -> None:
    """The same finite outputs twice."""
    model, args, kwargs = build(name)
    model.eval()
    with torch.no_grad():
        first, second = (tensors(model(*args, **kwargs)) for _ in range(2))
    assert first
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert not a.is_floating_point() or bool(a.isfinite().all())


@pytest.mark.parametrize("name", SMALL)
def test_small_rows_widen_losslessly(name: str) -> None:
    model, args, kwargs = build(name)
    teacher = gpdfx.expand(
        model, 2, example_inputs=args, example_kwargs=kwargs, branches=None, dynamic="batch"
    )
    report = teacher.report()
    assert report.check is not None
    assert max(report.error.values()) < report.check.tolerance
    assert report.widened == 1.0
    assert not report.bridged
    assert report.parameters[1] > 1.9 * report.parameters[0]
    plain = gpdfx.collapse(teacher)
    assert type(plain) is type(model)
    assert tensors_equal(model.state_dict(), plain.state_dict())
    model.eval(), teacher.eval()
    with torch.no_grad():
        for a, b in zip(
            tensors(teacher(*args, **kwargs)), tensors(model(*args, **kwargs)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
