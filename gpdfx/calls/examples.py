"""Example inputs where the user gives none, and checks on those that are given."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from ..errors import InputError

_RANKS: tuple[tuple[type[nn.Module], tuple[int, ...]], ...] = (
    (nn.Conv1d, (256,)),
    (nn.Conv2d, (64, 64)),
    (nn.Conv3d, (16, 64, 64)),
)


def _torchvision_size(model: nn.Module) -> tuple[int, int]:
    """The size that torchvision's own weights of this architecture were trained at."""
    size = 299 if type(model).__name__ == "Inception3" else getattr(model, "image_size", 224)
    return int(size), int(size)


def infer_inputs(model: nn.Module) -> tuple[torch.Tensor, ...]:
    """A batch of two: from timm's ``pretrained_cfg``, torchvision's default size, or the first
    convolution, linear or embedding layer.

    Raises ``InputError`` where the model takes more than one argument or has no such layer.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, generator=draw)
        return x.to(parameter.device, parameter.dtype)

    required = [
        name
        for name, p in inspect.signature(model.forward).parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) > 1:
        raise InputError(
            f"{type(model).__name__}.forward takes {', '.join(required)}; cannot guess them all",
            remedy=f"pass example_inputs=({', '.join(required)}), a batch of two or more each",
        )
    config = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size") if isinstance(config, dict) else None
    if size:
        built = getattr(getattr(model, "patch_embed", None), "img_size", None) or size[1:]
        return (noise(2, size[0], *built),)
    for module in model.modules():
        for kind, spatial in _RANKS:
            if isinstance(module, kind):
                channels = int(module.in_channels)  # type: ignore[arg-type]
                vision = type(model).__module__.startswith("torchvision.models")
                if vision and kind is nn.Conv2d:
                    spatial = _torchvision_size(model)
                return (noise(2, channels, *spatial),)
        if isinstance(module, nn.Linear):
            return (noise(2, module.in_features),)
        if isinstance(module, nn.Embedding):
            shape = (2, min(16, module.num_embeddings))
            tokens = torch.randint(0, module.num_embeddings, shape, generator=draw)
            return (tokens.to(parameter.device),)
    raise InputError(
        f"cannot guess an input for {type(model).__name__}: it has no convolution, linear or "
        "embedding layer",
        remedy="pass example_inputs=(x,), a batch of two or more",
    )
