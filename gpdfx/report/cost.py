"""What a step costs, told before the first one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..calls import tree
from ..passes.folded import Make
from ..teacher.folding import Lazy
from ..teacher.module import Teacher
from ..torch_private import StorageReference, storage_key, storage_reference, without_modes

Example = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Cost:
    """``macs``: multiply-adds of one sample in the forward of student and teacher, counted by
    PyTorch; ``fold``: those of the branches, once a step whatever the batch. ``kept``: bytes that
    the forward of a student and of a step (both) keeps of one sample for the backward; ``None``
    where that cannot be told (a fixed batch, a network without gradients).
    """

    macs: tuple[int, int]
    fold: int
    kept: tuple[int, int] | None

    def __str__(self) -> str:
        student, teacher = self.macs
        text = f"multiply-adds x {(student + teacher) / max(student, 1):.2f}"
        text += f" (and {self.fold:,} for the branches)" if self.fold else ""
        if self.kept is not None and self.kept[0]:
            text += f", activations x {self.kept[1] / self.kept[0]:.2f}"
        return text + " of the plain student's"


def cost(teacher: Teacher, student: nn.Module, example: Example) -> Cost:
    """Run student and teacher on the example, in eval mode, and count."""
    args, kwargs = example
    batch = max(_batch(example), 1)
    with _undisturbed(teacher), _undisturbed(student), torch.no_grad():
        folded = Lazy(
            {n: partial(_unobserved, make) for n, make in teacher._fold_lazily().made.items()}
        )
        own = _count(lambda: student(*args, **kwargs))
        wide = _count(lambda: teacher._run_teacher(folded, args, kwargs))
        fold = _count(lambda: deque(teacher._fold_lazily(student=False).values(), maxlen=0))
    macs = own // batch, wide // batch
    with _undisturbed(teacher, freeze=False), _undisturbed(student, freeze=False):
        try:
            kept = _per_sample(student, example), _per_sample(partial(_both, teacher), example)
        except Exception:  # a batch of one may not do, eval mode overwrite what a gradient needs
            return Cost(macs, fold, None)
    return Cost(macs, fold, kept if min(kept) > 0 else None)


def _unobserved(make: Make) -> Tensor:
    """Made where the counter does not see it."""
    with without_modes():
        return make()


def _both(teacher: Teacher, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """``Teacher.both`` up to gradients of branches, with one folded weight at a time: each takes a
    gradient and is held by no graph, as a leaf would be."""
    zero = torch.zeros((), requires_grad=True)

    def plus_zero(make: Make) -> Tensor:
        return make() + zero

    folded = Lazy(
        {name: partial(plus_zero, make) for name, make in teacher._fold_lazily().made.items()}
    )
    return teacher._run_teacher(folded, args, kwargs), teacher._run_student(folded, args, kwargs)


def _batch(example: Example) -> int:
    args, kwargs = example
    sizes = (x.shape[0] for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim)
    return next(sizes, 1)


def _count(call: Callable[[], Any]) -> int:
    """Multiply-adds, by PyTorch's formulas."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton: not at the start

    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops()) // 2


def _per_sample(call: Callable[..., Any], example: Example) -> int:
    """The growth of what is kept from one sample to all of the example's."""
    batch = max(_batch(example), 2)
    one: Example = tree.map_leaves(
        lambda x: x[:1] if isinstance(x, Tensor) and x.ndim and len(x) == batch else x, example
    )
    least, kept = _kept(call, one), _kept(call, example)
    return (kept - least) // (batch - 1)


def _kept(call: Callable[..., Any], example: Example) -> int:
    """Bytes saved for the backward, every storage once; nothing is really saved."""
    args, kwargs = example
    seen: dict[int, tuple[StorageReference, int]] = {}

    def pack(x: Tensor) -> None:
        # the weak reference keeps the address from being used again
        seen[storage_key(x)] = storage_reference(x), x.untyped_storage().nbytes()

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda x: x):  # no backward comes
        call(*args, **kwargs)
    return sum(size for _, size in seen.values())


@contextmanager
def _undisturbed(module: nn.Module, *, freeze: bool = True) -> Iterator[None]:
    """In eval mode, its buffers put back after. ``freeze``: the counter cannot hook a parameter
    that is passed on."""
    training, buffers = module.training, list(module.buffers())
    before = [buffer.clone() for buffer in buffers]  # forward may write to them
    trained = [p for p in module.parameters() if p.requires_grad and freeze]
    module.eval()
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        module.train(training)
        for p in trained:
            p.requires_grad_()
        with torch.no_grad():
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)
