"""Losses of features: outputs of inner modules of the student against the static teacher's.

``Features`` collects outputs by name (``gpdfx.distill.collect``). A ``FeatureLoss`` has parameters
of its own: ``build`` makes them from the shapes of the features, and then they train with the
student.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .collect import Features as Features

Shapes = Sequence[Sequence[int]]


class FeatureLoss(nn.Module):
    """A loss of the student's features against the static teacher's, with parameters of its own.

    ``student_layers`` and ``static_layers``: names of modules, in pairs. ``build`` comes before
    the optimizer is made, before ``to(device)`` and before ``load_state_dict``; called again, it
    begins anew. A loss of your own overrides ``build`` and ``forward``.
    """

    def __init__(
        self, student_layers: Sequence[str], static_layers: Sequence[str], weight: float = 1.0
    ) -> None:
        super().__init__()
        if isinstance(student_layers, str) or isinstance(static_layers, str):
            raise InputError("layers are given as one string", remedy="give a list of names")
        if not student_layers or len(student_layers) != len(static_layers):
            raise InputError(
                f"{len(student_layers)} layers of the student and {len(static_layers)} of the "
                "static teacher",
                remedy="name as many of the one as of the other, and at least one",
            )
        self.student_layers, self.static_layers = tuple(student_layers), tuple(static_layers)
        self.weight = weight
        self.parts = nn.ModuleList()
        """What ``build`` makes: one module for each pair of layers."""

    def build(self, student_shapes: Shapes, static_shapes: Shapes) -> None:
        """Make the parameters for features of these shapes, batch included."""
        raise NotImplementedError

    def forward(self, student_features: list[Tensor], static_features: list[Tensor]) -> Tensor:
        """The loss, a scalar. Static features get no gradient."""
        raise NotImplementedError

    def _check(self, student: Sequence[Any], static: Sequence[Any]) -> None:
        count = len(self.student_layers)
        if len(student) != count or len(static) != count:
            raise InputError(
                f"{len(student)} features of the student and {len(static)} of the static teacher "
                f"for {count} pairs of layers",
                remedy="give one of each for every pair, in the order of the layers",
            )


class PairwiseLoss(FeatureLoss):
    """``weight sum_l distance(output_l, static_l)``, where ``parts`` make the outputs."""

    distance: Callable[[Tensor, Tensor], Tensor]

    def outputs(self, student_features: list[Tensor]) -> list[tuple[int, Tensor]]:
        """What the parts make of the student's features, with the numbers of their pairs."""
        raise NotImplementedError

    def forward(self, student_features: list[Tensor], static_features: list[Tensor]) -> Tensor:
        if not len(self.parts):
            raise InputError(
                f"{type(self).__name__} has no parameters yet",
                remedy="call build(student_shapes, static_shapes) first",
            )
        self._check(student_features, static_features)
        losses = []
        for k, output in self.outputs(student_features):
            static = static_features[k]
            if output.ndim == 4:
                output = _resize(output, static)
            if output.shape != static.shape:
                raise InputError(
                    f"features of {self.student_layers[k]!r} become {tuple(output.shape)}, the "
                    f"static teacher's are {tuple(static.shape)}",
                    remedy="name layers with the same number of tokens; build for these channels",
                )
            losses.append(self.distance(output, static.detach()))
        return self.weight * torch.stack(losses).sum()


LEVELS = (4, 2, 1)
"""Heights and widths of the pooled pyramid."""


def hierarchical_context_loss(student: Tensor, static: Tensor) -> Tensor:
    """Mean squared differences of (N, C, H, W) features and of their averages on coarser grids.

    ``(sum_k 2^-k MSE_k) / sum_k 2^-k``: k = 0 is full size, then come averages on 4 x 4, 2 x 2 and
    1 x 1 grids, those of them that are smaller than the feature (arXiv 2104.09044, section 3.3).
    """
    loss, weight, total = F.mse_loss(student, static), 1.0, 1.0
    height, width = static.shape[-2:]
    for level in LEVELS:
        if level < max(height, width):
            weight /= 2
            total += weight
            grid = min(level, height), min(level, width)
            student_grid = F.adaptive_avg_pool2d(student, grid)
            loss = loss + weight * F.mse_loss(student_grid, F.adaptive_avg_pool2d(static, grid))
    return loss / total


