"""What people do with a teacher besides calling it, tried on one: ``yes``, or what came instead."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gpdfx
from gpdfx.calls import tree
from gpdfx.calls.examples import seed_all
from gpdfx.passes.program import duplicate

USES = ("other_batch", "deepcopy", "save_load", "joint_step")
NO_BATCH, NOT_THE_NETWORK, NOTHING = UNTRIED = ("no batch", "not the network", "nothing to train")
"""Inputs without a batch; the network itself cannot have another one; it has no gradient."""
NEAR = 1e-3
"""Of the largest value: float32 in another order. What is exact is ``expand``'s own check. Where
float32 makes another choice (the order of boxes that score alike), float64 decides."""


def uses(model: nn.Module, teacher: gpdfx.Teacher, call: Any) -> dict[str, str]:
    """Of a teacher just made by ``expand(model)`` with this example call. The last use
    trains it."""

    def like(module: nn.Module, expected: list[Any]) -> str:
        return _compare(_outputs(module.eval(), call), expected)

    teacher.eval()
    expected = _outputs(teacher, call)

    def other_batch() -> str:
        changed = another_batch(call)
        if changed is None:
            return NO_BATCH
        own = duplicate(model).eval()
        _outputs(own, call)  # as the teacher was: the first call may settle something
        try:
            wanted = _outputs(own, changed)
        except Exception:  # whatever it raises at that size
            return NOT_THE_NETWORK

        def exact() -> Iterator[list[Any]]:
            pair = copy.deepcopy(teacher).double(), own.double()
            return (_outputs(x, _doubled(changed)) for x in pair)

        return _compare(_outputs(teacher, changed), wanted, exact)

    def save_load() -> str:
        with tempfile.TemporaryDirectory() as folder:
            gpdfx.save(teacher, Path(folder) / "teacher.safetensors")
            student = duplicate(model)
            return like(gpdfx.load(Path(folder) / "teacher.safetensors", student), expected)

    def joint_step() -> str:
        answer = _tried(lambda: _step(teacher, teacher.student, call))
        if answer == "yes":

            def exact() -> Iterator[list[Any]]:
                student = teacher.double().student
                pair = gpdfx.collapse(teacher).eval(), student
                return (_outputs(x, _doubled(call)) for x in pair)

            wanted = _outputs(teacher.eval().student, call)
            return _compare(_outputs(gpdfx.collapse(teacher).eval(), call), wanted, exact)
        twin = duplicate(model)
        own = _tried(lambda: _step(twin, twin, call))
        return answer if own == "yes" or answer == NOTHING else NOT_THE_NETWORK

    tries = (other_batch, lambda: like(copy.deepcopy(teacher), expected), save_load, joint_step)
    return dict(zip(USES, map(_tried, tries), strict=True))


def _step(module: nn.Module, student: Callable[..., Any], call: Any) -> str:
    """One optimizer's step of a module by the outputs of two calls, its own and the student's."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    module.train()
    seed_all(0)
    outputs = []
    for function in (module, student):
        args, kwargs = tree.copied(call)
        outputs += tree.leaves(function(*args, **kwargs))
    losses = [y.abs().square().mean() for y in outputs if _trains(y)]
    if not losses:
        return NOTHING
    torch.stack(losses).sum().backward()
    if not all(p.grad is None or bool(p.grad.isfinite().all()) for p in trained):
        return "a gradient is not finite"
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    return "yes"


def another_batch(call: Any) -> Any:
    """The call with one sample more: of every tensor whose first size is that of the first
    tensor."""
    sizes = [x.shape[0] for x in tree.leaves(call) if isinstance(x, Tensor) and x.ndim]
    if not sizes:
        return None

    def longer(x: Any) -> Any:
        grows = isinstance(x, Tensor) and x.ndim and x.shape[0] == sizes[0]
        return torch.cat([x, x[-1:]]) if grows else x

    return tree.map_leaves(longer, call)


def _doubled(call: Any) -> Any:
    """The call with its float32 in float64."""
    return tree.map_leaves(
        lambda x: x.double() if isinstance(x, Tensor) and x.dtype is torch.float32 else x, call
    )


def _trains(y: Any) -> bool:
    return isinstance(y, Tensor) and y.requires_grad


@torch.no_grad()
def _outputs(function: Callable[..., Any], call: Any) -> list[Any]:
    """From one random state, of inputs of its own."""
    args, kwargs = tree.copied(call)
    seed_all(0)
    return tree.leaves(function(*args, **kwargs))


def _compare(
    found: list[Any],
    expected: list[Any],
    exact: Callable[[], Iterator[list[Any]]] | None = None,
) -> str:
    """``exact``: makes both in float64."""
    if len(found) != len(expected):
        return f"{len(found)} results, {len(expected)} expected"
    for y, z in zip(found, expected, strict=True):
        if not isinstance(z, Tensor):
            continue
        if y.shape != z.shape or y.dtype != z.dtype:
            return f"{y.dtype} {list(y.shape)}, {z.dtype} {list(z.shape)} expected"
        if not torch.allclose(y, z, rtol=0, atol=NEAR * _largest(z), equal_nan=True):
            if exact:
                return _compare(*exact())
            return f"differs by {_largest(y.double() - z.double()):.1e} of {_largest(z):.1e}"
    return "yes"


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()] if x.dtype.is_floating_point or x.is_complex() else x
    return float(finite.abs().max()) if finite.numel() else 0.0


def _tried(use: Callable[[], str]) -> str:
    try:
        return use()
    except Exception as error:  # whatever it is, it is what the row tells
        kind = "" if isinstance(error, gpdfx.GpdfxError) else f"{type(error).__name__}: "
        return kind + next(iter(str(error).splitlines()), "")
