"""The operation over the mini-batches of several processes, as if they were one.

What ``eager`` sums over this process's elements is summed over all processes: in the forward pass for the location
and then for the moment, which is taken about it; in the backward pass once. So the statistics, the change of the
stream and what reaches x through them are those of one process with the joined mini-batch. Gradients of gain and bias
stay this process's own, for DistributedDataParallel or whoever averages gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.spec import Formula, State, View
from .another_pass import counting_once
from .checks import check_backward, check_call
from .derivatives import first_order_only, is_recorded, refuse
from .eager import _derivative_of_power, _keep_finite, mix_weights, slope_of
from .plain import elements, hide, mix, num_samples, running_average, wide


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    view: View,
    formula: Formula,
    state: State | None,
    grad_scale: Tensor | None,
    stats: Tensor | None,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """As ``plain.normalize``, over all processes of ``group``; x may be empty in some of them.

    Returns:
        y, and how many elements of all processes are behind each statistic, ``(G,)``.
    """
    if is_recorded():
        refuse(x, weight, bias)
    check_call(x, weight, bias, view, state, stats)
    y, n = _Normalize.apply(x, weight, bias, mask, view, formula, state, grad_scale, stats, group)
    return y, n


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
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = wide(x.dtype)
        keep = None if mask is None else mask.view(view.mask_shape)
        v = hide(x.view(view.split).to(dtype), keep)
        own_n = torch.as_tensor(elements(view, keep), device=x.device).flatten().expand(view.num_stats)
        own_samples = torch.as_tensor(num_samples(x, mask), device=x.device).view(1)

        total, n, samples = _over_all(group, v.sum(view.reduced).flatten(), own_n, own_samples)
        n, samples = n.long(), samples.long().squeeze()
        b_mu = (total / n.clamp(min=1)).to(dtype)
        if state is None:
            mu = b_mu
        else:
            state.samples.add_(samples)
            alpha = mix_weights(formula.alpha, formula.window, state.samples, state.long.dtype)
            short_mu = running_average(state.short[0], state.count, b_mu, n)
            mu = mix(alpha, state.long[0], short_mu, b_mu)

        from_mu = hide(v - mu.view(view.stats_shape), keep)
        d = from_mu if formula.centered else v
        (total,) = _over_all(group, d.abs().pow(formula.p).sum(view.reduced).flatten())
        b_m = (total / n.clamp(min=1)).to(dtype)
        finite = b_mu.isfinite() & b_m.isfinite()
        if state is None:
            m = b_m
        else:
            short_m = running_average(state.short[1], state.count, b_m, n)
            m = mix(alpha, state.long[1], short_m, b_m)
            _keep_finite(state.short, state.count, (short_mu, short_m), n, finite)
        if stats is not None:
            torch.stack((mu, m), out=stats)

        inverse = (formula.k**2 * m ** (2 / formula.p) + formula.eps).rsqrt()
        y = torch.empty_like(x, dtype=dtype)  # no view, which nn.ReLU(inplace=True) could not change
        into = torch.mul(from_mu, inverse.view(view.stats_shape), out=y.view(view.split))
        if weight is not None:
            into *= weight.to(dtype).view(view.channel_shape)
        if bias is not None:
            into += bias.to(dtype).view(view.channel_shape)
        if keep is not None:
            into.masked_fill_(~keep, 0)

        ctx.save_for_backward(x, weight, mask, torch.stack((mu, inverse, slope_of(m, inverse, finite, formula))))
        ctx.view, ctx.formula, ctx.state, ctx.grad_scale, ctx.group = view, formula, state, grad_scale, group
        ctx.n, ctx.samples, ctx.has_bias = n, samples, bias is not None
        ctx.mark_non_differentiable(n)
        return y.to(x.dtype), n

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, weight, mask, saved = ctx.saved_tensors
        view, formula = ctx.view, ctx.formula
        check_backward(x, dy, weight, saved, view, ctx.state)
        mu, inverse, slope = saved
        keep = None if mask is None else mask.view(view.mask_shape)
        v = hide(x.view(view.split).to(mu.dtype), keep)
        from_mu = hide(v - mu.view(view.stats_shape), keep)
        g = hide(dy.reshape(x.shape).view(view.split).to(mu.dtype), keep)

        over_channels = tuple(i for i, size in enumerate(view.channel_shape) if size == 1 and view.axes[i] != 1)
        dweight = dbias = dx = None
        if weight is not None and ctx.needs_input_grad[1]:
            dweight = (g * from_mu * inverse.view(view.stats_shape)).sum(over_channels).flatten().to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = g.sum(over_channels).flatten()
        if ctx.needs_input_grad[0]:
            if weight is not None:
                g = g * weight.to(g.dtype).view(view.channel_shape)
            u = _derivative_of_power(from_mu if formula.centered else v, formula.p)
            with counting_once(ctx):
                dx = hide(_input_gradient(ctx, g, from_mu, u, inverse, slope), keep).reshape(x.shape).to(x.dtype)
        return dx, dweight, dbias, *(None,) * 7


def _input_gradient(ctx: Any, g: Tensor, from_mu: Tensor, u: Tensor, inverse: Tensor, slope: Tensor) -> Tensor:
    """dx = dx̂/s + ĝ_mu + ĝ_m·p·u, as in ``eager``; every mean is one over all processes."""
    view, formula, state = ctx.view, ctx.formula, ctx.state
    cut = slope.isnan()
    u = u.masked_fill(cut.view(view.stats_shape), 0)
    sums = (t.sum(view.reduced).flatten() for t in (g * from_mu, g, u))
    along, g_mean, q = ((t / ctx.n.clamp(min=1)).to(g.dtype) for t in _over_all(ctx.group, *sums))
    g_m, g_mu = -along * slope, -g_mean * inverse
    scale = None if ctx.grad_scale is None else ctx.grad_scale.to(g.dtype)
    if scale is not None:
        g_m, g_mu = g_m / scale, g_mu / scale

    beta, streamed_m = formula.beta, g_m
    if state is not None:
        state.grad_samples.add_(ctx.samples)
        beta = mix_weights(formula.beta, formula.window, state.grad_samples, state.long.dtype)
        short_m = running_average(state.short_grad[1], state.grad_count, g_m, ctx.n)
        streamed_m = mix(beta, state.long_grad[1], short_m, g_m)
    streamed_m = streamed_m.masked_fill(cut, 0)
    if formula.centered:
        g_mu = g_mu - streamed_m * formula.p * q
    streamed_mu = g_mu
    if state is not None:
        short_mu = running_average(state.short_grad[0], state.grad_count, g_mu, ctx.n)
        streamed_mu = mix(beta, state.long_grad[0], short_mu, g_mu)
        finite = g_m.isfinite() & g_mu.isfinite()
        _keep_finite(state.short_grad, state.grad_count, (short_mu, short_m), ctx.n, finite)
    if scale is not None:
        streamed_m, streamed_mu = streamed_m * scale, streamed_mu * scale

    dx = torch.addcmul(streamed_mu.view(view.stats_shape), g, inverse.view(view.stats_shape))
    return dx.addcmul_(u, (formula.p * streamed_m).view(view.stats_shape))


def _over_all(group: dist.ProcessGroup | None, *parts: Tensor) -> tuple[Tensor, ...]:
    """These vectors, summed over the processes by one all-reduce; in float64, which keeps counts exact."""
    flat = torch.cat([part.to(torch.float64) for part in parts])
    dist.all_reduce(flat, group=group)
    return flat.split([len(part) for part in parts])
