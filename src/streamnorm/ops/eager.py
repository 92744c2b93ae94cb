"""The PyTorch engine: one autograd.Function on tensor operations, for every device and dtype.

It saves x and three vectors per statistic for the backward pass, as Batch Normalization does, and computes what
``plain`` does. Written for few passes over memory; the mathematics is explained there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..core.spec import Formula, Mix, State, View
from . import plain
from .another_pass import counting_once
from .checks import check_backward
from .derivatives import Again, any_order
from .plain import Scalar, at_least_one, elements, hide, mix, num_samples, running_average, wide

NAME = "torch"


def status() -> str:
    """What this engine is, for ``streamnorm.engines()``."""
    return "available: PyTorch operations, on every device"


def supports(x: Tensor, mask: Tensor | None, view: View, formula: Formula, state: State | None) -> bool:
    """Every input."""
    return True


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
    """As ``plain.normalize``."""
    y: Tensor = _Normalize.apply(x, weight, bias, mask, view, formula, state, grad_scale, stats)
    return y


def again(ctx: Any) -> Again:
    """What a use was computed from, and how; ``ctx`` is what a forward pass left, see :func:`gradients`."""
    x, weight, mask, saved = ctx.saved_tensors
    bias = saved.new_zeros(x.shape[1], requires_grad=True) if ctx.has_bias else None  # no gradient depends on its value
    inputs = x, weight, bias
    if ctx.state is not None:
        return inputs, None
    return inputs, lambda x, weight, bias: (plain.normalize(x, weight, bias, mask, ctx.view, ctx.formula),)


class _Normalize(torch.autograd.Function):
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
    ) -> Tensor:
        dtype = wide(x.dtype)
        keep = None if mask is None else mask.view(view.mask_shape)
        v = hide(x.view(view.split), keep)
        n = elements(view, keep)
        samples = num_samples(x, mask)

        b_mu = (v.sum(view.reduced, keepdim=True, dtype=dtype) / at_least_one(n)).flatten()
        if state is None:
            mu = b_mu
        else:
            state.samples.add_(samples)
            alpha = mix_weights(formula.alpha, formula.window, state.samples, dtype)
            per_index = n.flatten() if isinstance(n, Tensor) else n
            short_mu = running_average(state.short[0], state.count, b_mu, per_index)
            mu = mix(alpha, state.long[0], short_mu, b_mu)

        from_mu = v - mu.view(view.stats_shape)
        d = hide(from_mu, keep) if formula.centered else v.to(dtype)
        b_m = mean_power(d, formula.p, view, n)
        finite = b_mu.isfinite() & b_m.isfinite()
        if state is None:
            m = b_m
        else:
            short_m = running_average(state.short[1], state.count, b_m, per_index)
            m = mix(alpha, state.long[1], short_m, b_m)
            _keep_finite(state.short, state.count, (short_mu, short_m), per_index, finite)
        if stats is not None:
            torch.stack((mu, m), out=stats)

        inverse = (formula.k**2 * m ** (2 / formula.p) + formula.eps).rsqrt()
        scale = inverse.view(view.stats_shape)
        if weight is not None:
            scale = scale * weight.to(dtype).view(view.channel_shape)
        # Autograd lets no one change a view that a Function returns, and nn.ReLU(inplace=True) does: y is none.
        y = torch.empty_like(x, dtype=dtype)
        into = y.view(view.split)
        if bias is None:
            torch.mul(from_mu, scale, out=into)
        else:
            torch.addcmul(bias.to(dtype).view(view.channel_shape), from_mu, scale, out=into)
        if keep is not None:
            into.masked_fill_(~keep, 0)

        ctx.save_for_backward(x, weight, mask, torch.stack((mu, inverse, slope_of(m, inverse, finite, formula))))
        ctx.view, ctx.formula, ctx.state, ctx.grad_scale = view, formula, state, grad_scale
        ctx.n, ctx.samples, ctx.has_bias = n, samples, bias is not None
        return y.to(x.dtype)

    @staticmethod
    @any_order(again)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with counting_once(ctx):
            return *gradients(ctx, dy), None, None, None, None, None, None


def gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, gain and bias, where they are needed; and then the streams of gradients advance.

    ``ctx`` is what a forward pass left: ``saved_tensors`` with x, gain, mask and the rows mu, 1/s and slope, and what
    else is read here.
    """
    x, weight, mask, saved = ctx.saved_tensors
    view, formula = ctx.view, ctx.formula
    if not (is_compiling() or getattr(ctx, "checked", False)):
        check_backward(x, dy, weight, saved, view, ctx.state)
    keep = None if mask is None else mask.view(view.mask_shape)
    mu, inverse, slope = saved
    inverse_wide = inverse.view(view.stats_shape)
    v = hide(x.view(view.split), keep)
    from_mu = hide(v - mu.view(view.stats_shape), keep)
    g = hide(dy.reshape(x.shape).view(view.split), keep).to(from_mu.dtype)

    wide_weight = None if weight is None else weight.to(g.dtype).view(view.channel_shape)
    sums: tuple[Tensor, Tensor] | None = None
    if view.stats_shape == view.channel_shape:  # one statistic per channel: gain, bias and statistics share their sums
        sums = (g * from_mu).sum(view.reduced, keepdim=True), g.sum(view.reduced, keepdim=True)
    over_channels = tuple(i for i, size in enumerate(view.channel_shape) if size == 1 and view.axes[i] != 1)
    dweight = dbias = dx = None
    if weight is not None and ctx.needs_input_grad[1]:
        total = (g * from_mu * inverse_wide).sum(over_channels) if sums is None else sums[0] * inverse_wide
        dweight = total.flatten().to(weight.dtype)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        dbias = (g.sum(over_channels) if sums is None else sums[1]).flatten()
    if ctx.needs_input_grad[0]:
        if wide_weight is not None:
            g = g * wide_weight
            sums = None if sums is None else (sums[0] * wide_weight, sums[1] * wide_weight)
        if sums is None:
            sums = (g * from_mu).sum(view.reduced, keepdim=True), g.sum(view.reduced, keepdim=True)
        d = from_mu if formula.centered else v.to(g.dtype)
        dx = _input_gradient(ctx, g, sums, d, inverse, slope)
        dx = hide(dx, keep).reshape(x.shape).to(x.dtype)
    return dx, dweight, dbias


