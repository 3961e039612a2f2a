"""How forward and backward of a training step run: as they are, compiled, or as a CUDA graph.

    runner = Runner(net, config, ranks, scaler)  # or GraphRunner
    result = runner(x, y)    # a Distilled
    runner.backward(result)  # gradients of scaler.scale(result.loss), in .grad

Compiled code and graphs hold for batches like the first one. Any other, such as an epoch's short
last one, runs eagerly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...calls import tree
from ...distill.gpd import Distilled
from ...errors import InputError
from ...torch_private import compile_error
from ..config import OWN_GRAPHS, TrainConfig, refuse
from ..networks import Net, SavedBuffers
from ..ranks import Ranks

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP = 3  # eager steps before a capture: cuDNN and cuBLAS choose and allocate in them


def check_execution(config: TrainConfig, ranks: Ranks) -> None:
    """Raise ``InputError`` for a CUDA graph where there can be none."""
    refuse(
        config.cuda_graph and ranks.device.type != "cuda",
        f"cuda_graph needs a GPU, and this run is on {ranks.device.type}",
        "leave out --cuda-graph; --compile works on CPUs too",
    )
    refuse(
        config.cuda_graph and ranks.world > 1,
        f"cuda_graph is for one process, and these are {ranks.world}",
        "leave out --cuda-graph, or train in one process",
    )


class Runner:
    """Forward under autocast, on all ranks; compiled if ``config.compile`` says so."""

    def __init__(
        self, net: Net, config: TrainConfig, ranks: Ranks, scaler: torch.amp.GradScaler
    ) -> None:
        self.net, self.scaler, self.device = net, scaler, ranks.device
        self.dtype, self.mode = AUTOCAST.get(config.amp), config.compile
        self.eager: Any = net
        if ranks.world > 1:
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            self.eager = DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False)
        self.compiled = None if self.mode == "none" else compile_network(self.eager, self.mode)
        self.first: Any = None  # what batches are like that compiled code and graphs are for

    def fits(self, x: Tensor, y: Tensor) -> bool:
        """Whether a batch is like the first one."""
        like = (x.shape, x.dtype, y.shape, y.dtype)
        self.first = self.first or like
        return bool(self.first == like)

    def __call__(self, x: Tensor, y: Tensor) -> Distilled:
        network = self.eager
        if self.compiled is not None and self.fits(x, y):
            network = self.compiled
            if self.device.type == "cuda" and self.mode in OWN_GRAPHS:
                torch.compiler.cudagraph_mark_step_begin()
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)
        with autocast, compiler_errors():
            result: Distilled = network(x, y)
            return result

    def backward(self, result: Distilled) -> None:
        """Gradients, scaled where ``amp`` asks for it."""
        with compiler_errors():
            self.scaler.scale(result.loss).backward()


def compile_network(net: nn.Module, mode: str) -> Any:
    """``net`` by ``torch.compile``, for batches of one shape."""
    return torch.compile(net, mode=None if mode == "default" else mode, dynamic=False)


@contextmanager
def compiler_errors() -> Iterator[None]:
    """A compiler's error, with what to do."""
    try:
        yield
    except compile_error() as error:
        said = " ".join(str(error).strip().splitlines()[:2])
        raise InputError(
            f"torch.compile failed: {said}", remedy="train without --compile"
        ) from error


class GraphRunner(Runner):
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
        self._warm_up()
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
        self.result: Distilled = tree.map_leaves(
            lambda x: x.detach() if isinstance(x, Tensor) else x, result
        )
        self.graph = graph

    def _warm_up(self) -> None:
        """On a stream beside, as captures want it; nothing remains of these steps."""
        here, beside = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        beside.wait_stream(here)
        with torch.cuda.stream(beside), torch.random.fork_rng([self.device]):
            buffers = SavedBuffers(self.net)
            for _ in range(WARM_UP):
                self.net.zero_grad()
                super().backward(super().__call__(self.x, self.y))
            buffers.restore()
        here.wait_stream(beside)
        self.net.zero_grad()  # gradients that are made in the capture belong to the graph
