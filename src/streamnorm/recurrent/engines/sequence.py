"""One autograd.Function around a whole sequence, whichever engine runs it.

An engine gives a :class:`Pass`: forward it runs all time steps, and keeps what it needs; backward it goes through them
from the last to the first, so that the streams meet their gradients in the order in which autograd delivers them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ...core.compiler import is_hooked
from ...layers import GeneralBatchNorm, Norm, SampleNorm, StreamingNorm1d
from ...ops import plain
from ...ops.derivatives import Again, any_order
from ...training import agreement, updates
from ..checks import check_backward, shapes_of
from ..norms import PerStepBatchNorm, RecurrentBatchNorm, RecurrentSampleNorm, RecurrentStreamingNorm
from ..steps import Hidden, Norms, Weights
from . import loop

KNOWN = frozenset(
    (Norm, SampleNorm, StreamingNorm1d, GeneralBatchNorm)
    + (RecurrentStreamingNorm, RecurrentSampleNorm, RecurrentBatchNorm, PerStepBatchNorm)
)
"""The norms whose forward the engines may do themselves: these types, since a subclass may have one of its own."""

Gradient = Tensor | None


class Tensors(NamedTuple):
    """All that has a gradient: inputs, weights, gains, the cell norm's bias, and where the sequences start."""

    data: Any
    w_ih: Any
    w_hh: Any
    b_ih: Any
    b_hh: Any
    w_hr: Any
    gain_ih: Any
    gain_hh: Any
    gain_hn: Any
    gain_cell: Any
    bias_cell: Any
    h: Any
    c: Any

    @property
    def hidden(self) -> Hidden:
        """(h,) or, for the LSTM, (h, c)."""
        return (self.h,) if self.c is None else (self.h, self.c)


class Pass(Protocol):
    """A forward pass over a sequence, and what it leaves for the backward pass."""

    def forward(self, t: Tensors) -> tuple[Tensor, ...]:
        """The hidden states of all steps, one step after the other, and the hidden tensors after each last step."""
        ...

    def backward(
        self, t: Tensors, needs: Tensors, output: Tensor, d_output: Gradient, d_finals: tuple[Gradient, ...]
    ) -> dict[str, Gradient]:
        """The gradients, by the names of what they belong to; at least of what ``needs`` one and has one.

        Args:
            t: the tensors that the pass was made with.
            needs: for each of them whether it needs a gradient.
            output: the hidden states of all steps.
            d_output: their gradient, None where there is none.
            d_finals: the gradients of the final hidden tensors.
        """
        ...


Make = Callable[[str, list[int], Norms, Tensors], Pass]
"""Makes the pass of a network of this kind over so many sequences at each step, with these norms and tensors."""


# Whether the graph that a backward pass goes through is kept for another one.
keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def supports(data: Tensor, sizes: list[int], hidden: Hidden, weights: Weights, norms: Norms) -> bool:
    """Whether an engine may run such a layer in place of the loop over the cells."""
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
    if type(norm) not in KNOWN or is_hooked(norm):
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


def run(
    make: Make, kind: str, data: Tensor, sizes: list[int], hidden: Hidden, weights: Weights, norms: Norms
) -> tuple[Tensor, Hidden]:
    """Run one layer in one direction by the pass that ``make`` makes; ``loop.run`` explains the other arguments."""
    output, *finals = _apply(make, kind, sizes, norms, *_tensors(data, hidden, weights, norms))
    return output, tuple(finals)


def _tensors(data: Tensor, hidden: Hidden, weights: Weights, norms: Norms) -> Tensors:
    """All that has a gradient; the norms, whose forward will not be called, begin to notice weight updates."""
    gains: list[Tensor | None] = []
    for norm in norms:
        assert norm is None or isinstance(norm, Norm)
        if (
            norm is not None
            and norm.stream is not None
            and (next(norm._ties.lease, None) is None or agreement.is_new(norm))
        ):
            updates.notice(norm)
        gains.append(None if norm is None else norm.weight)
    bias_cell = None if norms.cell is None else norms.cell.bias
    return Tensors._make((data, *weights, *gains, bias_cell, *hidden, *(None,) * (2 - len(hidden))))


