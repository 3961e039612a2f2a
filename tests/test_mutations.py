"""The check is tested by mutation: a sample of ``benchmarks.mutations``."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from benchmarks.mutation_comparison import Comparison, distance
from benchmarks.mutation_networks import NETWORKS
from benchmarks.mutation_operators import OPERATORS, Subject
from benchmarks.mutations import Trial

from .helpers import program_of

SAMPLE = {
    "stages": 20,
    "stages-normed": 10,
    "parts": 15,
    "several": 15,
    "norms": 15,
    "regions": 10,
    "branching": 15,
}
"""Network -> how many mutants, one of each operator in turn."""


def trial(name: str) -> Trial:
    torch.set_num_threads(1)
    return Trial.of(name, draws=9)


@pytest.mark.parametrize("name", SAMPLE)
def test_every_fault_that_makes_another_function_is_caught(name: str) -> None:
    one = trial(name)
    turns = itertools.zip_longest(*(one.mutants(operator, 3) for operator in OPERATORS))
    planted = [m for turn in turns for m in zip(OPERATORS, turn, strict=True) if m[1]]
    sample = planted[: SAMPLE[name]]
    assert len(sample) == SAMPLE[name]
    outcomes = [(operator, m.mode, m.node, *one.outcome(m)) for operator, m in sample]
    holes = [each for each in outcomes if each[3] in ("survived", "crash")]
    assert not holes, "\n".join(map(str, holes))
    assert sum(each[3] == "caught" for each in outcomes) > SAMPLE[name] / 2


def test_operators_leave_the_original_alone() -> None:
    """And reach all that they should: every operator finds something in one of the networks."""
    found: dict[str, int] = dict.fromkeys(OPERATORS, 0)
    for name in ("stages", "norms", "several"):
        network = NETWORKS[name]
        model, call = network.build()
        program = program_of(model, call, network.ratio, **network.options)
        before = [str(graph) for graph in program.graphs.values()]
        tables = program.shares | program.constants
        kept = {name: x.clone() for name, x in tables.items()}
        subject = Subject.of(program, call)
        for operator, mutants in OPERATORS.items():
            for mutant in mutants(subject):
                found[operator] += 1
                assert mutant.make() is not program
        assert [str(graph) for graph in program.graphs.values()] == before
        assert all(x.equal(kept[name]) for name, x in tables.items())
    assert all(found.values()), found


def test_the_comparison_tells_a_fault_from_none() -> None:
    """Without the check: it finds a function to be its own, and each of these to be another."""
    network = NETWORKS["stages"]
    model, call = network.build()
    program = program_of(model, call, network.ratio, **network.options)
    comparison, subject = Comparison(program, call, 6), Subject.of(program, call)
    assert comparison.difference(program) == ""
    kinds = ("detach", "scale", "float32", "momentum", "draw again", "mute a scale", "bake a size")
    for operator in kinds:
        mutant = next(m for m in OPERATORS[operator](subject) if "eval" not in m.mode)
        assert comparison.difference(mutant.make()), mutant


def test_distances_are_of_elements() -> None:
    """Neither a mask nor a large neighbour hides a small difference."""
    a = torch.tensor([1.0, -1e9, 2.0, -torch.inf], dtype=torch.float64)
    b = a.clone()
    assert distance(a, b, 0) == 0
    b[0] += 1e-6
    assert distance(a, b, 0) == pytest.approx(5e-7)
    b[3] = -1e30
    assert distance(a, b, 0) == torch.inf
    assert distance(a, None, 0) == distance(a, a.float(), 0) == torch.inf
    whole = nn.Linear(1, 1).weight.detach()
    assert distance(whole * 0, whole * 0 + 1e-12, 1.0) <= 1e-12
