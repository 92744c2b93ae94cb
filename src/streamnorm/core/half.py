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

from .spec import PRIOR_SAMPLES, Formula, Mix, State, by_evidence, with_own

Scalar = float | Tensor
Averages = tuple[Tensor, Tensor, Tensor, Tensor]
"""The tensors of one half: long, short, count and samples."""


class Half:
    """One half of a stream during one use.

    It is made where a pass begins and dropped where it ends: a compiler takes no object from forward to backward.

    Args:
        averages: what the use starts from, and what :meth:`close` changes.
        constants: α or β; None under the window rule.
        lasting: the samples that long stands for, under the window rule.
        n: how many elements are behind each value, a number or ``(G,)``.
        samples: the number of samples of the use.
        units: what the averages are multiples of, of both rows; None for 1.
        own: the share of this use's own value under the window rule.
    """

    def __init__(
        self,
        averages: Averages,
        constants: Mix | None,
        lasting: Scalar | None,
        n: int | Tensor,
        samples: int | Tensor,
        units: tuple[Tensor, Tensor] | None = None,
        own: Scalar = 0.0,
    ) -> None:
        self.long, self.short, self.count, self.samples = averages
        self.n, self.units = n, units
        self.fresh_samples = self.samples + samples
        self.weights = mix_weights(constants, lasting, self.fresh_samples, self.long.dtype, own)
        self.share = n / (self.count + n).clamp(min=1).to(self.long.dtype)

    def mixed(self, row: int, value: Tensor) -> tuple[Tensor, Tensor]:
        """The value that the use sees in place of that of this call, and the new short-term average."""
        short, unit = self.short[row], None if self.units is None else self.units[row]
        if unit is not None:
            value = torch.where(unit > 0, value / unit, 0)
        fresh = short + (value - short) * self.share
        seen = mix(self.weights, self.long[row], fresh, value)
        return seen if unit is None else seen * unit, fresh

    def close(self, fresh: tuple[Tensor, Tensor], finite: Tensor, counts: Tensor | None = None) -> None:
        """Let the fresh averages of both rows into the stream.

        Args:
            fresh: the second results of :meth:`mixed`.
            finite: the indices whose values are finite; others keep their average and count.
            counts: the indices of which this is a use of its own, and no repetition of one; None for all.
        """
        if counts is None:
            self.samples.copy_(self.fresh_samples)
        else:
            finite = finite & counts
            self.samples.copy_(torch.where(counts[0], self.fresh_samples, self.samples))
        self.short.copy_(torch.where(finite, torch.stack(fresh), self.short))
        self.count.add_(self.n * finite)


class Present:
    """The half of a layer without a stream: a use sees the value of this call."""

    def mixed(self, row: int, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value for both: there are no averages."""
        return value, value

    def close(self, fresh: tuple[Tensor, Tensor], finite: Tensor, counts: Tensor | None = None) -> None:
        """Keep nothing."""


def statistics_half(state: State | None, formula: Formula, n: int | Tensor, samples: int | Tensor) -> Half | Present:
    """The half that a forward pass advances."""
    if state is None:
        return Present()
    averages = state.long, state.short, state.count, state.samples
    return Half(averages, formula.alpha, lasting(formula, state), n, samples)


def gradients_half(
    state: State | None, formula: Formula, n: int | Tensor, samples: int | Tensor, inverse: Tensor
) -> Half | Present:
    """The half that a backward pass advances; ``inverse`` is 1/s of the use.

    Under the window rule the gradients of mu and m are kept in units of 1/s and 1/s^p (docs/mathematics.md).
    """
    if state is None:
        return Present()
    averages = state.long_grad, state.short_grad, state.grad_count, state.grad_samples
    units = None if formula.window is None else (inverse, inverse**formula.p)
    use = samples.to(state.long_grad.dtype) if isinstance(samples, Tensor) else samples
    return Half(averages, formula.beta, formula.grad_window, n, samples, units, formula.own_share(use))


def lasting(formula: Formula, state: State) -> Scalar | None:
    """E of the window rule, the samples that long-term statistics stand for; None without a window.

    On an accelerator it stays a tensor, since reading it would wait; in a graph, too.
    """
    if formula.window is None:
        return None
    if _can_be_read(state.seen):
        return formula.lasting(state.seen.item())
    return (state.seen + PRIOR_SAMPLES).to(state.long.dtype).clamp(max=formula.window)


def mix_weights(
    constants: Mix | None, lasting: Scalar | None, samples: Tensor, dtype: torch.dtype, own: Scalar = 0.0
) -> tuple[Scalar, Scalar, Scalar]:
    """α or β: the stream's constants, or (E, S, 0)/(E + S) after S samples, and ``own`` of the present value."""
    if lasting is None:
        assert constants is not None
        return constants
    if _can_be_read(samples) and not isinstance(lasting, Tensor):
        return with_own(by_evidence(lasting, samples.item()), own)
    recent = samples.to(dtype)
    lasting = lasting if isinstance(lasting, Tensor) else torch.full_like(recent, lasting)  # else it is rounded twice
    return with_own((lasting / (lasting + recent), recent / (lasting + recent), 0.0), own)


def bounded(m: Tensor, b_m: Tensor, formula: Formula) -> Tensor:
    """m, and at least b_m/c^p (docs/mathematics.md, the bound)."""
    low = b_m * formula.floor
    return torch.where(low > m, low, m) if formula.floor else m


def _can_be_read(t: Tensor) -> bool:
    """Whether the number is here, and nothing that records operations would take it for a constant."""
    recorded = is_compiling() or torch._C._len_torch_dispatch_stack() > 0  # fake tensors, make_fx
    return type(t) is Tensor and t.device.type == "cpu" and not recorded


def mix(weights: Sequence[Scalar], long: Tensor, short: Tensor, present: Tensor) -> Tensor:
    """Long, short and present, weighted. A weight of zero keeps a value out altogether, so 0·inf is 0 here."""
    values = zip(weights, (long, short, present))
    terms = [weight * value for weight, value in values if isinstance(weight, Tensor) or weight]
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(long)
