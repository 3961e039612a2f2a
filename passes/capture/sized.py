"""Buffers that an op gives their size in the first call: the range of every channel, of a network
that is prepared for quantization and was never called. They get it before capture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...calls import tree
from ...errors import InputError
from ..program import duplicate

_OBSERVE = torch.fused_moving_avg_obs_fake_quant


def sized(student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """Give a student's empty buffers the size and the values with which the op that writes them
    begins, in place; it stays what it was, never called. Raises ``InputError`` where Python sizes
    them, and begins in another way."""
    if all(buffer.numel() for buffer in student.buffers()):
        return student
    run, sizes = duplicate(student).train(), _Sizes()
    before = dict(run.named_buffers())
    own_args, own_kwargs = tree.fresh((args, kwargs))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), sizes:
        run(*own_args, **own_kwargs)
    for name, own in student.named_buffers():
        new = before[name]
        if new.shape != own.shape and id(new) in sizes.begun:
            start = own.clone().expand_as(new) if own.numel() else new
            own.resize_as_(new).copy_(start)
        elif new.shape != own.shape and not own.numel():
            path, _, leaf = name.rpartition(".")
            raise InputError(
                f"the buffer {leaf} gets its size in the first call",
                module_path=f"{path or '(root)'} ({type(student.get_submodule(path)).__name__})",
                remedy="call the model once, in train mode and on real data, then expand it",
            )
    return student


class _Sizes(TorchFunctionMode):
    """Ops that observe a range are called without looking; ``begun``: what they write to, by id."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = dict[int, Tensor]()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _OBSERVE and not kwargs:
            x, observe, quantize, *state = args
            self.begun |= {id(t): t for t in state[:4]}
            return func(x, torch.zeros_like(observe), torch.zeros_like(quantize), *state)
        return func(*args, **(kwargs or {}))
