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

TABLE = {
    # encoders of text
    "AlbertForMaskedLM": row(text),
    "BertForSequenceClassification": row(text),
    "BigBirdForSequenceClassification": row(text, attention_type="original_full"),
    "CanineForSequenceClassification": row(text, num_hash_buckets=64),
    "ConvBertForTokenClassification": row(text),
    "DebertaForMaskedLM": row(text, **DISENTANGLED),
    "DebertaV2ForSequenceClassification": row(text, **DISENTANGLED),
    "DistilBertForSequenceClassification": row(text, hidden_dim=80),
    "ElectraForPreTraining": row(text),
    "EsmForMaskedLM": row(text, mask_token_id=3),
    "EuroBertForMaskedLM": row(text),
    "FNetForSequenceClassification": row(tokens),
    "FunnelForSequenceClassification": row(text, block_sizes=[1, 1], d_head=12),
    "IBertForSequenceClassification": row(text),
    "LayoutLMForTokenClassification": row(text, max_2d_position_embeddings=32),
    "LongformerForSequenceClassification": row(text),
    "MPNetForMaskedLM": row(text),
    "MegatronBertForMaskedLM": row(text),
    "MobileBertForSequenceClassification": row(text, intra_bottleneck_size=32),
    "ModernBertForMaskedLM": row(text),
    "MraForMaskedLM": row(text),
    "NomicBertForMaskedLM": row(text),
    "NystromformerForMaskedLM": row(text, num_landmarks=10, segment_means_seq_len=10),
    "PerceiverForSequenceClassification": row(text, **LATENTS, num_self_attention_heads=4),
    "RemBertForMaskedLM": row(text, input_embedding_size=24, output_embedding_size=40),
    "RoFormerForMaskedLM": row(text),
    "RobertaForMaskedLM": row(text),
    "SplinterForQuestionAnswering": row(text, question_token_id=3),
    "SqueezeBertForMaskedLM": row(text, embedding_size=48),
    "TapasForSequenceClassification": row(text),
    "XLMForSequenceClassification": row(text, emb_dim=48),
    "XLNetForSequenceClassification": row(text),
    # causal decoders
    "ApertusForCausalLM": row(text),
    "BioGptForCausalLM": row(text),
    "BloomForCausalLM": row(text),
    "CTRLLMHeadModel": row(text),
    "CodeGenForCausalLM": row(text),
    "CohereForCausalLM": row(text),
    "DeepseekV3ForCausalLM": row(text, first_k_dense_replace=1, num_key_value_heads=4),
    "DiffLlamaForCausalLM": row(text),
    "FalconForCausalLM": row(text),
    "FalconMambaForCausalLM": row(text, conv_kernel=4),
    "GPT2LMHeadModel": row(text),
    "GPTBigCodeForCausalLM": row(text),
    "GPTJForCausalLM": row(text),
    "GPTNeoForCausalLM": row(text, attention_types=[[["global", "local"], 1]]),
    "GPTNeoXForCausalLM": row(text),
    "Gemma2ForCausalLM": row(text),
    "Gemma3ForCausalLM": row(text),
    "GemmaForCausalLM": row(text),
    "GlmForCausalLM": row(text),
    "GptOssForCausalLM": row(text),
    "GraniteForCausalLM": row(text),
    "GraniteMoeForCausalLM": row(text),
    "JambaForCausalLM": row(text, attn_layer_period=2, attn_layer_offset=1),
    "JetMoeForCausalLM": row(text),
    "Lfm2ForCausalLM": row(text),
    "LlamaForCausalLM": row(text),
    "Mamba2ForCausalLM": row(text, conv_kernel=4, num_heads=6, n_groups=2, chunk_size=4),
    "MambaForCausalLM": row(text, conv_kernel=4),
    "MiniMaxForCausalLM": row(text, block_size=4),
    "MistralForCausalLM": row(text),
    "MixtralForCausalLM": row(text),
    "MptForCausalLM": row(text),
    "NemotronForCausalLM": row(text),
    "OPTForCausalLM": row(text, word_embed_proj_dim=24),
    "Olmo2ForCausalLM": row(text),
    "OpenAIGPTLMHeadModel": row(text),
    "PersimmonForCausalLM": row(text),
    "Phi3ForCausalLM": row(text),
    "PhiForCausalLM": row(text),
    "Qwen2ForCausalLM": row(text),
    "Qwen2MoeForCausalLM": row(text),
    "Qwen3ForCausalLM": row(text),
    "Qwen3MoeForCausalLM": row(text),
    "Qwen3NextForCausalLM": row(text, layer_types=["linear_attention", "full_attention"]),
    "RecurrentGemmaForCausalLM": row(text, num_hidden_layers=3, lru_width=40),
    "RwkvForCausalLM": row(tokens, use_cache=False),  # it writes to states that backward needs
    "StableLmForCausalLM": row(text, num_attention_heads=3, num_key_value_heads=1),
    "Starcoder2ForCausalLM": row(text),
    "XGLMForCausalLM": row(text),
    # encoder-decoders
    "BartForConditionalGeneration": row(pair),
    "BlenderbotForConditionalGeneration": row(pair),
    "FSMTForConditionalGeneration": row(pair, src_vocab_size=100, tgt_vocab_size=110),
    "LEDForConditionalGeneration": row(pair),
    "LongT5ForConditionalGeneration": row(pair, local_radius=3),
    "M2M100ForConditionalGeneration": row(pair),
    "MBartForConditionalGeneration": row(pair),
    "MarianMTModel": row(pair),
    "PegasusForConditionalGeneration": row(pair),
    "ProphetNetForConditionalGeneration": row(pair),
    "SwitchTransformersForConditionalGeneration": row(pair, num_sparse_encoder_layers=1),
    "T5ForConditionalGeneration": row(pair),
    "UMT5ForConditionalGeneration": row(pair),
    # audio
    "ASTForAudioClassification": row(floats("input_values", 24, 16), max_length=24),
    "EncodecModel": row(
        floats("input_values", 1, 400),
        num_filters=4,
        hidden_size=16,
        codebook_size=16,
        upsampling_ratios=[4, 2],
    ),
    "HubertForSequenceClassification": row(audio),
    "MoonshineForConditionalGeneration": row(join(floats("input_values", 2000), written)),
    "SEWForCTC": row(audio),
    "Speech2TextForConditionalGeneration": row(join(floats("input_features", 24, 16), written)),
    "UniSpeechSatForSequenceClassification": row(audio),
    "Wav2Vec2BertForCTC": row(floats("input_features", 24, 160)),
    "Wav2Vec2ConformerForCTC": row(audio),
    "Wav2Vec2ForCTC": row(audio),
    "WavLMForSequenceClassification": row(audio),
    "WhisperForAudioClassification": row(floats("input_features", 16, 48)),
    "WhisperForConditionalGeneration": row(join(floats("input_features", 16, 48), written)),
    # images and video
    "BeitForImageClassification": row(pixels),
    "BitForImageClassification": row(pixels, num_groups=4),
    "ConvNextForImageClassification": row(large),
    "ConvNextV2ForImageClassification": row(large),
    "CvtForImageClassification": row(
        pixels, embed_dim=[12, 20, 36], depth=[1, 2, 3], num_heads=[1, 2, 3]
    ),
    "DINOv3ViTModel": row(pixels, num_register_tokens=2),
    "DPTForDepthEstimation": row(
        pixels, **NECK, num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3]
    ),
    "DeiTForImageClassificationWithTeacher": row(pixels),
    "DetrForObjectDetection": row(large),
    "Dinov2ForImageClassification": row(pixels),
    "Dinov2WithRegistersForImageClassification": row(pixels),
    "EfficientNetForImageClassification": row(
        pixels, width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=320
    ),
    "FocalNetForImageClassification": row(pixels, depths=[1, 2], hidden_sizes=[12, 24]),
    "GLPNForDepthEstimation": row(large, **HEADS, decoder_hidden_size=36),
    "HieraForImageClassification": row(
        large, image_size=[64, 64], patch_size=[7, 7], num_heads=[1, 2, 3, 4]
    ),
    "IJepaForImageClassification": row(pixels),
    "ImageGPTForImageClassification": row(tokens),
    "LevitForImageClassification": row(large, **LEVIT),
    "MobileNetV1ForImageClassification": row(pixels, depth_multiplier=0.25),
    "MobileNetV2ForImageClassification": row(pixels, depth_multiplier=0.25),
    "MobileViTForImageClassification": row(large, patch_size=2, **MOBILE),
    "MobileViTV2ForImageClassification": row(large, patch_size=2, width_multiplier=0.25),
    "PoolFormerForImageClassification": row(large),
    "PvtForImageClassification": row(large, **HEADS, image_size=64),
    "PvtV2ForImageClassification": row(large, **HEADS),
    "RegNetForImageClassification": row(pixels, groups_width=8),
    "ResNetForImageClassification": row(pixels),
    "SegformerForSemanticSegmentation": row(large, **HEADS, decoder_hidden_size=36),
    "SiglipForImageClassification": row(pixels),
    "SwiftFormerForImageClassification": row(
        large, depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 40]
    ),
    "Swin2SRForImageSuperResolution": row(small, **WINDOWS, image_size=16, patch_size=1),
    "SwinForImageClassification": row(pixels, **WINDOWS, patch_size=2),
    "Swinv2ForImageClassification": row(pixels, **WINDOWS, patch_size=2),
    "TimesformerForVideoClassification": row(video),
    "UperNetForSemanticSegmentation": row(large, auxiliary_in_channels=24),
    "VJEPA2ForVideoClassification": row(
        floats("pixel_values_videos", 4, 3, 32, 32), crop_size=32, frames_per_clip=4, **PREDICTOR
    ),
    "ViTForImageClassification": row(pixels),
    "ViTForMaskedImageModeling": row(pixels, encoder_stride=8),
    "ViTMAEForPreTraining": row(join(pixels, floats("noise", 16))),
    "ViTMSNForImageClassification": row(pixels),
    "VideoMAEForVideoClassification": row(video),
    "VivitForVideoClassification": row(video, tubelet_size=[2, 8, 8]),
    "YolosForObjectDetection": row(pixels, image_size=[32, 32], num_detection_tokens=6),
    # several kinds of input at once
    "BlipForConditionalGeneration": row(both),
    "BridgeTowerForImageAndTextRetrieval": row(
        both, hidden_size=64, text_config=WIDE, vision_config=WIDE
    ),
    "CLIPModel": row(both),
    "CLIPSegForImageSegmentation": row(both, extract_layers=[0, 1], reduce_dim=20),
    "ChineseCLIPModel": row(both),
    "GitForCausalLM": row(both),
    "GroupViTModel": row(both, vision_config=GROUPING),
    "LlavaForConditionalGeneration": row(illustrated, text_config={"model_type": "qwen2"}),
    "LxmertForQuestionAnswering": row(
        join(text, regions, floats("visual_pos", 6, 4)), num_qa_labels=5
    ),
    "OwlViTForObjectDetection": row(both, projection_dim=48),
    "PaliGemmaForConditionalGeneration": row(illustrated, projection_dim=48),
    "SiglipModel": row(both),
    "VisionEncoderDecoderModel": row(join(pixels, written)),
    "VisualBertForQuestionAnswering": row(join(text, floats("visual_embeds", 6, 20))),
    # sequences of numbers
    "DecisionTransformerModel": row(trajectory, state_dim=5, act_dim=3, max_ep_len=20),
    "PatchTSMixerForPrediction": row(floats("past_values", 32, 4), num_input_channels=4),
    "PatchTSTForPrediction": row(floats("past_values", 32, 4), num_input_channels=4),
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
