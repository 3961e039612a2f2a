"""Limits of capture: which sizes stay free, and how long tracing may take."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.export import Dim
from torch.overrides import TorchFunctionMode

from ...torch_private import hint

LEVELS = ("sizes", "batch", "none")
"""Which input sizes stay free: every one that the model leaves free, the batch, none."""


PATIENCE = 10.0
"""Seconds of processor time for a mode with all sizes free; some networks take minutes."""


def has_unknown_size(val: Any) -> bool:
    """True for a tensor with a size that not even the example has."""
    sizes = val.shape if isinstance(val, torch.Tensor) else [val]
    return any(isinstance(s, torch.SymInt) and hint(s) is None for s in sizes)


def dynamic_shapes(tensors: tuple[torch.Tensor, ...], level: str) -> list[Any] | None:
    """Dynamic shapes for ``torch.export``: dim 0 of every tensor that shares the batch size, and
    for ``sizes`` all dimensions of all tensors; export bakes those that the model does not leave
    free."""
    batch = next((x.shape[0] for x in tensors if x.ndim), 0)
    if level == "none" or (level == "batch" and batch < 2):
        return None

    def free(d: int, size: int) -> bool:
        return size > 1 and (level == "sizes" or (d == 0 and size == batch))

    shapes = [{d: Dim.AUTO for d, s in enumerate(x.shape) if free(d, s)} or None for x in tensors]
    return shapes if any(shapes) else None


class TooSlowError(BaseException):
    """No ``Exception``: nothing on its way out may take it for one of the model's."""


class _Deadline(TorchFunctionMode):
    """Raises ``TooSlowError`` once this thread has used its processor time.

    A mode is asked before every call of PyTorch's that tracing makes, and an error may leave it as
    the call's own would. (Raised from a timer, or by a dispatch mode, it ended the process: both
    hit code that must not fail.) A single call of a slow network takes seconds, not more.
    """

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self.deadline = deadline

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        compiling = torch.compiler.is_dynamo_compiling()  # torch.cond's branches: it has no clock
        if not compiling and time.thread_time() > self.deadline:
            raise TooSlowError
        return func(*args, **(kwargs or {}))


def time_limit(seconds: float | None) -> contextlib.AbstractContextManager[Any]:
    """Stop the tracing in the block after some seconds of this thread's processor time."""
    if seconds is None:
        return contextlib.nullcontext()
    return _Deadline(time.thread_time() + seconds)


class _Hush(logging.Filter):
    """Matches every warning, and drops every record, of one thread, until it is lifted."""

    def __init__(self) -> None:
        super().__init__()
        self.thread: int | None = threading.get_ident()

    def match(self, text: str) -> bool:
        """What a warning's text or module is asked for, as by a compiled pattern."""
        return threading.get_ident() == self.thread

    def filter(self, record: logging.LogRecord) -> bool:
        return threading.get_ident() != self.thread


_NOISY = (
    "torch.export._trace",
    "torch.fx.experimental.symbolic_shapes",
    "torch._subclasses.fake_tensor",
)
"""Loggers that tell at length of an export that fails."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, and what torch logs of a failed export, in this thread alone: the terminal
    is for our own error."""
    hush, loggers = _Hush(), list(map(logging.getLogger, _NOISY))
    entry: Any = ("ignore", hush, Warning, None, 0)
    warnings.filters.insert(0, entry)  # type: ignore[attr-defined]
    for logger in loggers:
        logger.addFilter(hush)
    try:
        yield
    finally:
        hush.thread = None  # where another thread holds a copy of the filters meanwhile
        for logger in loggers:
            logger.removeFilter(hush)
        with contextlib.suppress(ValueError):
            warnings.filters.remove(entry)  # type: ignore[attr-defined]
