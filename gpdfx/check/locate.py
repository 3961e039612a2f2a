"""The place at which student and teacher part."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..algebra.gather import gather
from ..calls.sizes import input_sizes
from ..errors import InputError
from ..passes.capture.submodules import Calls, recording
from ..passes.folded import reads
from ..passes.infer import Inference
from ..passes.program import CallSite, Program, module_path, source
from ..passes.widen import Widened
from ..teacher.captured import Section
from ..teacher.module import attach
from .observe import difference, keep_rng
from .streaming import StreamingTeacher

NOTICED = 1e-9  # where student and teacher part


def first_difference(
    widened: Widened,
    student: nn.Module,
    teacher: StreamingTeacher,
    inputs: Any,
    mode: str,
    seed: int,
) -> dict[str, Any]:
    """Node, module path and source line at which student and teacher part; empty if unknown."""
    inference = widened.inference
    calls = calls_of(student.train(mode == "train"), widened.parts, inputs)
    for key, captured in widened.modes.items():
        site = captured.site
        if site.mode != mode:
            continue
        try:
            section = Section(captured, captured.graph, input_sizes(captured.graph))
            flat = call_of(section, calls.get(site.path, []))
            mine = _record(_root(widened, student), captured.graph, flat, seed, "")
            teacher.load_student(student)
            graph = teacher.graphs[key]
            fed = [*flat, teacher._fold()] if reads(graph) else flat
            theirs = _record(teacher._net, graph, fed, seed, "student")
        except Exception as error:  # the message about the mismatch matters more than its place
            return {"source": f"(the first differing node is unknown: {type(error).__name__})"}
        for node in captured.graph.nodes:
            if (
                node.name in mine
                and node.name in theirs
                and _differ(widened, inference, node, mine, theirs)
            ):
                return {"node": node.name, "module_path": module_path(node), "source": source(node)}
    return {}


def _differ(
    widened: Widened,
    inference: Inference,
    node: fx.Node,
    mine: dict[str, Any],
    theirs: dict[str, Any],
) -> bool:
    x, y = mine[node.name], theirs[node.name]
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    maps = tuple(widened.frozen(a) for a in inference.axes[node])
    wide = gather(x, maps)
    return wide.shape != y.shape or difference(wide, y) > NOTICED


def _root(program: Program, student: nn.Module) -> nn.Module:
    root = nn.Module()
    own = dict(student.named_parameters()) | dict(student.named_buffers())
    for name, tensor in program.tensors.items():
        attach(root, name, own.get(name, tensor), persistent=False)
    root._modules.update(program.children)
    return root


def _record(root: nn.Module, graph: fx.Graph, flat: Any, seed: int, key: str) -> dict[str, Any]:
    """Every value of a run, by the name of the student's node."""
    found: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            name = n.meta.get(key) if key else n.name
            if name and isinstance(result, Tensor):
                found[name] = result.detach().clone()
            return result

    torch.manual_seed(seed)
    Recorder(root, graph=graph).run(*flat)
    return found


# --------------------------------------------------------------------------- calls of parts
def calls_of(student: nn.Module, paths: list[str], inputs: tuple[Any, Any]) -> Calls:
    """How modules are called when the student runs."""
    calls: Calls = {}
    with keep_rng(), contextlib.suppress(Exception), recording(student, calls, paths):
        student(*inputs[0], **inputs[1])
    return calls


def call_of(section: Section, calls: list[CallSite]) -> Any:
    """The tensors of the first call that a section takes."""
    for site in calls:
        try:
            args, kwargs = site.call.unflatten(list(site.tensors))
            return section.flatten(args, kwargs)
        except InputError:
            continue
    return None
