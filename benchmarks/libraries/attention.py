"""Attention in its many forms: transformers for text, images and signals, and what stands in
for attention."""

from __future__ import annotations

import pkgutil

import torch
from torch import Tensor, nn

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

IMAGE = images(3, 32)
SEQUENCE = floats(4, 16, 24)
TEXT = tokens(4, 16)
VIT = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 24, "heads": 3, "mlp_dim": 40}
LAYERS = {"dim": 24, "depth": 2, "heads": 3, "attn_dim_head": 8}


def _x(
    wrapper: str, layers: str, inputs: Inputs, outer: dict[str, object], **inner: object
) -> Entry:
    """A wrapper of x-transformers around its layers."""

    def make() -> nn.Module:
        found = pkgutil.resolve_name("x_transformers")
        stack = getattr(found, layers)(**{**LAYERS, **inner})
        return getattr(found, wrapper)(attn_layers=stack, **outer)

    return Entry(make, inputs)


def _text(**inner: object) -> Entry:
    outer: dict[str, object] = {"num_tokens": 100, "max_seq_len": 32}
    return _x("TransformerWrapper", "Decoder", TEXT, outer, **inner)


def _genome() -> nn.Module:
    found = pkgutil.resolve_name("enformer_pytorch.modeling_enformer:Enformer")
    size = {"dim": 48, "depth": 1, "heads": 2, "output_heads": {"human": 5}, "attn_dim_key": 8}
    return found.from_hparams(**size, target_length=4, num_downsamples=3, dim_divisible_by=4)


def _sentences(first: str, *args: object) -> Entry:
    """Modules of sentence-transformers, which put what they compute into the dict that they get."""

    def make() -> nn.Module:
        kinds = pkgutil.resolve_name("sentence_transformers.sentence_transformer.modules")
        dense = (kinds.Dense(24, 16), kinds.Dense(16, 8))
        return nn.Sequential(getattr(kinds, first)(*args), kinds.Pooling(24), *dense)

    def inputs() -> tuple[dict[str, Tensor]]:
        lengths = torch.tensor([16, 9, 12, 16])
        words = SEQUENCE()[0]
        mask = torch.arange(words.shape[1]) < lengths[:, None]
        return (
            {
                "token_embeddings": words,
                "attention_mask": mask.long(),
                "sentence_lengths": lengths,
            },
        )

    return Entry(make, inputs)


class Quantized(nn.Module):
    """A small autoencoder around a quantizer of vector-quantize-pytorch."""

    def __init__(self, kind: str, **keywords: object) -> None:
        super().__init__()
        found = pkgutil.resolve_name("vector_quantize_pytorch")
        self.encoder = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 8))
        self.quantizer = getattr(found, kind)(**keywords)
        self.decoder = nn.Sequential(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 12))

    def forward(self, x):  # type: ignore[no-untyped-def]
        quantized, *rest = self.quantizer(self.encoder(x))
        return self.decoder(quantized), *rest


def _quantized(kind: str, **keywords: object) -> Entry:
    return Entry(lambda: Quantized(kind, **keywords), floats(4, 10, 12))