def _input_gradient(
    ctx: Any, g: Tensor, sums: tuple[Tensor, Tensor], d: Tensor, inverse: Tensor, slope: Tensor
) -> Tensor:
    """dx = dx̂/s + ĝ_mu + ĝ_m·p·u, with the gradients of the statistics streamed; sums are of dx̂·(x − mu) and dx̂."""
    view, formula, state, p = ctx.view, ctx.formula, ctx.state, ctx.formula.p
    divisor = at_least_one(ctx.n)
    per_index = ctx.n.flatten() if isinstance(ctx.n, Tensor) else ctx.n
    cut = slope.isnan()
    u = _derivative_of_power(d, p)
    can_ask = (
        u.is_cpu and type(u) is Tensor and not is_compiling()
    )  # a device would be waited for, a graph has no values
    if not can_ask or cut.any():  # u is not finite either
        u = u.masked_fill(cut.view(view.stats_shape), 0)

    g_m = -(sums[0] / divisor).flatten() * slope
    g_mu = -(sums[1] / divisor).flatten() * inverse
    if ctx.grad_scale is not None:
        unscale = ctx.grad_scale.to(g.dtype)
        g_m, g_mu = g_m / unscale, g_mu / unscale

    if state is None:
        beta, long, short_m = formula.beta, (g_m, g_m), g_m
    else:
        state.grad_samples.add_(ctx.samples)
        beta = mix_weights(formula.beta, formula.window, state.grad_samples, g.dtype)
        long = state.long_grad
        short_m = running_average(state.short_grad[1], state.grad_count, g_m, per_index)
    moment_path = mix(beta, long[1], short_m, g_m).masked_fill(cut, 0)
    if formula.centered:
        q = (u.sum(view.reduced, keepdim=True) / divisor).flatten()
        g_mu = g_mu - moment_path * p * q
    if state is None:
        location_path = mix(beta, g_mu, g_mu, g_mu)
    else:
        short_mu = running_average(state.short_grad[0], state.grad_count, g_mu, per_index)
        location_path = mix(beta, long[0], short_mu, g_mu)
        finite = g_m.isfinite() & g_mu.isfinite()
        _keep_finite(state.short_grad, state.grad_count, (short_mu, short_m), per_index, finite)
    if ctx.grad_scale is not None:
        moment_path, location_path = moment_path * unscale, location_path * unscale

    dx = torch.addcmul(location_path.view(view.stats_shape), g, inverse.view(view.stats_shape))
    return dx.addcmul_(u, (p * moment_path).view(view.stats_shape))


