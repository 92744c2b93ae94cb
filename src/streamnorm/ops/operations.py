"""The operation on tensor operations, forward and backward: for every device and dtype, in graphs, and over processes.

It saves x and three numbers per statistic for the backward pass, as Batch Normalization does, and computes what
``plain`` does. Written for few passes over memory; the mathematics is explained there.

- As the PyTorch engine it runs as it stands (``eager``).
- Over processes the sums are those of all of them (``processes``): a :class:`Reduction` makes means of sums.
- In a graph that ``torch.compile`` makes, the statistics of a use go through an operator that is computed once
  (``graph``), since a compiler decides by itself what the backward part computes a second time.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..core.half import bounded, gradients_half, statistics_half
from ..core.spec import Call, Formula, State, View, wide
from . import plain
from .another_pass import AnotherPass, counting_once
from .checks import check_backward
from .derivatives import Again, any_order
from .graph import hold, is_another_pass
from .plain import at_least_one, elements, hide, num_samples


class Reduction(Protocol):
    """Means over the elements of an input, in one process or in several, and the numbers of elements and samples."""

    @property
    def n(self) -> int | Tensor:
        """The elements behind each statistic, a number or ``(G,)``; known after the first call of :meth:`means`."""

    @property
    def samples(self) -> int | Tensor:
        """The samples of the use; known likewise."""

    def means(self, *sums: Tensor) -> tuple[Tensor, ...]:
        """Turn sums over this process's elements, each ``(G,)``, into means."""


class Here(NamedTuple):
    """The elements of this process's input."""

    n: int | Tensor
    samples: int | Tensor

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None, view: View) -> Here:
        """Count the elements that the mask leaves."""
        n = elements(view, None if mask is None else mask.view(view.mask_shape))
        return cls(n.flatten() if isinstance(n, Tensor) else n, num_samples(x, mask))

    def means(self, *sums: Tensor) -> tuple[Tensor, ...]:
        """Divide each sum by the number of its elements."""
        divisor = at_least_one(self.n)
        return tuple(total / divisor for total in sums)


def normalize(call: Call, over: Reduction | None = None) -> Tensor:
    """Normalize as ``plain.normalize`` does, by means over this process's elements or over those of ``over``."""
    y: Tensor = Normalize.apply(*call, over)
    return y


def again(ctx: Any) -> Again:
    """The inputs of a use, and a function that computes its output again, or None where there is no such function.

    ``ctx`` is what a forward pass left, see :func:`gradients`.
    """
    x, weight, mask, saved = ctx.saved_tensors
    bias = saved.new_zeros(x.shape[1], requires_grad=True) if ctx.has_bias else None  # no gradient depends on its value
    inputs = x, weight, bias
    if ctx.state is not None or ctx.over is not None:
        return inputs, None
    return inputs, lambda x, weight, bias: (plain.normalize(x, weight, bias, mask, ctx.view, ctx.formula),)


