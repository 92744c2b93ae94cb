"""The whole-sequence engine: one autograd.Function per layer and direction, backpropagation through time by hand.

The input's products of all steps are one matrix product, and so are the weights' gradients. In between, time steps
are taken one after the other, see ``traced``. Backward retraces them from the last to the first, so that the streams
meet their gradients in the order in which autograd delivers them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.compiler import HOOKS
from ..layers.norm import GeneralBatchNorm, Norm, SampleNorm, StreamingNorm1d
from ..ops import plain
from ..ops.derivatives import Again, any_order
from ..training import agreement, updates
from . import loop
from .norms import PerStepBatchNorm, RecurrentBatchNorm
from .steps import Hidden, Norms, Weights
from .traced import TRACED, Gradient, Gradients, Tensors, Traced, plus

KNOWN = (Norm, SampleNorm, StreamingNorm1d, GeneralBatchNorm, RecurrentBatchNorm, PerStepBatchNorm)
"""The norms whose forward the engines may do themselves: these types, since a subclass may have one of its own."""

# Whether the graph that a backward pass goes through is kept for another one.
keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def supports(data: Tensor, sizes: list[int], hidden: Hidden, weights: Weights, norms: Norms) -> bool:
    """Whether this engine runs such a layer. What it does not know, the loop over the cells runs."""
    dtype = data.dtype
    return (
        sizes[0] > 0
        and dtype in (torch.float32, torch.float64)
        and all(t is None or t.dtype == dtype for t in hidden + weights)
        and not torch.compiler.is_compiling()
        and not _casts(data.device)
        and _all_differ(norms)
        and all(norm is None or _can_run(norm, dtype, sizes) for norm in norms)
        and all(norm is None or norm._parameters["bias"] is None for norm in norms[:3])
    )


def _casts(device: torch.device) -> bool:
    """Whether autocast would choose the precision of a matrix product."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _all_differ(norms: Norms) -> bool:
    """Whether no norm serves two paths: the order of its uses within a step is then of no account."""
    present = [id(norm) for norm in norms if norm is not None]
    return len(set(present)) == len(present)


def _can_run(norm: nn.Module, dtype: torch.dtype, sizes: list[int]) -> bool:
    """Whether the engine does all that this norm's own forward would do."""
    if type(norm) not in KNOWN or any(norm.__dict__[hooks] for hooks in HOOKS):
        return False
    assert isinstance(norm, Norm)
    if any(parameter is not None and parameter.dtype != dtype for parameter in norm._parameters.values()):
        return False
    collects = norm.training and not norm.frozen
    if isinstance(norm, GeneralBatchNorm):
        return collects and norm.ghosts == 1 and sizes[-1] > 1 and norm.running_mean.dtype == dtype
    if norm.stream is not None:
        return collects and norm.state.long.dtype == dtype
    return not norm.training or norm.ref.view((sizes[-1], norm.num_features)).num_elements > 1


def arguments(data: Tensor, hidden: Hidden, weights: Weights, norms: Norms) -> Tensors:
    """All that has a gradient; the norms, whose forward will not be called, begin to notice weight updates."""
    gains: list[Tensor | None] = []
    for norm in norms:
        assert norm is None or isinstance(norm, Norm)
        if norm is not None and norm.stream is not None and (next(norm._lease, None) is None or agreement.is_new(norm)):
            updates.notice(norm)
        gains.append(None if norm is None else norm.weight)
    bias_cell = None if norms.cell is None else norms.cell.bias
    return Tensors._make((data, *weights, *gains, bias_cell, *hidden, *(None,) * (2 - len(hidden))))


def run(
    kind: str, data: Tensor, sizes: list[int], hidden: Hidden, weights: Weights, norms: Norms
) -> tuple[Tensor, Hidden]:
    """Run one layer in one direction; :func:`streamnorm.recurrent.loop.run` explains the arguments."""
    output, *finals = _Sequence.apply(kind, sizes, norms, *arguments(data, hidden, weights, norms))
    return output, tuple(finals)


