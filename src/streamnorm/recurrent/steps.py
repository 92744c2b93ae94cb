"""One time step of each recurrent network: the equations, on which cells and layers are built.

A step takes ``wx = W_ih·x`` and the hidden tensors, and gives the next hidden tensors. N stands for a normalization
with a gain; each matrix product has one of its own. The biases stay outside:

    RNN     h' = tanh(N(W_ih·x) + b_ih + N(W_hh·h) + b_hh)
    GRU     r, z = σ(N(W_ih·x) + b_ih + N(W_hh·h) + b_hh)
            n = tanh(N(W_in·x) + b_in + r·(N(W_hn·h) + b_hn)),  or with the reset before the product
            n = tanh(N(W_in·x) + b_in + N(W_hn·(r·h)) + b_hn)
            h' = (1 − z)·n + z·h
    LSTM    i, f, o = σ(N(W_ih·x) + b_ih + N(W_hh·h) + b_hh),  g = tanh(the same)
            c' = f·c + i·g,  h' = o·tanh(N(c')), where this N is left out unless asked for
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norms import RecurrentBatchNorm, When

Hidden = tuple[Tensor, ...]
"""(h,) or, for the LSTM, (h, c), each with one row per sequence."""


class Weights(NamedTuple):
    """The weights of one layer and direction, under the names of ``torch.nn``."""

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    hr: Tensor | None = None


class Norms(NamedTuple):
    """The normalizations of one layer and direction; None leaves a path as it is.

    ``ih`` and ``hh`` are those of the input's and of the hidden state's product; ``hn`` that of the product after the
    reset gate, in a GRU that resets before it; ``cell`` that of an LSTM's cell.
    """

    ih: nn.Module | None = None
    hh: nn.Module | None = None
    hn: nn.Module | None = None
    cell: nn.Module | None = None


def normalize(x: Tensor, norm: nn.Module | None, bias: Tensor | None, when: When) -> Tensor:
    """N(x) + bias."""
    if norm is None:
        y = x
    elif isinstance(norm, RecurrentBatchNorm):
        y = norm.at(x, when)
    else:
        y = norm(x)
    return y if bias is None else y + bias


def _rnn(act: Callable[[Tensor], Tensor], wx: Tensor, hidden: Hidden, w: Weights, n: Norms, when: When) -> Hidden:
    (h,) = hidden
    from_input = normalize(wx, n.ih, w.bias_ih, when)
    from_hidden = normalize(F.linear(h, w.hh), n.hh, w.bias_hh, when)
    return (act(from_input + from_hidden),)


def rnn_tanh(wx: Tensor, hidden: Hidden, w: Weights, n: Norms, when: When) -> Hidden:
    """A step of the simple recurrent network."""
    return _rnn(torch.tanh, wx, hidden, w, n, when)


def rnn_relu(wx: Tensor, hidden: Hidden, w: Weights, n: Norms, when: When) -> Hidden:
    """A step of the simple recurrent network with rectified units."""
    return _rnn(torch.relu, wx, hidden, w, n, when)


def gru(wx: Tensor, hidden: Hidden, w: Weights, n: Norms, when: When) -> Hidden:
    """A step of the GRU as torch.nn has it: the reset gate acts after the matrix product."""
    (h,) = hidden
    reset_x, update_x, new_x = normalize(wx, n.ih, w.bias_ih, when).chunk(3, 1)
    reset_h, update_h, new_h = normalize(F.linear(h, w.hh), n.hh, w.bias_hh, when).chunk(3, 1)
    reset, update = torch.sigmoid(reset_x + reset_h), torch.sigmoid(update_x + update_h)
    new = torch.tanh(new_x + reset * new_h)
    return (new + update * (h - new),)


def gru_reset_before(wx: Tensor, hidden: Hidden, w: Weights, n: Norms, when: When) -> Hidden:
    """A step of the GRU as the paper has it: the reset gate acts before the matrix product."""
    (h,) = hidden
    size = h.shape[1]
    bias_gates, bias_new = (None, None) if w.bias_hh is None else (w.bias_hh[: 2 * size], w.bias_hh[2 * size :])
    reset_x, update_x, new_x = normalize(wx, n.ih, w.bias_ih, when).chunk(3, 1)
    reset_h, update_h = normalize(F.linear(h, w.hh[: 2 * size]), n.hh, bias_gates, when).chunk(2, 1)
    reset, update = torch.sigmoid(reset_x + reset_h), torch.sigmoid(update_x + update_h)
    new = torch.tanh(new_x + normalize(F.linear(reset * h, w.hh[2 * size :]), n.hn, bias_new, when))
    return (new + update * (h - new),)


def lstm(wx: Tensor, hidden: Hidden, w: Weights, n: Norms, when: When) -> Hidden:
    """A step of the LSTM."""
    h, c = hidden
    gates = normalize(wx, n.ih, w.bias_ih, when) + normalize(F.linear(h, w.hh), n.hh, w.bias_hh, when)
    input_, forget, candidate, output = gates.chunk(4, 1)
    c = torch.sigmoid(forget) * c + torch.sigmoid(input_) * torch.tanh(candidate)
    h = torch.sigmoid(output) * torch.tanh(normalize(c, n.cell, None, when))
    return (h if w.hr is None else F.linear(h, w.hr)), c


Step = Callable[[Tensor, Hidden, Weights, Norms, When], Hidden]

STEPS: dict[str, Step] = {
    "RNN_TANH": rnn_tanh,
    "RNN_RELU": rnn_relu,
    "GRU": gru,
    "GRU_RESET_BEFORE": gru_reset_before,
    "LSTM": lstm,
}

GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "GRU": 3, "GRU_RESET_BEFORE": 3, "LSTM": 4}
