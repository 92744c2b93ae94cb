"""One endless sequence, learnt piece by piece and then step by step.

The task is to foresee the next value of a noisy signal that never ends and comes one sequence at a time: no mini-batch
to normalize with, and no place to backpropagate to the beginning. First a GRU reads pieces of 20 steps (truncated
backpropagation through time): the hidden state goes on from piece to piece, its gradient does not. Then a cell starts
over and makes one step and one weight update for each value that arrives (online learning).

    python examples/truncated_bptt.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

import streamnorm as sn

HIDDEN = 32
PIECE = 20


def signal(length: int) -> Tensor:
    """Two sines of unrelated periods and some noise, of shape (length, 1)."""
    time = torch.arange(length)
    clean = 0.6 * torch.sin(2 * math.pi * time / 17) + 0.4 * torch.sin(2 * math.pi * time / 5.3)
    return (clean + 0.05 * torch.randn(length)).unsqueeze(1)


def by_pieces(gru: sn.GRU, readout: nn.Linear, values: Tensor) -> Iterator[float]:
    """Truncated backpropagation: an update after each piece. Yields the losses."""
    optimizer = torch.optim.Adam([*gru.parameters(), *readout.parameters()], lr=0.005)
    hidden = None
    for start in range(0, len(values) - PIECE, PIECE):
        inputs, targets = values[start : start + PIECE], values[start + 1 : start + PIECE + 1]
        output, hidden = gru(inputs, hidden)  # (T, features): one sequence
        loss = nn.functional.mse_loss(readout(output), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hidden = hidden.detach()  # the value goes on, the gradient ends here
        yield loss.item()


def step_by_step(cell: sn.GRUCell, readout: nn.Linear, values: Tensor) -> Iterator[float]:
    """Online learning: an update after each value. Yields the losses."""
    optimizer = torch.optim.Adam([*cell.parameters(), *readout.parameters()], lr=0.002)
    hidden = None
    for value, target in pairwise(values):
        hidden = cell(value, hidden)
        loss = nn.functional.mse_loss(readout(hidden), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hidden = hidden.detach()
        yield loss.item()


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def main() -> tuple[float, float, float, float]:
    """Mean squared errors at the beginning and at the end, piece by piece and then step by step."""
    torch.manual_seed(0)
    pieces = list(by_pieces(sn.GRU(1, HIDDEN), nn.Linear(HIDDEN, 1), signal(8000)))
    first, last = mean(pieces[:10]), mean(pieces[-50:])
    print(f"piece by piece: mean squared error {first:.3f} at first, {last:.4f} after {len(pieces)} updates")

    steps = list(step_by_step(sn.GRUCell(1, HIDDEN), nn.Linear(HIDDEN, 1), signal(2000)))
    first_step, last_step = mean(steps[:200]), mean(steps[-500:])
    print(f"step by step:   mean squared error {first_step:.3f} at first, {last_step:.4f} after {len(steps)} updates")
    print("the signal varies by 0.26 about its mean; its noise is 0.0025")
    return first, last, first_step, last_step


if __name__ == "__main__":
    torch.set_num_threads(1)  # one sequence is too little to share out
    main()