class _Formulas(nn.Module):
    """A norm without a stream as a function of its tensors: it tracks no statistics."""

    def __init__(self, norm: Norm, gain: Tensor | None, bias: Tensor | None = None) -> None:
        super().__init__()
        self.norm, self.gain, self.offset = norm, gain, bias

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, and apply gain and bias."""
        return plain.normalize(x, self.gain, self.offset, None, self.norm.ref.view(x.shape), self.norm.formula)


def again(ctx: Any) -> Again:
    """What a use was computed from, and how; ``ctx.use`` holds the first three arguments of the Function."""
    kind, sizes, norms = ctx.use
    _, *tensors = ctx.saved_tensors

    def function(*arguments: Any) -> tuple[Tensor, ...]:
        t = Tensors(*arguments[3:])
        gains = (t.gain_ih, None), (t.gain_hh, None), (t.gain_hn, None), (t.gain_cell, t.bias_cell)
        own = Norms(*(_Formulas(norm, *own) if isinstance(norm, Norm) else None for norm, own in zip(norms, gains)))
        weights = Weights(t.w_ih, t.w_hh, t.b_ih, t.b_hh, t.w_hr)
        output, finals = loop.run(kind, t.data, sizes, t.hidden, weights, own)
        return output, *finals

    streams = any(isinstance(norm, Norm) and norm.stream is not None for norm in norms)
    return (None, None, None, *tensors), None if streams else function


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: str, sizes: list[int], norms: Norms, *differentiable: Any) -> Any:
        tensors = Tensors(*differentiable)
        hidden = tensors.hidden
        steps = TRACED[kind](tensors, norms)
        outputs: list[Tensor] = []
        ended: list[Hidden] = []
        for number, wx in enumerate((tensors.data @ tensors.w_ih.t()).split(sizes)):
            rows = len(wx)
            if rows < len(hidden[0]):
                ended.append(tuple(h[rows:] for h in hidden))
                hidden = tuple(h[:rows] for h in hidden)
            hidden = steps.forward(number, wx, hidden)
            outputs.append(hidden[0])
        output = torch.cat(outputs)
        ctx.save_for_backward(output, *tensors)
        ctx.set_materialize_grads(False)
        ctx.steps, ctx.use = steps, (kind, sizes, norms)
        return output, *(torch.cat(parts) for parts in zip(hidden, *reversed(ended)))

    @staticmethod
    @any_order(again)
    def backward(ctx: Any, d_output: Tensor | None, *d_finals: Tensor | None) -> Any:
        output, *saved = ctx.saved_tensors
        tensors, needs = Tensors(*saved), Tensors(*ctx.needs_input_grad[3:])
        steps: Traced = ctx.steps
        sizes: list[int] = ctx.use[1]
        states = output.split(sizes)
        before = [tensors.h, *(state[:rows] for state, rows in zip(states, sizes[1:]))]
        d_states = [None] * len(sizes) if d_output is None else d_output.split(sizes)

        steps.start_backward(needs)
        d_hidden: Gradients = (None,) * len(d_finals)
        reached = 0
        for number in reversed(range(len(sizes))):
            d_hidden = tuple(_grown(d, d_final, reached, sizes[number]) for d, d_final in zip(d_hidden, d_finals))
            d_hidden = (plus(d_hidden[0], d_states[number]), *d_hidden[1:])
            d_hidden = steps.backward(number, states[number], before[number], d_hidden)
            reached = sizes[number]

        gradients = steps.finish_backward(torch.cat(before))
        if steps.d_wx:
            d_wx = torch.cat(steps.d_wx[::-1])
            gradients["data"] = d_wx @ tensors.w_ih if needs.data else None
            gradients["w_ih"] = d_wx.t() @ tensors.data if needs.w_ih else None
        gradients.update(zip(("h", "c"), d_hidden))
        if not keeps_graph():
            ctx.steps = None  # what it holds is as large as all steps, and the graph may live on
        return None, None, None, *(gradients.get(name) for name in Tensors._fields)


def _grown(d: Gradient, d_final: Gradient, reached: int, rows: int) -> Gradient:
    """The gradient of a hidden tensor after a step, of which the first ``reached`` rows went on to the next one."""
    if reached == rows or (d is None and d_final is None):
        return d
    ended = d_final[reached:rows] if d_final is not None else None
    if reached == 0:
        return ended
    like = d if d is not None else d_final
    assert like is not None
    parts = (
        like.new_zeros(reached, like.shape[1]) if d is None else d,
        like.new_zeros(rows - reached, like.shape[1]) if ended is None else ended,
    )
    return torch.cat(parts)
