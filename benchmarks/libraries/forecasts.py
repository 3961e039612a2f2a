"""Forecasts and time series."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.libraries.entry import Entry, Table, floats, given, net

LENGTH, AHEAD, SERIES = 24, 6, 3
_SERIES = floats(4, SERIES, 32)


def _windows(series: int) -> Any:
    past = floats(4, LENGTH, series)()[0]
    nothing = dict.fromkeys(("futr_exog", "hist_exog", "stat_exog"))
    return given({"insample_y": past, "insample_mask": torch.ones_like(past), **nothing})


def _one(kind: str, **keywords: Any) -> Entry:
    """One series at a time."""
    path = f"neuralforecast.models:{kind}"
    return net(path, _windows(1), AHEAD, LENGTH, **{"max_steps": 1, **keywords})


def _many(kind: str, **keywords: Any) -> Entry:
    """Several together."""
    path = f"neuralforecast.models:{kind}"
    return net(path, _windows(SERIES), AHEAD, LENGTH, SERIES, **{"max_steps": 1, **keywords})


def _tsai(path: str, *args: Any, **keywords: Any) -> Entry:
    return net(f"tsai.models.{path}", _SERIES, SERIES, 4, *args, **keywords)


_MLP = {"mlp_units": [[16, 16]] * 3}
_ATTENTION = {"hidden_size": 16, "n_head": 2, "conv_hidden_size": 16}

TABLE: Table = {
    "neuralforecast": {
        "NBEATS": _one("NBEATS", **_MLP),
        "NHITS": _one("NHITS", **_MLP),
        "TFT": _one("TFT", hidden_size=16, n_head=2),
        "TimesNet": _one("TimesNet", hidden_size=8, conv_hidden_size=8, top_k=2, num_kernels=2),
        "TiDE": _one("TiDE", hidden_size=16, decoder_output_dim=8, temporal_decoder_dim=16),
        "BiTCN": _one("BiTCN", hidden_size=8),
        "Informer": _one("Informer", **_ATTENTION),
        "iTransformer": _many("iTransformer", hidden_size=16, n_heads=2, d_ff=32),
        "SOFTS": _many("SOFTS", hidden_size=16, d_core=16, d_ff=32),
        "TimeXer": _many("TimeXer", patch_len=8, hidden_size=16, n_heads=2, d_ff=32),
    },
    "pytorch-forecasting": {
        "GatedResidualNetwork": net(
            "pytorch_forecasting.models.temporal_fusion_transformer.sub_modules:GatedResidualNetwork",
            floats(4, 5, 6),
            *(6, 16, 8),
        ),
        "InterpretableMultiHeadAttention": net(
            "pytorch_forecasting.models.temporal_fusion_transformer.sub_modules:InterpretableMultiHeadAttention",
            floats(4, 5, 16, count=3),
            *(2, 16),
        ),
    },
    "tsai": {
        "InceptionTime": _tsai("InceptionTime:InceptionTime", nf=4),
        "TST": _tsai("TST:TST", 32, n_layers=2, d_model=16, n_heads=2, d_ff=32),
        "LSTM_FCN": _tsai("RNN_FCN:LSTM_FCN", 32, hidden_size=8, conv_layers=[8, 12, 8]),
        "TransformerModel": _tsai("TransformerModel:TransformerModel", d_model=16, d_ffn=32),
    },
}
