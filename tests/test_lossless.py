"""The promise: the same function, in both modes, and back again bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch

import gpdfx

from .helpers import thinned
from .networks import NETWORKS, WRITTEN, tensors_equal

# Of large networks these run by default; the rest are slow, and rows of the coverage benchmark.
LARGE = {("resnet18", 2), ("mobilenet_v3_small", 1.5), ("vit_tiny", 2)}
RATIOS = (1.5, 2, 3)
USUAL = {*LARGE, *itertools.product(WRITTEN, RATIOS)}


@pytest.mark.parametrize(("name", "ratio"), thinned(itertools.product(NETWORKS, RATIOS), USUAL))
def test_expand_is_lossless_and_collapse_returns_the_student(name: str, ratio: float) -> None:
    case = NETWORKS[name]
    model = case.model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dynamic = "sizes" if ratio == 2 else "batch"  # free sizes take most of the time
    teacher = gpdfx.expand(
        model,
        ratio,
        example_inputs=case.inputs(),
        branches="auto" if ratio == 2 else None,
        dynamic=dynamic,
    )
    report = teacher.report()
    assert max(report.error.values()) <= max(report.check.tolerance, 1e-10)
    assert report.check.tolerance <= 1e-7
    if name not in ("odd", "norms"):
        assert report.check.tolerance == 1e-10
    assert tensors_equal(before, model.state_dict())
    plain = gpdfx.collapse(teacher)
    assert type(plain) is type(model)
    assert tensors_equal(before, plain.state_dict())
    failed = [b.reason for b in report.bridged if "rule failed" in b.reason or "sizes" in b.reason]
    assert not failed
    if ratio == 2:
        assert report.widened >= 0.95 or name == "odd", report
    grown = report.parameters[1] / report.parameters[0]
    assert grown <= ratio**2
    assert grown > 1


@pytest.mark.parametrize("name", WRITTEN)
def test_ratio_one_is_the_identity(name: str) -> None:
    case = WRITTEN[name]
    teacher = gpdfx.expand(case.model(), 1, example_inputs=case.inputs())
    assert teacher.report().parameters[0] == teacher.report().parameters[1]
    assert not teacher.report().groups


@pytest.mark.parametrize("name", WRITTEN)
def test_uniform_shares_are_lossless(name: str) -> None:
    case = WRITTEN[name]
    gpdfx.expand(case.model(), 2.5, example_inputs=case.inputs(), shares="uniform")


def test_float32_teacher_matches_in_float32() -> None:
    case = NETWORKS["gpt"]
    model = case.model().eval()
    teacher = gpdfx.expand(model, 2, example_inputs=case.inputs(), verify=False)
    x = case.inputs(seed=5)
    torch.testing.assert_close(teacher(*x), model(*x), rtol=1e-5, atol=1e-5)


def test_another_batch_size_works() -> None:
    case = NETWORKS["odd"]
    model = case.model().double().eval()
    (x,) = case.inputs()
    teacher = gpdfx.expand(model, 1.5, example_inputs=(x.double(),))
    for batch in (1, 2, 6):
        y = torch.randn(batch, 3, 16, 16, dtype=torch.float64)
        torch.testing.assert_close(teacher(y), model(y), rtol=1e-10, atol=1e-12)


def test_structure_of_attention() -> None:
    """Heads widen, head features stay; grouped axes widen their groups."""
    case = NETWORKS["gpt"]
    report = gpdfx.expand(case.model(), 2, example_inputs=case.inputs(), verify=False).report()
    widths = {(g.before, g.after) for g in report.groups}
    assert (3, 6) in widths
    assert (8, 16) not in widths
    assert report.widened == 1.0
    assert not report.bridged
