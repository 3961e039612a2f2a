"""Signals in time: brain recordings, time-frequency transforms, spiking and recurrent networks."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.libraries.entry import Entry, Inputs, Table, floats, net

EEG = {"n_chans": 8, "n_outputs": 3, "n_times": 256}


def _brain(name: str, chans: int = 8, times: int = 256, **keywords: object) -> Entry:
    shape = {**EEG, "n_chans": chans, "n_times": times}
    return net(f"braindecode.models:{name}", floats(4, chans, times), **shape, **keywords)


def _spiking(path: str, **keywords: object) -> Entry:
    """A network of spikingjelly over steps in time, with its usual neurons."""

    def make() -> nn.Module:
        found = {
            name: pkgutil.resolve_name(f"spikingjelly.activation_based.{name}")
            for name in ("functional", "neuron")
        }
        build = pkgutil.resolve_name(f"spikingjelly.activation_based.{path}")
        model = build(spiking_neuron=found["neuron"].LIFNode, **keywords)
        found["functional"].set_step_mode(model, "m")
        return AtRest(model, found["functional"].reset_net)

    return Entry(make, floats(3, 4, 3, 32, 32))


def _spikes(kind: str, *args: object, **keywords: object) -> Entry:
    """Neurons of snntorch between two layers, over steps in time, as its tutorials have it."""

    def make() -> nn.Module:
        neuron = pkgutil.resolve_name(f"snntorch:{kind}")
        return Steps(*(neuron(*args, **keywords) for _ in range(2)))

    return Entry(make, floats(5, 4, 12))


def _plain(path: str, inputs: Inputs, *args: object) -> Entry:
    """What is at a path, with its TorchScript functions as Python, as ``PYTORCH_JIT=0`` has them:
    those of s5 fail under ``vmap`` when they are called with gradients for the second time."""

    def make() -> nn.Module:
        with patch("torch.jit.script", lambda function: function):
            return pkgutil.resolve_name(path)(*args)  # type: ignore[no-any-return]

    return Entry(make, inputs)


def _mamba(module: str, config: str, name: str, inputs: Inputs, **keywords: object) -> Entry:
    def make() -> nn.Module:
        settings = pkgutil.resolve_name(f"mambapy.{module}:{config}")
        return pkgutil.resolve_name(f"mambapy.{module}:{name}")(settings(**keywords))

    return Entry(make, inputs)


def _wired(name: str) -> Entry:
    def make() -> nn.Module:
        wiring = pkgutil.resolve_name("ncps.wirings:AutoNCP")(20, 4)
        return pkgutil.resolve_name(f"ncps.torch:{name}")(8, wiring)

    return Entry(make, floats(4, 6, 8))


def _norse(name: str) -> Entry:
    def make() -> nn.Module:
        torch_ = pkgutil.resolve_name("norse.torch")
        cells = [getattr(torch_, name)() for _ in range(2)]
        layers = (nn.Linear(12, 20), cells[0], nn.Linear(20, 16), cells[1], nn.Linear(16, 4))
        return torch_.SequentialState(*layers)

    return Entry(make, floats(4, 12))


TABLE: Table = {
    "braindecode": {
        "EEGNet": _brain("EEGNet"),
        "ShallowFBCSPNet": _brain("ShallowFBCSPNet", n_filters_time=8, n_filters_spat=8),
        "Deep4Net": _brain("Deep4Net", times=512, n_filters_time=6, n_filters_spat=6),
        "EEGConformer": _brain("EEGConformer", num_layers=2, num_heads=4, n_filters_time=16),
        "ATCNet": _brain("ATCNet", times=512, sfreq=128),
        "USleep": _brain("USleep", chans=2, times=3000, sfreq=100, depth=4),
        "EEGInceptionERP": _brain("EEGInceptionERP", sfreq=128),
        "FBCNet": _brain("FBCNet", times=500, sfreq=250, n_filters_spat=8),
        "BIOT": _brain("BIOT", times=1000, sfreq=200, embed_dim=32, num_heads=4, num_layers=2),
        "AttentionBaseNet": _brain("AttentionBaseNet", times=512, n_temporal_filters=8),
    },
    "mambapy": {
        "Mamba": _mamba("mamba", "MambaConfig", "Mamba", floats(4, 16, 24), d_model=24, n_layers=2),
        "Mamba-sequential": _mamba(
            *("mamba", "MambaConfig", "Mamba", floats(4, 8, 24)),
            **{"d_model": 24, "n_layers": 2, "pscan": False, "inner_layernorms": True},
        ),
        "VMamba": _mamba("vim", "MambaConfig", "VMamba", floats(4, 16, 24), d_model=24, n_layers=2),
    },
    "ncps": {
        "CfC": net("ncps.torch:CfC", floats(4, 6, 8), 8, 20),
        "CfC-pure": net("ncps.torch:CfC", floats(4, 6, 8), 8, 20, mode="pure"),
        "CfC-memory": net("ncps.torch:CfC", floats(4, 6, 8), 8, 20, mixed_memory=True),
        "CfC-wired": _wired("CfC"),
    },
    "norse": {
        "LIF-cells": _norse("LIFCell"),
        "LIF-boxes": _norse("LIFBoxCell"),
    },
    "pytorch-tcn": {
        "TCN": net("pytorch_tcn:TCN", floats(4, 8, 32), 8, [12, 16, 16]),
    },
    "s5-pytorch": {
        "S5": _plain("s5:S5", floats(4, 16, 12), 12, 16),
        "S5Block": _plain("s5:S5Block", floats(4, 16, 12), 12, 16, False),
        "S5Block-two-ways": _plain("s5:S5Block", floats(4, 16, 12), 12, 16, True),
    },
    "silero-vad": {"vad": net("silero_vad:load_silero_vad", floats(1, 512), call={"sr": 16000})},
    "snntorch": {
        "Leaky": _spikes("Leaky", 0.9, learn_beta=True),
        "Synaptic": _spikes("Synaptic", 0.9, 0.8),
        "RLeaky": _spikes("RLeaky", 0.9, linear_features=20),
    },
    "spikingjelly": {
        "spiking_resnet18": _spiking("model.spiking_resnet:spiking_resnet18", num_classes=5),
        "sew_resnet18": _spiking("model.sew_resnet:sew_resnet18", num_classes=5, cnf="ADD"),
    },
}


class AtRest(nn.Module):
    """Every call begins with neurons at rest, as spikingjelly's examples have it."""

    def __init__(self, network: nn.Module, reset: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.network, self.reset = network, reset

    def forward(self, steps: Tensor) -> Tensor:
        self.reset(self.network)
        y: Tensor = self.network(steps)
        return y


class Steps(nn.Module):
    """Spikes of the last layer, of all steps; every call begins with neurons at rest."""

    def __init__(self, hidden: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.hidden = nn.Linear(12, 20), hidden
        self.second, self.last = nn.Linear(20, 20), last

    def forward(self, steps: Tensor) -> Tensor:
        pairs = ((self.first, self.hidden), (self.second, self.last))
        states = [neuron.reset_mem() for _, neuron in pairs]
        states = [state if isinstance(state, tuple) else (state,) for state in states]
        spikes = list[Tensor]()
        for x in steps:
            for k, (layer, neuron) in enumerate(pairs):
                found = neuron(layer(x), *states[k])
                x, states[k] = found[0], found[-len(states[k]) :]
            spikes.append(x)
        return torch.stack(spikes)


class Wavelets(nn.Module):
    """A wavelet transform, a convolution of each of its parts, and back."""

    def __init__(self) -> None:
        super().__init__()
        found = pkgutil.resolve_name("pytorch_wavelets")
        self.forwards, self.back = found.DWTForward(1, "db2"), found.DWTInverse("db2")
        self.low, self.high = nn.Conv2d(3, 6, 3, padding=1), nn.Conv3d(3, 6, 3, padding=1)

    def forward(self, x):  # type: ignore[no-untyped-def]
        low, (high,) = self.forwards(x)
        return self.back((self.low(low), [self.high(high)]))
