"""Images: backbones, segmentation, compression, features, pictures with text."""

from __future__ import annotations

import pkgutil
from typing import Any

from torch import nn

from benchmarks.libraries.entry import (
    Entry,
    Inputs,
    Table,
    floats,
    given,
    images,
    join,
    net,
    tokens,
)

_PAIR = images(batch=2)
_SMALL = images(size=32, batch=2)
_ENCODER = {"encoder_name": "tu-mobilenetv3_small_050", "encoder_weights": None}
_NARROW: dict[str, Any] = {"decoder_channels": (32, 16, 16, 16, 16)}


def _smp(name: str, inputs: Inputs = _PAIR, **keywords: Any) -> Entry:
    return net(f"segmentation_models_pytorch:{name}", inputs, **{**_ENCODER, **keywords})


def _torchseg(name: str, **keywords: Any) -> Entry:
    encoder = "mobilenetv3_small_050"
    return net(f"torchseg:{name}", _PAIR, encoder, encoder_weights=None, **keywords)


def _compressai(name: str, *sizes: int) -> Entry:
    return net(f"compressai.models:{name}", _PAIR, *sizes)


def _hub(name: str, size: int = 64) -> Entry:
    """A network of pretrainedmodels, without its weights."""
    return net(f"pretrainedmodels:{name}", images(size=size, batch=2), 1000, pretrained=None)


def _trained(path: str, *args: Any, **keywords: Any) -> Entry:
    """A method of self-supervision around a small network of torchvision."""

    def make() -> nn.Module:
        backbone = net("torchvision.models:squeezenet1_1", _PAIR, num_classes=8).make()
        return net(path, _PAIR, backbone, *args, **keywords).make()

    return Entry(make, _PAIR)