class Normalize(torch.autograd.Function):
    """The operation; ``forward`` and ``backward`` take any context, also from callers that go back by hand."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        view: View,
        formula: Formula,
        state: State | None,
        grad_scale: Tensor | None,
        stats: Tensor | None,
        over: Reduction | None = None,
    ) -> Tensor:
        """Normalize, and advance the stream of statistics."""
        dtype = wide(x.dtype)
        keep = None if mask is None else mask.view(view.mask_shape)
        v = hide(x.view(view.split), keep)

        reduction = Here.of(x, mask, view) if over is None else over
        (b_mu,) = reduction.means(v.sum(view.reduced, dtype=dtype).flatten())
        half = statistics_half(state, formula, reduction.n, reduction.samples)
        mu, short_mu = half.mixed(0, b_mu)
        from_mu = v - mu.view(view.stats_shape)
        d = hide(from_mu, keep) if formula.centered else v.to(dtype)
        (b_m,) = reduction.means(_sum_of_powers(d, view, formula.p))
        m, short_m = half.mixed(1, b_m)
        if state is not None:
            m = bounded(m, b_m, formula)

        finite = b_mu.isfinite() & b_m.isfinite()
        inverse = (formula.k**2 * m ** (2 / formula.p) + formula.eps).rsqrt()
        rows = mu, inverse, _slope(m, inverse, finite, formula)
        saved = torch.stack(rows if stats is None else (*rows, m))
        counts = None
        passed: list[Tensor] = []  # in a graph, what its backward part asks
        if is_compiling() and (state is not None or stats is not None):
            saved, counts, *passed = hold(saved)
            mu, inverse = saved[0], saved[1]
            from_mu = v - mu.view(view.stats_shape)

        scale = inverse.view(view.stats_shape)
        if weight is not None:
            scale = scale * weight.to(dtype).view(view.channel_shape)
        shift = None if bias is None else bias.to(dtype).view(view.channel_shape)
        y = from_mu * scale if shift is None else torch.addcmul(shift, from_mu, scale)
        y = hide(y, keep)
        if view.split != x.shape:
            y = _in_shape(y, x.shape)

        half.close((short_mu, short_m), finite, counts)
        if stats is not None:
            stats.copy_(saved[::3] if counts is None else torch.where(counts, saved[::3], torch.nan))
        ctx.save_for_backward(x, weight, mask, saved, *passed)
        ctx.view, ctx.formula, ctx.state, ctx.grad_scale, ctx.over = view, formula, state, grad_scale, over
        ctx.n, ctx.samples, ctx.has_bias = reduction.n, reduction.samples, bias is not None
        return y.to(x.dtype)

    @staticmethod
    @any_order(again)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, gain and bias."""
        if is_compiling():
            return *gradients(ctx, dy), *(None,) * 7
        with counting_once(ctx):
            return *gradients(ctx, dy), *(None,) * 7


def gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of x, gain and bias that are needed, and advance the stream of gradients.

    ``ctx`` is what a forward pass left: ``saved_tensors`` with x, gain, mask and the rows mu, 1/s and slope, and what
    else is read here.
    """
    x, weight, mask, saved, *passed = ctx.saved_tensors
    view: View = ctx.view
    if not (is_compiling() or getattr(ctx, "checked", False)):
        check_backward(x, dy, weight, saved, view, ctx.state)
    keep = None if mask is None else mask.view(view.mask_shape)
    mu, inverse, slope, *_ = saved.unbind()
    v = hide(x.view(view.split), keep)
    from_mu = hide(v - mu.view(view.stats_shape), keep)
    g = hide(dy.reshape(x.shape).view(view.split), keep).to(from_mu.dtype)

    over_channels = tuple(i for i, size in enumerate(view.channel_shape) if size == 1 and view.axes[i] != 1)
    shared = view.stats_shape == view.channel_shape  # one statistic per channel: gain, bias and statistics share sums
    sums = _sums(g, from_mu, view) if shared else None
    dweight = dbias = dx = None
    if weight is not None and ctx.needs_input_grad[1]:
        if sums is None:
            dweight = (g * from_mu * inverse.view(view.stats_shape)).sum(over_channels).flatten()
        else:
            dweight = sums[0] * inverse
        dweight = dweight.to(weight.dtype)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        dbias = g.sum(over_channels).flatten() if sums is None else sums[1]
    if ctx.needs_input_grad[0]:
        if weight is not None:
            gain = weight.to(g.dtype)
            g = g * gain.view(view.channel_shape)
            sums = None if sums is None else (sums[0] * gain, sums[1] * gain)
        d = from_mu if ctx.formula.centered else v.to(g.dtype)
        sums = _sums(g, from_mu, view) if sums is None else sums
        another = None
        if passed and ctx.state is not None:
            first = ~is_another_pass(passed[0], sums[1])
            another = AnotherPass(ctx.state, ctx.n, ctx.samples, first)
        dx = _input_gradient(ctx, ctx.state if another is None else another.scratch, g, sums, d, inverse, slope)
        if another is not None:
            another.finish()
        dx = hide(dx, keep).reshape(x.shape).to(x.dtype)
    return dx, dweight, dbias


def _in_shape(y: Tensor, shape: torch.Size) -> Tensor:
    """y with the axes of the input: no view, since autograd lets no one change one, as nn.ReLU(inplace=True) does."""
    try:
        return torch.ops.aten._unsafe_view.default(y, shape)
    except RuntimeError:  # the input's elements overlap, as after Tensor.unfold: parts of an axis may lie in any order
        return torch.ops.aten._unsafe_view.default(y.contiguous(), shape)


def _sums(g: Tensor, from_mu: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """The sums of g·(x − mu) and of g, for each statistic."""
    return (g * from_mu).sum(view.reduced).flatten(), g.sum(view.reduced).flatten()


def _input_gradient(
    ctx: Any, state: State | None, g: Tensor, sums: tuple[Tensor, Tensor], d: Tensor, inverse: Tensor, slope: Tensor
) -> Tensor:
    """dx = dx̂/s + ĝ_mu + ĝ_m·p·u, with the gradients of the statistics streamed; g is dx̂."""
    view, formula, p = ctx.view, ctx.formula, ctx.formula.p
    cut = slope.isnan()
    u = _derivative_of_power(d, p)
    # A device would be waited for, and a graph has no values to ask.
    can_ask = u.is_cpu and type(u) is Tensor and not is_compiling()
    if not can_ask or cut.any():  # where a moment is not finite, u may not be so either
        u = u.masked_fill(cut.view(view.stats_shape), 0)

    reduction: Reduction = Here(ctx.n, ctx.samples) if ctx.over is None else ctx.over
    half = gradients_half(state, formula, ctx.n, ctx.samples, inverse)
    along, mean_g, *q = reduction.means(*sums, *((u.sum(view.reduced).flatten(),) if formula.centered else ()))
    g_m, g_mu = -along * slope, -mean_g * inverse
    if ctx.grad_scale is not None:
        unscale = ctx.grad_scale.to(g.dtype)
        g_m, g_mu = g_m / unscale, g_mu / unscale

    through_m, short_m = half.mixed(1, g_m)
    through_m = through_m.masked_fill(cut, 0)
    if formula.centered:
        g_mu = g_mu - through_m * p * q[0]
    through_mu, short_mu = half.mixed(0, g_mu)
    if state is not None:
        half.close((short_mu, short_m), g_m.isfinite() & g_mu.isfinite())
    if ctx.grad_scale is not None:
        through_m, through_mu = through_m * unscale, through_mu * unscale

    dx = torch.addcmul(through_mu.view(view.stats_shape), g, inverse.view(view.stats_shape))
    return dx.addcmul_(u, (p * through_m).view(view.stats_shape))


def _sum_of_powers(d: Tensor, view: View, p: float) -> Tensor:
    """The sum of |d|^p, without a temporary for the usual orders."""
    if p in (1, 2):
        norm = torch.linalg.vector_norm(d, p, view.reduced).flatten()
        return norm if p == 1 else norm.square()
    return d.abs().pow_(p).sum(view.reduced).flatten()


def _derivative_of_power(d: Tensor, p: float) -> Tensor:
    """u = |d|^(p−1)·sgn d."""
    if p == 1:
        return d.sgn()
    if p == 2:
        return d
    return d.abs().pow_(p - 1).mul_(d.sgn())


def _slope(m: Tensor, inverse: Tensor, finite: Tensor, formula: Formula) -> Tensor:
    """sigma²/(p·m·s³), how the output falls as m grows; NaN marks an index whose statistic is not finite."""
    exponent = 2 / formula.p - 1
    alive = m >= torch.finfo(m.dtype).tiny  # below, the power of a subnormal number overflows
    power = torch.ones_like(m) if exponent == 0 else torch.where(alive, m, 1) ** exponent * alive
    return (formula.k**2 / formula.p * (power * inverse) * inverse**2).masked_fill(~finite, torch.nan)
