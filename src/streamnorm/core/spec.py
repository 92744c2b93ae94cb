"""The description of one use of a layer to an engine: the view of the input, the formula, the state to advance."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Mix = tuple[float, float, float]
"""Three weights that sum to one: of the long-term, the short-term and the present statistic."""

PRESENT_ONLY: Mix = (0.0, 0.0, 1.0)

PRIOR_SAMPLES = 16
"""The number of samples that the prior is worth to the window rule."""


class View(NamedTuple):
    """An input seen as ``(A, G, B)``: G statistics, each collected over the A·B elements that share its index.

    Splitting an axis never copies, so ``x.view(split)`` works for every memory layout. The axes ``kept`` index the
    statistics in row-major order; all others are reduced over. ``axes`` tells where each axis comes from:
    0 the samples, 1 the channels, 2 and more the spatial axes.
    """

    split: tuple[int, ...]
    kept: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def reduced(self) -> tuple[int, ...]:
        """The axes of ``split`` that a statistic is collected over."""
        return tuple(i for i in range(len(self.split)) if i not in self.kept)

    @property
    def stats_shape(self) -> tuple[int, ...]:
        """The shape in which G statistics broadcast against ``x.view(split)``."""
        return tuple(size if i in self.kept else 1 for i, size in enumerate(self.split))

    @property
    def channel_shape(self) -> tuple[int, ...]:
        """The shape in which one value per channel broadcasts against ``x.view(split)``."""
        return tuple(size if axis == 1 else 1 for size, axis in zip(self.split, self.axes, strict=True))

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """The shape in which one value per sample and place broadcasts against ``x.view(split)``."""
        return tuple(1 if axis == 1 else size for size, axis in zip(self.split, self.axes, strict=True))

    def per_channel(self, stats: Tensor) -> Tensor:
        """One value per channel from one per statistic, where all axes kept come from the channels.

        In memory of its own: ``torch.batch_norm`` reads running statistics as if they were contiguous.
        """
        return stats.view(self.stats_shape).expand(self.channel_shape).reshape(-1).contiguous()

    @property
    def num_samples(self) -> int:
        """N, the number of samples."""
        return math.prod([size for size, axis in zip(self.split, self.axes) if axis == 0])

    @property
    def num_channels(self) -> int:
        """C, the number of channels."""
        return math.prod([size for size, axis in zip(self.split, self.axes) if axis == 1])

    @property
    def num_stats(self) -> int:
        """G, the number of statistics."""
        return math.prod([self.split[i] for i in self.kept])

    @property
    def num_elements(self) -> int:
        """n = A·B, the number of elements behind one statistic (without a mask)."""
        return math.prod([self.split[i] for i in self.reduced])


class Formula(NamedTuple):
    """The constants of docs/mathematics.md that a step needs, and that do not change.

    ``alpha`` and ``beta`` mix the statistics and their gradients, ``kappa`` says what a weight update keeps and
    takes; with a ``window``, and a ``grad_window`` for the gradients, the three are None and follow from the samples
    seen. Without a stream alpha and beta are ``PRESENT_ONLY`` and there is no kappa. ``limit`` is c of the bound on
    the moment, infinity for none. ``own`` is P of the window rule, the samples of a mini-batch whose own gradient
    counts as much as that of all others; infinity for none.
    """

    p: float
    centered: bool
    k: float
    eps: float
    alpha: Mix | None = PRESENT_ONLY
    beta: Mix | None = PRESENT_ONLY
    kappa: tuple[float, float, float, float] | None = None
    window: float | None = None
    grad_window: float | None = None
    limit: float = math.inf
    own: float = math.inf

    @property
    def floor(self) -> float:
        """c^−p: the moment in use is at least this share of the call's own; 0 without a bound."""
        return float(self.limit**-self.p)

    def lasting(self, seen: float) -> float:
        """E of the window rule: the samples that the long-term average stands for, having taken in so many."""
        assert self.window is not None
        return min(self.window, PRIOR_SAMPLES + seen)

    def own_share(self, samples: Any) -> Any:
        """β3 of the window rule, S/(S + P) for a use of S samples, a number or a tensor."""
        return samples / (samples + self.own) if self.own < math.inf else 0.0

    def weights(self, samples: float, grad_samples: float, seen: float, use: float = 0) -> Weights:
        """α, β and κ as they are after so many samples and gradients of samples since the last weight update.

        Args:
            samples: whose statistics are in the short-term average.
            grad_samples: whose gradients are.
            seen: the samples that the long-term average has taken in.
            use: the samples of the use itself, which α and β are for; κ does not depend on them.

        Raises:
            ValueError: without a stream.
        """
        if self.window is not None and self.grad_window is not None:
            alpha = by_evidence(self.lasting(seen), samples)
            beta = by_evidence(self.grad_window, grad_samples)
            own = self.own_share(use)
            return Weights(alpha, with_own(beta, own), (*alpha[:2], *beta[:2]))
        if self.alpha is None or self.beta is None or self.kappa is None:
            raise ValueError("a formula without a stream has no memory")
        return Weights(self.alpha, self.beta, self.kappa)


