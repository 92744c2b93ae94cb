"""The traced engine: what ``torch.compile`` sees, tensor operations alone, which it fuses and differentiates with.

The formulas are those of ``plain`` and the passes those of ``eager``. What differs is how state is kept. A compiler
takes the graph of a training step apart: it decides by itself what the backward part computes a second time, and
by then the streams have moved on. So the statistics of a use go through an operator of our own, ``hold``, which no
compiler computes twice; behind it nothing asks for the state as it was. The streams of gradients are read and moved
where their gradients arrive, in the backward part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.spec import Formula, State, View
from . import eager
from .plain import at_least_one, elements, hide, mix, num_samples, running_average, wide

NAME = "traced"


def status() -> str:
    """What this engine is, for ``streamnorm.engines()``."""
    return "available: PyTorch operations without a graph break, under torch.compile and torch.export"


listeners: list[Callable[[Tensor], Tensor | None]] = []
"""Told of each use in training when a graph runs, with what it holds; what they do is not written into the graph.

An answer says that the use is a repetition, and what was held before: then it changes no state.
"""

_library = torch.library.Library("streamnorm", "FRAGMENT")
_library.define("hold(Tensor values) -> Tensor")


@torch.library.impl(_library, "hold", "CompositeExplicitAutograd")
def _hold(values: Tensor) -> Tensor:
    """A copy. The last row is of ones, and comes back as zeros, beside the values of before, from a repetition."""
    for listener in listeners:
        earlier = listener(values)
        if earlier is not None:
            held = earlier.clone()
            held[-1] = 0
            return held
    return values.clone()


@torch.library.impl(_library, "hold", "Meta")
def _hold_while_tracing(values: Tensor) -> Tensor:
    return torch.empty_like(values)


def hold(*rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows, as no compiler computes them a second time; and for each index whether this is a use of its own."""
    held = torch.ops.streamnorm.hold(torch.stack((*rows, torch.ones_like(rows[0]))))
    return held[:-1], held[-1] != 0


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
    y, used = _Normalize.apply(x, weight, bias, mask, view, formula, state, grad_scale)
    if stats is not None:
        held, counts = hold(*used)
        stats.copy_(torch.where(counts, held, torch.nan))
    return y


def take_part(state: State) -> None:
    """A use without data: it collects nothing, and is noticed like any other."""
    _, counts = hold(state.samples.view(1))
    state.samples.add_(0 * counts[0])


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
    ) -> tuple[Tensor, Tensor]:
        dtype = wide(x.dtype)
        keep = None if mask is None else mask.view(view.mask_shape)
        v = hide(x.view(view.split).to(dtype), keep)
        n = elements(view, keep)
        samples = num_samples(x, mask)
        per_index = n.flatten() if isinstance(n, Tensor) else n

        b_mu = (v.sum(view.reduced, keepdim=True) / at_least_one(n)).flatten()
        mu = b_mu
        if state is not None:
            seen = state.samples + samples
            alpha = eager.mix_weights(formula.alpha, formula.window, seen, dtype)
            short_mu = running_average(state.short[0], state.count, b_mu, per_index)
            mu = mix(alpha, state.long[0], short_mu, b_mu)

        from_mu = v - mu.view(view.stats_shape)
        b_m = eager.mean_power(hide(from_mu, keep) if formula.centered else v, formula.p, view, n)
        m = b_m
        if state is not None:
            short_m = running_average(state.short[1], state.count, b_m, per_index)
            m = mix(alpha, state.long[1], short_m, b_m)

        finite = b_mu.isfinite() & b_m.isfinite()
        inverse = (formula.k**2 * m ** (2 / formula.p) + formula.eps).rsqrt()
        rows = mu, inverse, eager.slope_of(m, inverse, finite, formula)
        if state is None:
            values = torch.stack(rows)
        else:
            values, counts = hold(*rows)
            enters = finite & counts
            state.short.copy_(torch.where(enters, torch.stack((short_mu, short_m)), state.short))
            state.count.add_(per_index * enters)
            state.samples.copy_(torch.where(counts[0], seen, state.samples))

        y = (v - values[0].view(view.stats_shape)) * values[1].view(view.stats_shape)
        if weight is not None:
            y = y * weight.to(dtype).view(view.channel_shape)
        if bias is not None:
            y = y + bias.to(dtype).view(view.channel_shape)
        used = torch.stack((mu, m))
        ctx.mark_non_differentiable(used)
        ctx.save_for_backward(x, weight, mask, values)
        ctx.view, ctx.formula, ctx.state, ctx.grad_scale = view, formula, state, grad_scale
        ctx.n, ctx.samples, ctx.has_bias = n, samples, bias is not None
        # A copy, which costs a compiler nothing: autograd lets no one change a view that a Function returns, and
        # nn.ReLU(inplace=True) does.
        return hide(y, keep).view(x.shape).to(x.dtype, copy=True), used

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:
        return *eager.gradients(ctx, dy), None, None, None, None, None
