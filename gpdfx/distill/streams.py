"""Work on a CUDA stream of its own, beside the stream that goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..calls import tree

_SIDES: dict[torch.device, torch.cuda.Stream] = {}


def start(call: Callable[[], Any], like: Any, *, beside: bool) -> Callable[[], Any]:
    """Start ``call``; the function that is returned gives its result.

    ``beside``: on a second stream of the device that the tensors in ``like`` are on, which stay
    alive until the result is asked for, on the same stream as now. On CPUs, in compiled code and
    in a graph capture the call runs here and now.
    """
    device = _device(like) if beside and not torch.compiler.is_compiling() else None
    if device is None or torch.cuda.is_current_stream_capturing():
        result = call()
        return lambda: result
    main = torch.cuda.current_stream(device)
    side = _SIDES.setdefault(device, torch.cuda.Stream(device))
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = call()

    def join() -> Any:
        main.wait_stream(side)
        for x in tree.leaves(result):
            if isinstance(x, Tensor):
                x.record_stream(main)  # or its memory would be the side's again too early
        return result

    return join


def _device(like: Any) -> torch.device | None:
    """The GPU of the first tensor that is on one."""
    tensors = (x for x in tree.leaves(like) if isinstance(x, Tensor))
    return next((x.device for x in tensors if x.is_cuda), None)
