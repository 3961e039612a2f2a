"""Diffusion: denoisers, autoencoders, and whole diffusions as networks."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.libraries.entry import Entry, Inputs, Table, floats, given, join, net, tokens

_TIMES = given(torch.tensor([3, 700]))
_TEXT = floats(2, 5, 32)


def _diffusers(name: str, inputs: Inputs, call: dict[str, Any] | None = None, **k: Any) -> Entry:
    return net(f"diffusers:{name}", inputs, call=call, **k)


def _unet(cross: bool) -> dict[str, Any]:
    attention = "CrossAttn" if cross else "Attn"
    return {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", f"{attention}DownBlock2D"),
        "up_block_types": (f"{attention}UpBlock2D", "UpBlock2D"),
    }


_ENCODER: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
}
_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}


def _noise(name: str, inputs: Inputs, unet: str = "Unet", **keywords: Any) -> Entry:
    """A denoiser of denoising-diffusion-pytorch in the diffusion that trains it."""
    package = "denoising_diffusion_pytorch"

    def make() -> Any:
        denoiser = net(f"{package}:{unet}", inputs, dim=16, dim_mults=(1, 2), attn_dim_head=8)
        return net(f"{package}:{name}", inputs, denoiser.make(), **keywords).make()

    return Entry(make, inputs)


_IMAGE = floats(2, 3, 16, 16)

TABLE: Table = {
    "diffusers": {
        "UNet2DModel": _diffusers("UNet2DModel", join(_IMAGE, _TIMES), **_unet(False)),
        "UNet2DConditionModel": _diffusers(
            "UNet2DConditionModel",
            join(floats(2, 4, 16, 16), _TIMES, _TEXT),
            cross_attention_dim=32,
            **_unet(True),
        ),
        "UNet1DModel": _diffusers(
            "UNet1DModel",
            join(floats(2, 14, 16), _TIMES),
            **{"in_channels": 14, "out_channels": 14, "time_embedding_type": "positional"},
            **{"block_out_channels": (16, 32), "norm_num_groups": 4, "act_fn": "mish"},
            **{"down_block_types": ("DownResnetBlock1D",) * 2, "out_block_type": "OutConv1DBlock"},
            **{"up_block_types": ("UpResnetBlock1D",), "mid_block_type": "MidResTemporalBlock1D"},
            **{"use_timestep_embedding": True},
        ),
        "UVit2DModel": _diffusers(
            "UVit2DModel",
            join(tokens(2, 8, 8, among=30), _TEXT, floats(2, 32), floats(2, 5)),
            **{"hidden_size": 32, "cond_embed_dim": 32, "micro_cond_encode_dim": 8},
            **{"micro_cond_embed_dim": 40, "encoder_hidden_size": 32, "vocab_size": 31},
            **{"codebook_size": 30, "in_channels": 32, "block_out_channels": 32},
            **{"num_res_blocks": 1, "block_num_heads": 4, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "intermediate_size": 48, "sample_size": 8},
        ),
        "AutoencoderKL": _diffusers("AutoencoderKL", _IMAGE, **_ENCODER),
        "AutoencoderDC": _diffusers(
            "AutoencoderDC",
            _IMAGE,
            **{"latent_channels": 4, "attention_head_dim": 8},
            **{"encoder_block_types": ("ResBlock", "EfficientViTBlock")},
            **{"decoder_block_types": ("ResBlock", "EfficientViTBlock")},
            **{"encoder_block_out_channels": (16, 32), "decoder_block_out_channels": (16, 32)},
            **{"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)},
            **{"encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,))},
        ),
        "DiTTransformer2DModel": _diffusers(
            "DiTTransformer2DModel",
            join(floats(2, 4, 8, 8), _TIMES, tokens(2, among=10)),
            **{"num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 1000, **_HEADS},
        ),
        "SD3Transformer2DModel": _diffusers(
            "SD3Transformer2DModel",
            join(floats(2, 4, 8, 8), _TEXT, floats(2, 24), _TIMES),
            **{"sample_size": 8, "in_channels": 4, "num_layers": 2, "joint_attention_dim": 32},
            **{"caption_projection_dim": 32, "pooled_projection_dim": 24, "out_channels": 4},
            **{"pos_embed_max_size": 8, "qk_norm": "rms_norm", "dual_attention_layers": (0,)},
            **_HEADS,
        ),
        "FluxTransformer2DModel": _diffusers(
            "FluxTransformer2DModel",
            join(
                *(floats(2, 16, 8), _TEXT, floats(2, 24), floats(2)),
                *(floats(16, 3), floats(5, 3)),
            ),
            **{"in_channels": 8, "num_layers": 1, "num_single_layers": 1, **_HEADS},
            **{"joint_attention_dim": 32, "pooled_projection_dim": 24},
            **{"axes_dims_rope": (4, 6, 6)},
        ),
        "PixArtTransformer2DModel": _diffusers(
            "PixArtTransformer2DModel",
            join(floats(2, 4, 8, 8), _TEXT, _TIMES),
            **{"num_layers": 2, "sample_size": 8, "cross_attention_dim": 32, **_HEADS},
            **{"caption_channels": 32, "use_additional_conditions": False},
        ),
        "WanTransformer3DModel": _diffusers(
            "WanTransformer3DModel",
            join(floats(2, 4, 2, 8, 8), _TIMES, _TEXT),
            **{"in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 16},
            **{"ffn_dim": 48, "num_layers": 2, "rope_max_seq_len": 32, **_HEADS},
        ),
    },
    "denoising-diffusion-pytorch": {
        "Unet": net(
            "denoising_diffusion_pytorch:Unet",
            join(_IMAGE, _TIMES),
            **{"dim": 16, "dim_mults": (1, 2), "attn_dim_head": 8},
        ),
        "KarrasUnet": net(
            "denoising_diffusion_pytorch:KarrasUnet",
            join(floats(2, 4, 16, 16), floats(2)),
            **{"image_size": 16, "dim": 16, "dim_max": 32, "num_downsamples": 1},
            **{"num_blocks_per_stage": 1, "attn_res": (8,), "attn_dim_head": 8},
        ),
        "GaussianDiffusion": _noise("GaussianDiffusion", _IMAGE, image_size=16, timesteps=20),
    },
}
