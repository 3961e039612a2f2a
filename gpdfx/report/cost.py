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
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from ..calls import tree
from ..passes.folded import Make
from ..teacher.folding import Lazy
from ..teacher.module import Teacher

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
    with _undisturbed(teacher), _undisturbed(student), torch.no_grad():
        folded = Lazy(
            {n: partial(_uncounted, make) for n, make in teacher._fold_lazily().made.items()}
        )
        macs = (
            _macs(lambda: student(*args, **kwargs), example),
            _macs(lambda: teacher._run_teacher(folded, args, kwargs), example),
        )
        fold = _count(lambda: deque(teacher._fold_lazily(student=False).values(), maxlen=0))
    with _undisturbed(teacher, freeze=False), _undisturbed(student, freeze=False):
        try:
            both = partial(_both, teacher)
            kept = _per_sample(student, example), _per_sample(both, example)
        except Exception:  # a batch of one may not do, eval mode overwrite what a gradient needs
            return Cost(macs, fold, None)
    return Cost(macs, fold, kept if min(kept) > 0 else None)


def _uncounted(make: Make) -> Tensor:
    with _disable_current_modes():
        return make()


def _both(teacher: Teacher, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """``Teacher.both`` up to gradients of branches, with one folded weight at a time."""
    given = torch.zeros((), requires_grad=True)
    folded = Lazy(
        {
            name: partial(_Made.apply, given, make)
            for name, make in teacher._fold_lazily().made.items()
        }
    )
    return teacher._run_teacher(folded, args, kwargs), teacher._run_student(folded, args, kwargs)


class _Made(torch.autograd.Function):
    """A tensor that takes a gradient and that no graph holds, as it would hold a leaf."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, make: Make) -> Tensor:
        return make()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def _per_sample(call: Callable[..., Any], example: Example) -> int:
    """The growth of what is kept from one sample to all of the example's."""
    batch = max(_batch(example), 2)
    one: Example = tree.map_leaves(
        lambda x: x[:1] if isinstance(x, Tensor) and x.ndim and len(x) == batch else x, example
    )
    kept = [_kept(lambda x=x: call(*x[0], **x[1])) for x in (one, example)]  # type: ignore[misc]
    return (kept[1] - kept[0]) // (batch - 1)


def _batch(example: Example) -> int:
    args, kwargs = example
    sizes = (x.shape[0] for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim)
    return next(sizes, 1)


def _macs(call: Callable[[], Any], example: Example) -> int:
    """Of one sample."""
    return _count(call) // max(_batch(example), 1)


def _count(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops()) // 2


def _kept(call: Callable[[], Any]) -> int:
    """Bytes saved for the backward, every storage once; nothing is really saved."""
    seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(x: Tensor) -> None:
        storage = x.untyped_storage()
        # the weak reference keeps the address from being used again
        seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    with torch.enable_grad(), saved_tensors_hooks(pack, _never):
        call()
    return sum(size for _, size in seen.values())


def _never(_: None) -> Tensor:
    raise AssertionError("there is no backward")


@contextmanager
def _undisturbed(module: nn.Module, *, freeze: bool = True) -> Iterator[None]:
    """In eval mode, its buffers put back after. ``freeze``: the counter cannot hook a parameter
    that is passed on."""
    training = module.training
    trained = [p for p in module.parameters() if p.requires_grad]
    buffers = [(b, b.clone()) for b in module.buffers()]  # forward may write to them
    module.eval()
    if freeze:
        module.requires_grad_(False)
    try:
        yield
    finally:
        module.train(training)
        for p in trained:
            p.requires_grad_()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
