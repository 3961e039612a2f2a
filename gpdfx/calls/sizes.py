"""Which input sizes a captured graph holds for.

Capture leaves a size free (a symbol), bakes it (a number), or ties it to another; on its way it
takes branches, and each leaves a condition on the symbols. A size for which the graph does not
hold is refused by name. Conditions that may only come from what an operation's shape function took
for granted (no size of zero or one, as a rule) are set apart: the check tries them.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import InputError
from ..torch_private import expression, guards, python_text


@dataclass(frozen=True)
class Symbol:
    """Where a symbol can be read: dimension ``dim`` of input number ``input`` has the size
    ``scale * symbol + offset``."""

    input: int
    dim: int
    scale: int
    offset: int

    def read(self, flat: Sequence[Any]) -> tuple[int, int]:
        """The symbol's value for these inputs, and what is left over."""
        size: int = flat[self.input].shape[self.dim]
        return divmod(size - self.offset, self.scale)

    def text(self, names: list[str]) -> str:
        place = f"{names[self.input]}.shape[{self.dim}]"
        plain = (self.scale, self.offset) == (1, 0)
        return place if plain else f"(({place} - {self.offset}) // {self.scale})"


@dataclass(frozen=True)
class Sizes:
    """``inputs``: per input the size of each dimension: a number, or an expression in symbols;
    ``symbols``: by name; ``conditions``: expressions that hold for every size the graph is right
    for; ``assumed``: others that capture met, of which it is not known whether they need to."""

    inputs: tuple[tuple[int | str, ...], ...]
    symbols: dict[str, Symbol]
    conditions: tuple[str, ...]
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        demands = tuple(self._demands())
        code = _first_broken(tuple(one.text for one in demands))
        self.__dict__.update(_all=demands, _broken=code)

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the function, which does not pickle."""
        return Sizes, (self.inputs, self.symbols, self.conditions, self.assumed)

    def check(self, flat: Sequence[Any], names: list[str]) -> None:
        """Raise ``InputError`` unless the inputs have sizes that the graph holds for. A compiler
        follows this, too, and then guards on what was asked of sizes."""
        for name, x, sizes in zip(names, flat, self.inputs, strict=True):
            if x.ndim != len(sizes):
                raise InputError(
                    f"input {name} has {x.ndim} dimensions, not {len(sizes)}",
                    remedy="pass inputs of the example's rank",
                )
        broken = self.__dict__["_broken"](flat)
        if broken is not None:
            one: _Demand = self.__dict__["_all"][broken]
            why = self._readable(one.why, names)
            if one.dim is not None:
                size = flat[one.input].shape[one.dim]
                why = f"input {names[one.input]} has size {size} in dimension {one.dim}{why}"
            raise InputError(why, remedy="expand the model with example_inputs of this size")

    def takes(self, flat: Sequence[Any]) -> bool:
        """Whether ``check`` lets the inputs pass."""
        with contextlib.suppress(InputError):
            self.check(flat, [""] * len(flat))
            return True
        return False

    def texts(self, names: list[str]) -> list[tuple[str, str]]:
        """What ``check`` asks of the tensors ``flat``: as Python, and for people."""
        demands: tuple[_Demand, ...] = self.__dict__["_all"]
        named = [(f"flat[{k}]", name) for k, name in enumerate(names)]
        return [(d.text, reduce(lambda t, n: t.replace(*n), named, d.text)) for d in demands]

    @property
    def doubts(self) -> tuple[str, ...]:
        """Conditions that need not hold, but of which that was not seen: the assumed ones, and that
        no size is one or zero, which capture takes for granted."""
        unseen = (f"{name} != {size}" for size in (1, 0) for name in self.symbols)
        return tuple(dict.fromkeys((*self.assumed, *unseen)))

    def unseen(self) -> Sizes:
        """As this, but all doubts are conditions."""
        conditions = (*self.conditions, *self.doubts)
        return Sizes(self.inputs, self.symbols, conditions, self.doubts)

    def _demands(self) -> Iterator[_Demand]:
        """All that is asked of sizes, as Python that names the tensors ``flat``."""
        places = [f"flat[{k}]" for k in range(len(self.inputs))]
        all_ = [(k, d, want) for k, each in enumerate(self.inputs) for d, want in enumerate(each)]
        for k, d, want in all_:
            if isinstance(want, int):
                why = f"; the network was captured with {want} there"
                yield _Demand(f"{places[k]}.shape[{d}] == {want}", why, k, d)
        for at in self.symbols.values():
            if at.scale != 1:
                text = f"({places[at.input]}.shape[{at.dim}] - {at.offset}) % {at.scale} == 0"
                why = f", which is not {at.offset} plus a multiple of {at.scale}"
                yield _Demand(text, why, at.input, at.dim)
        for k, d, want in all_:
            own = f"{places[k]}.shape[{d}]"
            if isinstance(want, str) and (text := self._readable(want, places)) != own:
                why = f"; the network was captured with the size of {want} there"
                yield _Demand(f"{own} == {text}", why, k, d)
        for condition in self.conditions:
            why = f"the network was captured on a path that needs {condition}"
            yield _Demand(self._readable(condition, places), why)

    def _readable(self, text: str, names: list[str]) -> str:
        for name, at in self.symbols.items():
            text = re.sub(rf"\b{name}\b", at.text(names), text)
        return text

    def free(self, level: str, shapes: list[tuple[int, ...]]) -> set[str]:
        """The symbols of a level of ``LEVELS``: all, the batch (first dimensions of the example's
        shapes that are as large as the first one), none."""
        if level != "batch":
            return set(self.symbols) if level == "sizes" else set()
        size = next((shape[0] for shape in shapes if shape), 0)
        places = self.symbols.items()
        return {n for n, at in places if at.dim == 0 and shapes[at.input][0] == size}

    def read(self, flat: Sequence[Any]) -> dict[str, int]:
        """The symbols' values for these inputs."""
        return {name: at.read(flat)[0] for name, at in self.symbols.items()}

    def moved(
        self, flat: Sequence[Any], values: dict[str, int], names: list[str]
    ) -> list[Any] | None:
        """These inputs repeated or cut to other values of the symbols; ``None`` if the graph does
        not claim to hold there."""
        moved = list(flat)
        for k, sizes in enumerate(self.inputs):
            for d, want in enumerate(sizes):
                size = int(evaluate(want, values)) if isinstance(want, str) else want
                if size != flat[k].shape[d]:
                    moved[k] = resized(moved[k], d, max(size, 0))
        return moved if self.takes(moved) else None

    def elsewhere(self, flat: Sequence[Any], level: str, names: list[str]) -> Iterator[list[Any]]:
        """The example's values, cut or repeated to other sizes that the graph claims to hold for:
        a sample more, or the first number that it holds for, and half the lengths, or lengths that
        differ more, also by what conditions name, or twice the lengths, but equal ones equally."""
        shapes = [tuple(x.shape) for x in flat]
        free, batch = self.free(level, shapes), self.free("batch", shapes)
        example, none = self.read(flat), True
        most = max(example.values(), default=0)
        named = {n for text in (*self.conditions, *self.assumed) for n in numbers(text)}
        steps = (32, 28, 24, 16, 12, 8, 4, 2, 1, *sorted(n for n in named if 1 < n <= most))
        for samples in (1, 2, 3, *(example[name] for name in batch), -1):
            for halves, step in ((1, 0), *((2, step) for step in steps), (4, 0)):
                values = dict(example)
                for name in free - batch:
                    more = max(step // self.symbols[name].scale, 1) if step else 0
                    values[name] = (values[name] * halves + 1) // 2 + more
                values |= {name: example[name] + samples for name in batch & free}
                if (moved := self.moved(flat, values, names)) is not None:
                    none = False
                    yield moved
            if not none:
                return

    def smaller(
        self, flat: Sequence[Any], size: int, samples: int, names: list[str]
    ) -> list[Any] | None:
        """The example's values, cut where a size that is free is larger, or the batch: to the
        first number from ``samples`` on that the graph claims to hold for."""
        shapes = [tuple(x.shape) for x in flat]
        example, batch = self.read(flat), self.free("batch", shapes)
        largest = max((example[name] for name in batch), default=samples)
        for most in range(samples, max(largest, samples) + 1):
            values = dict(example)
            for name, at in self.symbols.items():
                limit = most if name in batch else (size - at.offset) // at.scale
                values[name] = min(example[name], limit)
            if (moved := self.moved(flat, values, names)) is not None:
                return moved
        return None

    def pinned(self, shapes: list[tuple[int, ...]], level: str) -> Sizes:
        """As this, but only the symbols of a lower level are free; all else is the example's."""
        return self.fixed(shapes, self.free(level, shapes))

    def settled(self, shapes: list[tuple[int, ...]], free: set[str], known: set[str]) -> Sizes:
        """``unseen``, with what was seen of another capture of the same: its free symbols, and its
        conditions, which decide of doubts alone."""
        sizes = self.fixed(shapes, free)
        kept = (c for c in sizes.conditions if c not in sizes.assumed or c in known)
        return Sizes(sizes.inputs, sizes.symbols, tuple(kept))

    def fixed(self, shapes: list[tuple[int, ...]], free: set[str]) -> Sizes:
        """``pinned`` to any free symbols."""
        inputs = tuple(
            tuple(want if names_in(want) <= free else s for s, want in zip(*both, strict=True))
            for both in zip(shapes, self.inputs, strict=True)
        )
        symbols = {name: at for name, at in self.symbols.items() if name in free}
        conditions, assumed = (
            tuple(c for c in map(self._with_sizes(shapes, free), each) if names_in(c))
            for each in (self.conditions, self.assumed)
        )
        return Sizes(inputs, symbols, conditions, assumed)

    def _with_sizes(self, shapes: list[tuple[int, ...]], free: set[str]) -> Callable[[str], str]:
        """Conditions with the example's numbers for symbols that are not free."""

        def number(match: re.Match[str]) -> str:
            at = self.symbols.get(match[0])
            if at is None or match[0] in free:
                return match[0]
            return str((shapes[at.input][at.dim] - at.offset) // at.scale)

        return lambda condition: _SYMBOL.sub(number, condition)

    def describe(self, names: list[str]) -> dict[str, str]:
        """Input -> its sizes, for people: ``batch x 3 x any x any``."""

        def word(d: int, size: int | str) -> str:
            free = "any" if d else "batch"
            return free if isinstance(size, str) else str(size)

        words = ([word(*each) for each in enumerate(sizes)] for sizes in self.inputs)
        return {name: " x ".join(w) or "number" for name, w in zip(names, words, strict=True)}


@dataclass(frozen=True)
class _Demand:
    """``text``: Python that has to be true; ``why``: what is told where it is not, with the symbols
    of ``Sizes``, after the size that is at fault, if it is one."""

    text: str
    why: str
    input: int = -1
    dim: int | None = None


@lru_cache(maxsize=4096)
def _first_broken(texts: tuple[str, ...]) -> Callable[[Sequence[Any]], int | None]:
    """One function, made of all, that says which is the first that tensors do not fulfil; one that
    divides by a size of nothing is not."""
    lines = [f"        k = {k}\n        if not ({t}): return k" for k, t in enumerate(texts)]
    body = "\n".join((*lines, "    except ZeroDivisionError: return k", "    return None"))
    scope: dict[str, Any] = {"math": math, "torch": torch}
    exec(compile(f"def broken(flat):\n    try:\n        k = 0\n{body}", "<sizes>", "exec"), scope)
    function: Callable[[Sequence[Any]], int | None] = scope["broken"]
    return function


def resized(x: Tensor, dim: int, size: int) -> Tensor:
    """A tensor cut to a size, or each of its indices repeated, which leaves sorted what was; one
    that is empty is filled with ones."""
    if not (own := x.shape[dim]):
        return x.new_ones((*x.shape[:dim], size, *x.shape[dim + 1 :]))
    return x.index_select(dim, (torch.arange(size) * min(own, size) // size).to(x.device))


def evaluate(text: str, values: dict[str, int]) -> Any:
    """An expression or a condition, for values of its symbols."""
    try:
        return eval(_compiled(text), {"math": math, "torch": torch}, values)
    except ZeroDivisionError:  # a size of nothing
        return None


@lru_cache(maxsize=4096)
def _compiled(text: str) -> CodeType:
    return compile(text, "<sizes>", "eval")


def names_in(size: int | str) -> set[str]:
    """The symbols of an expression."""
    used = _compiled(size).co_names if isinstance(size, str) else ()
    return set(filter(_SYMBOL.fullmatch, used))


def numbers(text: str) -> set[int]:
    """The whole numbers in an expression, none of a name's or a fraction's."""
    return set(map(int, _NUMBER.findall(text)))


_SYMBOL = re.compile(r"\b[a-z]\d+\b")
_NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.])")


# --------------------------------------------------------------------------- of a graph
def fits(graph: fx.Graph, tensors: Sequence[Tensor]) -> bool:
    """True if a captured graph holds for tensors of these sizes."""
    return input_sizes(graph).takes(tensors)


def input_sizes(graph: fx.Graph) -> Sizes:
    """Read them off the placeholders of a captured graph."""
    inputs: list[tuple[int | str, ...]] = []
    symbols: dict[str, Symbol] = {}
    conditions: list[Any] = []
    for k, node in enumerate(graph.find_nodes(op="placeholder")):
        sizes: list[int | str] = []
        for d, size in enumerate(node.meta["val"].shape):
            if not is_free(size):
                sizes.append(int(size))
                continue
            sizes.append(python_text(expression(size)))
            conditions = conditions or guards(size)
            _bind(symbols, expression(size), k, d)
        inputs.append(tuple(sizes))
    known = [c for c in conditions if {str(s) for s in c.free_symbols} <= set(symbols)]
    needed = dict.fromkeys(python_text(c) for c in known if _matters(c))
    assumed = dict.fromkeys(python_text(c) for c in known if not _matters(c))
    return Sizes(tuple(inputs), symbols, tuple(needed), tuple(assumed))


def _bind(symbols: dict[str, Symbol], size: Any, k: int, d: int) -> None:
    """Note where a symbol can be read; straight from a size, if there is one."""
    if len(size.free_symbols) != 1:
        return
    (symbol,) = size.free_symbols
    scale = size.coeff(symbol, 1)
    offset = (size - scale * symbol).expand()
    known = symbols.get(str(symbol))
    straight = known is not None and (known.scale, known.offset) == (1, 0)
    if scale.is_Integer and offset.is_Integer and scale > 0 and not straight:
        symbols[str(symbol)] = Symbol(k, d, int(scale), int(offset))


def _matters(condition: Any) -> bool:
    """Equations, and bounds that the user set; not what may say that no size is zero or one."""
    relation = getattr(condition, "rel_op", "!=")
    bounds = (side for side in condition.args if side.is_Integer and abs(int(side)) > 2)
    return relation == "==" or (relation != "!=" and any(True for _ in bounds))


def is_free(size: Any) -> bool:
    """True if a size is known only at run time. Capture bakes some symbols on its way."""
    return isinstance(size, torch.SymInt) and not expression(size).is_number
