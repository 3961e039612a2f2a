"""Tables: networks of columns, numbers and categories, and click-through rates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.libraries.entry import Entry, Table, floats, join, net, of, tokens

NUMBERS = floats(4, 6)
CATEGORIES = tokens(4, 3, among=5)
_FT = {"d_token": 16, "n_blocks": 2, "attention_dropout": 0.1, "ffn_d_hidden": 32}


def _columns() -> tuple[Tensor, ...]:
    """Three categories, two numbers, a history of three categories and its length."""
    draw = torch.Generator().manual_seed(0)
    history = torch.randint(1, 5, (4, 3), generator=draw)
    whole = (torch.randint(5, (4, 3), generator=draw), history, torch.full((4, 1), 3))
    return (torch.cat([whole[0], torch.randn(4, 2, generator=draw), *whole[1:]], 1).float(),)


def _ctr(kind: str, **keywords: Any) -> Entry:
    def make(m: Any) -> nn.Module:
        feature = m.inputs
        categories = [feature.SparseFeat(f"c{k}", 5, 8) for k in range(3)]
        columns = [*categories, *(feature.DenseFeat(f"n{k}", 1) for k in range(2))]
        own: tuple[Any, ...] = (columns, columns)
        if kind in ("DIN", "DIEN"):
            history = feature.SparseFeat("hist_c0", 5, 8, embedding_name="c0")
            own = ([*columns, feature.VarLenSparseFeat(history, 3, length_name="length")], ["c0"])
        elif kind == "PNN":
            own = (columns,)
        network: nn.Module = getattr(m.models, kind)(*own, dnn_hidden_units=(16, 12), **keywords)
        return network

    def inputs() -> tuple[Tensor, ...]:
        return tuple(x if kind in ("DIN", "DIEN") else x[:, :5] for x in _columns())

    return of("deepctr_torch", make, inputs)


TABLE: Table = {
    "pytorch-tabnet": {
        "TabNet": net(
            "pytorch_tabnet.tab_network:TabNet",
            NUMBERS,
            6,
            3,
            4,
            4,
            2,
            group_attention_matrix=torch.eye(6),
        ),
        "TabNet/entmax": net(
            "pytorch_tabnet.tab_network:TabNet",
            NUMBERS,
            6,
            3,
            4,
            4,
            2,
            mask_type="entmax",
            group_attention_matrix=torch.eye(6),
        ),
    },
    "tab-transformer-pytorch": {
        kind: net(
            f"tab_transformer_pytorch:{kind}",
            join(CATEGORIES, NUMBERS),
            **{"categories": (5, 5, 5), "num_continuous": 6, "dim": 16, "depth": 2, "heads": 2},
            **({"mlp_act": nn.ReLU()} if kind == "TabTransformer" else {}),
        )
        for kind in ("TabTransformer", "FTTransformer")
    },
    "rtdl": {
        "FTTransformer": net(
            "rtdl:FTTransformer.make_baseline",
            join(NUMBERS, CATEGORIES),
            **{"n_num_features": 6, "cat_cardinalities": [5, 5, 5], "d_out": 3, **_FT},
            **{"ffn_dropout": 0.1, "residual_dropout": 0.1},
        ),
    },
    "rtdl-revisiting-models": {
        "ResNet": net(
            "rtdl_revisiting_models:ResNet",
            NUMBERS,
            **{"d_in": 6, "d_out": 3, "n_blocks": 2, "d_block": 16, "d_hidden_multiplier": 2.0},
            **{"dropout1": 0.1, "dropout2": 0.0},
        ),
    },
    "rtdl-num-embeddings": {
        "Periodic": of(
            "rtdl_num_embeddings",
            lambda m: nn.Sequential(
                m.PeriodicEmbeddings(6, 8, n_frequencies=8, lite=False),
                nn.Flatten(),
                nn.Linear(48, 3),
            ),
            NUMBERS,
        ),
        "PiecewiseLinear": of(
            "rtdl_num_embeddings",
            lambda m: nn.Sequential(
                m.PiecewiseLinearEmbeddings(
                    [torch.linspace(-2, 2, 5)] * 6, 8, activation=True, version="B"
                ),
                *(nn.Flatten(), nn.Linear(48, 3)),
            ),
            NUMBERS,
        ),
    },
    "deepctr-torch": {
        "DeepFM": _ctr("DeepFM", dnn_use_bn=True),
        "xDeepFM": _ctr("xDeepFM", cin_layer_size=(8, 6)),
        "AutoInt": _ctr("AutoInt", att_layer_num=2),
        "FiBiNET": _ctr("FiBiNET"),
        "DIN": _ctr("DIN", att_hidden_size=(8, 6)),
    },
}
