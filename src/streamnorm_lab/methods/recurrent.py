"""The normalizations that the recurrent experiments compare, and variants that a user puts together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import streamnorm as sn
from streamnorm_lab.methods.method import Method, Methods, refuse_unknown

_OPTIONS = (
    "dropout",
    "p",
    "center",
    "scale",
    "eps",
    "window",
    "alpha",
    "beta",
    "kappa",
    "momentum",
    "max_steps",
    "gain",
)


@dataclass(frozen=True)
class RecurrentMethod(Method):
    """A normalization inside a recurrent layer: ``norm`` and ``options`` are those of ``sn.GRU``."""

    norm: str | None
    options: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, steps: int) -> dict[str, Any]:
        """The keywords for ``sn.GRU``, ``sn.LSTM`` or ``sn.RNN``, for sequences of so many time steps."""
        per_step = {"max_steps": steps} if self.norm == "batch-per-step" else {}
        return {"norm": self.norm, **per_step, **self.options}

    def variant(self, options: Mapping[str, Any]) -> RecurrentMethod:
        """The same with more options of ``sn.GRU``; a small layer is made to see whether it has them."""
        refuse_unknown(options, _OPTIONS)
        variant = replace(self, options={**self.options, **options})
        with torch.random.fork_rng(devices=[]):
            sn.RNN(1, 1, **variant.arguments(1))
        return variant


_ALL = (
    RecurrentMethod("none", "No normalization", "#7f7f7f", "X", "none", None),
    RecurrentMethod("batch", "Batch", "#d55e00", "s", "batch", "batch"),
    RecurrentMethod("batch-per-step", "Batch per step", "#e69f00", "D", "batch-per-step", "batch-per-step"),
    RecurrentMethod("layer", "Layer", "#0072b2", "^", "layer", "layer"),
    RecurrentMethod("streaming-l2", "Streaming L2", "#cc79a7", "v", "streaming-l2", "streaming", {"p": 2}),
    RecurrentMethod("streaming-l1", "Streaming L1", "#009e73", "o", "streaming-l1", "streaming", {"p": 1}),
)
RECURRENT = Methods({method.name: method for method in _ALL})
