"""The processes that train together: this one's device, and what all of them tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Ranks:
    """The device of this process, and its rank among ``world`` processes."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def all(self, flag: Tensor) -> bool:
        """Whether it is true on every rank."""
        return not self.sum(flag.logical_not().int())

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks the first one's values."""
        if self.world > 1:
            for x in tensors:
                dist.broadcast(x, 0)

    def wait(self) -> None:
        """Go on when all ranks are here."""
        self.all(torch.ones((), device=self.device))

    def device_name(self) -> str:
        """What the summary calls it."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name()
        return f"{torch.get_num_threads()} CPU threads"


@contextmanager
def join(device: str = "auto") -> Iterator[Ranks]:
    """This process's ranks; under ``torchrun`` it joins the others (gloo on CPUs, nccl on GPUs)."""
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise InputError("there is no GPU that torch can use", remedy="pass device='cpu'")
    chosen = torch.device("cpu")
    if cuda:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    joins = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        together = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ()
        yield Ranks(chosen, *together)
    finally:
        if joins:
            dist.destroy_process_group()
