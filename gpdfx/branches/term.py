"""A branch's kernel as a formula: one product of its tensors, from which all folds are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .layer import Layer


@dataclass(frozen=True)
class Term:
    """``K[g, o, i, x] = gain * sum carrier * factor`` over the letters that are not of ``goix``.

    Groups g, outputs o, inputs i and taps x (the elements of the kernel); the names of the tensors
    and the letters of their dimensions, in which x stands for all dimensions of the kernel:

        Term("weight", "goix")                              w[o, i, x]
        Term("weight", "goi", "filters", "gox")             w[o, i] f[o, x]
        Term("up", "goh", "down", "ghi")                    sum_h u[o, h] v[h, i]
        Term("point", "goie", "depth", "giex")              sum_e p[o, i, e] d[i, e, x]

    Without a factor, a carrier that has no x is the same at all taps; without a name, it is the
    identity. ``taps``: (start, stop, step) of those that K is not zero at, and that its x means.
    ``residual``: 1 is added to the factor where h = i (modulo the inputs). K is linear in the
    carrier, which has o; a factor with an o is a constant.
    """

    carrier: str
    letters: str
    factor: str = ""
    others: str = ""
    taps: tuple[int, int, int] | None = None
    gain: float = 1.0
    residual: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of its tensors."""
        return tuple(name for name in (self.carrier, self.factor) if name)

    @property
    def axes(self) -> tuple[str, ...]:
        """Their letters."""
        pairs = ((self.carrier, self.letters), (self.factor, self.others))
        return tuple(letters for name, letters in pairs if name)

    @property
    def summed(self) -> str:
        """The letter that it sums over, if there is one."""
        return next((letter for letter in self.letters if letter not in "goix"), "")

    def gained(self, x: Tensor) -> Tensor:
        """Times the gain."""
        return x if self.gain == 1 else x * self.gain

    def part(self, x: Tensor) -> Tensor:
        """Of (groups, out, in, taps), a view of its taps."""
        return x if self.taps is None else x[..., slice(*self.taps)]

    def second(self, factor: Tensor, inputs: int) -> Tensor:
        """The factor, with what ``residual`` adds; of a layer with so many ``inputs``."""
        if not self.residual:
            return factor
        hidden, times = factor.shape[1], -(-factor.shape[1] // inputs)
        eye = torch.eye(min(hidden, inputs), inputs, dtype=factor.dtype, device=factor.device)
        return factor + (eye if times == 1 else eye.repeat(times, 1)[:hidden])

    def product(self, carrier: Tensor, factor: Tensor | None) -> Tensor:
        """(groups, out, in or 1, taps or 1) without its gain, of tensors with one dimension a
        letter."""
        if factor is None:
            return aligned(carrier, self.letters)
        if not self.summed:
            return aligned(carrier, self.letters) * aligned(factor, self.others)
        letters = "goi" + "x" * ("x" in self.letters + self.others)
        return aligned(
            torch.einsum(f"{self.letters},{self.others}->{letters}", carrier, factor), letters
        )

    def kernel(self, layer: Layer, params: Mapping[str, Tensor]) -> Tensor:
        """The weight, of ``layer.shape``; differentiable."""
        if not self.carrier:
            carrier = torch.eye(layer.outputs, layer.inputs).expand(layer.groups, -1, -1)
        else:
            carrier = flat(params[self.carrier], self.letters)
        factor = flat(params[self.factor], self.others) if self.factor else None
        made = self.product(carrier, None if factor is None else self.second(factor, layer.inputs))
        whole = made.new_zeros(*layer.shape[:3], layer.taps)
        self.part(whole).copy_(self.gained(made))
        return whole.reshape(layer.shape)


def aligned(x: Tensor, letters: str) -> Tensor:
    """A tensor whose letters are of ``goix``, with a dimension for each of these."""
    for dim, letter in enumerate("goix"):
        x = x if letter in letters else x.unsqueeze(dim)
    return x


def flat(x: Tensor, letters: str) -> Tensor:
    """A tensor with one dimension a letter."""
    at = letters.find("x")
    return x if at < 0 else x.reshape(*x.shape[:at], -1)
