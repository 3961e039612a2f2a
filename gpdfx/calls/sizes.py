"""Which input sizes a captured graph holds for.

Capture leaves a size free (a symbol), bakes it (a number), or ties it to another; on its way it
takes branches, and each leaves a condition on the symbols. A size for which the graph does not
hold is refused by name. Conditions that only exclude sizes of zero and one are dropped: capture
assumes them everywhere, and the operations do not need them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy.printers import PythonPrinter

from ..errors import InputError

InputDim = tuple[int, int]
"""An input's number, and one of its dimensions."""


@dataclass(frozen=True)
class Sizes:
    """``inputs``: per input the size of each dimension: a number, or an expression in symbols;
    ``symbols``: name -> a place whose size is ``scale * symbol + offset``; ``conditions``:
    expressions that hold for every size the graph is right for."""

    inputs: tuple[tuple[int | str, ...] | None, ...]
    symbols: dict[str, tuple[InputDim, int, int]]
    conditions: tuple[str, ...]

    def check(self, flat: Sequence[Any], names: list[str]) -> None:
        """Raise ``InputError`` unless the inputs have sizes that the graph holds for."""
        for k, (x, sizes) in enumerate(zip(flat, self.inputs, strict=True)):
            if sizes is None:
                continue
            if x.ndim != len(sizes):
                raise InputError(
                    f"input {names[k]} has {x.ndim} dimensions, not {len(sizes)}",
                    remedy="pass inputs of the example's rank",
                )
            for d, want in enumerate(sizes):
                if isinstance(want, int) and x.shape[d] != want:
                    raise InputError(
                        f"input {names[k]} has size {x.shape[d]} in dimension {d}; the network "
                        f"was captured with {want} there",
                        remedy=_REMEDY,
                    )
        if not torch.compiler.is_compiling():
            self._check_symbols(flat, names)

    def free(self, level: str, shapes: list[tuple[int, ...]]) -> set[str]:
        """The symbols of a level of ``LEVELS``: all, the batch (first dimensions of the example's
        shapes that are as large as the first one), none."""
        if level != "batch":
            return set(self.symbols) if level == "sizes" else set()
        size = next((shape[0] for shape in shapes if shape), 0)
        places = ((name, place) for name, (place, _, _) in self.symbols.items())
        return {name for name, (k, d) in places if d == 0 and shapes[k][0] == size}

    def elsewhere(self, flat: Sequence[Any], level: str, names: list[str]) -> Iterator[list[Any]]:
        """The example's values, repeated to other sizes that the graph claims to hold for: one
        sample more, and lengths that differ more, but equal ones equally."""
        shapes = [tuple(x.shape) for x in flat]
        free, batch = self.free(level, shapes), self.free("batch", shapes)
        for step in (32, 28, 24, 16, 12, 8, 4, 2, 1, 0):  # 0: twice the size
            values = {}
            for name, ((k, d), scale, offset) in self.symbols.items():
                values[name] = (flat[k].shape[d] - offset) // scale
                more = 1 if name in batch else max(step // scale, 1) if step else values[name]
                values[name] += more if name in free else 0
            moved = list(flat)
            for k, sizes in enumerate(self.inputs):
                for d, want in enumerate(sizes or ()):
                    if isinstance(want, str):
                        moved[k] = resized(moved[k], d, int(_evaluate(want, values)))
            try:
                self.check(moved, names)
            except InputError:
                continue
            yield moved

    def pinned(self, shapes: list[tuple[int, ...]], level: str) -> Sizes:
        """As this, but only the symbols of a lower level are free; all else is the example's."""
        free = self.free(level, shapes)
        inputs = tuple(
            sizes
            and tuple(
                want if isinstance(want, int) or _names(want) <= free else shape[d]
                for d, want in enumerate(sizes)
            )
            for shape, sizes in zip(shapes, self.inputs, strict=True)
        )
        symbols = {name: place for name, place in self.symbols.items() if name in free}
        conditions = tuple(c for c in self.conditions if _names(c) & set(self.symbols) <= free)
        return Sizes(inputs, symbols, conditions)

    def describe(self, names: list[str]) -> dict[str, str]:
        """Input -> its sizes, for people: ``batch x 3 x any x any``."""
        words = {}
        for k, sizes in enumerate(self.inputs):
            if sizes is not None:
                text = ["any" if isinstance(s, str) else str(s) for s in sizes]
                text[:1] = ["batch"] if sizes and isinstance(sizes[0], str) else text[:1]
                words[names[k]] = " x ".join(text) or "number"
        return words

    def _check_symbols(self, flat: Sequence[Any], names: list[str]) -> None:
        values = {}
        for name, ((k, d), scale, offset) in self.symbols.items():
            values[name], rest = divmod(flat[k].shape[d] - offset, scale)
            if rest:
                raise InputError(
                    f"input {names[k]} has size {flat[k].shape[d]} in dimension {d}, which is not "
                    f"{offset} plus a multiple of {scale}",
                    remedy=_REMEDY,
                )
        for k, sizes in enumerate(self.inputs):
            for d, want in enumerate(sizes or ()):
                if isinstance(want, str) and _evaluate(want, values) != flat[k].shape[d]:
                    place = self._readable(want, names)
                    raise InputError(
                        f"input {names[k]} has size {flat[k].shape[d]} in dimension {d}; the "
                        f"network was captured with the size of {place} there",
                        remedy=_REMEDY,
                    )
        for condition in self.conditions:
            if not _holds(condition, values):
                raise InputError(
                    "the network was captured on a path that needs "
                    f"{self._readable(condition, names)}",
                    remedy=_REMEDY,
                )

    def _readable(self, text: str, names: list[str]) -> str:
        for name, ((k, d), scale, offset) in self.symbols.items():
            place = f"{names[k]}.shape[{d}]"
            place = place if (scale, offset) == (1, 0) else f"(({place} - {offset}) // {scale})"
            text = re.sub(rf"\b{name}\b", place, text)
        return text


_REMEDY = "expand the model with example_inputs of this size"


def resized(x: Tensor, dim: int, size: int) -> Tensor:
    """A tensor repeated, or cut, to a size; one that is empty is filled with ones."""
    if not x.shape[dim]:
        return x.new_ones((*x.shape[:dim], size, *x.shape[dim + 1 :]))
    return x.index_select(dim, (torch.arange(size) % x.shape[dim]).to(x.device))


def _evaluate(text: str, values: dict[str, int]) -> Any:
    return eval(_compiled(text), {"math": math}, values)


def _holds(condition: str, values: dict[str, int]) -> bool:
    try:
        return bool(_evaluate(condition, values))
    except ZeroDivisionError:  # a size of nothing
        return False


@lru_cache(maxsize=4096)
def _compiled(text: str) -> CodeType:
    return compile(text, "<sizes>", "eval")


def _names(text: str) -> set[str]:
    return set(_compiled(text).co_names) - {"math", "max", "min"}


def fits(graph: fx.Graph, tensors: Sequence[Tensor]) -> bool:
    """True if a captured graph holds for tensors of these sizes."""
    sizes = input_sizes(graph)
    try:
        sizes.check(tensors, [""] * len(tensors))
    except InputError:
        return False
    return True


def input_sizes(graph: fx.Graph) -> Sizes:
    """Read them off the placeholders of a captured graph."""
    inputs: list[tuple[int | str, ...] | None] = []
    symbols: dict[str, tuple[InputDim, int, int]] = {}
    guards: list[Any] = []
    for k, node in enumerate(graph.find_nodes(op="placeholder")):
        val = node.meta.get("val")
        if not isinstance(val, Tensor):
            inputs.append(None)
            continue
        sizes: list[int | str] = []
        for d, size in enumerate(val.shape):
            if is_free(size):
                symbolic: Any = size.node  # type: ignore[attr-defined]
                expression = symbolic.expr
                guards = guards or symbolic.shape_env.guards
                sizes.append(_code(expression))
                _bind(symbols, expression, (k, d))
            else:
                sizes.append(int(size))
        inputs.append(tuple(sizes))
    needed = (g.expr for g in guards if _matters(g.expr))
    known = (e for e in needed if {str(s) for s in e.free_symbols} <= set(symbols))
    return Sizes(tuple(inputs), symbols, tuple(dict.fromkeys(map(_code, known))))


def _bind(symbols: dict[str, tuple[InputDim, int, int]], expression: Any, place: InputDim) -> None:
    """Note where a symbol can be read; straight from a size, if there is one."""
    if len(expression.free_symbols) != 1:
        return
    (symbol,) = expression.free_symbols
    scale = expression.coeff(symbol, 1)
    offset = sympy.expand(expression - scale * symbol)
    known = symbols.get(str(symbol))
    if scale.is_Integer and offset.is_Integer and scale > 0 and (not known or known[1:] != (1, 0)):
        symbols[str(symbol)] = place, int(scale), int(offset)


def _matters(expression: Any) -> bool:
    """Equations, and bounds that the user set; not that a size is neither zero nor one."""
    if isinstance(expression, sympy.Eq):
        return True
    if not isinstance(expression, sympy.Rel) or isinstance(expression, sympy.Ne):
        return False
    return any(side.is_Integer and abs(int(side)) > 2 for side in expression.args)


def _code(expression: Any) -> str:
    return str(PythonPrinter().doprint(expression))


def is_free(size: Any) -> bool:
    """True if a size is known only at run time. Capture bakes some symbols on its way."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number
