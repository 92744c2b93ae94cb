"""The reference engine: the formulas, and autograd over them. Read this one to learn the mathematics.

Everything follows the order of ``docs/mathematics.md``. A statistic enters the formulas through one node,
``Streamed``: forward it turns the statistic of this call into the streamed one, backward it does the same to the
gradient. All other derivatives are autograd's.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ..core.spec import Call, Formula, State, View, Weights, wide
from .another_pass import AnotherPass
from .base import Committed, Engine, Uses
from .checks import check_before_backward
from .derivatives import first_order_only

Scalar = float | Tensor


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    view: View,
    formula: Formula,
    state: State | None = None,
    grad_scale: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    """Normalize ``x`` over a reference, apply gain and bias, and advance the stream.

    An index whose statistic b_mu or b_m is not finite leaves its stream untouched, forward and backward, and passes
    no gradient through its moment, which has no useful derivative. What remains is what the formula gives: where x is
    finite and its moment overflowed (say |d|^7 in float32), 1/s is 0, the output is 0 and dx is ĝ_mu; where an x makes
    m NaN, output and dx are NaN.

    Args:
        x: ``(N, C, ...)``, N > 0.
        weight: gain, ``(C,)``, or None for 1.
        bias: ``(C,)``, or None for 0.
        mask: bool, ``(N, ...)`` without the channel axis: True where an element counts. Others come out as zero,
            pass no gradient and enter no statistic.
        view: how x is seen as ``(A, G, B)``.
        formula: the constants.
        state: the stream's averages, changed in place; None without a stream.
        grad_scale: a scalar by which the loss was multiplied: gradients are streamed without it.
        stats: ``(2, G)``, filled with the mu and m that this call used.

    Returns:
        y, of the shape and dtype of ``x``.
    """
    p, k, eps = formula.p, formula.k, formula.eps
    keep = None if mask is None else mask.view(view.mask_shape)
    v = hide(x.to(wide(x.dtype)).view(view.split), keep)
    n = elements(view, keep)
    use = None if state is None else Use(state, formula, n, num_samples(x, mask), grad_scale)

    b_mu = v.sum(view.reduced, keepdim=True) / at_least_one(n)
    mu = b_mu if use is None else Streamed.apply(b_mu, 0, use)

    d = hide(v - mu, keep) if formula.centered else v
    total = magnitude(d.detach(), p).sum(view.reduced, keepdim=True)
    bad = ~total.isfinite()
    b_m = magnitude(d.masked_fill(bad, 0), p).sum(view.reduced, keepdim=True)
    b_m = torch.where(bad, total, b_m) / at_least_one(n)
    m = b_m if use is None else bounded(Streamed.apply(b_m, 1, use), b_m, formula)

    s = (k**2 * power(m, 2 / p) + eps).sqrt()
    if use is not None:
        use.inverse = 1 / s.detach().flatten()
    y = (v - mu) / s
    if weight is not None:
        y = y * weight.to(y.dtype).view(view.channel_shape)
    if bias is not None:
        y = y + bias.to(y.dtype).view(view.channel_shape)
    if stats is not None:
        stats.copy_(torch.stack((mu.detach().flatten(), m.detach().flatten())))
    return hide(y, keep).reshape(x.shape).to(x.dtype)


class Use:
    """One use of a stream: what it makes of a statistic, and later of its gradient.

    Both rows (mu, then m) are needed before the state may change, since one that is not finite keeps both out.
    """

    def __init__(
        self,
        state: State,
        formula: Formula,
        n: int | Tensor,
        samples: int | Tensor,
        grad_scale: Tensor | None,
    ) -> None:
        self.state, self.formula, self.samples, self.grad_scale = state, formula, samples, grad_scale
        self.n = n.flatten() if isinstance(n, Tensor) else n
        self.seen: dict[int, Tensor] = {}
        self.fresh: dict[int, Tensor] = {}
        self.finite = torch.ones_like(state.count, dtype=torch.bool)
        state.samples.add_(samples)
        self.alpha = self._weights().alpha
        self.passes = 0
        self.inverse: Tensor
        self.another: AnotherPass | None = None

    def statistic(self, b: Tensor, row: int) -> Tensor:
        """The statistic that a use sees: α1·long + α2·short + α3·b. After mu comes m, and then short takes both in."""
        state = self.state
        fresh = running_average(state.short[row], state.count, b.flatten(), self.n)
        self.fresh[row] = fresh
        self.finite &= b.flatten().isfinite()
        if row == 1:
            keep_finite(state.short, state.count, self.fresh, self.n, self.finite)
        return mix(self.alpha, state.long[row], fresh, b.flatten()).view(b.shape)

    def gradient(self, total: Tensor, row: int) -> Tensor:
        """The streaming gradient. m's arrives before mu's, and short_grad takes both in after mu's."""
        if row == 1:
            self.passes += 1
            self.another = AnotherPass(self.state, self.n, self.samples) if self.passes > 1 else None
        state = self.state if self.another is None else self.another.scratch
        if row == 1:
            state.grad_samples.add_(self.samples)
            self.beta = self._weights().beta
        g = total.flatten() / at_least_one(self.n)
        if self.grad_scale is not None:
            g = g / self.grad_scale.to(g.dtype)
        unit = self._unit(row)
        g = g * torch.where(unit > 0, 1 / unit, 0)
        fresh = running_average(state.short_grad[row], state.grad_count, g, self.n)
        self.seen[row] = g
        self.fresh[row] = fresh
        mixed = mix(self.beta, state.long_grad[row], fresh, g) * unit
        if row == 1:
            mixed = mixed.masked_fill(~self.finite, 0)
        else:
            finite = self.finite & self.seen[0].isfinite() & self.seen[1].isfinite()
            keep_finite(state.short_grad, state.grad_count, self.fresh, self.n, finite)
            if self.another is not None:
                self.another.finish()
        if self.grad_scale is not None:
            mixed = mixed * self.grad_scale.to(g.dtype)
        return (mixed * at_least_one(self.n)).view(total.shape)

    def _unit(self, row: int) -> Tensor:
        """The unit of the streams of gradients: 1/s for mu and 1/s^p for m under the window rule, else 1."""
        if self.formula.window is None:
            return torch.ones_like(self.inverse)
        return self.inverse ** (self.formula.p if row == 1 else 1)

    def _weights(self) -> Weights:
        return weights(self.formula, self.state, float(self.samples))


