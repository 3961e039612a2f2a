"""Laws that hold for networks nobody wrote. A failure prints the network as runnable code."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st

import gpdfx
from gpdfx.branches.sets import SETS
from gpdfx.report.report import Report
from gpdfx.teacher.module import take_first

from .helpers import facts
from .networks import tensors_equal
from .random_networks import build, networks

COUNT = int(os.environ.get("GPDFX_NETWORKS", "100"))
PARTS = 4
RATIOS = st.sampled_from([1.3, 1.5, 2, 2, 2.5, 3])
BRANCHES = st.sampled_from([None, "auto", *SETS])
SHARES = st.sampled_from(["random", "uniform"])


def check(
    code: str, ratio: Any, shares: str, branches: str | None = None, **options: Any
) -> Report:
    """Lossless in both modes; collapse is the identity; gradients are the student's own; explain
    agrees with the report."""
    model = build(code)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    options |= {"shares": shares, "branches": branches}
    teacher = gpdfx.expand(model, ratio, example_inputs=(x,), **options)
    report = teacher.report()
    assert not [b for b in report.bridged if "rule" in b.reason and "no rule" not in b.reason]
    assert tensors_equal(model.state_dict(), gpdfx.collapse(teacher).state_dict())
    assert all(sizes.startswith("batch") for sizes in report.inputs.values()), report.inputs

    model.eval(), teacher.eval()
    for run in (model, teacher.student):
        torch.manual_seed(2)  # dropout may be on in eval mode, too
        run(x).square().sum().backward()
    wide = dict(teacher.named_parameters())
    for name, p in model.named_parameters():
        if p.grad is not None:
            derived = take_first(wide[name].grad, facts(teacher).maps[name])
            scale = float(p.grad.abs().max())  # kernels may differ on strided views
            torch.testing.assert_close(derived, p.grad, rtol=1e-3, atol=1e-4 * scale + 1e-7)

    stays = {(f.parameter, f.dim) for f in report.fixed}
    for name, _ in model.named_parameters():
        for dim, d in enumerate(gpdfx.explain(teacher, name).dimensions):
            if d.student > 1:
                assert ((name, dim) in stays) == bool(d.reason), (name, dim, d)
                assert (d.teacher > d.student) == bool(d.group), (name, dim, d)
    return report


@pytest.mark.parametrize("part", range(PARTS))
def test_random_networks(part: int) -> None:
    @seed(part)
    @settings(
        max_examples=COUNT // PARTS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(networks(), RATIOS, SHARES, BRANCHES)
    def run(code: str, ratio: float, shares: str, branches: str | None) -> None:
        note(f"ratio {ratio}, shares {shares!r}, branches {branches!r}\n{code}")
        check(code, ratio, shares, branches)

    run()
