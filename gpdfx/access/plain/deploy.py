"""The wide network without the package: a plain ``torch.fx.GraphModule``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...calls import sparse, tree
from ...errors import GpdfxError, InputError, check_choice
from ...passes.capture.modes import EVAL, TRAIN
from ...passes.program import has_effect
from ...teacher.captured import Section
from ...teacher.module import Teacher
from ...torch_private import tree_leaves
from ..find import find_teacher
from .calls import write_inputs, write_output, write_sizes
from .retrace import Retrace, Seen
from .tensors import Written, assembled, meanings, names_of


def plain_teacher(teacher: nn.Module, *, mode: str = EVAL) -> fx.GraphModule:
    """The dynamic teacher as a plain ``torch.fx.GraphModule``, which runs, pickles and exports
    without gpdfx, with the call signature of the teacher and the structure of its outputs.

    Branches are merged into their weights, and a weight that is contracted over copies is
    multiplied by its shares; batch norms stay. The ``state_dict`` has the student's keys, wide.
    In eval mode, ops that are the student's layers (linear, convolutions, norms, embeddings) are
    these layers, as modules of ``torch.nn``. Sizes that are free in the teacher stay free; for
    others, and for arguments that are no tensors and differ from the example's, an assertion in
    the graph fails.

    Tied weights stay tied where all layers that read them weigh the copies alike. Where they do
    not (an embedding that is the head, too), each layer gets its own and a warning says so; if
    the student has no name for each, the shares stay in the graph.

    ``teacher``: one, or what holds one (see ``gpdfx.collapse``).
    ``mode``: ``"eval"`` gives what ``teacher.eval()`` computes. ``"train"`` gives what it computes
    in train mode (batch statistics, dropout), to go on training the wide network alone. Either is
    one graph: ``train()`` and ``eval()`` of the result do not turn one into the other. Autocast
    that the network switches off in a part of its forward is not switched off here.

    The result shares no memory with the teacher, which is unchanged.

    Raises:
        InputError: the network was captured in parts, writes to dicts or lists that it is given,
            turns autocast on by itself, or calls an op of higher order (``torch.cond``); in train
            mode also branches with a batch norm of their
            own, and functions with a backward of their own. Says what to do.
        GpdfxError: no graph can be written, or it computes something else on the example.
    """
    own = find_teacher("plain_teacher", teacher)
    check_choice("mode", mode, (EVAL, TRAIN))
    with own._settled():
        return _plain(own, mode)


def _plain(teacher: Teacher, mode: str) -> fx.GraphModule:
    section = _section(teacher, mode)
    args, kwargs = _example(teacher)
    flat = section.flatten(args, kwargs)
    with _undisturbed(flat):
        written = _written(teacher, section, flat, mode == TRAIN)
    plain = assembled(teacher, written, mode == TRAIN)
    with _undisturbed(flat):
        args, kwargs = section.call.unflatten(flat)
        _check(plain(*args, **kwargs), written.outputs)
        for name, buffer in plain.named_buffers():  # the call may have moved statistics
            if name in teacher._facts.maps:
                buffer.copy_(teacher._tensor(name))
    return plain


def _section(teacher: Teacher, mode: str) -> Section:
    if "" not in teacher._parts:
        some = ", ".join(sorted(teacher._parts)[:3])
        raise InputError(
            f"the teacher was captured in parts ({some}), and the student's Python runs between "
            "them, which no graph does",
            remedy="teacher.report() says what does not export: mend that and expand again; or "
            "expand one of the parts alone",
        )
    section = next(s for s in teacher._parts[""].sections if s.site.state == mode)
    if section.writes:
        raise InputError(
            "the network puts results into a dict or list that it is called with",
            remedy="let forward return them in one of its own, and expand it again",
        )
    return section


def _example(teacher: Teacher) -> Any:
    """The example call, in the type and on the device that the teacher has by now."""
    first = next((p for p in teacher.parameters() if p.is_floating_point()), None)

    def moved(x: Any) -> Any:
        if first is None or not isinstance(x, Tensor):
            return x
        return x.detach().to(first.device, first.dtype if x.is_floating_point() else x.dtype)

    return tree.map_leaves(moved, teacher._facts.example)


@contextlib.contextmanager
def _undisturbed(flat: list[Any]) -> Iterator[None]:
    """The same random numbers each time, generators as before; no gradients, no autocast."""
    kinds = {"cpu", *(x.device.type for x in flat)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        cuda = [x.device for x in flat if x.device.type == "cuda"]
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        for kind in filter(torch.amp.is_autocast_available, sorted(kinds)):
            stack.enter_context(torch.autocast(kind, enabled=False))
        torch.manual_seed(0)
        yield


def _written(teacher: Teacher, section: Section, flat: list[Tensor], training: bool) -> Written:
    """The graph; once more if it reads variants of a tensor that no names are for."""
    folded, apart = teacher._fold(student=False), frozenset[str]()
    while True:
        torch.manual_seed(0)
        tracer = Retrace(teacher._net, folded, teacher._facts.maps, apart, training)
        try:
            outputs = _run(tracer, section, flat)
        except (GpdfxError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # what no proxy can stand for
            raise GpdfxError(
                f"no plain graph can be written: {type(error).__name__}: {error}",
                remedy="deploy the teacher itself, or the student (gpdfx.collapse)",
            ) from error
        tracer.detach()
        tracer.graph.eliminate_dead_code(is_impure_node=has_effect)
        meant = meanings(tracer.graph, names_of(teacher), teacher._student)
        mixed = frozenset(name for name, own in meant.items() if not own)
        if not mixed:
            return Written(tracer.graph, tracer.weights, tracer.constants, outputs)
        apart |= mixed


def _run(tracer: Retrace, section: Section, flat: list[Tensor]) -> Any:
    """Write the graph; its outputs for the example."""
    if any(map(sparse.is_sparse, tree_leaves(section.call.unflatten(flat)))):
        raise InputError("an input is sparse", remedy="deploy the teacher itself")
    inputs = write_inputs(tracer, section.call, flat)
    write_sizes(tracer, section.sizes, inputs, section.call.names)
    code = tracer.function(section.code)
    results = code(tracer.net, *inputs, *([None] if section.reads_folded else ()))
    results = results[: sum(section.out.slots)]
    marks = [torch.empty(0) for _ in results]
    places = {id(mark): tracer.create_arg(x) for mark, x in zip(marks, results, strict=True)}
    tracer.graph.output(write_output(tracer.graph, section.out.fill(marks)[0], places))
    return section.out.fill(x.value if isinstance(x, Seen) else x for x in results)[0]


def _check(given: Any, expected: Any) -> None:
    """A wrong graph shows on the example; rounding does not (it may turn a choice of experts)."""
    pairs = zip(tree.leaves(given), tree.leaves(expected), strict=True)
    for x, own in pairs:
        if isinstance(own, Tensor) and own.is_floating_point() and own.numel():
            gap, scale = (
                float(y.nan_to_num(0, 0, 0).square().mean().sqrt()) for y in (x - own, own)
            )
            if not gap <= torch.finfo(own.dtype).eps ** 0.25 * scale:
                raise GpdfxError(
                    f"the plain graph computes something else: {gap:.1e} apart, of {scale:.1e}",
                    remedy="this is a bug in gpdfx: please report it with the network",
                )
