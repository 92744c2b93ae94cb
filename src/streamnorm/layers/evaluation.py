"""Evaluation: a fixed affine map, or statistics that adapt to the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .. import ops
from ..core.spec import GRADIENTS, Call, Formula, View
from ..core.stream import ESTABLISHED
from ..training.streaming import Streaming


def affine_map(x: Tensor, mu: Tensor, variance: Tensor, layer: Streaming, mask: Tensor | None, view: View) -> Tensor:
    """Normalize by given statistics. Where they are the same all over a channel, PyTorch's own kernel does it."""
    if mask is not None:  # what is hidden may be infinite, and 0·inf is no gradient for the gain
        x = x.masked_fill(~mask.unsqueeze(1), 0)
    if all(view.axes[i] == 1 for i in view.kept):
        mu, variance = view.per_channel(mu), view.per_channel(variance)
        # Contiguous: the backward of batch_norm reads a gain with gaps as if it had none.
        weight, bias = (None if t is None else t.to(mu.dtype).contiguous() for t in (layer.weight, layer.bias))
        y = F.batch_norm(x, mu, variance, weight, bias, training=False, eps=layer.eps)
    else:
        shape = view.stats_shape
        y = (x.view(view.split) - mu.view(shape)) * (variance + layer.eps).rsqrt().view(shape)
        if layer.weight is not None:
            y = y * layer.weight.view(view.channel_shape)
        if layer.bias is not None:
            y = y + layer.bias.view(view.channel_shape)
        y = y.view(x.shape).to(x.dtype)
    return y if mask is None else y.masked_fill(~mask.unsqueeze(1), 0)


class Adapting(NamedTuple):
    """The adaptation of a layer: its formula, the layer's name, and a function to call with that after each use."""

    formula: Formula
    name: str
    guard: Callable[[str], None] | None


def adapt(layer: Streaming, x: Tensor, mask: Tensor | None, view: View, adapting: Adapting) -> Tensor:
    """Evaluate by the statistics with this input among them, and let them become the long-term ones."""
    if is_compiling():
        raise RuntimeError("streamnorm.adapt changes statistics in evaluation, in eager mode: call the model itself")
    state, formula = layer.state, adapting.formula
    with torch.no_grad():
        state = state._replace(seen=torch.full_like(state.seen, ESTABLISHED))  # the memory is the one asked for
        used = state.long.new_empty(2, view.num_stats)
        ops.normalize(Call(x.detach(), None, None, mask, view, formula, state, stats=used))
        nothing = {name: torch.zeros_like(getattr(state, name)) for name in GRADIENTS}
        ops.commit([(state._replace(**nothing), formula)])
        variance = formula.k**2 * used[1] ** (2 / formula.p)
        if adapting.guard is not None:
            adapting.guard(adapting.name)
    return affine_map(x, used[0], variance, layer, mask, view)
