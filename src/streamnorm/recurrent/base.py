"""What cells and layers share: the normalizations as submodules, and where all parameters start."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .norms import NormChoice
from .steps import GATES, Norms


class Normalized(nn.Module):
    """Mixed into torch.nn's cells and layers."""

    kind: str
    choice: NormChoice
    hidden_size: int
    bias: Any

    def _add_norms(self, suffix: str, norm_cell: bool) -> None:
        """Make the norms of one layer and direction: ``norm_ih<suffix>`` and so on."""
        weight = getattr(self, f"weight_ih{suffix}")
        for name, size in _features(self.kind, self.hidden_size, norm_cell).items():
            bias = name == "cell" and bool(self.bias)
            norm = self.choice.make(size, bias, device=weight.device, dtype=weight.dtype)
            if norm is not None:
                self.choice.reset(norm)
                self.add_module(f"norm_{name}{suffix}", norm)

    def _norms(self, suffix: str) -> Norms:
        return Norms(*(self._modules.get(f"norm_{name}{suffix}") for name in Norms._fields))

    def _is_plain(self) -> bool:
        """Whether this is exactly torch.nn's network."""
        return self.choice.norm is None and self.kind != "GRU_RESET_BEFORE"

    def reset_parameters(self) -> None:
        """Draw the weights as torch.nn does; gains, biases and statistics of the norms start over."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for weight in self.parameters(recurse=False):
            nn.init.uniform_(weight, -bound, bound)
        for name, child in self.named_children():
            if name.startswith("norm_"):
                self.choice.reset(child)

    def extra_repr(self) -> str:
        """torch.nn's arguments, then ours."""
        after = ", reset_after=False" if self.kind == "GRU_RESET_BEFORE" else ""
        return f"{super().extra_repr()}{after}, {self.choice}"


def _features(kind: str, hidden_size: int, norm_cell: bool) -> dict[str, int]:
    """The fields of :class:`Norms` that a network of this kind fills, and the features of each."""
    gates = GATES[kind] * hidden_size
    if kind == "GRU_RESET_BEFORE":
        return {"ih": gates, "hh": 2 * hidden_size, "hn": hidden_size}
    return {"ih": gates, "hh": gates, **({"cell": hidden_size} if norm_cell else {})}
