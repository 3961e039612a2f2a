"""Features: what some of the student's modules return comes out of the teacher's graphs too."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ..errors import InputError, suggest
from .program import copied, is_tensor
from .widen import Widened


def add_features(program: Widened) -> Widened:
    """Append the results of the modules that ``features`` names to the outputs of every graph.

    They have the teacher's width; of a module that runs twice it is the last one. Raises
    ``InputError`` for modules that a graph does not have, and for networks that were captured in
    parts.
    """
    paths = program.options.features
    if not paths:
        return program
    known = [name for name, _ in program.student.named_modules() if name]
    if program.parts != [""]:
        raise InputError(
            "features cannot be taken out of a network that was captured in parts",
            remedy="distill its logits",
        )
    graphs = {}
    for key, mode in program.modes.items():
        graph = graphs[key] = copied(program.graphs[key])
        made = {n.meta["student"]: n for n in graph.nodes if "student" in n.meta}
        found = []
        for path in paths:
            source = _result(mode.nodes, path)
            if source is None or source.name not in made:
                near = suggest(path, known)
                raise InputError(f"no module {path!r} returns a tensor that is used", remedy=near)
            found.append(made[source.name])
        output = graph.output_node()
        output.args = ((*output.args[0], *found),)  # type: ignore[misc]
    return replace(program, graphs=graphs)


def _result(nodes: list[fx.Node], path: str) -> fx.Node | None:
    """The last node of a module whose value leaves it."""
    inside = dict.fromkeys(node for node in nodes if _within(node, path))
    leaving = [n for n in inside if is_tensor(n) and any(u not in inside for u in n.users)]
    return leaving[-1] if leaving else None


def _within(node: fx.Node, path: str) -> bool:
    stack = node.meta.get("nn_module_stack") or {}
    return any(where.split("@")[0] == path for where, _ in stack.values())
