"""A training that can stop at any mini-batch and go on in another process; test_resume.py runs it both ways.

As a script: ``python resume.py CHECKPOINT RESULT`` goes on from one file and leaves the end in the other.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import streamnorm as sn

BATCHES_PER_UPDATE = 3
TOTAL = 14
"""Mini-batches; the last update is short of one."""


class Model(nn.Module):
    """All kinds of layers that keep statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = sn.GRU(3, 4)
        self.dense = nn.Sequential(
            nn.Linear(4, 6), sn.StreamingNorm1d(6, scale="raw"), nn.Dropout(0.1), sn.GeneralBatchNorm(6)
        )
        self.conv = nn.Sequential(
            nn.Conv1d(6, 4, 3, padding=1), sn.StreamingNorm1d(4, kappa=0.7, affine=False, scale="raw")
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, 3)`` to a number for each sample."""
        h = self.gru(x.transpose(0, 1))[0]
        y: Tensor = self.conv(torch.stack([self.dense(step) for step in h], 2)).mean((1, 2))
        return y


class Training:
    """Model, optimizer, scaler, random numbers, and where in an update it is."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.model = Model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        sn.bind(self.model, self.optimizer, scaler=self.scaler)
        self.seen = 0

    def run(self, until: int) -> None:
        """Go on to this mini-batch."""
        for number in range(self.seen, until):
            samples = 2 + number % 3
            loss = self.model(torch.randn(samples, 4, 3)).square().mean() / BATCHES_PER_UPDATE
            self.scaler.scale(loss).backward()
            if (number + 1) % BATCHES_PER_UPDATE == 0:
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
        self.seen = until

    def state(self) -> dict[str, Any]:
        """All that a checkpoint has to hold."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "grads": [p.grad for p in self.model.parameters()],  # those of an unfinished update
            "seen": self.seen,
            "random": torch.get_rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Become what ``state`` was taken of."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for parameter, grad in zip(self.model.parameters(), state["grads"], strict=True):
            parameter.grad = grad
        self.seen = state["seen"]
        torch.set_rng_state(state["random"])


def resume(checkpoint: Path) -> dict[str, Any]:
    """Go on from a file to the end."""
    training = Training()
    training.load(torch.load(checkpoint, weights_only=True))
    training.run(TOTAL)
    return training.state()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(resume(Path(sys.argv[1])), sys.argv[2])
