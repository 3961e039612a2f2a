"""Bytes that kernels of a fold move, counted by hand; in ``test_kernels``, by the interpreter."""

from __future__ import annotations

import torch

from benchmarks import kernels_bytes
from benchmarks.layers import Case
from gpdfx.branches.layer import Layer
from gpdfx.kernels.fold import launch


def sizes(layer: Layer, chosen: str, made: torch.dtype) -> kernels_bytes.Sizes:
    case = Case(layer, chosen, torch.float32)
    own = [t.detach() for t in case.tensors]
    plan = launch.Plan((case.site,), own, True, True, made, True)
    (found,) = kernels_bytes.sizes_of(plan, own)
    return found


def test_two_lines_beside_a_small_convolution() -> None:
    """Four outputs, eight inputs, nine taps; the student is half as wide, so that a row has a tile
    for each of the two copies of its inputs: eight tiles."""
    found = sizes(Layer(1, 4, 8, (3, 3), "conv"), "acnet", torch.float32)
    weight, student, lines = 4 * 8 * 9 * 4, 2 * 4 * 9 * 4, 2 * (4 * 8 * 3 * 4)
    scales, table = 3 * 4 * 4, 8 * 4
    read_scales = 3 * 8 * 4
    shares = (8 + 2 + 8) * 4  # of a tile an index of its row, and one share; an index a copy
    distinct = (4 + 2 + 8) * 4
    moved = 2 * weight + student + lines
    assert kernels_bytes.count([found], False) == {
        "combine": (moved + read_scales + shares, moved + scales + distinct)
    }
    assert found.least(False) == moved + scales + table
    sums = 3 * 8 * 4  # of each row's tiles
    moved = 3 * weight + student + 2 * lines
    assert kernels_bytes.count([found], True) == {
        "scatter": (moved + read_scales + shares + sums, moved + scales + distinct + sums),
        "reduce": (sums + scales, sums + scales),
    }
    assert found.least(True) == moved + 2 * scales + table


def test_operands_in_the_parameters_type_are_parameters() -> None:
    """Of rank one: eight numbers to the left, sixteen to the right."""
    types = (torch.float32, torch.float16)
    own, half = (sizes(Layer(1, 8, 16, (), "linear"), "lowrank", t) for t in types)
    weight, student, scales, table = 8 * 16 * 4, 4 * 8 * 4, 2 * 8 * 4, 8 * 2 * 4
    shared = 2 * weight + student + scales + table
    assert own.least(False) == shared + weight
    assert half.least(False) == shared + weight // 2 + (8 + 16) * (4 + 2)
    assert kernels_bytes.count([half], False)["prepare"] == ((8 + 16) * (4 + 2),) * 2
