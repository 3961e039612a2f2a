"""Laws that hold for networks nobody wrote. A failure prints the network as runnable code."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, note, seed, settings

from .random_networks import BRANCHES, RATIOS, SHARES, check, networks

COUNT = int(os.environ.get("GPDFX_NETWORKS", "48"))
PARTS = 4


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
