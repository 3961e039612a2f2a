"""Images: backbones, detectors, segmentation."""

from __future__ import annotations

from benchmarks.libraries.entry import Table, images, net

TABLE: Table = {
    "segmentation-models-pytorch": {
        "Unet": net("segmentation_models_pytorch:Unet", images(), "resnet18", encoder_weights=None),
    },
    "vit-pytorch": {
        "SimpleViT": net(
            "vit_pytorch:SimpleViT",
            images(size=32),
            **{"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 48},
            **{"depth": 2, "heads": 4, "mlp_dim": 80},
        ),
    },
}