def mean_power(d: Tensor, p: float, view: View, n: int | Tensor) -> Tensor:
    """mean(|d|^p), without a temporary for the usual orders."""
    if p == 1:
        total = torch.linalg.vector_norm(d, 1, view.reduced, keepdim=True)
    elif p == 2:
        total = torch.linalg.vector_norm(d, 2, view.reduced, keepdim=True).square()
    else:
        total = d.abs().pow_(p).sum(view.reduced, keepdim=True)
    return (total / at_least_one(n)).flatten()


def _derivative_of_power(d: Tensor, p: float) -> Tensor:
    """u = |d|^(p−1)·sgn d."""
    if p == 1:
        return d.sgn()
    if p == 2:
        return d
    return d.abs().pow_(p - 1).mul_(d.sgn())


def slope_of(m: Tensor, inverse: Tensor, finite: Tensor, formula: Formula) -> Tensor:
    """sigma²/(p·m·s³), how the output falls as m grows; NaN marks an index whose statistic is not finite."""
    exponent = 2 / formula.p - 1
    alive = m >= torch.finfo(m.dtype).tiny  # below, the power of a subnormal number overflows
    power = torch.ones_like(m) if exponent == 0 else torch.where(alive, m, 1) ** exponent * alive
    return (formula.k**2 / formula.p * (power * inverse) * inverse**2).masked_fill(~finite, torch.nan)


def _keep_finite(short: Tensor, count: Tensor, fresh: tuple[Tensor, Tensor], n: int | Tensor, finite: Tensor) -> None:
    torch.where(finite, torch.stack(fresh), short, out=short)
    count.add_(n * finite)


def mix_weights(
    constants: Mix | None, window: float | None, samples: Tensor, dtype: torch.dtype
) -> tuple[Scalar, Scalar, Scalar]:
    """α (or β). On an accelerator the samples stay a tensor, since reading them would wait; in a graph, too."""
    if window is None or _can_be_read(samples):
        return plain.mix_weights(constants, window, samples)
    seen = samples.to(dtype)
    return window / (window + seen), seen / (window + seen), 0.0


def _can_be_read(samples: Tensor) -> bool:
    """Whether the number is here, and nothing that records operations would take it for a constant."""
    recorded = is_compiling() or torch._C._len_torch_dispatch_stack() > 0  # fake tensors, make_fx
    return type(samples) is Tensor and samples.device.type == "cpu" and not recorded


def commit(uses: Sequence[tuple[State, Formula]]) -> None:
    """As ``plain.commit``, for all layers at once: the number of kernel launches does not grow with the layers."""
    for fixed in (True, False):
        group = [(state, formula) for state, formula in uses if (formula.kappa is not None) == fixed]
        if not group:
            continue
        states = [state for state, _ in group]
        forward, backward = zip(*(_rates(state, formula) for state, formula in group))
        _commit([s.long for s in states], [s.short for s in states], [s.count for s in states], forward)
        _commit([s.long_grad for s in states], [s.short_grad for s in states], [s.grad_count for s in states], backward)
        torch._foreach_zero_([s.samples for s in states] + [s.grad_samples for s in states])


def _commit(longs: list[Tensor], shorts: list[Tensor], counts: list[Tensor], rates: Sequence[tuple[Any, Any]]) -> None:
    """long ← (1 + (κ1 − 1)·[count > 0])·long + κ2·short; the short of an index without a count is zero."""
    keep_less_one, take = ([rate[i] for rate in rates] for i in (0, 1))
    factors = [count.clamp(max=1).to(long.dtype) for count, long in zip(counts, longs)]
    torch._foreach_mul_(factors, keep_less_one)
    torch._foreach_add_(factors, 1.0)
    torch._foreach_mul_(longs, factors)
    torch._foreach_mul_(shorts, take)
    torch._foreach_add_(longs, shorts)
    torch._foreach_zero_(shorts)
    torch._foreach_zero_(counts)


def _rates(state: State, formula: Formula) -> tuple[tuple[Scalar, Scalar], tuple[Scalar, Scalar]]:
    """(κ1 − 1, κ2) and (κ3 − 1, κ4)."""
    if formula.kappa is not None:
        keep, take, keep_grad, take_grad = formula.kappa
        return (keep - 1, take), (keep_grad - 1, take_grad)
    assert formula.window is not None
    rates = []
    for samples in (state.samples, state.grad_samples):
        exponent = samples.to(state.long.dtype) / -formula.window
        rates.append((exponent.expm1(), -exponent.expm1()))
    return rates[0], rates[1]
