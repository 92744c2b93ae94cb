"""The base of cells and layers: the normalizations as submodules, and the initial values of all parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .engines import folded
from .norms import NormChoice
from .steps import GATES, Norms, Weights

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


class Normalized(nn.Module):
    """Mixed into torch.nn's cells and layers."""

    kind: str
    choice: NormChoice
    suffixes: list[str]
    """The endings of the parameters' names, one for each layer and direction."""

    _torch_type: Any
    """The network of torch.nn that this one is a subclass of."""

    input_size: int
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

    def _weights(self, suffix: str) -> Weights:
        return Weights(*(getattr(self, f"{name}{suffix}", None) for name in _WEIGHTS))  # type: ignore[arg-type]

    def _is_fixed(self) -> bool:
        return all(folded.supports(self.kind, self._norms(suffix)) for suffix in self.suffixes)

    def _folded(self) -> list[Weights]:
        return [folded.fold(self._weights(suffix), self._norms(suffix)) for suffix in self.suffixes]

    @torch.no_grad()
    def to_torch(self) -> Any:
        """A network of torch.nn that evaluates as this one does, with statistics and gains folded into its weights.

        Returns:
            An ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``, or a cell of these, in evaluation mode, with weights of its own.

        Raises:
            ValueError: if torch.nn has no equivalent: statistics of each sample or time step, a normalized cell, a GRU
                that resets before the product, or a factory's modules.

        Example:
            >>> from streamnorm import GRU
            >>> layer = GRU(3, 5).eval()
            >>> plain, x = layer.to_torch(), torch.randn(7, 2, 3)
            >>> type(plain).__name__, torch.allclose(plain(x)[0], layer(x)[0], atol=1e-6)
            ('GRU', True)
        """
        before = self.training
        self.eval()
        try:
            if not self._is_fixed():
                kind = f"{type(self).__name__}({self.extra_repr()})"
                raise ValueError(f"torch.nn has nothing that evaluates as {kind} does")
            folded = self._folded()
        finally:
            self.train(before)
        like = folded[0].ih
        plain = self._torch_type(
            self.input_size, self.hidden_size, **self._torch_arguments(), device=like.device, dtype=like.dtype
        )
        for suffix, weights in zip(self.suffixes, folded):
            for name, value in zip(_WEIGHTS, weights):
                if value is not None:
                    getattr(plain, name + suffix).copy_(value)
        return plain.eval()

    def _torch_arguments(self) -> dict[str, Any]:
        """The arguments of torch.nn's network besides its sizes."""
        return {}

    def _is_plain(self) -> bool:
        """Whether this is exactly torch.nn's network."""
        return self.choice.norm is None and self.kind != "GRU_RESET_BEFORE"

    def reset_parameters(self) -> None:
        """Draw the weights as torch.nn does; gains, biases and statistics of the norms start over."""
        bound = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0.0
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