TABLE: Table = {
    "CoLT5-attention": {
        "ConditionalRoutedFeedForward": net(
            *("colt5_attention:ConditionalRoutedFeedForward", floats(2, 32, 16), 16),
            **{"num_heavy_tokens": 8, "use_triton": False},
        ),
    },
    "axial-attention": {
        "AxialAttention": net(
            "axial_attention:AxialAttention", images(24, 8), 24, dim_index=1, heads=3
        ),
        "AxialImageTransformer": net(
            *("axial_attention:AxialImageTransformer", images(24, 8), 24, 2, 3),
            axial_pos_emb_shape=(8, 8),
        ),
    },
    "bottleneck-transformer-pytorch": {
        "BottleStack": net(
            "bottleneck_transformer_pytorch:BottleStack",
            images(16, 8),
            **{"dim": 16, "fmap_size": 8, "dim_out": 32, "heads": 2, "dim_head": 8},
            **{"num_layers": 2, "rel_pos_emb": True},
        ),
    },
    "conformer": {
        "ConformerBlock": net(
            "conformer:ConformerBlock", SEQUENCE, dim=24, dim_head=8, heads=3, conv_kernel_size=7
        ),
        "Conformer": net(
            *("conformer:Conformer", SEQUENCE, 24),
            **{"depth": 2, "dim_head": 8, "heads": 3, "conv_kernel_size": 7, "conv_causal": True},
        ),
    },
    "enformer-pytorch": {"Enformer": Entry(_genome, tokens(2, 64, among=5))},
    "g-mlp-pytorch": {
        "gMLP": net("g_mlp_pytorch:gMLP", TEXT, num_tokens=100, dim=24, depth=2, seq_len=16),
        "gMLP-causal": net(
            *("g_mlp_pytorch:gMLP", TEXT),
            **{"num_tokens": 100, "dim": 24, "depth": 2, "seq_len": 16, "causal": True},
            **{"attn_dim": 8, "circulant_matrix": True, "heads": 2},
        ),
        "gMLPVision": net(
            "g_mlp_pytorch:gMLPVision",
            IMAGE,
            **{"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 24, "depth": 2},
        ),
    },
    "hyper-connections": {"ViT": net("hyper_connections.vit:ViT", IMAGE, **VIT, depth=2)},
    "lambda-networks": {
        "LambdaLayer": net(
            *("lambda_networks:LambdaLayer", images(16, 8), 16),
            **{"dim_out": 16, "r": 5, "dim_k": 8, "heads": 4, "dim_u": 2},
        ),
        "LambdaLayer-global": net(
            *("lambda_networks:LambdaLayer", images(16, 8), 16), dim_out=16, n=8, dim_k=8
        ),
    },
    "linear-attention-transformer": {
        "LM": net(
            "linear_attention_transformer:LinearAttentionTransformerLM",
            TEXT,
            **{"num_tokens": 100, "dim": 24, "depth": 2, "max_seq_len": 16, "heads": 3},
            **{"causal": True, "blindspot_size": 4},
        ),
        "LM-local": net(
            "linear_attention_transformer:LinearAttentionTransformerLM",
            TEXT,
            **{"num_tokens": 100, "dim": 24, "depth": 2, "max_seq_len": 16, "heads": 4},
            **{"n_local_attn_heads": 2, "local_attn_window_size": 4, "reversible": True},
        ),
    },
    "linformer": {
        "Linformer": net("linformer:Linformer", SEQUENCE, 24, 16, 2, k=8, heads=3),
        "LinformerLM": net(
            *("linformer:LinformerLM", TEXT, 100, 24, 16, 2),
            **{"k": 8, "heads": 3, "one_kv_head": True, "share_kv": True},
        ),
    },
    "local-attention": {
        "LocalTransformer": net(
            "local_attention:LocalTransformer",
            TEXT,
            **{"num_tokens": 100, "max_seq_len": 16, "dim": 24, "depth": 2, "heads": 3},
            **{"local_attn_window_size": 4, "dim_head": 8},
        ),
        "LocalMHA": net(
            "local_attention:LocalMHA",
            SEQUENCE,
            **{"dim": 24, "window_size": 4, "heads": 3, "dim_head": 8, "causal": True},
            **{"qk_rmsnorm": True, "use_xpos": True, "xpos_scale_base": 4},
        ),
    },
    "memorizing-transformers-pytorch": {
        "MemorizingTransformer": net(
            *("memorizing_transformers_pytorch:MemorizingTransformer",),
            join(TEXT, given([])),
            **{"num_tokens": 100, "dim": 24, "depth": 2, "dim_head": 8, "heads": 3},
            **{"memorizing_layers": (), "xl_max_memories": 16},
        ),
    },
    "mlp-mixer-pytorch": {
        "MLPMixer": net(
            "mlp_mixer_pytorch:MLPMixer",
            IMAGE,
            **{"image_size": 32, "channels": 3, "patch_size": 8, "dim": 24, "depth": 2},
            num_classes=5,
        ),
    },
    "perceiver-pytorch": {
        "Perceiver": net(
            "perceiver_pytorch:Perceiver",
            floats(4, 8, 8, 3),
            **{"num_freq_bands": 3, "depth": 2, "max_freq": 8.0, "num_latents": 6},
            **{"latent_dim": 16, "latent_heads": 2, "latent_dim_head": 8, "cross_dim_head": 8},
            **{"num_classes": 5, "weight_tie_layers": True},
        ),
        "PerceiverIO": net(
            *("perceiver_pytorch:PerceiverIO", SEQUENCE),
            call={"queries": floats(5, 20)()[0]},
            **{"depth": 2, "dim": 24, "queries_dim": 20, "logits_dim": 7, "num_latents": 6},
            **{"latent_dim": 16, "latent_heads": 2, "latent_dim_head": 8, "cross_dim_head": 8},
        ),
    },
    "performer-pytorch": {
        "PerformerLM": net(
            "performer_pytorch:PerformerLM",
            TEXT,
            **{"num_tokens": 100, "max_seq_len": 16, "dim": 24, "depth": 2, "heads": 3},
            **{"dim_head": 8, "nb_features": 12},
        ),
        "Performer-relu": net(
            *("performer_pytorch:Performer", SEQUENCE, 24, 2, 3, 8),
            **{"generalized_attention": True, "ff_glu": True, "use_rezero": True},
        ),
    },
    "recurrent-memory-transformer-pytorch": {
        "RecurrentMemoryTransformer": net(
            *("recurrent_memory_transformer_pytorch:RecurrentMemoryTransformer", TEXT, 24),
            **{"num_tokens": 100, "depth": 2, "num_memory_tokens": 4, "seq_len": 16, "heads": 3},
            dim_head=8,
        ),
    },
    "reformer-pytorch": {
        "ReformerLM-full": net(
            *("reformer_pytorch:ReformerLM", TEXT, 100, 24, 2, 16),
            **{"heads": 3, "bucket_size": 4, "use_full_attn": True, "causal": True},
        ),
        "LSHSelfAttention": net(
            *("reformer_pytorch:LSHSelfAttention", SEQUENCE, 24, 3), bucket_size=4, n_hashes=2
        ),
    },
    "sentence-transformers": {
        "CNN-Dense": _sentences("CNN", 24, 12, [1, 3]),
        "LSTM-Dense": _sentences("LSTM", 24, 12),
    },
    "siren-pytorch": {
        "SirenNet": net("siren_pytorch:SirenNet", floats(32, 2), 2, 24, 3, 3),
    },
    "soft-moe-pytorch": {
        "SoftMoE": net("soft_moe_pytorch:SoftMoE", SEQUENCE, 24, seq_len=16, num_experts=4),
    },
    "st-moe-pytorch": {
        "MoE": net("st_moe_pytorch:MoE", SEQUENCE, 24, num_experts=4),
    },
    "titans-pytorch": {
        "NeuralMemory": net("titans_pytorch:NeuralMemory", SEQUENCE, 24, 4),
        "MemoryAsContextTransformer": net(
            "titans_pytorch:MemoryAsContextTransformer",
            TEXT,
            **{"num_tokens": 100, "dim": 24, "depth": 2, "segment_len": 4, "heads": 3},
            **{"dim_head": 8, "num_persist_mem_tokens": 2, "num_longterm_mem_tokens": 2},
        ),
    },
    "vector-quantize-pytorch": {
        "VQ": _quantized("VectorQuantize", dim=8, codebook_size=16),
        "ResidualVQ": _quantized("ResidualVQ", dim=8, num_quantizers=2, codebook_size=16),
        "FSQ": _quantized("FSQ", levels=[8, 5, 5], dim=8),
        "LFQ": _quantized("LFQ", dim=8, codebook_size=16),
        "SimVQ": _quantized("SimVQ", dim=8, codebook_size=16),
    },
    "x-transformers": {
        "Decoder": _text(),
        "Decoder-rotary": _text(
            rotary_pos_emb=True, use_rmsnorm=True, ff_glu=True, ff_swish=True, attn_kv_heads=1
        ),
        "Decoder-alibi": _text(alibi_pos_bias=True, alibi_num_heads=2, attn_qk_norm=True),
        "Encoder-memory": _x(
            *("TransformerWrapper", "Encoder", TEXT),
            {"num_tokens": 100, "max_seq_len": 32, "num_memory_tokens": 3, "l2norm_embed": True},
            **{"scale_residual": True, "macaron": True},
        ),
        "Continuous": _x(
            *("ContinuousTransformerWrapper", "Encoder", floats(4, 16, 10)),
            {"dim_in": 10, "dim_out": 7, "max_seq_len": 32},
            dynamic_pos_bias=True,
        ),
        "XTransformer": net(
            "x_transformers:XTransformer",
            join(tokens(4, 12), tokens(4, 9)),
            **{"dim": 24, "enc_num_tokens": 100, "enc_depth": 1, "enc_heads": 3},
            **{"enc_max_seq_len": 16, "dec_num_tokens": 100, "dec_depth": 1, "dec_heads": 3},
            **{"dec_max_seq_len": 16, "enc_attn_dim_head": 8, "dec_attn_dim_head": 8},
        ),
    },
}