class FitNet(PairwiseLoss):
    """``weight sum_l mean (r_l(student_l) - static_l)^2``: hints (Romero et al., 2015).

    ``r_l`` is a learned regressor: a 1x1 convolution for images (N, C, H, W), whose output is
    averaged (or repeated) to the static feature's height and width; a linear map of the last
    dimension for tokens (N, L, C) and vectors (N, C).
    """

    distance = staticmethod(F.mse_loss)

    def build(self, student_shapes: Shapes, static_shapes: Shapes) -> None:
        """Make one regressor for each pair; only the channels of the shapes matter."""
        self._check(student_shapes, static_shapes)
        parts: list[nn.Module] = []
        pairs = zip(self.student_layers, student_shapes, static_shapes, strict=True)
        for name, student, static in pairs:
            if len(student) != len(static) or len(student) not in (2, 3, 4):
                raise InputError(
                    f"features {tuple(student)} of {name!r} against {tuple(static)}",
                    remedy="name layers that both return (N, C, H, W), (N, L, C) or (N, C)",
                )
            if len(student) == 4:
                parts.append(nn.Conv2d(student[1], static[1], 1))
            else:
                parts.append(nn.Linear(student[-1], static[-1]))
        self.parts = nn.ModuleList(parts)

    def outputs(self, student_features: list[Tensor]) -> list[tuple[int, Tensor]]:
        return [(k, part(student_features[k])) for k, part in enumerate(self.parts)]


class ReviewKD(PairwiseLoss):
    """Knowledge review: deep student features help to match shallow static ones.

    ``weight sum_l HCL(out_l(u_l), static_l)``, where the review goes from the last layer to the
    first, ``u_l = ABF_l(student_l, u_{l+1})`` (Chen et al., arXiv 2104.09044). ``ABF`` is
    attention-based fusion (``Fusion``), ``HCL`` is ``hierarchical_context_loss``.

    Layers go from shallow to deep, and their features are (N, C, H, W); student and static ones
    may differ in channels, height and width. ``width``: channels of every ``u_l``; by default
    those of the deepest student feature, at most 512.
    """

    distance = staticmethod(hierarchical_context_loss)

    def __init__(
        self,
        student_layers: Sequence[str],
        static_layers: Sequence[str],
        weight: float = 1.0,
        width: int | None = None,
    ) -> None:
        super().__init__(student_layers, static_layers, weight)
        self.width = width

    def build(self, student_shapes: Shapes, static_shapes: Shapes) -> None:
        """Make one fusion for each pair; only the channels of the shapes matter."""
        self._check(student_shapes, static_shapes)
        names = [*self.student_layers, *self.static_layers]
        for name, shape in zip(names, [*student_shapes, *static_shapes], strict=True):
            if len(shape) != 4:
                raise InputError(
                    f"features {tuple(shape)} of {name!r}",
                    remedy="name layers that return (N, C, H, W), or use FitNet",
                )
        width = self.width or min(512, student_shapes[-1][1])
        last = len(student_shapes) - 1
        self.parts = nn.ModuleList(
            Fusion(student[1], width, static[1], deepest=k == last)
            for k, (student, static) in enumerate(zip(student_shapes, static_shapes, strict=True))
        )

    def outputs(self, student_features: list[Tensor]) -> list[tuple[int, Tensor]]:
        """From the deepest pair to the first."""
        review, outputs = None, []
        for k in reversed(range(len(self.parts))):
            review, output = self.parts[k](student_features[k], review)
            outputs.append((k, output))
        return outputs


class Fusion(nn.Module):
    """Attention-based fusion of a feature ``x`` with the review ``v`` of all deeper ones.

    ``u = a x' + b v'`` with ``x' = norm(conv1x1(x))``, ``v'`` resized to the height and width of
    ``x``, and two maps ``a, b = sigmoid(conv1x1([x', v']))``, (N, 1, H, W) each. The deepest
    feature has no review: ``u = x'``. ``norm(conv3x3(u))`` has the static feature's channels.
    Arxiv 2104.09044, section 3.3.
    """

    def __init__(self, channels: int, width: int, outputs: int, *, deepest: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.attention = None if deepest else nn.Conv2d(2 * width, 2, 1)
        self.leave = nn.Sequential(
            nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor, review: Tensor | None) -> tuple[Tensor, Tensor]:
        """(N, channels, H, W) -> ``u`` for the next shallower one, and what the loss compares."""
        u = self.enter(x)
        if self.attention is not None and review is not None:
            review = _resize(review, u)
            a, b = self.attention(torch.cat([u, review], 1)).sigmoid().split(1, dim=1)
            u = a * u + b * review
        return u, self.leave(u)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    """To the height and width of another: averages where smaller, repeats where larger."""
    height, width = like.shape[-2:]
    return x if x.shape[-2:] == (height, width) else F.adaptive_avg_pool2d(x, (height, width))
