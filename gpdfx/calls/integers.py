"""``int(tensor)`` and ``int(tensor.item())`` while a module is traced: a number that the graph
computes.

Python accepts nothing but an ``int`` of ``__int__``, so a tensor without data has none to give. Its
``item()`` does: a symbolic number, which has none to give either. Functions whose call of ``int``
failed for that are traced once more with another ``int`` in their module, which is put back when
the trace ends; torch's recurrent layers have it from the first.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
import traceback
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..torch_private import in_transform, is_fake

_LOCK = threading.RLock()
"""One trace at a time has another ``int`` anywhere."""


class _Kind(type):
    """Of a class that is ``int`` to all that asks, and takes what is traced as well."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(given, Tensor) and is_fake(given) and not in_transform():
            return given.to(torch.int64).item()  # towards zero, as int does
        if isinstance(given, torch.SymInt | torch.SymFloat):
            return math.trunc(given)
        return int(*args, **kwargs)

    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, int | torch.SymInt)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, int)


class _Integer(int, metaclass=_Kind):
    """What the name ``int`` stands for. Another thread gets plain numbers of it."""


class Integers(TorchFunctionMode):
    """Notes whose ``int`` failed while it lasts; the next time that it is entered, these have one
    that does not."""

    def __init__(self) -> None:
        super().__init__()
        asks = vars(torch.nn.modules.rnn)  # how many sequences are packed
        self._modules = {id(asks): asks}
        self._replaced = list[dict[str, Any]]()

    def more(self, error: BaseException | None) -> bool:
        """Whether some failed, up to this error, that have not been given another ``int``."""
        while error:
            frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
            for caller, frame in itertools.pairwise(frames):
                if frame.f_code is torch.SymInt.__int__.__code__:
                    self._note(caller)
            error = error.__cause__
        return len(self._modules) > len(self._replaced)

    def __enter__(self) -> Integers:
        if self._modules:
            _LOCK.acquire()
            self._replaced = list(self._modules.values())
            for names in self._replaced:
                names["int"] = _Integer
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            for names in self._replaced:
                del names["int"]
            if self._replaced:
                _LOCK.release()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            if func is Tensor.__int__ and not in_transform():
                self._note(sys._getframe(1))
            raise

    def _note(self, frame: FrameType) -> None:
        while frame.f_code.co_name == "__torch_function__" and frame.f_back:  # of other modes
            frame = frame.f_back
        names, code = frame.f_globals, frame.f_code
        users = names.get("__name__", "").partition(".")[0] != "torch"
        if users and "int" in code.co_names and names.get("int", _Integer) is _Integer:
            self._modules[id(names)] = names
