"""Sound: speech, separation, codecs, vocoders, classifiers."""

from __future__ import annotations

import pkgutil

import torch
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

WAVE = floats(4, 1, 2048)
ASTEROID = {"n_src": 2, "n_filters": 16, "kernel_size": 16, "stride": 8}


def _asteroid(name: str, *args: object, inputs: Inputs = WAVE, **keywords: object) -> Entry:
    return net(f"asteroid.models:{name}", inputs, *args, **keywords)


def _codec() -> nn.Module:
    """EnCodec, small."""
    part = pkgutil.resolve_name("encodec.modules")
    size = {"dimension": 16, "n_filters": 4, "ratios": [4, 2], "lstm": 1}
    encoder, decoder = part.SEANetEncoder(**size), part.SEANetDecoder(**size)
    quantizer = pkgutil.resolve_name("encodec.quantization:ResidualVectorQuantizer")(
        dimension=16, n_q=2, bins=32, kmeans_init=False
    )
    kind = pkgutil.resolve_name("encodec.model:EncodecModel")
    return kind(encoder, decoder, quantizer, [1.5], 8000, 1)


def _whisper() -> nn.Module:
    """Its sparse buffer, which forward does not read, held dense, as the refusal of it says."""
    found = pkgutil.resolve_name("whisper.model")
    model = found.Whisper(found.ModelDimensions(20, 16, 24, 3, 2, 50, 12, 24, 3, 2))
    model.register_buffer("alignment_heads", model.alignment_heads.to_dense(), persistent=False)
    return model


def _vocos(backbone: str, head: tuple[object, ...], *args: object) -> nn.Module:
    body = pkgutil.resolve_name(f"vocos.models:{backbone}")(*args)
    name, *sizes = head
    return nn.Sequential(body, pkgutil.resolve_name(f"vocos.heads:{name}")(*sizes))


def _dual_path() -> nn.Module:
    """The separator of SepFormer."""
    part = pkgutil.resolve_name("speechbrain.lobes.models.dual_path")
    size = {"num_layers": 1, "d_model": 16, "nhead": 2, "d_ffn": 24, "norm_before": True}
    inner, across = (part.SBTransformerBlock(**size, dropout=0.0) for _ in range(2))
    return part.Dual_Path_Model(12, 16, inner, across, num_layers=2, K=10)


def _speech(path: str, inputs: Inputs, *args: object, **keywords: object) -> Entry:
    return net(f"speechbrain.lobes.models.{path}", inputs, *args, **keywords)


def _relative_positions() -> tuple[torch.Tensor, ...]:
    """A sequence of 16 for speechbrain's Conformer; its distances go in as ``pos_embs``."""
    return (torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(0)),)


