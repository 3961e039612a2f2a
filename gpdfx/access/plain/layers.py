"""Ops of a graph that are those of the student's own layers, as modules of ``torch.nn``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ...passes.program import bind
from ...teacher.compiled import REGISTRIES
from ...teacher.inner import add_module

aten = torch.ops.aten
Names = Mapping[str, list[str]]
"""Tensor, as a graph reads it -> all of its names."""


@dataclass(frozen=True)
class Kind:
    """How an op is a layer of class ``layer``. ``tensors``: its arguments that the layer has by the
    same names; ``same``: others that the layer has to have alike; ``widths``: attributes that
    follow from the shape of the weight and the op's arguments."""

    layer: type[nn.Module]
    tensors: tuple[str, ...]
    same: tuple[str, ...]
    widths: Callable[[torch.Size, Mapping[str, Any]], dict[str, Any]]


def _linear(size: torch.Size, args: Mapping[str, Any]) -> dict[str, Any]:
    return {"in_features": size[1], "out_features": size[0]}


def _embedding(size: torch.Size, args: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_embeddings": size[0], "embedding_dim": size[1]}


def _conv(size: torch.Size, args: Mapping[str, Any]) -> dict[str, Any]:
    groups = args["groups"]
    return {"in_channels": size[1] * groups, "out_channels": size[0], "groups": groups}


def _transposed(size: torch.Size, args: Mapping[str, Any]) -> dict[str, Any]:
    groups = args["groups"]
    return {"in_channels": size[0], "out_channels": size[1] * groups, "groups": groups}


def _batch_norm(size: torch.Size, args: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_features": size[0]}


def _layer_norm(size: torch.Size, args: Mapping[str, Any]) -> dict[str, Any]:
    return {"normalized_shape": tuple(size)}


def _group_norm(size: torch.Size, args: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_groups": args["num_groups"], "num_channels": size[0]}


_AFFINE = ("weight", "bias")
_STEPS = ("stride", "padding", "dilation")
KINDS: dict[Any, tuple[Kind, ...]] = {
    aten.linear.default: (Kind(nn.Linear, _AFFINE, (), _linear),),
    aten.embedding.default: (
        Kind(nn.Embedding, ("weight",), ("scale_grad_by_freq", "sparse"), _embedding),
    ),
    aten.layer_norm.default: (Kind(nn.LayerNorm, _AFFINE, ("eps",), _layer_norm),),
    aten.group_norm.default: (Kind(nn.GroupNorm, _AFFINE, ("eps",), _group_norm),),
    aten.batch_norm.default: tuple(
        Kind(layer, (*_AFFINE, "running_mean", "running_var"), ("eps",), _batch_norm)
        for layer in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    ),
    **{
        op: (Kind(layer, _AFFINE, _STEPS, _conv),)
        for layer, packet in (
            (nn.Conv1d, aten.conv1d),
            (nn.Conv2d, aten.conv2d),
            (nn.Conv3d, aten.conv3d),
        )
        for op in (packet.default, packet.padding)
    },
    **{
        op: (Kind(layer, _AFFINE, (*_STEPS, "output_padding"), _transposed),)
        for layer, op in (
            (nn.ConvTranspose1d, aten.conv_transpose1d.default),
            (nn.ConvTranspose2d, aten.conv_transpose2d.input),
            (nn.ConvTranspose3d, aten.conv_transpose3d.input),
        )
    },
}


def layers_of(node: fx.Node, names: Names, student: nn.Module) -> Iterator[tuple[str, Kind]]:
    """Paths of the student's layers that an op may be: of its class, with its tensors by some of
    their names, and with nothing that the op does not say."""
    for kind in KINDS.get(node.target, ()):
        args = bind(node)
        given = {name: args[name] for name in kind.tensors}
        called = {k: names.get(str(getattr(x, "target", "")), []) for k, x in given.items()}
        if args.get("training"):
            continue
        for path in (name.removesuffix(".weight") for name in called["weight"]):
            layer = student.get_submodule(path) if f"{path}.weight" in called["weight"] else None
            if type(layer) is kind.layer and all(
                f"{path}.{k}" in called[k] if x is not None else getattr(layer, k, None) is None
                for k, x in given.items()
            ):
                own = vars(layer)
                alike = all(_plain(args[k]) == _plain(own[k]) for k in kind.same)
                usual = own.get("padding_mode", "zeros") == "zeros" and "forward" not in own
                if alike and usual and own.get("max_norm") is None:
                    yield path, kind


def _plain(x: Any) -> Any:
    return list(x) if isinstance(x, tuple | list) else x


def call_layer(node: fx.Node, root: nn.Module, student: nn.Module) -> None:
    """In the place of an op, the layer that it is, if it is one of the student's: another of its
    class, of the tensors in ``root``."""
    names = {str(x.target): [str(x.target)] for x in node.all_input_nodes if x.op == "get_attr"}
    found = next(layers_of(node, names, student), None)
    if found is None:
        return
    (path, kind), args = found, bind(node)
    layer, held = student.get_submodule(path), root.get_submodule(path)
    new = kind.layer.__new__(kind.layer)
    nn.Module.__init__(new)
    own = {name: copy.copy(x) for name, x in vars(layer).items() if name not in REGISTRIES}
    vars(new).update(own | kind.widths(held.get_parameter("weight").shape, args), training=False)
    new._parameters.update(dict.fromkeys(layer._parameters) | held._parameters)
    new._buffers.update(held._buffers)
    new._non_persistent_buffers_set.update(held._non_persistent_buffers_set)
    add_module(root, path, new)
    data = "indices" if kind.layer is nn.Embedding else "input"
    node.op, node.target, node.args, node.kwargs = "call_module", path, (args[data],), {}
