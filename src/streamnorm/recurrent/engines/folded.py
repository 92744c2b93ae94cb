"""Layers whose statistics are fixed, in evaluation or frozen: their norms are affine maps, and torch.nn runs them.

With scale = gain/s, N(W·x) + b is (scale·W)·x + (b − mu·scale): other weights of the same network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.compiler import is_hooked
from ...layers import GeneralBatchNorm, Norm
from ..norms import PerStepBatchNorm
from ..steps import Hidden, Norms, Weights
from .sequence import KNOWN

_NETWORKS: dict[str, Any] = {
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
    "GRU": torch.gru,
    "LSTM": torch.lstm,
}


def supports(kind: str, norms: Norms) -> bool:
    """Whether one layer in one direction is torch.nn's with other weights now."""
    paths = norms[:2]
    return kind in _NETWORKS and norms.cell is None and all(norm is None or is_affine(norm) for norm in paths)


def is_affine(norm: nn.Module) -> bool:
    """Whether a norm is now the same affine map of each feature, at all steps."""
    if type(norm) not in KNOWN:
        return False
    assert isinstance(norm, Norm)
    if not norm.frozen and (norm.training or norm._adapting is not None):
        return False
    if isinstance(norm, PerStepBatchNorm) or is_hooked(norm):
        return False
    keeps_statistics = norm.stream is not None or isinstance(norm, GeneralBatchNorm)
    return keeps_statistics and len(norm.eval_stats()[0]) == norm.num_features


def fold(weights: Weights, norms: Norms) -> Weights:
    """The weights with which torch.nn's network does what the normalized one does; gradients go through them."""
    w_ih, b_ih = _fold(weights.ih, weights.bias_ih, norms.ih)
    w_hh, b_hh = _fold(weights.hh, weights.bias_hh, norms.hh)
    return Weights(w_ih, w_hh, b_ih, b_hh, weights.hr)


def _fold(weight: Tensor, bias: Tensor | None, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    if bias is None:
        bias = weight.new_zeros(len(weight))
    if norm is None:
        return weight, bias
    assert isinstance(norm, Norm)
    mu, variance = norm.eval_stats()
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = bias - mu * scale if norm.bias is None else bias + norm.bias - mu * scale
    return (weight * scale[:, None]).to(weight.dtype), shift.to(weight.dtype)


def run(
    kind: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    hidden: Hidden,
    weights: list[Weights],
    layer: nn.RNNBase,
) -> tuple[Tensor, Hidden]:
    """All layers and directions over a mini-batch of sequences.

    Args:
        kind: which network, a key of ``STEPS``.
        input: ``(T, N, features)``, or the data of a PackedSequence.
        batch_sizes: of the PackedSequence, else None.
        hidden: where the sequences start, ``(layers·directions, N, ...)``.
        weights: of each layer and direction.
        layer: its options.
    """
    flat = [tensor for each in weights for tensor in each if tensor is not None]
    start = hidden if kind == "LSTM" else hidden[0]
    options = (True, layer.num_layers, layer.dropout, layer.training, layer.bidirectional)
    if batch_sizes is None:
        output, *finals = _NETWORKS[kind](input, start, flat, *options, False)
    else:
        output, *finals = _NETWORKS[kind](input, batch_sizes, start, flat, *options)
    return output, tuple(finals)
