"""What a step costs, told before the first one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..calls import tree
from ..calls.given import apart
from ..errors import InputError
from ..passes.capture.modes import EVAL, enter
from ..passes.capture.submodules import slow_attention
from ..passes.folded import Folded, Make
from ..passes.program import duplicate
from ..teacher.folding import Lazy
from ..teacher.module import Teacher
from ..torch_private import (
    FakeMode,
    StorageReference,
    flop_counter,
    storage_key,
    storage_reference,
    without_modes,
)

Module = TypeVar("Module", bound=nn.Module)
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


def cost(teacher: Teacher, student: nn.Module, example: Example, *, borrow: bool = True) -> Cost:
    """Run student and teacher on the example, in eval mode, and count: without data, as far as
    their code does not ask for values. ``borrow``: it writes to no parameter."""
    fake, real = (
        cache(partial(Subject, teacher, student, example, fake, borrow)) for fake in (True, False)
    )

    def tell(measure: Callable[[Subject], Any], *final: type[Exception]) -> Any:
        try:
            return measure(fake())
        except final:
            raise
        except Exception:  # whatever a network raises that has to know a value, or a tensor's type
            return measure(real())

    macs = tell(Subject.student_macs), tell(Subject.teacher_macs)
    try:
        kept = tell(Subject.kept, InputError)
    except Exception:  # a batch of one may not do, eval mode overwrite what a gradient needs
        kept = None
    return Cost(macs, tell(Subject.fold_macs), kept)


class Subject:
    """Copies of teacher and student, in eval mode, to run and to forget: on parameters of the same
    sizes without data (``fake``), on the same ones (``borrow``), or on copies. What Python keeps of
    a run ends with them.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: nn.Module,
        example: Example,
        fake: bool,
        borrow: bool = True,
    ) -> None:
        self.mode = FakeMode() if fake else None
        self.borrow = fake or borrow
        # a call is known by the objects in it that are no tensors
        self.constants = {id(x): x for x in tree.leaves(example) if not isinstance(x, Tensor)}
        self.teacher, self.student = self._copy(teacher), self._copy(student)
        slow_attention(self.student)
        self.example: Example = tree.map_leaves(self._stand_in, example)
        self.batch = max(_batch(example), 1)

    def _copy(self, module: Module) -> Module:
        shared = chain(
            module.parameters() if self.borrow else (), module.buffers() if self.mode else ()
        )
        memo = {id(x): self._stand_in(x) for x in shared}
        return enter(duplicate(module, self.constants | memo), EVAL, {})

    def _stand_in(self, x: Any) -> Any:
        return self.mode.from_tensor(x) if self.mode and isinstance(x, Tensor) else x

    # ---- measures
    def student_macs(self) -> int:
        args, kwargs = apart(self.example)
        return self._count(lambda: self.student(*args, **kwargs))[1] // self.batch

    def teacher_macs(self) -> int:
        folded = Lazy({name: partial(_unobserved, make) for name, make in self.made.items()})
        call = partial(self.teacher._run_teacher, folded, *apart(self.example))
        return self._count(call)[1] // self.batch

    def fold_macs(self) -> int:
        return self.fold[1]

    def kept(self) -> tuple[int, int] | None:
        """Of the student, and of both."""
        with self.mode or nullcontext():
            kept = _per_sample(self.student, self.example), _per_sample(self._both, self.example)
        return kept if min(kept) > 0 else None

    # ---- their parts
    @cached_property
    def fold(self) -> tuple[Folded, int]:
        return self._count(self.teacher._fold)

    @property
    def made(self) -> Mapping[str, Make]:
        """Folded weights without gradients: one at a time, but for those that take no memory."""
        if self.mode is None:
            return self.teacher._fold_lazily().made
        return {name: partial(self.fold[0].__getitem__, name) for name in self.fold[0]}

    def _both(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """``Teacher.both`` up to gradients of branches, with one folded weight at a time: each
        takes a gradient and is held by no graph, as a leaf would be."""
        zero = torch.zeros((), requires_grad=True)

        def plus_zero(make: Make) -> Tensor:
            return make() + zero

        folded = Lazy({name: partial(plus_zero, make) for name, make in self.made.items()})
        run, call = (self.teacher._run_teacher, self.teacher._run_student), (args, kwargs)
        return run[0](folded, *apart(call)), run[1](folded, *apart(call))

    def _count(self, call: Callable[[], Any]) -> tuple[Any, int]:
        """A result, and the multiply-adds that it takes by PyTorch's formulas, which do not know
        the fused inference path of attention."""
        counter = flop_counter()
        with torch.enable_grad(), self.mode or nullcontext(), counter:
            result = call()
        return result, int(counter.get_total_flops()) // 2


def _unobserved(make: Make) -> Tensor:
    """Made where the counter does not see it."""
    with without_modes():
        return make()


def _batch(example: Example) -> int:
    args, kwargs = example
    sizes = (x.shape[0] for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim)
    return next(sizes, 1)


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
    args, kwargs = apart(example)
    seen: dict[int, tuple[StorageReference, int]] = {}

    def pack(x: Tensor) -> None:
        # the weak reference keeps the address from being used again
        seen[storage_key(x)] = storage_reference(x), x.untyped_storage().nbytes()

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda x: x):  # no backward comes
        call(*args, **kwargs)
    return sum(size for _, size in seen.values())
