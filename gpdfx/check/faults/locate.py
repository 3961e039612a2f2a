"""The place at which student and teacher part."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...algebra.gather import gather
from ...calls import tree
from ...calls.sizes import input_sizes
from ...errors import InputError
from ...passes.capture.modes import enter, flags_of
from ...passes.capture.submodules import Calls, recording
from ...passes.folded import reads
from ...passes.program import CallSite, module_path, source
from ...passes.widen import Widened
from ...teacher.captured import Section
from ..facts import Inputs, difference, errors_of, floating, scales_of
from ..observe import keep_rng, observe
from ..streaming import StreamingTeacher
from ..visit import Pair

NOTICED = 1e-9  # where student and teacher part


def first_difference(program: Widened, pair: Pair, mode: str) -> dict[str, Any]:
    """Node, module path and source line at which student and teacher part; empty if unknown."""
    student, teacher = pair.student, pair.teacher
    calls = calls_of(enter(student, mode, program.flags), program.parts, pair.inputs)
    tensors = program.tensors | program.children
    tensors |= dict(student.named_parameters()) | dict(student.named_buffers())
    for key, captured in program.modes.items():
        if not _runs_in(captured.site, student, mode):
            continue
        graph = teacher.graphs[key]
        try:
            section = Section(captured, captured.graph, input_sizes(captured.graph))
            flat = call_of(section, calls.get(captured.site.path, []))
            expected = _record(student, captured.graph, tree.fresh(flat), pair.seed, tensors)
            pair.load()
            inputs = [*tree.fresh(flat), teacher._fold()] if reads(graph) else tree.fresh(flat)
            got = _record(teacher._net, graph, inputs, pair.seed)
        except Exception as error:  # the message about the mismatch matters more than its place
            return {"source": f"(the first differing node is unknown: {type(error).__name__})"}
        for node in captured.graph.nodes:
            if node.name in expected and node.name in got:
                maps = tuple(program.frozen(a) for a in program.inference.axes[node])
                own, other = gather(expected[node.name], maps), got[node.name]
                own = own.to(other) if floating(own) and floating(other) else own  # baked constants
                if difference(own, other) > NOTICED:
                    where = {"module_path": module_path(node), "source": source(node)}
                    return {"node": node.name, **where}
    return {}


def guilty_part(pair: Pair, mode: str, allowed: float) -> str | None:
    """The first of several captured modules that, called alone, does not give what the student's
    gives: outputs and gradients."""
    teacher, student = pair.teacher, pair.copy_in(mode)
    pair.reload()
    teacher._enter(mode)
    calls = calls_of(pair.copy_in(mode), list(teacher._parts), pair.inputs)
    for section in teacher.sections.values():
        path = section.site.path
        flat = call_of(section, calls.get(path, []))
        if not _runs_in(section.site, student, mode) or flat is None:
            continue
        module, inputs = student.get_submodule(path), section.call.unflatten(flat)
        run = partial(run_section, teacher, section)
        own = dict(module.requires_grad_().named_parameters())
        sources = teacher.sources_of(path, module)
        with contextlib.suppress(Exception):  # a module that cannot be differentiated
            expected = observe(module, inputs, pair.seed, "all", parameters=own)
            got = observe(run, inputs, pair.seed, "all", parameters=sources, copy=tree.copied)
            errors = errors_of(expected, got, scales_of(expected, inputs, own))
            if not max(errors.values()) <= max(allowed, NOTICED):
                return path
        module.requires_grad_(False)  # other copies borrow them
    return None


def _runs_in(site: CallSite, student: nn.Module, mode: str) -> bool:
    """Whether a student that is in this mode runs a graph: parts are alike in several."""
    if not site.path:
        return site.mode == mode
    return site.flags == flags_of(student.get_submodule(site.path))


def run_section(teacher: StreamingTeacher, section: Section, *args: Any, **kwargs: Any) -> Any:
    """One of the teacher's graphs, called as its module is."""
    flat = section.flatten(args, kwargs)
    return section(teacher._net, teacher._folding.for_call(), flat, args, kwargs)


def _record(
    root: nn.Module, graph: fx.Graph, flat: Any, seed: int, student: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """Every tensor of a run, by the name of the student's node. ``student``: the tensors that its
    graph names, if it is the one that runs."""
    seen: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def fetch_attr(self, target: str) -> Any:
            return super().fetch_attr(target) if student is None else student[target]

        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            name = n.meta.get("student") if student is None else n.name
            if name and isinstance(result, Tensor):
                seen[name] = result.detach().clone()
            return result

    torch.manual_seed(seed)
    Recorder(root, graph=graph).run(*flat)
    return seen


# --------------------------------------------------------------------------- calls of parts
def calls_of(student: nn.Module, paths: list[str], inputs: Inputs) -> Calls:
    """How modules are called when the student runs."""
    calls: Calls = {}
    with keep_rng(), contextlib.suppress(Exception), recording(student, calls, paths):
        args, kwargs = tree.fresh(inputs)
        student(*args, **kwargs)
    return calls


def call_of(section: Section, calls: list[CallSite]) -> Any:
    """The tensors of the first call that a section takes."""
    for site in calls:
        with contextlib.suppress(InputError):
            args, kwargs = site.call.unflatten(list(site.tensors))
            return section.flatten(args, kwargs)
    return None
