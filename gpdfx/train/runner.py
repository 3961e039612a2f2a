"""How forward and backward of a training step run: as they are, compiled, or as a CUDA graph.

    runner = make_runner(net, config, place, scaler)
    result = runner(x, y)    # a Distilled
    runner.backward(result)  # gradients of scaler.scale(result.loss), in .grad

Compiled code and graphs hold for batches like the first one. Any other, such as an epoch's short
last one, runs eagerly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distill.gpd import Distilled
from ..errors import InputError

if TYPE_CHECKING:
    from .config import TrainConfig
    from .step import Net, Place

COMPILE = ("none", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
OWN_GRAPHS = ("reduce-overhead", "max-autotune")  # on GPUs they make CUDA graphs themselves
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP = 3  # eager steps before a capture: cuDNN and cuBLAS choose and allocate in them


def check_way(config: TrainConfig, place: Place) -> None:
    """Raise ``InputError`` for a way to run that this place does not have."""
    if not config.cuda_graph:
        return
    for wrong, message, remedy in (
        (
            place.device.type != "cuda",
            f"cuda_graph needs a GPU, and this run is on {place.device.type}",
            "leave out --cuda-graph; --compile works on CPUs too",
        ),
        (
            place.world > 1,
            f"cuda_graph is for one process, and these are {place.world}",
            "leave out --cuda-graph, or train in one process",
        ),
    ):
        if wrong:
            raise InputError(message, remedy=remedy)


def make_runner(
    net: Net, config: TrainConfig, place: Place, scaler: torch.amp.GradScaler
) -> Runner:
    """The way that ``config.compile`` and ``config.cuda_graph`` ask for."""
    check_way(config, place)
    way = Captured if config.cuda_graph else Runner
    return way(net, config, place, scaler)


class Runner:
    """Forward under autocast, on all ranks; compiled if ``config.compile`` says so."""

    def __init__(
        self, net: Net, config: TrainConfig, place: Place, scaler: torch.amp.GradScaler
    ) -> None:
        self.net, self.scaler, self.device = net, scaler, place.device
        self.cast = AUTOCAST.get(config.amp)
        self.mode = config.compile
        self.eager: Any = net
        if place.world > 1:
            ids = [place.device.index] if place.device.type == "cuda" else None
            self.eager = DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False)
        self.fast: Any = None if self.mode == "none" else compiled(self.eager, self.mode)
        self.first: Any = None  # what batches the fast way is for

    def fits(self, x: Tensor, y: Tensor) -> bool:
        """Whether a batch is like the first one."""
        like = (x.shape, x.dtype, y.shape, y.dtype)
        self.first = self.first or like
        return bool(self.first == like)

    def __call__(self, x: Tensor, y: Tensor) -> Distilled:
        fast = self.fast is not None and self.fits(x, y)
        if fast and self.device.type == "cuda" and self.mode in OWN_GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, self.cast, enabled=self.cast is not None), failing():
            result: Distilled = (self.fast if fast else self.eager)(x, y)
            return result

    def backward(self, result: Distilled) -> None:
        """Gradients, scaled where ``amp`` asks for it."""
        with failing():
            self.scaler.scale(result.loss).backward()


def compiled(net: nn.Module, mode: str) -> Any:
    """``net`` by ``torch.compile``, for batches of one shape."""
    return torch.compile(net, mode=None if mode == "default" else mode, dynamic=False)


@contextmanager
def failing() -> Iterator[None]:
    """A compiler's error, with what to do."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        said = " ".join(str(error).strip().splitlines()[:2])
        raise InputError(
            f"torch.compile failed: {said}", remedy="train without --compile"
        ) from error


class Captured(Runner):
    """Forward and backward as one CUDA graph, replayed on buffers that stay where they are.

    The optimizer is not in it: whether a step counts is decided between backward and optimizer.
    Parameters must stay where they are; so do the gradients, which every replay overwrites.
    """

    graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Distilled:
        self.replayed = self.fits(x, y)
        if not self.replayed:
            return super().__call__(x, y)
        if self.graph is None or self.counts != self.net.gap_counts:
            self._capture(x, y)
        assert self.graph is not None
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        for p, grad in self.grads:
            p.grad = grad
        return self.result

    def backward(self, result: Distilled) -> None:
        """Nothing to do for a batch that was replayed."""
        if not self.replayed:
            super().backward(result)

    def _capture(self, x: Tensor, y: Tensor) -> None:
        self.graph = None  # frees the old one's memory
        self.counts, self.grads = self.net.gap_counts, []
        self.x, self.y = x.clone(), y.clone()
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side), buffers_kept(self.net), torch.random.fork_rng([self.device]):
            for _ in range(WARM_UP):
                self.net.zero_grad()
                super().backward(super().__call__(self.x, self.y))
        torch.cuda.current_stream(self.device).wait_stream(side)
        self.net.zero_grad()  # gradients that are made in the capture belong to the graph
        graph = torch.cuda.CUDAGraph()
        try:
            # A thread that loads data may call CUDA meanwhile: only this one's calls count.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = super().__call__(self.x, self.y)
                super().backward(result)
        except RuntimeError as error:
            said = str(error).strip().partition("\n")[0]
            raise InputError(
                f"this step cannot be captured as a CUDA graph: {said}",
                remedy="train without --cuda-graph: something in the network or a loss waits for "
                "the GPU, or moves data between devices",
            ) from error
        self.grads = [(p, p.grad) for p in self.net.parameters() if p.grad is not None]
        kept = {name: term.detach() for name, term in result.terms.items()}
        static = result.static_logits
        self.result = Distilled(
            result.loss.detach(),
            result.student_logits.detach(),
            result.teacher_logits.detach(),
            None if static is None else static.detach(),
            kept,
        )
        self.graph = graph


@contextmanager
def buffers_kept(net: nn.Module) -> Iterator[None]:
    """Put all buffers back after."""
    held = [(b, b.clone()) for b in net.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in held:
                buffer.copy_(before)
