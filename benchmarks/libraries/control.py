"""Control: policies, value networks and encoders of reinforcement learning."""

from __future__ import annotations

import pkgutil
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.libraries.entry import Entry, Inputs, Table, floats, given, images, join, net, of

_IN = floats(4, 6)


def _policy(path: str, *inputs: Inputs, discrete: bool = True, **keywords: Any) -> Entry:
    """A policy of stable-baselines3 for these observations; what it returns holds no draws."""

    def make() -> nn.Module:
        spaces = pkgutil.resolve_name("gymnasium.spaces")
        (given_,) = join(*inputs)()

        def space(x: Any) -> Any:
            if isinstance(x, dict):
                return spaces.Dict({name: space(value) for name, value in x.items()})
            if x.ndim == 4:
                return spaces.Box(0, 255, tuple(x.shape[1:]), "uint8")
            return spaces.Box(-1, 1, tuple(x.shape[1:]))

        action = spaces.Discrete(3) if discrete else spaces.Box(-1, 1, (2,))
        policy: nn.Module = pkgutil.resolve_name(path)(
            space(given_), action, lambda _: 1e-3, **keywords
        )
        return policy

    return Entry(make, join(*inputs), {"deterministic": True})


_POLICIES = "stable_baselines3.common.policies"
_SMALL = {"net_arch": [16, 16]}
_CNN = {"features_extractor_kwargs": {"features_dim": 16}, **_SMALL}
_PIXELS = given(torch.randint(256, (2, 3, 36, 36), dtype=torch.uint8))
_BOTH = given({"image": _PIXELS()[0], "vector": floats(2, 6)()[0]})


class Agent(nn.Module):
    """A head on a body (tianshou): its first result."""

    def __init__(self, agent: nn.Module) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, x: Tensor) -> Any:
        return self.agent(x)[0]


def _tianshou(kind: str) -> Entry:
    def make(m: Any) -> nn.Module:
        if kind == "dueling":
            heads = {"hidden_sizes": [12]}, {"hidden_sizes": [12]}
            return Agent(m.Net(6, 3, [16, 16], dueling_param=heads))
        if kind == "actor":
            actor = pkgutil.resolve_name("tianshou.utils.net.discrete:Actor")
            return Agent(actor(m.Net(6, hidden_sizes=[16]), 3, [12]))
        if kind == "gaussian":
            actor = pkgutil.resolve_name("tianshou.utils.net.continuous:ActorProb")
            return Agent(actor(m.Net(6, hidden_sizes=[16]), 2, [12], conditioned_sigma=True))
        return Agent(m.Recurrent(1, 6, 3, hidden_layer_size=16))

    inputs = floats(4, 5, 6) if kind == "recurrent" else _IN
    return of("tianshou.utils.net.common", make, inputs)


_DECISION = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 32, "n_positions": 32}
_RATES = {"activation": "relu", "resid_pdrop": 0.1, "attn_pdrop": 0.1}

TABLE: Table = {
    "stable-baselines3": {
        "ActorCritic": _policy(f"{_POLICIES}:ActorCriticPolicy", _IN, **_SMALL),
        "ActorCritic/gaussian": _policy(
            f"{_POLICIES}:ActorCriticPolicy", _IN, discrete=False, **_SMALL
        ),
        "ActorCriticCnn": _policy(f"{_POLICIES}:ActorCriticCnnPolicy", _PIXELS, **_CNN),
        "MultiInput": _policy(
            f"{_POLICIES}:MultiInputActorCriticPolicy",
            _BOTH,
            features_extractor_kwargs={"cnn_output_dim": 16},
            **_SMALL,
        ),
        "DQN": _policy("stable_baselines3.dqn.policies:DQNPolicy", _IN, **_SMALL),
        "SAC": _policy("stable_baselines3.sac.policies:SACPolicy", _IN, discrete=False, **_SMALL),
    },
    "tianshou": {kind: _tianshou(kind) for kind in ("dueling", "actor", "gaussian", "recurrent")},
    "torchrl": {
        "ConvNet": net("torchrl.modules:ConvNet", images(3, 16), 3, 2, [8, 12]),
        "DuelingCnnDQNet": of(
            "torchrl.modules",
            lambda m: m.DuelingCnnDQNet(
                3,
                cnn_kwargs={
                    "in_features": 3,
                    "num_cells": [8, 8],
                    "kernel_sizes": [3, 3],
                    "strides": [2, 2],
                },
                mlp_kwargs={"in_features": 72, "depth": 1, "num_cells": 16},
            ),
            images(3, 16),
        ),
        "DecisionTransformer": net(
            "torchrl.modules:DecisionTransformer",
            join(floats(2, 5, 6), floats(2, 5, 3), floats(2, 5, 1)),
            *(6, 3, _DECISION | _RATES),
        ),
        "NoisyLinear": of(
            "torchrl.modules",
            lambda m: nn.Sequential(m.NoisyLinear(6, 16), nn.ReLU(), m.NoisyLinear(16, 3)),
            _IN,
        ),
        "LSTM": net("torchrl.modules:LSTM", floats(4, 5, 6), 6, 8),
        "MultiAgentMLP": net(
            "torchrl.modules:MultiAgentMLP",
            floats(4, 3, 6),
            *(6, 2, 3),
            **{"centralized": False, "share_params": True, "depth": 2, "num_cells": 16},
        ),
    },
    "d3rlpy": {
        "PixelEncoder": net(
            "d3rlpy.models.torch.encoders:PixelEncoder",
            images(3, 36, 2),
            *((3, 36, 36), [[8, 8, 4], [12, 4, 2]], 16),
        ),
        "VectorEncoderWithAction": net(
            "d3rlpy.models.torch.encoders:VectorEncoderWithAction",
            join(_IN, floats(4, 2)),
            *((6,), 2, [16, 16]),
            use_batch_norm=True,
        ),
        "GPT2": net(
            "d3rlpy.models.torch.transformers:GPT2",
            join(floats(2, 6, 16), given(torch.ones(2, 6))),
            **{"layer_width": 16, "pre_activation_ff_hidden_size": 32},
            **{"post_activation_ff_hidden_size": 32, "num_heads": 2, "context_size": 6},
            **{"num_layers": 2, "attn_dropout": 0.1, "resid_dropout": 0.1, "embed_dropout": 0.1},
            activation=nn.ReLU(),
        ),
    },
}