class Streamed(torch.autograd.Function):
    """Stands between the statistic of this call and the one that the formulas use."""

    @staticmethod
    def forward(ctx, b: Tensor, row: int, use: Use) -> Tensor:  # type: ignore[no-untyped-def]
        """The statistic in the place of that of this call."""
        ctx.row, ctx.use = row, use
        return use.statistic(b, row)

    @staticmethod
    @first_order_only
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        """The gradient in the place of that of this call."""
        return ctx.use.gradient(grad, ctx.row), None, None


def commit(uses: Uses) -> None:
    """Say that the weights changed: move every stream's short-term averages into its long-term ones."""
    for state, formula in uses:
        keep, take, keep_grad, take_grad = weights(formula, state).kappa
        for long, short, count, kept, taken in (
            (state.long, state.short, state.count, keep, take),
            (state.long_grad, state.short_grad, state.grad_count, keep_grad, take_grad),
        ):
            long.copy_(torch.where(count > 0, kept * long + taken * short, long))
            short.zero_()
            count.zero_()
        state.seen.add_(state.samples)
        state.samples.zero_()
        state.grad_samples.zero_()


def weights(formula: Formula, state: State, use: float = 0) -> Weights:
    """α, β and κ of a stream as it is: its constants, or what the window rule makes of the samples seen."""
    return formula.weights(state.samples.item(), state.grad_samples.item(), state.seen.item(), use)


def bounded(m: Tensor, b_m: Tensor, formula: Formula) -> Tensor:
    """m, and at least b_m/c^p. The bound is a constant for the gradients, which go through m as without it."""
    low = b_m.detach() * formula.floor
    return m + torch.where(low > m, low - m, 0).detach() if formula.floor else m


def mix(weights: tuple[Scalar, Scalar, Scalar], long: Tensor, short: Tensor, present: Tensor) -> Tensor:
    """Long, short and present, weighted. A weight of zero keeps a value out altogether, so 0·inf is 0 here."""
    terms = [
        weight * value for weight, value in zip(weights, (long, short, present)) if isinstance(weight, Tensor) or weight
    ]
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(long)


def running_average(average: Tensor, count: Tensor, value: Tensor, n: int | Tensor) -> Tensor:
    """The average over ``count`` elements so far, and over ``n`` more whose average is ``value``."""
    share = n / (count + n).clamp(min=1).to(average.dtype)
    return average + (value - average) * share


def keep_finite(short: Tensor, count: Tensor, fresh: dict[int, Tensor], n: int | Tensor, finite: Tensor) -> None:
    """Let the fresh averages into the state where both of an index are finite."""
    short.copy_(torch.where(finite, torch.stack((fresh[0], fresh[1])), short))
    count.add_(n * finite)


def magnitude(d: Tensor, p: float) -> Tensor:
    """|d|^p. The square has a second derivative at 0 too, where the absolute value has none."""
    return d.square() if p == 2 else d.abs() ** p


def power(m: Tensor, exponent: float) -> Tensor:
    """m^exponent, whose derivative at m = 0 is 0 where the formula has no limit (exponent < 1)."""
    if exponent >= 1:
        return m**exponent
    return torch.where(m != 0, m, 1) ** exponent * (m != 0)


def elements(view: View, keep: Tensor | None) -> int | Tensor:
    """n, the number of elements behind each statistic; with a mask one number per index, which may be 0."""
    if keep is None:
        return view.num_elements
    channels = math.prod([view.split[i] for i in view.reduced if view.axes[i] == 1])
    return (keep.sum(view.reduced, keepdim=True) * channels).expand(view.stats_shape)


def at_least_one(n: int | Tensor) -> int | Tensor:
    """n as a divisor: an index without an element has a sum of 0, and its average is 0."""
    return n.clamp(min=1) if isinstance(n, Tensor) else n


def num_samples(x: Tensor, mask: Tensor | None) -> int | Tensor:
    """N, or with a mask the number of samples that have an element left."""
    return x.shape[0] if mask is None else mask.reshape(len(mask), -1).any(1).sum()


def hide(t: Tensor, keep: Tensor | None) -> Tensor:
    """Zero where the mask says padding."""
    return t if keep is None else t.masked_fill(~keep, 0)


class _Reference(Engine):
    name = "plain"

    def status(self) -> str:
        return "available: the reference, autograd over the formulas; only used when forced"

    def takes(self, call: Call) -> bool:
        return True

    def normalize(self, call: Call) -> Tensor:
        y = normalize(*call)
        if y.grad_fn is not None:  # the other engines look for themselves
            check = partial(check_before_backward, call.x, call.weight, call.view, call.state)
            y.grad_fn.register_prehook(check)
        return y

    def commit(self, uses: Uses) -> Committed:
        commit(uses)
        return Committed(())


ENGINE = _Reference()
