"""Detectors and faces: networks of the YAML files that ultralytics ships, and facenet-pytorch."""

from __future__ import annotations

import pkgutil
from typing import Any

from torch import nn

from benchmarks.libraries.entry import Entry, Table, images, net

_TASKS = {
    "cls": "Classification",
    "obb": "OBB",
    "pose": "Pose",
    "seg": "Segmentation",
}


def _yolo(name: str, kind: str = "") -> Entry:
    """The network of ``name.yaml``, half as wide as its smallest scale where it has scales."""
    task = f"ultralytics.nn.tasks:{kind or _TASKS.get(name.partition('-')[2], 'Detection')}Model"
    inputs = images(batch=2)

    def make() -> nn.Module:
        read: Any = pkgutil.resolve_name("ultralytics.nn.tasks:yaml_model_load")
        config = read(f"{name}.yaml")
        if "scales" in config:
            depth, _, most = config["scales"]["n"]
            config["scales"]["n"] = [depth, 0.125, most]
        return net(task, inputs, config, nc=3, verbose=False).make()

    return Entry(make, inputs)


TABLE: Table = {
    "ultralytics": {
        **{
            name: _yolo(name)
            for name in (
                *("yolov5n", "yolov6n", "yolov8n", "yolov9t", "yolov10n"),
                *("yolo11n", "yolo26n", "yolov8n-ghost"),
                *("yolov8n-cls", "yolo11n-seg", "yolov8n-pose", "yolo11n-obb", "yolo12n-cls"),
            )
        },
        "yolov8n-rtdetr": _yolo("yolov8n-rtdetr", "RTDETRDetection"),
    },
    "facenet-pytorch": {
        "InceptionResnetV1": net(
            "facenet_pytorch:InceptionResnetV1", images(size=80, batch=2), pretrained=None
        ),
        "PNet": net("facenet_pytorch.models.mtcnn:PNet", images(size=32)),
        "RNet": net("facenet_pytorch.models.mtcnn:RNet", images(size=24)),
        "ONet": net("facenet_pytorch.models.mtcnn:ONet", images(size=48)),
    },
}