class _Formulas(nn.Module):
    """A norm without a stream as a function of its tensors: it tracks no statistics."""

    def __init__(self, norm: Norm, gain: Tensor | None, bias: Tensor | None = None) -> None:
        super().__init__()
        self.norm, self.gain, self.offset = norm, gain, bias

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, and apply gain and bias."""
        return plain.normalize(x, self.gain, self.offset, None, self.norm.ref.view(x.shape), self.norm.formula)


def _again(ctx: Any) -> Again:
    """The inputs of a use, and a function that computes its outputs again, or None where a stream advances.

    ``ctx.use`` holds the kind, the sizes and the norms.
    """
    kind, sizes, norms = ctx.use
    _, *tensors = ctx.saved_tensors

    def function(*arguments: Any) -> tuple[Tensor, ...]:
        t = Tensors(*arguments[len(_NO_TENSORS) :])
        gains = (t.gain_ih, None), (t.gain_hh, None), (t.gain_hn, None), (t.gain_cell, t.bias_cell)
        own = Norms(*(_Formulas(norm, *own) if isinstance(norm, Norm) else None for norm, own in zip(norms, gains)))
        weights = Weights(t.w_ih, t.w_hh, t.b_ih, t.b_hh, t.w_hr)
        output, finals = loop.run(kind, t.data, sizes, t.hidden, weights, own)
        return output, *finals

    streams = any(isinstance(norm, Norm) and norm.stream is not None for norm in norms)
    return (*_NO_TENSORS, *tensors), None if streams else function


_NO_TENSORS = (None,) * 4
"""The gradients of the Function's first arguments, which have none."""


class Sequence(torch.autograd.Function):
    """A layer in one direction over a mini-batch of sequences."""

    @staticmethod
    def forward(ctx: Any, make: Make, kind: str, sizes: list[int], norms: Norms, *tensors: Any) -> Any:
        """The hidden states of all steps, and the final hidden tensors."""
        t = Tensors(*tensors)
        ctx.steps, ctx.use = make(kind, sizes, norms, t), (kind, sizes, norms)
        output, *finals = ctx.steps.forward(t)
        ctx.save_for_backward(output, *tensors)
        ctx.set_materialize_grads(False)
        ctx.shapes = shapes_of((output, *tensors))
        return output, *finals

    @staticmethod
    @any_order(_again)
    def backward(ctx: Any, d_output: Gradient, *d_finals: Gradient) -> Any:
        """The gradients of all tensors."""
        output, *saved = ctx.saved_tensors
        check_backward(ctx.shapes, (output, *saved), (d_output, *d_finals))
        needs = Tensors(*ctx.needs_input_grad[len(_NO_TENSORS) :])
        found = ctx.steps.backward(Tensors(*saved), needs, output, d_output, d_finals)
        if not keeps_graph():
            ctx.steps = None  # what it holds is as large as all steps, and the graph may live on
        return *_NO_TENSORS, *(found.get(name) if need else None for name, need in zip(Tensors._fields, needs))


# As in ops/native.py: what Function.apply does before it calls this is of use to functorch, which does not come here.
_apply = super(torch.autograd.Function, Sequence).apply


def states_before(start: Tensor, states: Tensor, sizes: list[int]) -> list[Tensor]:
    """The hidden states before each step, from where the sequences start and the states after each step."""
    return [start, *(state[:rows] for state, rows in zip(states.split(sizes), sizes[1:]))]


def after_last(states: Tensor, sizes: list[int]) -> Tensor:
    """Of the hidden tensors of all steps those after each sequence's own last step."""
    if sizes[0] == sizes[-1]:
        return states[-sizes[0] :].clone()
    following = [*sizes[1:], 0]
    ended = [state[rows:] for state, rows in zip(states.split(sizes), following) if len(state) > rows]
    return torch.cat(ended[::-1])
