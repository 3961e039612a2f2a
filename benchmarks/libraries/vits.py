"""vit-pytorch: vision transformers of many kinds."""

from __future__ import annotations

import pkgutil

from torch import nn

from benchmarks.libraries.entry import Entry, Inputs, Table, floats, images, net

IMAGE = images(3, 32)
VIT = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 24, "heads": 3, "mlp_dim": 40}


def _vit(path: str, inputs: Inputs = IMAGE, **keywords: object) -> Entry:
    """A network of vit-pytorch of two layers, with the usual arguments."""
    return net(f"vit_pytorch.{path}", inputs, **{**VIT, "depth": 2, "dim_head": 8}, **keywords)


def _stages(path: str, **keywords: object) -> Entry:
    """One that gets smaller by stages."""
    return net(f"vit_pytorch.{path}", images(3, 64), num_classes=5, **keywords)


def _masked() -> nn.Module:
    found = pkgutil.resolve_name("vit_pytorch")
    return found.MAE(
        encoder=found.ViT(**VIT, depth=1, pool="mean"), decoder_dim=16, decoder_dim_head=8
    )


TABLE: Table = {
    "vit-pytorch": {
        "ViT": _vit("vit:ViT"),
        "CaiT": _vit("cait:CaiT", cls_depth=1),
        "PiT": net("vit_pytorch.pit:PiT", IMAGE, **VIT, depth=(1, 1), dim_head=8),
        "XCiT": _vit("xcit:XCiT", cls_depth=1),
        "ViViT": net(
            "vit_pytorch.vivit:ViViT",
            floats(2, 3, 4, 32, 32),
            **{"image_size": 32, "image_patch_size": 8, "frames": 4, "frame_patch_size": 2},
            **{"num_classes": 5, "dim": 24, "spatial_depth": 1, "temporal_depth": 1},
            **{"heads": 3, "mlp_dim": 40, "dim_head": 8},
        ),
        "MAE": Entry(_masked, IMAGE),
        "LeViT": net(
            "vit_pytorch.levit:LeViT",
            images(3, 64),
            **{"image_size": 64, "num_classes": 5, "stages": 2, "dim": (16, 24), "depth": 1},
            **{"heads": (2, 3), "mlp_mult": 2, "dim_key": 8, "dim_value": 8},
        ),
        "NesT": net(
            "vit_pytorch.nest:NesT",
            IMAGE,
            **{"image_size": 32, "patch_size": 4, "dim": 12, "heads": 2, "num_hierarchies": 2},
            **{"block_repeats": (1, 1), "num_classes": 5, "dim_head": 8},
        ),
        "T2T": net(
            *("vit_pytorch.t2t:T2TViT", IMAGE),
            **{"image_size": 32, "num_classes": 5, "dim": 24, "depth": 1, "heads": 3},
            **{"mlp_dim": 40, "dim_head": 8, "t2t_layers": ((3, 2), (3, 2))},
        ),
        "MaxViT": _stages(
            "max_vit:MaxViT", dim_conv_stem=8, dim=8, dim_head=8, depth=(1, 1), window_size=4
        ),
        "CvT": _stages(
            *("cvt:CvT",),
            **{"s1_emb_dim": 8, "s2_emb_dim": 12, "s2_heads": 2, "s3_emb_dim": 16, "s3_heads": 2},
            **{"s2_depth": 1, "s3_depth": 1},
        ),
        "TwinsSVT": _stages(
            *("twins_svt:TwinsSVT",),
            **{"s1_emb_dim": 8, "s2_emb_dim": 12, "s3_emb_dim": 16, "s4_emb_dim": 20},
            **{"s1_local_patch_size": 4, "s1_global_k": 4, "s2_local_patch_size": 4},
            **{"s2_global_k": 4, "s3_local_patch_size": 4, "s3_global_k": 2, "s3_depth": 1},
            **{"s4_local_patch_size": 2, "s4_global_k": 2, "s4_depth": 1},
        ),
        "CrossFormer": _stages(
            *("crossformer:CrossFormer",),
            **{"dim": (32, 32, 32, 64), "depth": (1, 1, 1, 1), "global_window_size": (4, 2, 2, 1)},
            local_window_size=2,
        ),
        "ScalableViT": _stages(
            *("scalable_vit:ScalableViT",),
            **{"dim": 16, "heads": (2, 2), "depth": (1, 1), "reduction_factor": (4, 2)},
            **{"window_size": (8, 4), "ssa_dim_key": (8, 8), "ssa_dim_value": (8, 8)},
            **{"iwsa_dim_key": 8, "iwsa_dim_value": 8},
        ),
    },
}
