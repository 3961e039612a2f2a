"""Limits of capture: which sizes stay free, and how long tracing may take."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

LEVELS = ("sizes", "batch", "none")
"""Which input sizes stay free: every one that the model leaves free, the batch, none."""


PATIENCE = 10.0
"""Seconds of processor time for a mode with all sizes free; some networks take minutes."""


def has_unknown_size(val: Any) -> bool:
    """True for a tensor with a size that not even the example has."""
    sizes = val.shape if isinstance(val, torch.Tensor) else [val]
    return any(isinstance(s, torch.SymInt) and s.node.hint is None for s in sizes)


def dynamic_shapes(tensors: tuple[torch.Tensor, ...], level: str) -> list[Any] | None:
    """Dynamic shapes for ``torch.export``: dim 0 of every tensor that shares the batch size, and
    for ``sizes`` all dimensions of all tensors; export bakes those that the model does not leave
    free."""
    sizes = [x.shape[0] for x in tensors if x.ndim]
    if level == "none" or not sizes or (level == "batch" and sizes[0] < 2):
        return None

    def spec(x: torch.Tensor) -> dict[int, Any] | None:
        if not x.ndim:
            return None
        dims = range(1, x.ndim) if level == "sizes" else ()
        batch = [0] if x.shape[0] == sizes[0] or level == "sizes" else []
        return {d: Dim.AUTO for d in (*batch, *dims) if x.shape[d] > 1} or None

    shapes = [spec(x) for x in tensors]
    return shapes if any(shapes) else None


class TooSlowError(BaseException):
    """No ``Exception``: nothing on its way out may take it for one of the model's."""


_STOPS = ((ShapeEnv, "evaluate_expr"), (fx.Graph, "create_node"))
"""What tracing calls all the time, and where an error may leave it as any of its own does. (One
raised from outside, by a timer, can end the process: it may hit code that must not fail.)"""


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Stop the tracing in the block after some seconds of this thread's processor time."""
    if seconds is None:
        yield
        return
    thread, deadline = threading.get_ident(), time.thread_time() + seconds

    def stopping(call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread and time.thread_time() > deadline:
                raise TooSlowError
            return call(*args, **kwargs)

        return checked

    with contextlib.ExitStack() as stack:
        for kind, name in _STOPS:
            stopped = stopping(getattr(kind, name))
            stack.enter_context(mock.patch.object(kind, name, stopped))
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A failed export prints its partial graph to stderr; keep the terminal for our own error."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
