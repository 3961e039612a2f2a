"""MNIST-1D, generated: ten shapes that are stretched, moved, sheared and made noisy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Ten shapes of twelve points: where the pen is, left (-) or right (+), on its way down the digit.
# fmt: off
TEMPLATES = (
    ( 0,  3,  5,  6,  6,  6,  6,  6,  6,  5,  3,  0),
    ( 0, -3, -2,  0,  1,  2,  3,  3,  3,  3,  3,  0),
    ( 0,  4,  6,  6,  4,  2, -1, -3, -4, -4, -2,  0),
    ( 0,  4,  6,  5,  2,  0,  2,  5,  6,  5,  3,  0),
    ( 0, -2, -4, -6, -5,  4,  4,  4,  4,  4,  4,  0),
    ( 0, -3, -5, -5, -3,  1,  5,  6,  6,  5,  3,  0),
    ( 0, -3, -5, -6, -5, -2,  2,  5,  6,  5,  3,  0),
    ( 0,  4,  6,  6,  5,  3,  1, -1, -3, -5, -6,  0),
    ( 0,  3,  5,  4,  1, -1,  1,  4,  6,  6,  4,  0),
    ( 0, -4, -5, -2,  2,  4,  5,  5,  5,  5,  4,  0),
)
# fmt: on
WIDTH, LENGTH = 72, 40  # samples before and after the last resampling


def mnist1d(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Signals (count, 1, 40) and labels (count,): every class equally often, in random order.

    As in MNIST-1D (arXiv 2011.14439): a template of 12 points, standardised; 36 to 60 zeros after
    it; resampled to 72 points (so it is stretched); scaled by 0.8 to 1.2; moved by up to 47 points,
    around the end; outside the template gaussian noise of deviation 0.25, smoothed by a gaussian
    of 2 points; on all of it iid noise of deviation 0.02; sheared by up to 0.19 at either end;
    resampled to 40 points. The templates are our own.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=draw)

    labels = (torch.arange(count) % 10)[torch.randperm(count, generator=draw)]
    template = torch.tensor(TEMPLATES, dtype=torch.float32)
    template = (template - template.mean(1, True)) / template.std(1, correction=0, keepdim=True)
    template = template - template[:, :1]
    points = template.shape[1]
    padding = torch.randint(36, 61, (count, 1), generator=draw)
    at = torch.linspace(0, 1, WIDTH) * (points + padding - 1)
    x = _interpolate(F.pad(template[labels], (0, WIDTH - points)), at) * uniform(0.8, 1.2)
    start = torch.randint(48, (count, 1), generator=draw)
    moved = (torch.arange(WIDTH) - start) % WIDTH
    x, inside = x.gather(1, moved), (at < points).gather(1, moved)
    reach = 8  # four deviations
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / 2) ** 2)
    hiss = 0.25 * torch.randn(count, 1, WIDTH + 2 * reach, generator=draw)
    smooth = F.conv1d(hiss, (bell / bell.sum()).reshape(1, 1, -1)).squeeze(1)
    x = torch.where(inside, x, smooth)
    x = x + 0.02 * torch.randn(count, WIDTH, generator=draw)
    x = x - uniform(-0.375, 0.375) * torch.linspace(-0.5, 0.5, WIDTH)
    x = _interpolate(x, torch.linspace(0, WIDTH - 1, LENGTH).expand(count, -1))
    return x.unsqueeze(1), labels


def _interpolate(x: Tensor, at: Tensor) -> Tensor:
    """x (N, L) at positions (N, M) between 0 and L - 1, linearly."""
    left = at.floor().long().clamp(max=x.shape[1] - 2)
    return torch.lerp(x.gather(1, left), x.gather(1, left + 1), at - left)