def _coca() -> nn.Module:
    """CoCa, whose projection of texts is left uninitialized."""
    model: nn.Module = pkgutil.resolve_name("open_clip.coca_model:CoCa")(
        embed_dim=32,
        multimodal_cfg={"context_length": 7, "width": 32, "heads": 4, "layers": 1},
        vision_cfg={
            **{"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
            **{"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
        },
        text_cfg={
            **{"context_length": 7, "vocab_size": 100, "width": 32, "heads": 4, "layers": 1},
            **{"embed_cls": True, "output_tokens": True},
        },
    )
    nn.init.normal_(model.get_parameter("text_decoder.text_projection"), std=0.1)
    return model


TABLE: Table = {
    "segmentation-models-pytorch": {
        "Unet": _smp("Unet", **_NARROW, decoder_attention_type="scse"),
        "UnetPlusPlus": _smp("UnetPlusPlus", **_NARROW),
        "MAnet": _smp("MAnet", **_NARROW),
        "Linknet": _smp("Linknet"),
        "FPN": _smp("FPN", decoder_pyramid_channels=32, decoder_segmentation_channels=32),
        "PSPNet": _smp("PSPNet", psp_out_channels=32),
        "PAN": _smp("PAN", inputs=images(size=128, batch=2), decoder_channels=16),
        "DeepLabV3Plus": _smp("DeepLabV3Plus", decoder_channels=16),
        "UPerNet": _smp("UPerNet", decoder_channels=16),
        "Segformer": _smp("Segformer", encoder_name="mit_b0", decoder_segmentation_channels=16),
        "DPT": _smp(
            "DPT",
            **{"encoder_name": "tu-vit_tiny_patch16_224", "decoder_fusion_channels": 16},
            **{"decoder_intermediate_channels": (8, 16, 16, 16), "dynamic_img_size": True},
        ),
        "Unet mobileone": _smp("Unet", **_NARROW, encoder_name="mobileone_s0"),
    },
    "torchseg": {
        "Unet": _torchseg("Unet", **_NARROW),
        "DeepLabV3Plus": _torchseg("DeepLabV3Plus", decoder_channels=16),
    },
    "efficientnet-pytorch": {
        "EfficientNet": net(
            "efficientnet_pytorch:EfficientNet.from_name", _PAIR, "efficientnet-b0"
        ),
    },
    "pretrainedmodels": {
        "bninception": _hub("bninception", 224),
    },
    "kornia": {
        "HardNet": net("kornia.feature:HardNet", images(1, 32), False),
        "HyNet": net("kornia.feature:HyNet", images(1, 32), False),
        "SOSNet": net("kornia.feature:SOSNet", images(1, 32), False),
        "TFeat": net("kornia.feature:TFeat", images(1, 32), False),
        "KeyNet": net("kornia.feature:KeyNet", images(1, 32), False),
        "XFeatModel": net("kornia.feature.xfeat:XFeatModel", images(1, 64, 2)),
        "RRDBNet": net("kornia.models.rrdbnet:RRDBNet", images(size=16, batch=2), 3, 3, 4, 8, 1, 4),
        "SmallSRNet": net("kornia.models.small_sr:SmallSRNet", images(1, 16), 2, pretrained=False),
        "TinyViT": net(
            "kornia.models.tiny_vit:TinyViT",
            _PAIR,
            **{"img_size": 64, "num_classes": 5, "embed_dims": (8, 16, 32, 32)},
            **{"depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2), "window_sizes": (4, 4, 4, 2)},
        ),
    },
    "compressai": {
        "FactorizedPrior": _compressai("FactorizedPrior", 8, 12),
        "ScaleHyperprior": _compressai("ScaleHyperprior", 8, 12),
        "JointAutoregressive": _compressai("JointAutoregressiveHierarchicalPriors", 12, 12),
        "Cheng2020Attention": _compressai("Cheng2020Attention", 8),
    },
    "open-clip-torch": {
        "CLIP": net(
            "open_clip.model:CLIP",
            join(_SMALL, tokens(2, 7)),
            **{"embed_dim": 16, "quick_gelu": True},
            vision_cfg={"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
            text_cfg={"context_length": 7, "vocab_size": 100, "width": 32, "heads": 4, "layers": 2},
        ),
        "CLIP resnet": net(
            "open_clip.model:CLIP",
            join(_PAIR, tokens(2, 7)),
            embed_dim=16,
            vision_cfg={"image_size": 64, "layers": (1, 1, 1, 1), "width": 8, "head_width": 16},
            text_cfg={"context_length": 7, "vocab_size": 100, "width": 32, "heads": 4, "layers": 1},
        ),
        "CoCa": Entry(_coca, join(_SMALL, tokens(2, 7))),
    },
    "torchgeo": {
        "FCSiamConc": net(
            "torchgeo.models:FCSiamConc",
            floats(2, 2, 3, 64, 64),
            **{**_ENCODER, **_NARROW},
        ),
        "LTAE": net(
            "torchgeo.models:LTAE",
            floats(2, 6, 16),
            **{"in_channels": 16, "n_head": 4, "d_k": 4, "n_neurons": (32, 16), "d_model": 32},
            **{"len_max_seq": 6},
        ),
        "ConvLSTM": net("torchgeo.models:ConvLSTM", floats(2, 4, 3, 16, 16), 3, [8, 8], 3, 2),
        "CROMA": net(
            "torchgeo.models:CROMA",
            join(images(2, 32, 2), images(12, 32, 2)),
            **{"encoder_dim": 64, "encoder_depth": 2, "num_heads": 16, "image_size": 32},
        ),
        "DOFA": net(
            "torchgeo.models:DOFA",
            join(_SMALL, given([0.66, 0.55, 0.48])),
            **{"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3},
        ),
    },
    "lightly": {
        "SimCLRProjectionHead": net(
            "lightly.models.modules:SimCLRProjectionHead", floats(4, 32), 32, 48, 16
        ),
    },
    "byol-pytorch": {
        "BYOL": _trained(
            "byol_pytorch:BYOL",
            **{"image_size": 64, "hidden_layer": -1, "projection_size": 16},
            **{"projection_hidden_size": 24, "use_simplicial_embeddings": False},
            **{"augment_fn": nn.Identity()},
        ),
    },
    "x-clip": {
        "CLIP": net(
            "x_clip:CLIP",
            join(tokens(2, 8), images(size=32, batch=2)),
            call={"return_latents": True},
            **{"dim_text": 32, "dim_image": 32, "dim_latent": 16, "num_text_tokens": 100},
            **{"text_enc_depth": 1, "text_seq_len": 8, "text_heads": 2, "text_dim_head": 16},
            **{"visual_enc_depth": 1, "visual_image_size": 32, "visual_patch_size": 8},
            **{"visual_heads": 2, "visual_dim_head": 16},
        ),
    },
    "vit-pytorch": {},
}
