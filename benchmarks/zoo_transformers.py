"""Hugging Face architectures from small random configurations: no weights, no tokenizers.

A row is a model class, the inputs that it is called with, and what its configuration has besides
``SMALL``. Sizes differ wherever an architecture lets them, so that no two axes are taken for one.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[], dict[str, Tensor]]

BATCH = 3
LENGTH = 10
# Every configuration takes those that it knows; names that only one architecture has are here too
# where that keeps its row short.
SMALL: dict[str, Any] = {
    **{"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 100},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8},
    **{"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"embedding_size": 24, "ffn_dim": 80, "d_ff": 80, "d_inner": 80, "dff": 80, "n_inner": 80},
    **{"sliding_window": 4, "local_attention": 4, "window_size": 4, "attention_window": [4, 4]},
    # mixtures of experts, latent and linear attention
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "n_group": 2},
    **{"q_lora_rank": 28, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12},
    **{"v_head_dim": 14, "linear_value_head_dim": 20, "topk_group": 1, "kv_channels": 12},
    # encoder-decoders
    **{"encoder_ffn_dim": 80, "decoder_ffn_dim": 72, "decoder_layers": 2, "d_kv": 16},
    **{"decoder_attention_heads": 4, "num_decoder_layers": 2, "decoder_start_token_id": 1},
    **{"num_encoder_layers": 2, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
    **{"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    **{"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2, "decoder_hidden_size": 24},
    **{"decoder_intermediate_size": 40, "decoder_num_attention_heads": 2, "num_queries": 6},
    # audio
    **{"conv_dim": (24, 32), "conv_stride": (5, 4), "conv_kernel": (10, 6), "conv_channels": 40},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "codebook_dim": 16},
    **{"num_mel_bins": 16, "input_feat_per_channel": 16, "codebook_size": 16},
    **{"max_source_positions": 24, "max_target_positions": 64},
    # vision
    **{"image_size": 32, "patch_size": 8, "num_frames": 4, "projection_dim": 40, "num_stages": 4},
    **{"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, 40], "embed_dim": 12},
    # several kinds of input
    **{"visual_feat_dim": 20, "visual_embedding_dim": 20, "image_token_index": 99},
    **{"l_layers": 2, "x_layers": 1, "r_layers": 1, "projection_intermediate_dim": 40},
    # masks that numpy draws and layers that Python drops while training: no graph can hold them
    **{"apply_spec_augment": False, "layerdrop": 0.0},
    **{"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
}


# --------------------------------------------------------------------------- inputs
def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def tokens(length: int = LENGTH, name: str = "input_ids") -> dict[str, Tensor]:
    return {name: torch.randint(3, 100, (BATCH, length), generator=_draw())}


def text(length: int = LENGTH) -> dict[str, Tensor]:
    """Sequences of several lengths, padded on the right."""
    used = torch.arange(length) < torch.tensor([[length], [length - 2], [length // 2]])
    ids = tokens(length)["input_ids"] * used
    return {"input_ids": ids, "attention_mask": used.long()}


def written() -> dict[str, Tensor]:
    """What a decoder has said so far."""
    return tokens(7, "decoder_input_ids")


def steps() -> dict[str, Tensor]:
    return {"timesteps": torch.arange(7).repeat(BATCH, 1)}


def illustrated() -> dict[str, Tensor]:
    """Text after an image of 16 patches, each at the place of a token 99."""
    ids = torch.cat([torch.full((BATCH, 16), 99), tokens()["input_ids"] - 2], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels()}


def floats(name: str, *shape: int) -> Inputs:
    return lambda: {name: torch.randn((BATCH, *shape), generator=_draw())}


def join(*inputs: Inputs) -> Inputs:
    return lambda: {name: x for make in inputs for name, x in make().items()}


pixels = floats("pixel_values", 3, 32, 32)
large = floats("pixel_values", 3, 64, 64)
small = floats("pixel_values", 3, 16, 16)
video = floats("pixel_values", 4, 3, 32, 32)
regions = floats("visual_feats", 6, 20)
audio = floats("input_values", 400)
pair = join(text, written)
both = join(text, pixels)
trajectory = join(
    *(floats(name, 7, n) for name, n in (("states", 5), ("actions", 3), ("returns_to_go", 1))),
    steps,
)

series = join(
    *(
        floats(f"past_{name}", 21, *shape)
        for name, shape in (("values", ()), ("time_features", (2,)))
    ),
    lambda: {"past_observed_mask": torch.ones(BATCH, 21)},
    *(
        floats(f"future_{name}", 6, *shape)
        for name, shape in (("values", ()), ("time_features", (2,)))
    ),
)


def boxes() -> dict[str, Tensor]:
    return {"bbox": torch.randint(0, 30, (BATCH, LENGTH, 4), generator=_draw())}


def unpadded() -> dict[str, Tensor]:
    return {"past_values_padding": torch.zeros(BATCH, 32), "freq": torch.zeros(BATCH, 1).long()}


# --------------------------------------------------------------------------- the table
@dataclasses.dataclass(frozen=True)
class Entry:
    """Keyword inputs, and what the configuration has besides ``SMALL``."""

    inputs: Inputs
    config: dict[str, Any]


def row(inputs: Inputs, **config: Any) -> Entry:
    return Entry(inputs, config)


DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
HEADS = {"num_attention_heads": [1, 2, 3, 5]}
WINDOWS = {"depths": [2, 2], "num_heads": [2, 3]}
LATENTS = {"num_latents": 6, "d_latents": 32, "d_model": 24, "num_self_attends_per_block": 2}
GROUPING = {"depths": [1, 1, 1], "num_group_tokens": [6, 3, 0], "num_output_groups": [6, 3, 0]}
NECK = {"neck_hidden_sizes": [12, 16, 20, 24], "fusion_hidden_size": 28}
PREDICTOR = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
LEVIT = {"image_size": 64, "patch_size": 16, "key_dim": [6, 6, 6], "hidden_sizes": [16, 24, 32]}
LEVIT |= {"num_attention_heads": [2, 3, 4], "depths": [1, 1, 1]}
MOBILE = {"hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 12, 16, 20, 24, 28, 64]}
WIDE = {"hidden_size": 64}
HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 6, "mamba_chunk_size": 4}
HYBRID |= {"layer_types": ["mamba", "attention"]}
SUBSAMPLED = {"num_mel_bins": 16, "subsampling_conv_channels": 8}
LABELS = {"num_character_labels": 12, "num_bpe_labels": 30, "num_wordpiece_labels": 40}
DINO = {"model_type": "dinov2", "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
DINO |= {"reshape_hidden_states": False}
DEPTH = {"reassemble_hidden_size": 48, "head_hidden_size": 12}
VITDET = {"model_type": "vitdet", "num_channels": 4, "patch_size": 16, "out_features": ["stage2"]}
SWIN = {"model_type": "swin", "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}
SWIN |= {"patch_size": 4, "window_size": 2}
DECODER = {"model_type": "detr", "d_model": 32, "decoder_layers": 2, "num_queries": 6}
MASKS = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_layers": 1}
MASKS |= {"encoder_feedforward_dim": 40, "dim_feedforward": 40, "backbone_config": SWIN}
HGNET = {"model_type": "hgnet_v2", "stem_channels": [3, 8, 12], "embedding_size": 12}
HGNET |= {"stage_in_channels": [12, 12, 16, 24], "stage_mid_channels": [8, 12, 16, 20]}
HGNET |= {"stage_out_channels": [12, 16, 24, 32], "hidden_sizes": [12, 16, 24, 32]}
HGNET |= {"stage_num_blocks": [1, 1, 1, 1], "out_indices": [2, 3, 4]}
RESNET = {"model_type": "rt_detr_resnet", "embedding_size": 8, "layer_type": "basic"}
RESNET |= {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "out_indices": [2, 3, 4]}
DETR = {"backbone_config": RESNET, "encoder_in_channels": [16, 24, 32], "num_denoising": 0}
DETR |= {"encoder_hidden_dim": 16, "encoder_ffn_dim": 24, "d_model": 16, "decoder_layers": 2}
DETR |= {"decoder_in_channels": [16, 16, 16], "decoder_ffn_dim": 40}
SERIES = {"prediction_length": 6, "context_length": 14, "num_time_features": 2, "d_model": 24}
SERIES |= {"lags_sequence": [1, 2, 7]}

TABLE = {
    # encoders of text
    "AlbertForMaskedLM": row(text),
    "BertForSequenceClassification": row(text),
    "BertGenerationEncoder": row(text),
    "BigBirdForSequenceClassification": row(text, attention_type="original_full"),
    "CamembertForMaskedLM": row(text),
    "CanineForSequenceClassification": row(text, num_hash_buckets=64),
    "ConvBertForTokenClassification": row(text),
    "DPRQuestionEncoder": row(text),
    "Data2VecTextForMaskedLM": row(text),
    "DebertaForMaskedLM": row(text, **DISENTANGLED),
    "DebertaV2ForSequenceClassification": row(text, **DISENTANGLED),
    "DistilBertForSequenceClassification": row(text, hidden_dim=80),
    "ElectraForPreTraining": row(text),
    "EmbeddingGemma2Model": row(text),
    "ErnieForMaskedLM": row(text),
    "EsmForMaskedLM": row(text, mask_token_id=3),
    "EuroBertForMaskedLM": row(text),
    "FNetForSequenceClassification": row(tokens),
    "FlaubertForSequenceClassification": row(text, emb_dim=48),
    "FunnelForSequenceClassification": row(text, block_sizes=[1, 1], d_head=12),
    "GteForMaskedLM": row(text),
    "IBertForSequenceClassification": row(text),
    "JinaEmbeddingsV3ForMaskedLM": row(text),
    "LayoutLMForTokenClassification": row(text, max_2d_position_embeddings=32),
    "LiltForTokenClassification": row(text),
    "LongformerForSequenceClassification": row(text),
    "LukeForMaskedLM": row(text, entity_vocab_size=30, entity_emb_size=20),
    "MPNetForMaskedLM": row(text),
    "MT5EncoderModel": row(text),
    "MarkupLMForTokenClassification": row(text, max_depth=6, xpath_unit_hidden_size=8),
    "MegatronBertForMaskedLM": row(text),
    "MobileBertForSequenceClassification": row(text, intra_bottleneck_size=32),
    "ModernBertForMaskedLM": row(text),
    "MraForMaskedLM": row(text),
    "NeoMMEForMaskedLM": row(text),
    "NomicBertForMaskedLM": row(text),
    "NystromformerForMaskedLM": row(text, num_landmarks=10, segment_means_seq_len=10),
    "OpenAIPrivacyFilterForTokenClassification": row(text),
    "PerceiverForSequenceClassification": row(text, **LATENTS, num_self_attention_heads=4),
    "RemBertForMaskedLM": row(text, input_embedding_size=24, output_embedding_size=40),
    "RoCBertForMaskedLM": row(text, pronunciation_vocab_size=20, shape_vocab_size=30),
    "RoFormerForMaskedLM": row(text),
    "RobertaForMaskedLM": row(text),
    "RobertaPreLayerNormForMaskedLM": row(text),
    "SplinterForQuestionAnswering": row(text, question_token_id=3),
    "SqueezeBertForMaskedLM": row(text, embedding_size=48),
    "TapasForSequenceClassification": row(text),
    "UltrabertForMaskedLM": row(text),
    "XLMForSequenceClassification": row(text, emb_dim=48),
    "XLMRobertaForMaskedLM": row(text),
    "XLMRobertaXLForMaskedLM": row(text),
    "XLNetForSequenceClassification": row(text),
    "XmodForMaskedLM": row(text, default_language="en_XX"),
    "YosoForMaskedLM": row(text),
    # causal decoders
    "AfmoeForCausalLM": row(text),
    "ApertusForCausalLM": row(text),
    "ArceeForCausalLM": row(text),
    "BeamForCausalLM": row(text),
    "BioGptForCausalLM": row(text),
    "BitNetForCausalLM": row(text),
    "BloomForCausalLM": row(text),
    "CTRLLMHeadModel": row(text),
    "CodeGenForCausalLM": row(text),
    "Cohere2ForCausalLM": row(text),
    "Cohere2MoeForCausalLM": row(text),
    "CohereForCausalLM": row(text),
    "DeepseekV2ForCausalLM": row(text, first_k_dense_replace=1, num_key_value_heads=4),
    "DeepseekV32ForCausalLM": row(text, first_k_dense_replace=1, num_key_value_heads=4),
    "DeepseekV3ForCausalLM": row(text, first_k_dense_replace=1, num_key_value_heads=4),
    "DiffLlamaForCausalLM": row(text),
    "DogeForCausalLM": row(text),
    "Dots1ForCausalLM": row(text, n_shared_experts=1),
    "Ernie4_5ForCausalLM": row(text),
    "Ernie4_5_MoeForCausalLM": row(text),
    "Exaone4ForCausalLM": row(text),
    "FalconForCausalLM": row(text),
    "FalconMambaForCausalLM": row(text, conv_kernel=4),
    "FlexOlmoForCausalLM": row(text),
    "GPT2LMHeadModel": row(text),
    "GPTBigCodeForCausalLM": row(text),
    "GPTJForCausalLM": row(text),
    "GPTNeoForCausalLM": row(text, attention_types=[[["global", "local"], 1]]),
    "GPTNeoXForCausalLM": row(text),
    "Gemma2ForCausalLM": row(text),
    "Gemma3ForCausalLM": row(text),
    "GemmaForCausalLM": row(text),
    "Glm4ForCausalLM": row(text),
    "Glm4MoeForCausalLM": row(text),
    "GlmForCausalLM": row(text),
    "GptOssForCausalLM": row(text),
    "GraniteForCausalLM": row(text),
    "GraniteMoeForCausalLM": row(text),
    "GraniteMoeHybridForCausalLM": row(text, **HYBRID),
    "GraniteMoeSharedForCausalLM": row(text),
    "HeliumForCausalLM": row(text, head_dim=12),
    "HunYuanMoEV1ForCausalLM": row(text),
    "JambaForCausalLM": row(text, attn_layer_period=2, attn_layer_offset=1),
    "JetMoeForCausalLM": row(text),
    "Lfm2ForCausalLM": row(text),
    "Lfm2MoeForCausalLM": row(text, layer_types=["conv", "full_attention"]),
    "Llama4ForCausalLM": row(text),
    "LlamaForCausalLM": row(text),
    "Mamba2ForCausalLM": row(text, conv_kernel=4, num_heads=6, n_groups=2, chunk_size=4),
    "MambaForCausalLM": row(text, conv_kernel=4),
    "MiniCPM3ForCausalLM": row(text, num_key_value_heads=4),
    "MiniMaxForCausalLM": row(text, block_size=4),
    "MiniMaxM2ForCausalLM": row(text),
    "MistralForCausalLM": row(text),
    "MixtralForCausalLM": row(text),
    "ModernBertDecoderForCausalLM": row(text),
    "MptForCausalLM": row(text),
    "MusicgenForCausalLM": row(lambda: {"input_ids": tokens()["input_ids"].repeat(4, 1)}),
    "NanoChatForCausalLM": row(text),
    "NemotronForCausalLM": row(text),
    "NemotronHForCausalLM": row(
        text,
        conv_kernel=4,
        mamba_num_heads=6,
        mamba_head_dim=12,
        ssm_state_size=6,
        n_groups=2,
        chunk_size=4,
        layers_block_type=["mamba", "attention"],
    ),
    "OPTForCausalLM": row(text, word_embed_proj_dim=24),
    "Olmo2ForCausalLM": row(text),
    "OlmoForCausalLM": row(text),
    "OlmoHybridForCausalLM": row(text),
    "OlmoeForCausalLM": row(text),
    "OpenAIGPTLMHeadModel": row(text),
    "PersimmonForCausalLM": row(text),
    "Phi3ForCausalLM": row(text),
    "PhiForCausalLM": row(text),
    "PhimoeForCausalLM": row(text),
    "Qwen2ForCausalLM": row(text),
    "Qwen2MoeForCausalLM": row(text),
    "Qwen3ForCausalLM": row(text),
    "Qwen3MoeForCausalLM": row(text),
    "Qwen3NextForCausalLM": row(text, layer_types=["linear_attention", "full_attention"]),
    "Qwen3_5ForCausalLM": row(text, layer_types=["linear_attention", "full_attention"]),
    "Qwen3_5MoeForCausalLM": row(text, layer_types=["linear_attention", "full_attention"]),
    "RecurrentGemmaForCausalLM": row(text, num_hidden_layers=3, lru_width=40),
    "RwkvForCausalLM": row(tokens, use_cache=False),  # it writes to states that backward needs
    "SmolLM3ForCausalLM": row(text),
    "StableLmForCausalLM": row(text, num_attention_heads=3, num_key_value_heads=1),
    "Starcoder2ForCausalLM": row(text),
    "TrOCRForCausalLM": row(text),
    "VaultGemmaForCausalLM": row(text),
    "XGLMForCausalLM": row(text),
    "ZayaForCausalLM": row(text, num_experts_per_tok=1),
    # encoder-decoders
    "BartForConditionalGeneration": row(pair),
    "BigBirdPegasusForConditionalGeneration": row(pair, attention_type="original_full"),
    "BlenderbotForConditionalGeneration": row(pair),
    "BlenderbotSmallForConditionalGeneration": row(pair),
    "EncoderDecoderModel": row(pair),
    "FSMTForConditionalGeneration": row(pair, src_vocab_size=100, tgt_vocab_size=110),
    "LEDForConditionalGeneration": row(pair),
    "LongT5ForConditionalGeneration": row(pair, local_radius=3),
    "M2M100ForConditionalGeneration": row(pair),
    "MBartForConditionalGeneration": row(pair),
    "MarianMTModel": row(pair),
    "MvpForConditionalGeneration": row(pair),
    "NllbMoeForConditionalGeneration": row(pair),
    "PLBartForConditionalGeneration": row(pair),
    "PegasusForConditionalGeneration": row(pair),
    "PegasusXForConditionalGeneration": row(pair),
    "ProphetNetForConditionalGeneration": row(pair),
    "SwitchTransformersForConditionalGeneration": row(pair, num_sparse_encoder_layers=1),
    "T5ForConditionalGeneration": row(pair),
    "T5GemmaForConditionalGeneration": row(pair),
    "UMT5ForConditionalGeneration": row(pair),
    "UdopForConditionalGeneration": row(join(pair, floats("bbox", 10, 4))),
    # audio
    "ASTForAudioClassification": row(floats("input_values", 24, 16), max_length=24),
    "DacModel": row(
        floats("input_values", 1, 400),
        encoder_hidden_size=8,
        decoder_hidden_size=64,
        downsampling_ratios=[2, 4],
        upsampling_ratios=[4, 2],
        n_codebooks=2,
        codebook_dim=4,
    ),
    "Data2VecAudioForCTC": row(audio),
    "EncodecModel": row(
        floats("input_values", 1, 400),
        num_filters=4,
        hidden_size=16,
        codebook_size=16,
        upsampling_ratios=[4, 2],
    ),
    "HubertForSequenceClassification": row(audio),
    "LasrForCTC": row(floats("input_features", 32, 16), encoder_config=SUBSAMPLED),
    "MimiModel": row(
        floats("input_values", 1, 400),
        num_filters=4,
        upsampling_ratios=[4, 2],
        vector_quantization_hidden_dimension=16,
        num_quantizers=3,
        num_semantic_quantizers=1,
        upsample_groups=48,
    ),
    "MoonshineForConditionalGeneration": row(join(floats("input_values", 2000), written)),
    "ParakeetForCTC": row(floats("input_features", 32, 16), encoder_config=SUBSAMPLED),
    "SEWDForCTC": row(audio),
    "SEWForCTC": row(audio),
    "Speech2TextForConditionalGeneration": row(join(floats("input_features", 24, 16), written)),
    "SpeechEncoderDecoderModel": row(join(audio, written)),
    "SpeechT5ForSpeechToText": row(join(audio, written)),
    "UniSpeechForCTC": row(audio),
    "UniSpeechSatForSequenceClassification": row(audio),
    "Wav2Vec2BertForCTC": row(floats("input_features", 24, 160)),
    "Wav2Vec2ConformerForCTC": row(audio),
    "Wav2Vec2ForCTC": row(audio),
    "WavLMForSequenceClassification": row(audio),
    "WhisperForAudioClassification": row(floats("input_features", 16, 48)),
    "WhisperForConditionalGeneration": row(join(floats("input_features", 16, 48), written)),
    # images and video
    "Aimv2VisionModel": row(pixels),
    "BeitForImageClassification": row(pixels),
    "BitForImageClassification": row(pixels, num_groups=4),
    "CLIPVisionModelWithProjection": row(pixels),
    "ConditionalDetrForObjectDetection": row(large),
    "ConvNextForImageClassification": row(large),
    "ConvNextV2ForImageClassification": row(large),
    "CvtForImageClassification": row(
        pixels, embed_dim=[12, 20, 36], depth=[1, 2, 3], num_heads=[1, 2, 3]
    ),
    "DFineForObjectDetection": row(large, **DETR | {"backbone_config": HGNET}),
    "DINOv3ConvNextModel": row(large),
    "DINOv3ViTModel": row(pixels, num_register_tokens=2),
    "DPTForDepthEstimation": row(
        pixels, **NECK, num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3]
    ),
    "DabDetrForObjectDetection": row(large),
    "Data2VecVisionForImageClassification": row(pixels),
    "DeiTForImageClassificationWithTeacher": row(pixels),
    "DepthAnythingForDepthEstimation": row(pixels, **NECK, backbone_config=DINO, **DEPTH),
    "DetrForObjectDetection": row(large),
    "Dinov2ForImageClassification": row(pixels),
    "Dinov2WithRegistersForImageClassification": row(pixels),
    "DonutSwinModel": row(pixels, **WINDOWS, patch_size=2),
    "EfficientNetForImageClassification": row(
        pixels, width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=320
    ),
    "EomtForUniversalSegmentation": row(pixels, num_upscale_blocks=1, num_blocks=1),
    "FocalNetForImageClassification": row(pixels, depths=[1, 2], hidden_sizes=[12, 24]),
    "GLPNForDepthEstimation": row(large, **HEADS, decoder_hidden_size=36),
    "HGNetV2ForImageClassification": row(pixels, **HGNET),
    "HieraForImageClassification": row(
        large, image_size=[64, 64], patch_size=[7, 7], num_heads=[1, 2, 3, 4]
    ),
    "IJepaForImageClassification": row(pixels),
    "ImageGPTForImageClassification": row(tokens),
    "LevitForImageClassification": row(large, **LEVIT),
    "MLCDVisionModel": row(pixels),
    "Mask2FormerForUniversalSegmentation": row(large, **MASKS),
    "MaskFormerForInstanceSegmentation": row(large, backbone_config=SWIN, decoder_config=DECODER),
    "MetaClip2ForImageClassification": row(pixels),
    "MgpstrForSceneTextRecognition": row(
        pixels, image_size=[32, 32], patch_size=[8, 8], max_token_length=6, **LABELS
    ),
    "MobileNetV1ForImageClassification": row(pixels, depth_multiplier=0.25),
    "MobileNetV2ForImageClassification": row(pixels, depth_multiplier=0.25),
    "MobileViTForImageClassification": row(large, patch_size=2, **MOBILE),
    "MobileViTV2ForImageClassification": row(large, patch_size=2, width_multiplier=0.25),
    "PPLCNetForImageClassification": row(pixels),
    "PixioModel": row(pixels),
    "PixtralVisionModel": row(pixels),
    "PoolFormerForImageClassification": row(large),
    "PvtForImageClassification": row(large, **HEADS, image_size=64),
    "PvtV2ForImageClassification": row(large, **HEADS),
    "RTDetrForObjectDetection": row(large, **DETR),
    "RTDetrV2ForObjectDetection": row(large, **DETR),
    "RadioModel": row(pixels),
    "RegNetForImageClassification": row(pixels, groups_width=8),
    "ResNetForImageClassification": row(pixels),
    "SamVisionModel": row(pixels),
    "SegGptModel": row(
        join(pixels, floats("prompt_pixel_values", 3, 32, 32), floats("prompt_masks", 3, 32, 32)),
        image_size=[64, 32],
        intermediate_hidden_state_indices=[0, 1],
        merge_index=0,
        pretrain_image_size=32,
    ),
    "SegformerForSemanticSegmentation": row(large, **HEADS, decoder_hidden_size=36),
    "SiglipForImageClassification": row(pixels),
    "SuperPointForKeypointDetection": row(pixels),
    "SwiftFormerForImageClassification": row(
        large, depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 40]
    ),
    "Swin2SRForImageSuperResolution": row(small, **WINDOWS, image_size=16, patch_size=1),
    "SwinForImageClassification": row(pixels, **WINDOWS, patch_size=2),
    "Swinv2ForImageClassification": row(pixels, **WINDOWS, patch_size=2),
    "TableTransformerForObjectDetection": row(large),
    "TextNetForImageClassification": row(
        large,
        stem_out_channels=8,
        conv_layer_kernel_sizes=[[[3, 3]], [[3, 3], [1, 3]], [[3, 1]], [[3, 3]]],
        conv_layer_strides=[[2], [2, 1], [2], [2]],
        hidden_sizes=[8, 12, 16, 20, 24],
    ),
    "TimesformerForVideoClassification": row(video),
    "Tipsv2VisionModel": row(pixels),
    "UperNetForSemanticSegmentation": row(large, auxiliary_in_channels=24),
    "VJEPA2ForVideoClassification": row(
        floats("pixel_values_videos", 4, 3, 32, 32), crop_size=32, frames_per_clip=4, **PREDICTOR
    ),
    "ViTForImageClassification": row(pixels),
    "ViTForMaskedImageModeling": row(pixels, encoder_stride=8),
    "ViTMAEForPreTraining": row(join(pixels, floats("noise", 16))),
    "ViTMSNForImageClassification": row(pixels),
    "VideoMAEForVideoClassification": row(video),
    "VideoPrismVisionModel": row(floats("pixel_values_videos", 4, 3, 32, 32)),
    "VitDetModel": row(pixels),
    "VitMatteForImageMatting": row(
        floats("pixel_values", 4, 32, 32),
        backbone_config=VITDET,
        convstream_hidden_sizes=[12, 16, 20],
        fusion_hidden_sizes=[24, 20, 16, 12],
    ),
    "VivitForVideoClassification": row(video, tubelet_size=[2, 8, 8]),
    "YolosForObjectDetection": row(pixels, image_size=[32, 32], num_detection_tokens=6),
    # several kinds of input at once
    "AltCLIPModel": row(both),
    "BlipForConditionalGeneration": row(both),
    "BridgeTowerForImageAndTextRetrieval": row(
        both, hidden_size=64, text_config=WIDE, vision_config=WIDE
    ),
    "CLIPModel": row(both),
    "CLIPSegForImageSegmentation": row(both, extract_layers=[0, 1], reduce_dim=20),
    "ChineseCLIPModel": row(both),
    "FlavaModel": row(both),
    "Gemma3ForConditionalGeneration": row(illustrated, mm_tokens_per_image=16),
    "GitForCausalLM": row(both),
    "GroupViTModel": row(both, vision_config=GROUPING),
    "LayoutLMv3ForTokenClassification": row(
        join(text, pixels, boxes), input_size=32, coordinate_size=8, shape_size=8
    ),
    "LlavaForConditionalGeneration": row(illustrated, text_config={"model_type": "qwen2"}),
    "LxmertForQuestionAnswering": row(
        join(text, regions, floats("visual_pos", 6, 4)), num_qa_labels=5
    ),
    "MetaClip2Model": row(both),
    "OwlViTForObjectDetection": row(both, projection_dim=48),
    "Owlv2ForObjectDetection": row(both, projection_dim=48),
    "PaliGemmaForConditionalGeneration": row(illustrated, projection_dim=48),
    "SiglipModel": row(both),
    "ViltForQuestionAnswering": row(both),
    "VipLlavaForConditionalGeneration": row(illustrated, vision_feature_layers=[-1, -2]),
    "VisionEncoderDecoderModel": row(join(pixels, written)),
    "VisionTextDualEncoderModel": row(both),
    "VisualBertForQuestionAnswering": row(join(text, floats("visual_embeds", 6, 20))),
    # sequences of numbers
    "AutoformerModel": row(series, **SERIES, moving_average=3),
    "DecisionTransformerModel": row(trajectory, state_dim=5, act_dim=3, max_ep_len=20),
    "InformerModel": row(series, **SERIES),
    "PatchTSMixerForPrediction": row(floats("past_values", 32, 4), num_input_channels=4),
    "PatchTSTForPrediction": row(floats("past_values", 32, 4), num_input_channels=4),
    "TimeSeriesTransformerModel": row(series, **SERIES),
    "TimesFmModel": row(join(floats("past_values", 32), unpadded)),
}


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The network ``name`` with random weights, no positional inputs, and its keyword inputs."""
    entry = TABLE[name]
    # transformers would take this repository's folder for the package that is also called so
    sys.modules.setdefault("kernels", None)
    kind = getattr(importlib.import_module("transformers"), name)
    torch.manual_seed(0)
    model: nn.Module = kind(_config(kind.config_class, entry.config))
    return model, (), entry.inputs()


def _config(kind: Any, changes: dict[str, Any]) -> Any:
    """A configuration with the sizes in ``SMALL`` that it knows, parts included."""
    fields = {f.name: f.name for f in dataclasses.fields(kind)}
    known = {alias: name for alias, name in kind.attribute_map.items() if name in fields} | fields
    given = {known[k]: v for k, v in SMALL.items() if k in known} | {"num_labels": 5} | changes
    for part, spec in kind.sub_configs_defaults.items():
        if part in changes or not spec.optional:
            usual = {k: v for k, v in spec.init_kwargs.items() if k not in SMALL}
            chosen = usual | changes.get(part, {})
            family = chosen.pop("model_type", spec.model_type)
            given[part] = _config(spec.get_config_class(family), chosen)
    return kind(**given)
