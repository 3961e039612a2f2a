"""Example inputs where the user gives none, and checks on those that are given."""

from __future__ import annotations

import inspect
import random
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import InputError
from . import sparse, tree
from .call import Call

_SPATIAL = {nn.Conv1d: (256,), nn.Conv2d: (64, 64), nn.Conv3d: (16, 64, 64)}
"""Convolution -> the size of an example for it."""


def infer_inputs(model: nn.Module) -> tuple[torch.Tensor, ...]:
    """A batch of two: from timm's ``pretrained_cfg``, torchvision's default size, or the first
    convolution, linear or embedding layer.

    Raises ``InputError`` where the model takes more than one argument or has no such layer.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> tuple[torch.Tensor]:
        return (torch.randn(shape, generator=draw).to(parameter.device, parameter.dtype),)

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
        return noise(2, size[0], *built)
    for module in model.modules():
        for kind, spatial in _SPATIAL.items():
            if isinstance(module, kind):
                return noise(2, module.in_channels, *(_torchvision_size(model, kind) or spatial))
        if isinstance(module, nn.Linear):
            return noise(2, module.in_features)
        if isinstance(module, nn.Embedding):
            shape = (2, min(16, module.num_embeddings))
            tokens = torch.randint(0, module.num_embeddings, shape, generator=draw)
            return (tokens.to(parameter.device),)
    raise InputError(
        f"cannot guess an input for {type(model).__name__}: it has no convolution, linear or "
        "embedding layer",
        remedy="pass example_inputs=(x,), a batch of two or more",
    )


def _torchvision_size(model: nn.Module, kind: type) -> tuple[int, ...]:
    """The size that torchvision's own weights of this architecture were trained at, if any."""
    if kind is not nn.Conv2d or not type(model).__module__.startswith("torchvision.models"):
        return ()
    size = 299 if type(model).__name__ == "Inception3" else getattr(model, "image_size", 224)
    return int(size), int(size)


def example_call(
    model: nn.Module, inputs: Any, keywords: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The user's example on tensors of its own, or a guess where there is none. Raises
    ``InputError`` if it is not one of this model's calls."""
    if inputs is None:
        inputs = () if keywords else infer_inputs(model)
    if not isinstance(inputs, tuple | list):
        raise InputError(
            f"example_inputs is a {type(inputs).__name__}",
            remedy="pass a tuple of positional inputs: example_inputs=(x,)",
        )
    keywords = {} if keywords is None else keywords
    if not isinstance(keywords, dict):
        raise InputError(f"example_kwargs is a {type(keywords).__name__}", remedy="pass a dict")
    for x in tree.leaves((inputs, keywords)):
        if isinstance(x, torch.Tensor) and (refused := _refused(x)):
            raise InputError(f"the example inputs hold {refused[0]}", remedy=refused[1])
    try:
        Call(model, tuple(inputs), keywords)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the example inputs do not fit {type(model).__name__}.forward: {error}",
            remedy="pass what you would pass to the model: positional inputs as example_inputs, "
            "keyword inputs as example_kwargs",
        ) from error
    args, kwargs = tree.copied((tuple(inputs), keywords))
    return args, kwargs


def _refused(x: torch.Tensor) -> tuple[str, str] | None:
    """Why a teacher cannot be called with such a tensor, and what to do; None if it can."""
    if x.is_nested:
        remedy = (
            "pad it (x.to_padded_tensor(0.0)) and pass a mask beside it, and let forward take both"
        )
        return "a nested tensor", f"{remedy}: samples of several lengths are no one size"
    plain = sparse.is_sparse(x) and (x.ndim == 2 or x.layout == sparse.COO) and not x.dense_dim()
    if x.layout != torch.strided and not plain:
        return f"a tensor of {x.ndim} dimensions that is {x.layout}", (
            "pass a matrix in one of the layouts torch.sparse_coo, torch.sparse_csr and "
            "torch.sparse_csc, or a dense tensor"
        )
    if x.is_meta:
        return "a tensor on the meta device, which has no values", "make them where the model is"
    return None


def two_samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """A call with a batch of one, which would be baked in, with it doubled."""
    tensors = [x for x in tree.leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if tensors and all(x.ndim and x.shape[0] == 1 for x in tensors):
        args, kwargs = tree.map_leaves(_twice, (args, kwargs))
    return args, kwargs


def _twice(x: Any) -> Any:
    return torch.cat([x, x.flip(tuple(range(1, x.ndim)))]) if isinstance(x, torch.Tensor) else x


def seed_all(seed: int) -> None:
    """Every global generator: a call can then be made again."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
