"""The reference engine: a plain loop over the time steps, and autograd through it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..norms import When
from ..steps import STEPS, Hidden, Norms, Weights


def run(
    kind: str, data: Tensor, sizes: list[int], hidden: Hidden, weights: Weights, norms: Norms
) -> tuple[Tensor, Hidden]:
    """Run one layer in one direction over a mini-batch of sequences.

    Args:
        kind: which network, a key of ``STEPS``.
        data: the inputs ``(sum(sizes), features)``, all sequences of step 0 first, then those of step 1, ...
        sizes: how many sequences reach each step, never increasing: they are sorted by their length.
        hidden: where the sequences start.
        weights: of this layer and direction.
        norms: likewise.

    Returns:
        The hidden states in the order of ``data``, and for each sequence the hidden tensors after its last step.
    """
    step = STEPS[kind]
    outputs: list[Tensor] = []
    ended: list[Hidden] = []
    for number, wx in enumerate(F.linear(data, weights.ih).split(sizes)):
        rows = sizes[number]
        if rows < len(hidden[0]):
            ended.append(tuple(h[rows:] for h in hidden))
            hidden = tuple(h[:rows] for h in hidden)
        hidden = step(wx, hidden, weights, norms, When(number, alone=rows == 1 < sizes[0]))
        outputs.append(hidden[0])
    finals = tuple(torch.cat(parts) for parts in zip(hidden, *reversed(ended)))
    return torch.cat(outputs), finals
