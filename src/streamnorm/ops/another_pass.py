"""A second backward pass through one graph: what it adds belongs to the use that was counted in the first.

Autograd sums what arrives: two passes, for two losses, give the gradient of the sum of the losses. The streams do the
same. Everything in a backward pass is affine in the gradient that arrives, so a second pass computes what its gradient
changes: the long-term average has had its share in the first pass, and the average over elements is one over as many
elements as before. For a layer that is used once in a graph, two passes and one through the sum are the same. If it is
used several times, so are all counts and the gradients of the moment; those of the location, and what reaches x, lack
what other uses would have handed on within the pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.spec import State


class AnotherPass:
    """The gradient half of a state for another pass through a use of ``n`` elements and so many samples.

    After a weight update in between nothing of the first pass is left to add to: there the use counts once more.

    Args:
        state: the stream.
        n: elements behind each statistic.
        samples: samples of the use.
        first: whether it is the first pass after all, where only a tensor can tell.
    """

    def __init__(self, state: State, n: int | Tensor, samples: int | Tensor, first: bool | Tensor = False) -> None:
        self.state = state
        self.is_new = (state.grad_count < n) | first
        counts_again = (state.grad_samples < samples) | first
        self.scratch = state._replace(
            long_grad=torch.where(self.is_new, state.long_grad, 0),
            short_grad=torch.where(self.is_new, state.short_grad, 0),
            grad_count=torch.where(self.is_new, state.grad_count, state.grad_count - n),
            grad_samples=torch.where(counts_again, state.grad_samples, state.grad_samples - samples),
        )

    def finish(self) -> None:
        """Add to the stream what the pass has left in ``scratch``."""
        state, scratch = self.state, self.scratch
        kept = state.short_grad * ~self.is_new
        state.short_grad.copy_(kept + scratch.short_grad)
        state.grad_count.copy_(torch.where(self.is_new, scratch.grad_count, state.grad_count))
        state.grad_samples.copy_(scratch.grad_samples)


def another_pass(state: State | None, n: int) -> AnotherPass | None:
    """For a sequence whose steps use a stream one after the other, with so many elements and samples in all."""
    return None if state is None else AnotherPass(state, n, n)


@contextmanager
def counting_once(ctx: Any) -> Iterator[None]:
    """Around the backward of a use, whose context holds ``state``, ``n`` and ``samples``: give it the right state."""
    if ctx.state is None or not ctx.needs_input_grad[0]:
        yield
    elif not getattr(ctx, "was_passed", False):
        yield
        ctx.was_passed = True  # not where it was refused
    else:
        state = ctx.state
        another = AnotherPass(state, ctx.n if isinstance(ctx.n, int) else ctx.n.flatten(), ctx.samples)
        ctx.state = another.scratch
        try:
            yield
        finally:
            ctx.state = state
        another.finish()
