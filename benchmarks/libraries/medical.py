"""Medical images: the networks of monai."""

from __future__ import annotations

from typing import Any

from benchmarks.libraries.entry import Entry, Inputs, Table, floats, images, join, net, tokens

_GREY = images(1, 32, 2)
_VOLUME = floats(2, 1, 16, 16, 16)
_FLAT: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
_STEPS: dict[str, Any] = {"channels": (4, 8, 16), "strides": (2, 2)}
_ATTENTION: dict[str, Any] = {"hidden_size": 32, "mlp_dim": 48, "num_heads": 4}
_KL: dict[str, Any] = {"channels": (8, 16), "attention_levels": (False, True), "num_res_blocks": 1}


def _monai(name: str, inputs: Inputs = _GREY, **keywords: Any) -> Entry:
    return net(f"monai.networks.nets:{name}", inputs, **keywords)


TABLE: Table = {
    "monai": {
        "UNet": _monai("UNet", **_FLAT, **_STEPS, num_res_units=1),
        "AttentionUnet": _monai("AttentionUnet", **_FLAT, **_STEPS),
        "BasicUNetPlusPlus": _monai("BasicUNetPlusPlus", **_FLAT, features=(4, 4, 8, 8, 16, 4)),
        "DynUNet": _monai(
            "DynUNet",
            **_FLAT,
            **{"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2)},
            **{"filters": (4, 8, 16), "deep_supervision": True, "res_block": True},
        ),
        "FlexibleUNet": _monai(
            "FlexibleUNet",
            images(3, 64, 2),
            **{"in_channels": 3, "out_channels": 2, "backbone": "efficientnet-b0"},
            **{"decoder_channels": (32, 16, 16, 8, 8)},
        ),
        "VNet": _monai("VNet", _VOLUME, dropout_prob_down=0.1, dropout_prob_up=(0.1, 0.1)),
        "SegResNet": _monai("SegResNet", **_FLAT, blocks_down=(1, 1), blocks_up=(1,)),
        "SwinUNETR": _monai(
            "SwinUNETR",
            images(1, 64, 2),
            **_FLAT,
            **{"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2)},
            **{"window_size": 4},
        ),
        "UNETR": _monai(
            "UNETR", _VOLUME, **_ATTENTION, **{"in_channels": 1, "out_channels": 2, "img_size": 16}
        ),
        "MaskedAutoEncoderViT": _monai(
            "MaskedAutoEncoderViT",
            **_ATTENTION,
            **{"in_channels": 1, "img_size": 32, "patch_size": 8, "num_layers": 1},
            **{"decoder_hidden_size": 24, "decoder_mlp_dim": 32, "decoder_num_layers": 1},
            **{"decoder_num_heads": 4, "spatial_dims": 2},
        ),
        "HighResNet": _monai("HighResNet", **_FLAT),
        "VoxelMorph": net(
            "monai.networks.nets:VoxelMorph",
            floats(2, 1, 16, 16, 16, count=2),
            None,
            integration_steps=2,
        ),
        "Quicknat": _monai(
            "Quicknat", num_classes=3, num_channels=1, num_filters=8, se_block="CSE_SSE"
        ),
        "MedNeXt": _monai(
            "MedNeXt",
            **_FLAT,
            **{"init_filters": 8, "kernel_size": 3, "blocks_down": (1, 1, 1, 1)},
            **{"blocks_bottleneck": 1, "blocks_up": (1, 1, 1, 1), "global_resp_norm": True},
        ),
        "Restormer": net(
            "monai.networks.nets.restormer:Restormer",
            _GREY,
            **{"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "dim": 8},
            **{"num_refinement_blocks": 1, "heads": (1, 2, 2, 2)},
        ),
        "VQVAE": _monai(
            "VQVAE",
            **_FLAT,
            **{"channels": (8, 16), "num_res_layers": 1, "num_res_channels": (8, 16)},
            **{"downsample_parameters": ((2, 4, 1, 1),) * 2, "embedding_dim": 8},
            **{"upsample_parameters": ((2, 4, 1, 1, 0),) * 2},
        ),
        "DiffusionModelUNet": _monai(
            "DiffusionModelUNet",
            join(_GREY, tokens(2)),
            **{**_FLAT, **_KL, "norm_num_groups": 4, "num_head_channels": 8},
        ),
        "SPADENet": _monai(
            "SPADENet",
            join(images(3, 32, 2), _GREY),
            **{"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "label_nc": 3},
            **{"input_shape": (32, 32), "channels": [8, 16], "z_dim": 6},
            **{"spade_intermediate_channels": 8},
        ),
        "MILModel": _monai(
            "MILModel",
            floats(2, 3, 3, 32, 32),
            **{"num_classes": 2, "mil_mode": "att_trans", "pretrained": False},
            **{"backbone": "resnet18", "trans_blocks": 1},
        ),
        "HoVerNet": _monai("HoVerNet", images(3, 256, 2), mode="fast", out_classes=2),
    },
}
