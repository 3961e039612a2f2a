"""Ops that make tensors from sizes."""

from __future__ import annotations

from typing import Any

from ...program import value
from ..op import Axes, Op
from ..signature import rows
from ..writer import Rule
from .movement import widen_sized


def _made(op: Op) -> Axes:
    """Constant along every axis, so each may widen with what it meets."""
    return tuple(map(op.free, value(op.node).shape))


def _counted(op: Op) -> Axes:
    """``arange`` and friends: positions; only a dimension of one can widen."""
    return tuple(op.fixed(size, "positions") for size in value(op.node).shape)


TABLE: dict[Any, Rule] = rows(
    {
        "zeros ones full empty.memory_format new_zeros new_ones new_full new_empty": Rule(
            _made, widen_sized
        ),
        "arange arange.start arange.start_step linspace eye eye.m scalar_tensor tril_indices "
        "triu_indices range range.step logspace hann_window hann_window.periodic bartlett_window "
        "bartlett_window.periodic blackman_window blackman_window.periodic hamming_window "
        "hamming_window.periodic hamming_window.periodic_alpha "
        "hamming_window.periodic_alpha_beta kaiser_window kaiser_window.periodic "
        "kaiser_window.beta fft_fftfreq fft_rfftfreq empty_permuted empty_strided": Rule(_counted),
    }
)
