"""The networks of ``benchmarks.speed``, and a step of training on each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpdfx
from benchmarks.timing import Call
from gpdfx import models

CLASSES = 1000
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
GRAPH = "graph"
WAYS = ("eager", "default", "max-autotune", GRAPH)


@dataclass(frozen=True)
class Setting:
    """What all rows of a run share. ``dtype``: of autocast; ``channels``: of the input;
    ``allocator``: what a CPU does with freed memory."""

    network: str
    device: str
    size: int
    batch: int
    ratio: float
    dtype: str
    channels: int = 3
    allocator: str = ""

    def student(self) -> nn.Module:
        """The same weights every time."""
        shape = (self.channels, self.size, self.size)
        return models.load(self.network, classes=CLASSES, shape=shape)

    def data(self) -> tuple[Tensor, Tensor]:
        """A batch of noise, and classes."""
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, self.channels, self.size, self.size, generator=draw)
        y = torch.randint(0, CLASSES, (self.batch,), generator=draw)
        return self.placed(x), y.to(self.device)

    def placed(self, what: Any) -> Any:
        """On the device; on GPUs channels last."""
        last = torch.channels_last if self.device == "cuda" else torch.preserve_format
        return what.to(self.device, memory_format=last)

    def gpd(self, branches: Any) -> gpdfx.GPD:
        """All networks of a step from scratch, for training."""
        example = (torch.randn(2, self.channels, self.size, self.size),)
        options = {"example_inputs": example, "dynamic": "batch", "verify": False}
        gpd = gpdfx.GPD(self.student(), ratio=self.ratio, branches=branches, **options)
        placed: gpdfx.GPD = self.placed(gpd)
        return placed.train()


# --------------------------------------------------------------------------- networks
def plain_wide(student: nn.Module, teacher: gpdfx.Teacher) -> nn.Module:
    """The student's own class with every layer at the teacher's widths: what a user would build
    without gpdfx. Convolutions, norms, linear layers and parameters of the network's own modules
    are made anew."""
    wide = copy.deepcopy(student)
    shapes = {name: p.shape for name, p in teacher.named_parameters()}
    for path, old in student.named_modules():
        if not any(True for _ in old.parameters(recurse=False)):
            continue
        shape = shapes.get(f"{path}.weight", ())
        new: nn.Module
        if isinstance(old, nn.Conv2d) and old.groups in (1, old.in_channels):
            groups = 1 if old.groups == 1 else shape[0]
            kept = (old.kernel_size, old.stride, old.padding, old.dilation, groups)
            bias = old.bias is not None
            new = nn.Conv2d(shape[1] * groups, shape[0], *kept, bias)  # type: ignore[arg-type]
        elif isinstance(old, nn.BatchNorm2d):
            new = nn.BatchNorm2d(shape[0], old.eps, old.momentum)
        elif isinstance(old, nn.Linear):
            new = nn.Linear(shape[1], shape[0], old.bias is not None)
        elif isinstance(old, nn.LayerNorm):
            new = nn.LayerNorm(shape, old.eps)
        elif not type(old).__module__.startswith("torch.nn"):
            for name, _ in old.named_parameters(path, recurse=False):
                drawn = nn.Parameter(0.02 * torch.randn(shapes[name]))
                setattr(wide.get_submodule(path), name.rpartition(".")[2], drawn)
            continue
        else:
            raise SystemExit(f"no plain wide network: {path or 'it'} is {type(old).__name__}")
        parent, _, leaf = path.rpartition(".")
        setattr(wide.get_submodule(parent), leaf, new)
    for path, module in wide.named_modules():  # attention: more heads, each as wide as before
        for name in {"num_heads", "attn_dim"} & vars(module).keys():
            own = next(name for name, _ in module.named_parameters(path))
            times = shapes[own][1] // student.get_parameter(own).shape[1]
            setattr(module, name, getattr(module, name) * times)
    found = {name: p.shape for name, p in wide.named_parameters()}
    wrong = [name for name, shape in found.items() if shape != shapes[name]]
    if wrong or len(found) != len(list(student.parameters())):
        raise SystemExit(f"the plain wide network is not as wide as the teacher: {wrong}")
    return wide


class Task(nn.Module):
    """A network's cross entropy."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)


class Gap(nn.Module):
    """GPD's whole loss."""

    def __init__(self, gpd: gpdfx.GPD) -> None:
        super().__init__()
        self.gpd = gpd

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.gpd(x, y).loss


# --------------------------------------------------------------------------- steps
Backward = Callable[[Any, Tensor, Tensor], None]
"""Forward and backward of a network, which may be compiled, on a batch."""


def one_loss(net: Any, x: Tensor, y: Tensor) -> None:
    """Of a module that returns its loss."""
    net(x, y).backward()


@dataclass
class Step:
    """zero_grad, forward, backward, optimizer step. ``eager``: without compiler and graph;
    ``run``: in the way that is timed; ``state``: the tensors that it keeps."""

    eager: Call
    run: Call
    params: list[nn.Parameter]
    optimizer: torch.optim.Optimizer

    def state(self) -> list[Tensor]:
        """Parameters, their gradients, and momentum."""
        held: list[Tensor] = [*self.params]
        held += [p.grad for p in self.params if p.grad is not None]
        for state in self.optimizer.state.values():
            held += [x for x in state.values() if isinstance(x, Tensor)]
        return held


def make_step(net: nn.Module, setting: Setting, way: str, backward: Backward = one_loss) -> Step:
    """A step of ``net`` on the setting's batch."""
    x, y = setting.data()
    params = [p for p in net.parameters() if p.requires_grad]
    fused = {"fused": True} if setting.device == "cuda" else {}
    # A rate that keeps random networks on random labels finite; it changes no time.
    optimizer = torch.optim.SGD(params, 1e-4, momentum=0.9, weight_decay=1e-4, **fused)
    cast = DTYPES[setting.dtype]

    marks = way == "max-autotune" and setting.device == "cuda"  # it makes CUDA graphs

    def step(call: Any) -> Call:
        def run() -> None:
            if marks:
                torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            with torch.autocast(setting.device, cast, enabled=cast is not None):
                backward(call, x, y)
            optimizer.step()

        return run

    eager = step(net)
    if way in ("eager", GRAPH):
        run = eager if way == "eager" else capture(eager)
    else:
        mode = None if way == "default" else way
        run = step(torch.compile(net, mode=mode, dynamic=False))
    return Step(eager, run, params, optimizer)


def capture(step: Call) -> Call:
    """A whole step, the optimizer in it, as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