LENGTHS = given(torch.tensor([16, 16, 12, 10]))
TABLE: Table = {
    "asteroid": {
        "ConvTasNet": _asteroid(
            "ConvTasNet", **ASTEROID, n_blocks=2, n_repeats=2, bn_chan=12, hid_chan=24, skip_chan=12
        ),
        "DPRNNTasNet": _asteroid(
            "DPRNNTasNet", **ASTEROID, bn_chan=12, hid_size=12, chunk_size=20, n_repeats=2
        ),
        "SuDORMRFNet": _asteroid(
            "SuDORMRFNet", 2, bn_chan=12, num_blocks=2, upsampling_depth=3, n_filters=16
        ),
        "LSTMTasNet": _asteroid("LSTMTasNet", **ASTEROID, n_layers=2, hid_size=12),
        "DeMask": _asteroid("DeMask", hidden_dims=(24,), n_filters=64, kernel_size=64, stride=32),
        "DCUNet": _asteroid(
            "DCUNet", "mini", fix_length_mode="pad", stft_n_filters=128, stft_kernel_size=128
        ),
    },
    "demucs": {
        "Demucs": net(
            *("demucs.demucs:Demucs", floats(2, 2, 4096), ["a", "b"], 2, 8),
            **{"depth": 3, "resample": False, "norm_starts": 2, "dconv_attn": 2, "dconv_lstm": 2},
        ),
        "HDemucs": net(
            *("demucs.hdemucs:HDemucs", floats(2, 2, 4096), ["a", "b"], 2, 8),
            **{"depth": 4, "nfft": 256, "norm_starts": 3, "dconv_attn": 3, "dconv_lstm": 3},
        ),
        "HTDemucs": net(
            *("demucs.htdemucs:HTDemucs", floats(2, 2, 8000), ["a", "b"], 2, 8),
            **{"depth": 2, "nfft": 512, "t_layers": 2, "t_heads": 2, "samplerate": 8000},
            **{"segment": 1},
        ),
    },
    "descript-audio-codec": {
        "DAC": net(
            *("dac:DAC", WAVE, 8, [2, 4]),
            **{"decoder_dim": 32, "decoder_rates": [4, 2], "n_codebooks": 2, "codebook_size": 32},
        ),
        "Discriminator": net(
            "dac.model.discriminator:Discriminator", WAVE, periods=[2, 3], fft_sizes=[256, 128]
        ),
    },
    "encodec": {
        "EncodecModel": Entry(_codec, WAVE),
        "SEANetEncoder": net(
            *("encodec.modules:SEANetEncoder", WAVE),
            **{"dimension": 16, "n_filters": 4, "ratios": [4, 2], "causal": True, "lstm": 2},
        ),
    },
    "openai-whisper": {
        "Whisper": Entry(_whisper, join(floats(4, 20, 32), tokens(4, 12, among=50))),
    },
    "panns-inference": {
        "ConvBlock": net(
            "panns_inference.models:ConvBlock", images(1, 32), 1, 12, call={"pool_type": "avg+max"}
        ),
    },
    "resemblyzer": {
        "VoiceEncoder": net("resemblyzer:VoiceEncoder", floats(4, 20, 40), "cpu", verbose=False),
    },
    "speechbrain": {
        "ECAPA_TDNN": _speech(
            *("ECAPA_TDNN:ECAPA_TDNN", floats(4, 30, 12), 12),
            **{"channels": [16, 16, 16, 16, 48], "attention_channels": 12, "res2net_scale": 4},
            **{"se_channels": 8, "lin_neurons": 10},
        ),
        "CRDNN": _speech(
            *("CRDNN:CRDNN", floats(4, 16, 20)),
            **{"input_shape": [None, None, 20], "cnn_channels": [4, 6], "rnn_layers": 2},
            **{"rnn_neurons": 12, "dnn_neurons": 12},
        ),
        "Xvector": _speech(
            *("Xvector:Xvector", floats(4, 30, 12)),
            **{"tdnn_channels": [12, 12, 12, 12, 24], "lin_neurons": 10, "in_channels": 12},
        ),
        "ContextNet": _speech(
            *("ContextNet:ContextNet", floats(4, 32, 12), (None, None, 12)),
            **{"out_channels": 16, "conv_channels": [8, 12], "num_blocks": 2, "num_layers": 2},
            **{"strides": [1, 2], "residuals": [True, True]},
        ),
        "TransformerEncoder": _speech(
            *("transformer.Transformer:TransformerEncoder", floats(4, 16, 24)),
            **{"num_layers": 2, "nhead": 4, "d_ffn": 32, "d_model": 24, "normalize_before": True},
        ),
        "ConformerEncoder-relative": _speech(
            *("transformer.Conformer:ConformerEncoder", _relative_positions),
            **{"num_layers": 1, "d_model": 24, "d_ffn": 32, "nhead": 4, "kernel_size": 7},
            call={"pos_embs": torch.randn(1, 31, 24)},
        ),
        "SepFormer": Entry(_dual_path, floats(2, 12, 40)),
        "TransformerASR": _speech(
            *("transformer.TransformerASR:TransformerASR",),
            join(floats(4, 16, 12), tokens(4, 7, among=20)),
            *(20, 12, 24, 4, 1, 1, 32),
        ),
    },
    "torchaudio": {
        "wav2vec2": net(
            *("torchaudio.models:wav2vec2_model", floats(4, 800), "group_norm"),
            *([(12, 10, 5), (12, 3, 2)], False, 24, 0.1, 8, 4, 2, 3, 0.1, 32, 0.1, 0.1),
            *(False, 0.0, 10),
        ),
        "Conformer": net(
            "torchaudio.models:Conformer", join(floats(4, 16, 12), LENGTHS), 12, 3, 20, 2, 5
        ),
        "Emformer": net(
            *("torchaudio.models:Emformer", join(floats(4, 18, 12), LENGTHS), 12, 3, 20, 2, 4),
            **{"left_context_length": 4, "right_context_length": 2, "max_memory_size": 2},
        ),
        "Tacotron2": net(
            "torchaudio.models:Tacotron2",
            join(
                tokens(4, 9, among=20),
                given(torch.tensor([9, 9, 7, 5])),
                floats(4, 8, 6),
                given(torch.tensor([6, 5, 5, 3])),
            ),
            **{"n_mels": 8, "n_symbol": 20, "symbol_embedding_dim": 12, "encoder_kernel_size": 3},
            **{"encoder_embedding_dim": 12, "decoder_rnn_dim": 16, "attention_rnn_dim": 16},
            **{"attention_hidden_dim": 8, "attention_location_n_filter": 4, "prenet_dim": 12},
            **{"postnet_embedding_dim": 12, "postnet_n_convolution": 3},
        ),
        "ConvTasNet": net("torchaudio.models:ConvTasNet", WAVE, 2, 16, 16, 3, 12, 24, 2, 2),
        "DeepSpeech": net("torchaudio.models:DeepSpeech", floats(4, 1, 10, 12), 12, 20, 8),
        "SquimObjective": net(
            "torchaudio.models:squim_objective_model",
            floats(4, 1600),
            *(16, 16, 16, 2, 12, 2, "GRU", 10),
        ),
    },
    "torchcrepe": {"Crepe": net("torchcrepe:Crepe", floats(4, 1024), "tiny")},
    "vocos": {
        "Vocos": Entry(
            lambda: _vocos("VocosBackbone", ("ISTFTHead", 16, 64, 16), 12, 16, 32, 2),
            floats(4, 12, 20),
        ),
        "Vocos-resnet": Entry(
            lambda: _vocos("VocosResNetBackbone", ("ISTFTHead", 16, 64, 16), 12, 16, 1),
            floats(4, 12, 20),
        ),
        "MultiResolutionDiscriminator": net(
            "vocos.discriminators:MultiResolutionDiscriminator",
            floats(2, 1024, count=2),
            (256, 128),
        ),
    },
}
