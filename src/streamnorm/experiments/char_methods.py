"""The normalizations that the recurrent experiments compare, and variants that a user puts together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import streamnorm as sn
from streamnorm.experiments.errors import UserError
from streamnorm.experiments.methods import Method


@dataclass(frozen=True)
class RecurrentMethod(Method):
    """A normalization inside a recurrent layer: ``norm`` and ``options`` are those of ``sn.GRU``."""

    norm: str | None
    options: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, steps: int) -> dict[str, Any]:
        """What ``sn.GRU`` and its like are given, for sequences of so many time steps."""
        per_step = {"max_steps": steps} if self.norm == "batch-per-step" else {}
        return {"norm": self.norm, **per_step, **self.options}


class RecurrentMethods(dict[str, RecurrentMethod]):
    """The methods by name, and any of them with options of its own, by a name that says them.

    A variant is written ``method,option=value,…``; several numbers are joined by ``+``.

    Example:
        >>> RECURRENT["streaming-l1,beta=0.7+0+0.3,kappa=0.9"].arguments(50)
        {'norm': 'streaming', 'p': 1, 'beta': (0.7, 0.0, 0.3), 'kappa': 0.9}
    """

    def __missing__(self, name: str) -> RecurrentMethod:
        base, *words = name.split(",")
        if base not in self or not words:
            raise KeyError(name)
        method = self[base]
        options = {**method.options, **dict(_option(name, word) for word in words)}
        variant = RecurrentMethod(
            name, ", ".join([method.label, *words]), method.colour, method.marker, name, method.norm, options
        )
        try:
            sn.RNN(1, 1, **variant.arguments(1))
        except (TypeError, ValueError) as error:
            raise UserError(f"method {name!r}: {error}") from None
        return variant


def _option(name: str, word: str) -> tuple[str, Any]:
    option, equals, text = word.partition("=")
    if not (option and equals and text):
        message = f"method {name!r}: {word!r} is not of the form option=value, for example streaming-l1,window=20000"
        raise UserError(message)
    try:
        numbers = tuple(float(number) for number in text.split("+"))
    except ValueError:
        return option, text
    return option, numbers if len(numbers) > 1 else numbers[0]


_ALL = (
    RecurrentMethod("none", "No normalization", "#7f7f7f", "X", "none", None),
    RecurrentMethod("batch", "Batch", "#d55e00", "s", "batch", "batch"),
    RecurrentMethod("batch-per-step", "Batch per step", "#e69f00", "D", "batch-per-step", "batch-per-step"),
    RecurrentMethod("layer", "Layer", "#0072b2", "^", "layer", "layer"),
    RecurrentMethod("streaming-l2", "Streaming L2", "#cc79a7", "v", "streaming-l2", "streaming", {"p": 2}),
    RecurrentMethod("streaming-l1", "Streaming L1", "#009e73", "o", "streaming-l1", "streaming", {"p": 1}),
)
RECURRENT = RecurrentMethods({method.name: method for method in _ALL})
