"""The recursion of long- and short-term averages: one half of a stream during one use.

A stream has two halves, of its statistics and of their gradients, and both follow one rule (docs/mathematics.md): a
use sees a mix of the long-term average, of the short-term average with this use's value in it, and of the value itself.
The engines on tensor operations share it; ``ops/plain.py`` is a writing of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .spec import Formula, Mix, State

Scalar = float | Tensor
Averages = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of one half: long, short, count and samples."""


class Half:
    """One half of a stream during one use.

    It is made where a pass begins and dropped where it ends: a compiler takes no object from forward to backward.

    Args:
        averages: what the use starts from, and what :meth:`close` changes.
        constants: α or β; None under the window rule.
        window: the memory in samples, or None.
        n: how many elements are behind each value, a number or ``(G,)``.
        samples: how many samples the use brings.
    """

    def __init__(
        self,
        averages: Averages,
        constants: Mix | None,
        window: float | None,
        n: int | Tensor,
        samples: int | Tensor,
    ) -> None:
        self.long, self.short, self.count, self.samples = averages
        self.n = n
        self.seen = self.samples + samples
        self.weights = mix_weights(constants, window, self.seen, self.long.dtype)
        self.share = n / (self.count + n).clamp(min=1).to(self.long.dtype)

    def mixed(self, row: int, value: Tensor) -> tuple[Tensor, Tensor]:
        """What the use sees in place of the value of this call, and what the short-term average becomes."""
        short = self.short[row]
        fresh = short + (value - short) * self.share
        return mix(self.weights, self.long[row], fresh, value), fresh

    def close(self, fresh: tuple[Tensor, Tensor], finite: Tensor, counts: Tensor | None = None) -> None:
        """Let the fresh averages of both rows into the stream.

        Args:
            fresh: the second results of :meth:`mixed`.
            finite: the indices whose values are finite; others keep their average and count.
            counts: the indices of which this is a use of its own, and no repetition of one; None for all.
        """
        if counts is None:
            self.samples.copy_(self.seen)
        else:
            finite = finite & counts
            self.samples.copy_(torch.where(counts[0], self.seen, self.samples))
        self.short.copy_(torch.where(finite, torch.stack(fresh), self.short))
        self.count.add_(self.n * finite)


class Present:
    """The half of a layer without a stream: a use sees the value of this call."""

    def mixed(self, row: int, value: Tensor) -> tuple[Tensor, Tensor]:
        """The value, which is all there is."""
        return value, value

    def close(self, fresh: tuple[Tensor, Tensor], finite: Tensor, counts: Tensor | None = None) -> None:
        """Nothing is kept."""


def statistics_half(state: State | None, formula: Formula, n: int | Tensor, samples: int | Tensor) -> Half | Present:
    """The half that a forward pass advances."""
    if state is None:
        return Present()
    return Half((state.long, state.short, state.count, state.samples), formula.alpha, formula.window, n, samples)


def gradients_half(state: State | None, formula: Formula, n: int | Tensor, samples: int | Tensor) -> Half | Present:
    """The half that a backward pass advances."""
    if state is None:
        return Present()
    averages = state.long_grad, state.short_grad, state.grad_count, state.grad_samples
    return Half(averages, formula.beta, formula.window, n, samples)


def mix_weights(
    constants: Mix | None, window: float | None, seen: Tensor, dtype: torch.dtype
) -> tuple[Scalar, Scalar, Scalar]:
    """α or β: the stream's constants, or (W, S, 0)/(W + S) after S samples.

    On an accelerator S stays a tensor, since reading it would wait; in a graph, too.
    """
    if window is None:
        assert constants is not None
        return constants
    if _can_be_read(seen):
        number = seen.item()
        return window / (window + number), number / (window + number), 0.0
    seen = seen.to(dtype)
    lasting = torch.full_like(seen, window)  # a number over a tensor would be rounded twice
    return lasting / (lasting + seen), seen / (lasting + seen), 0.0


def _can_be_read(t: Tensor) -> bool:
    """Whether the number is here, and nothing that records operations would take it for a constant."""
    recorded = is_compiling() or torch._C._len_torch_dispatch_stack() > 0  # fake tensors, make_fx
    return type(t) is Tensor and t.device.type == "cpu" and not recorded


def mix(weights: Sequence[Scalar], long: Tensor, short: Tensor, present: Tensor) -> Tensor:
    """Long, short and present, weighted. A weight of zero keeps a value out altogether, so 0·inf is 0 here."""
    values = zip(weights, (long, short, present))
    terms = [weight * value for weight, value in values if isinstance(weight, Tensor) or weight]
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(long)
