"""torchvision's networks for other tasks than classification: no weights, few classes, and the
smallest inputs that run in eval and train mode."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model_builder

KEYPOINTS = 4
Inputs = Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class Entry:
    """Positional inputs, and arguments of the builder and of ``forward``."""

    inputs: Inputs
    arguments: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)


# --------------------------------------------------------------------------- inputs
def floats(*shape: int, count: int = 1) -> Inputs:
    """``count`` tensors of that shape."""

    def make() -> tuple[Tensor, ...]:
        draw = torch.Generator().manual_seed(0)
        return tuple(torch.randn(shape, generator=draw) for _ in range(count))

    return make


def annotated() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different shapes, and the boxes, masks and keypoints of two objects in each."""
    draw = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[8.0, 8.0, 60.0, 50.0], [30.0, 20.0, 90.0, 88.0]])
    corners = boxes.reshape(2, 2, 2).repeat(1, KEYPOINTS // 2, 1)
    images = [torch.rand((3, *size), generator=draw) for size in ((96, 128), (112, 96))]
    targets = []
    for image in images:
        masks = torch.zeros((2, *image.shape[1:]), dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        visible = torch.ones((2, KEYPOINTS, 1))
        targets.append(
            {
                "boxes": boxes,
                "labels": torch.tensor([1, 3]),
                "masks": masks,
                "keypoints": torch.cat([corners, visible], -1),
            }
        )
    return images, targets


# --------------------------------------------------------------------------- the table
FEW = {"num_classes": 5}
SIZES = {"min_size": 96, "max_size": 128}
# A threshold that random weights pass, and no more boxes than a check needs.
BEST = {"detections_per_img": 10, "topk_candidates": 20, "score_thresh": 0.001}
PROPOSED = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20}
KEPT = {"box_detections_per_img": 10, "box_batch_size_per_image": 8}

IMAGES = floats(4, 3, 64, 64)  # four, as in benchmarks.networks
SEGMENT = Entry(IMAGES, FEW | {"aux_loss": True})
VIDEO = Entry(floats(4, 3, 4, 32, 32), FEW)
LARGE = Entry(floats(2, 3, 16, 224, 224), FEW)  # a size that the network bakes in
FLOW = Entry(floats(2, 3, 128, 128, count=2), call={"num_flow_updates": 2})
REGIONS = Entry(annotated, FEW | SIZES | PROPOSED | KEPT)
ANCHORS = Entry(annotated, FEW | SIZES | BEST)
FIXED = Entry(annotated, FEW | BEST)

TABLE = {
    "deeplabv3_mobilenet_v3_large": SEGMENT,
    "deeplabv3_resnet50": SEGMENT,
    "deeplabv3_resnet101": SEGMENT,
    "fcn_resnet50": SEGMENT,
    "fcn_resnet101": SEGMENT,
    "lraspp_mobilenet_v3_large": Entry(IMAGES, FEW),
    "mc3_18": VIDEO,
    "r2plus1d_18": VIDEO,
    "r3d_18": VIDEO,
    "s3d": Entry(floats(2, 3, 14, 224, 224), FEW),  # pools over 2 x 7 x 7 in the end
    "swin3d_t": VIDEO,
    "swin3d_s": VIDEO,
    "swin3d_b": VIDEO,
    "mvit_v1_b": LARGE,
    "mvit_v2_s": LARGE,
    "raft_small": FLOW,
    "raft_large": FLOW,
    "fasterrcnn_mobilenet_v3_large_320_fpn": REGIONS,
    "fasterrcnn_mobilenet_v3_large_fpn": REGIONS,
    "fasterrcnn_resnet50_fpn": REGIONS,
    "fasterrcnn_resnet50_fpn_v2": REGIONS,
    "maskrcnn_resnet50_fpn": REGIONS,
    "maskrcnn_resnet50_fpn_v2": REGIONS,
    "keypointrcnn_resnet50_fpn": Entry(annotated, REGIONS.arguments | {"num_keypoints": KEYPOINTS}),
    "retinanet_resnet50_fpn": ANCHORS,
    "retinanet_resnet50_fpn_v2": ANCHORS,
    "fcos_resnet50_fpn": ANCHORS,
    "ssd300_vgg16": FIXED,
    "ssdlite320_mobilenet_v3_large": FIXED,
}


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The network ``name`` with random weights, and its positional and keyword inputs."""
    entry = TABLE[name]
    builder = get_model_builder(name)
    known = inspect.signature(builder).parameters
    absent = {k: None for k in ("weights", "weights_backbone") if k in known}
    torch.manual_seed(0)
    model: nn.Module = builder(**absent, **entry.arguments)
    return model, entry.inputs(), entry.call
