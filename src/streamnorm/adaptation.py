"""Test-time adaptation: statistics that follow the data in evaluation, how far they have moved, and a safeguard."""

from __future__ import annotations

import math
import warnings

import torch
from torch import nn

from .core import arguments
from .core.stream import WINDOW, Stream
from .layers import Norm, streaming_layers
from .layers.evaluation import Adapting

EVERY = 16
"""The number of a layer's forward passes from one look of the safeguard to the next."""


class Adaptation:
    """An adaptation that :func:`adapt` has started; ``stop`` or the end of a ``with`` block ends it.

    Example:
        >>> import streamnorm as sn
        >>> model = sn.StreamingNorm1d(2).eval()
        >>> adaptation = sn.adapt(model, window=10)
        >>> for x in torch.randn(100, 1, 2) + 5:
        ...     _ = model(x)
        >>> adaptation.drift > 3
        True
        >>> adaptation.restore()
        >>> adaptation.stop()
        >>> model.long[0].tolist()
        [0.0, 0.0]
    """

    def __init__(self, layers: dict[str, Norm], window: float, max_drift: float | None) -> None:
        stream = Stream(window, limit=math.inf)
        self._max_drift, self._uses = max_drift, dict.fromkeys(layers, 0)
        self._layers, self._before = layers, {name: layer._adapting for name, layer in layers.items()}
        self._start = {name: layer.long.clone() for name, layer in layers.items()}
        self._reference = {name: layer.eval_stats() for name, layer in layers.items()}
        for name, layer in layers.items():
            moment = layer.moment
            formula = stream.formula(float(moment.p), moment.center == "mean", moment.k, layer.eps)
            layer._adapting = Adapting(formula, name, None if max_drift is None else self._guard)

    @property
    def drift(self) -> float:
        """The distance of the statistics to those at the start, in deviations of the start; the largest over layers.

        Of a layer it is √(Δμ² + Δσ²)/√(σ² + ε), root mean square over channels.
        """
        return max(self._drift(name) for name in self._start)

    def restore(self) -> None:
        """Set the statistics back to those at the start; the adaptation goes on from there."""
        for name, start in self._start.items():
            self._layers[name].long.copy_(start)

    def stop(self) -> None:
        """End the adaptation; the statistics keep their present values."""
        for name, before in self._before.items():
            self._layers[name]._adapting = before
        self._before = {}

    def __enter__(self) -> Adaptation:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _drift(self, name: str) -> float:
        layer = self._layers[name]
        mu_now, variance_now = layer.eval_stats()
        mu, variance = (value.to(mu_now) for value in self._reference[name])
        moved = torch.hypot(mu_now - mu, variance_now.sqrt() - variance.sqrt()) / (variance + layer.eps).sqrt()
        return float(moved.square().mean().sqrt())

    def _guard(self, name: str) -> None:
        """Undo and end the adaptation if a layer has moved too far. This is called at every use of a layer."""
        self._uses[name] += 1
        if self._uses[name] % EVERY or self._max_drift is None or (drift := self._drift(name)) <= self._max_drift:
            return
        self.restore()
        self.stop()
        where = f"{name} ({type(self._layers[name]).__name__})" if name else type(self._layers[name]).__name__
        warnings.warn(
            f"streamnorm.adapt has ended: the statistics of {where} moved {drift:.3g} deviations away from those at "
            f"the start, and max_drift is {self._max_drift:g}. All statistics are as they were at the start. Look at "
            "the data; if they are as they should be, call adapt again with a larger max_drift",
            RuntimeWarning,
            stacklevel=2,
        )


def adapt(model: nn.Module, window: float = WINDOW, max_drift: float | None = None) -> Adaptation:
    """Let forward passes in evaluation update the statistics: learning without labels, for data that drift.

    Each forward pass of a streaming layer adds its input to the statistics, normalizes by them, and commits. Weights,
    gain, bias and the streams of gradients do not change, and gradients flow through the layer as in evaluation.
    Frozen layers do not adapt, nor do layers in training mode.

    Args:
        model: a layer, or any module that holds some.
        window: memory in samples while it adapts, > 0. The layers' own memory may be far too long, as in a converted
            network.
        max_drift: a safeguard. Once the :attr:`Adaptation.drift` of a layer is above this, all statistics are set back
            to those at the start, the adaptation ends, and a warning says so. It is computed at every sixteenth
            forward pass of a layer. In deviations, > 0; None for no safeguard.

    Returns:
        A context manager with the methods ``stop`` and ``restore`` and the property ``drift``.

    Raises:
        ValueError: if the model holds no streaming layer, or ``window`` or ``max_drift`` is not above 0.

    Example:
        >>> import streamnorm as sn
        >>> model = sn.StreamingNorm1d(2).eval()
        >>> with sn.adapt(model, window=10):
        ...     for x in torch.randn(100, 1, 2) + 5:
        ...         _ = model(x)
        >>> bool((model.long[0] > 4).all())
        True
    """
    layers = streaming_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no streaming layer to adapt; call streamnorm.convert(model) first"
        )
    if max_drift is not None:
        meaning = "max_drift is a number of deviations above 0, or None for no safeguard"
        max_drift = arguments.real(max_drift, meaning)
        if not max_drift > 0:
            raise ValueError(f"{meaning}, got {max_drift:g}")
    names = {id(module): name for name, module in model.named_modules()}
    return Adaptation({names[id(layer)]: layer for layer in layers}, window, max_drift)