def by_evidence(lasting: float, recent: float) -> Mix:
    """Weights of a long-term average that stands for ``lasting`` samples and a short-term one of ``recent``."""
    return lasting / (lasting + recent), recent / (lasting + recent), 0.0


def with_own(mix: tuple[Any, Any, Any], own: Any) -> tuple[Any, Any, Any]:
    """Weights of which the present value gets a share of its own."""
    return (1 - own) * mix[0], (1 - own) * mix[1], own


class Weights(NamedTuple):
    """The mix of long-term, short-term and present at a use, and the rates of a commit (docs/mathematics.md)."""

    alpha: Mix
    beta: Mix
    kappa: tuple[float, float, float, float]

    def memory(self, samples: float) -> float:
        """The samples that the long-term average stands for where every weight update sees this many; maybe infinite.

        A commit that replaces a share of 1 − κ1 by an average of S samples leads to an average of S/(1 − κ1).
        """
        return samples / (1 - self.kappa[0]) if self.kappa[0] < 1 else math.inf


class State(NamedTuple):
    """The long- and short-term averages of a stream, changed in place; ``FIELDS`` tells their sizes.

    ``long``, ``short``, ``long_grad``, ``short_grad``: averages; row 0 is mu's, row 1 is the moment's.
    ``count``, ``grad_count``: elements since the last weight update.
    ``samples``, ``grad_samples``: samples since the last weight update.
    ``seen``: samples that the long-term averages have taken in.
    """

    long: Tensor
    short: Tensor
    long_grad: Tensor
    short_grad: Tensor
    count: Tensor  # type: ignore[assignment]  # a tuple method of that name is of no use here
    grad_count: Tensor
    samples: Tensor
    grad_samples: Tensor
    seen: Tensor


class Field(NamedTuple):
    """The properties of one buffer of a stream."""

    rows: int
    """2: ``(2, G)``, for mu and the moment; 1: ``(G,)``; 0: a scalar."""

    is_count: bool
    """int64; other buffers have the dtype of the statistics, see :func:`wide`."""

    half: Literal["statistics", "gradients"]
    """The half of the stream that it belongs to: a forward pass moves its statistics, a backward pass its gradients."""

    joined: Literal["same", "average", "sum"]
    """The value that several processes have after they join it at a weight update: the same as before, since all make
    the same commits from the same start; the average over the elements of all of them; or the sum."""

    def shape(self, num_stats: int) -> tuple[int, ...]:
        """The shape for G statistics."""
        return ((), (num_stats,), (2, num_stats))[self.rows]

    def dtype(self, statistics: torch.dtype) -> torch.dtype:
        """The dtype beside statistics of this dtype."""
        return torch.int64 if self.is_count else statistics


FIELDS = {
    "long": Field(2, False, "statistics", "same"),
    "short": Field(2, False, "statistics", "average"),
    "long_grad": Field(2, False, "gradients", "same"),
    "short_grad": Field(2, False, "gradients", "average"),
    "count": Field(1, True, "statistics", "sum"),
    "grad_count": Field(1, True, "gradients", "sum"),
    "samples": Field(0, True, "statistics", "sum"),
    "grad_samples": Field(0, True, "gradients", "sum"),
    "seen": Field(0, True, "statistics", "same"),
}
"""The buffers of a stream, by the names and in the order that they have in :class:`State`."""

STATISTICS = tuple(name for name, field in FIELDS.items() if field.half == "statistics")
GRADIENTS = tuple(name for name, field in FIELDS.items() if field.half == "gradients")


class Call(NamedTuple):
    """One use of a layer, all that an engine is told; ``ops.plain.normalize`` explains the fields."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    view: View
    formula: Formula
    state: State | None = None
    grad_scale: Tensor | None = None
    stats: Tensor | None = None


class Sign(NamedTuple):
    """The observations of a commit in a stream where training may be running away.

    ``use``: the number of the stream in the commit. ``before``, ``after``: the sum of its long-term moments.
    ``present``: the sum of its short-term moments before the commit. ``outgrown``: whether that makes a scale more than
    ``limit`` times as large as the long-term one. ``missed``, ``missed_gradients``: how many statistics, and gradients
    of statistics, met nothing finite since the last commit although there were samples.
    """

    use: int
    before: float
    after: float
    present: float
    outgrown: bool
    missed: int
    missed_gradients: int


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and state: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
