"""The pipeline: each pass makes another program, and every result is checked."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import fx

import gpdfx
from gpdfx import passes
from gpdfx.control import ExpandOptions, make_control
from gpdfx.passes import PASSES
from gpdfx.passes.capture.export import capture, whole
from gpdfx.passes.program import copied
from gpdfx.passes.widen import Widened

from .helpers import program_of, verify
from .networks import WRITTEN

SMALL = ("gpt", "odd", "regions", "held")


def told(graph: fx.Graph) -> list[str]:
    """All of a graph that a pass could change in place."""
    return [
        str((n.name, n.op, n.target, n.args, n.kwargs, list(n.users), sorted(n.meta)))
        for n in graph.nodes
    ]


def snapshot(program: Any) -> dict[str, Any]:
    """All of a program that a pass could change in place: graphs, names, what inference found."""
    seen: dict[str, Any] = {key: told(mode.graph) for key, mode in program.modes.items()}
    for one in fields(program):
        held = getattr(program, one.name)
        seen[one.name] = list(held) if isinstance(held, dict) else id(held)
    for key, graph in getattr(program, "graphs", {}).items():
        seen[f"teacher {key}"] = told(graph)
    if inference := getattr(program, "inference", None):
        solver = inference.solver
        seen["solver"] = solver.checkpoint(), dict(solver.reason), dict(solver.bound)
        seen["bridges"] = dict(inference.bridges)
    return seen


@pytest.mark.parametrize("name", SMALL)
def test_no_pass_changes_what_it_is_given(name: str) -> None:
    model, x = WRITTEN[name].model(), WRITTEN[name].inputs()
    control = make_control(model, 1.5, branches="mobileone")
    program = replace(
        capture(model, whole(model, x, {}), dynamic="batch"), options=ExpandOptions(control)
    )
    for pass_ in PASSES:
        before = snapshot(program)
        result = passes.run(program, (pass_,))
        assert snapshot(program) == before, pass_.__name__
        program = result
    assert isinstance(program, Widened)
    verify(program, (x, {}))


def names_no_tensor(program: Widened) -> Widened:
    graphs = {key: copied(graph) for key, graph in program.graphs.items()}
    graph = graphs["eval"]
    with graph.inserting_before(graph.output_node()):
        graph.get_attr("nobody")
    return replace(program, graphs=graphs)


def loses_a_dimension(program: Widened) -> Widened:
    axes = dict(program.inference.axes)
    node = next(n for n in axes if n.op == "call_function")
    axes[node] = axes[node][:-1]
    return replace(program, inference=replace(program.inference, axes=axes))


def shrinks(program: Widened) -> Widened:
    size = dict.fromkeys(program.widths.size, 1)
    return replace(program, widths=replace(program.widths, size=size))


def reads_what_comes_later(program: Widened) -> Widened:
    modes = {}
    for key, mode in program.modes.items():
        graph = copied(mode.graph)
        first = next(n for n in graph.nodes if n.op == "call_function")
        graph.output_node().append(first)
        modes[key] = replace(mode, graph=graph)
    return replace(program, modes=modes)


FAULTS = {
    names_no_tensor: "nobody",
    loses_a_dimension: "axes of other sizes",
    shrinks: "may not have 1 indices",
    reads_what_comes_later: "before it has been defined",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_what_a_faulty_pass_makes_is_refused(fault: Any) -> None:
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)), torch.randn(2, 4)
    program = program_of(model, ((x,), {}))
    with pytest.raises((AssertionError, RuntimeError), match=FAULTS[fault]):
        passes.run(program, (fault,))


def test_the_pipeline_reads_in_order() -> None:
    names = [pass_.__name__ for pass_ in PASSES]
    order = ["inline", "canonicalize", "infer", "assign", "widen", "branch", "lower"]
    assert [name for name in names if name in order] == order


class Named(torch.nn.Module):
    """Submodules that are called as the teacher's own methods are."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.report = torch.nn.Linear(4, 6), torch.nn.Linear(6, 5)
        self.both, self.narrow = torch.nn.Linear(5, 6), torch.nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.both(self.report(self.student(x).relu()).relu()))


def test_submodules_named_as_methods_are_not_hidden() -> None:
    torch.manual_seed(0)
    model, x = Named(), torch.randn(3, 4)
    teacher = gpdfx.expand(model, 2, example_inputs=(x,))
    torch.testing.assert_close(teacher(x), model(x))
    torch.testing.assert_close(teacher.student(x), model(x))
    for name, p in model.named_parameters():
        assert teacher.get_parameter(name).shape[-1] >= p.shape[-1]
        assert teacher.get_parameter(name) is dict(teacher.named_parameters())[name]
    assert teacher.report().widened == 1.0
    assert list(gpdfx.collapse(teacher).state_dict()) == list(model.state_dict())
