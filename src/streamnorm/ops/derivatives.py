"""Derivatives beyond the first: of a backward pass, along a tangent, and for a batch of output gradients.

A layer without a stream is a function of its input, and has all of them: where a backward pass is asked for more than
the gradients of one use, autograd computes them from the formulas of ``plain``. A stream that advances has none of
them, since what it passes back is a running average over calls: each is refused, with nothing changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

Function = Callable[..., Sequence[Tensor]]
Again = tuple[Sequence[Tensor | None], Function | None]
"""The tensors that a use was computed from, in the order of the Function's arguments, with None for what is no tensor;
and what computes the outputs from them by differentiable operations, or None where a stream advances."""

_has_transforms, _jit_trace = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state

_LAYER = "a streaming or synchronized layer that trains"
_STILL = "keep the statistics still: model.eval(), or `with streamnorm.frozen(model):`"

_NO_TRANSFORMS = (
    f"the transforms of torch.func (grad, vmap, jacrev, ...) do not go through {_LAYER}: it changes its statistics, "
    f"and what it passes back is no gradient of one function. Use loss.backward(), or {_STILL}"
)
_NO_TANGENTS = (
    f"forward-mode differentiation (torch.autograd.forward_ad) does not go through {_LAYER}: what it passes back is an "
    f"average over calls or processes, which has no tangent. Use loss.backward(), or {_STILL}"
)
_NO_TORCHSCRIPT = (
    f"torch.jit.trace does not go through {_LAYER}: TorchScript would keep the statistics of this moment. Write "
    "model.eval() before it; torch.compile takes a training step"
)
_NO_BATCHES = (
    f"{_LAYER} takes the gradients of its output one at a time, in the order in which they arrive: "
    "is_grads_batched=True, torch.autograd.functional.jacobian(vectorize=True) and vmap bring a batch of them. Loop "
    f"over them, or {_STILL}"
)
_NO_SECOND_DERIVATIVE = (
    f"a second derivative through {_LAYER} is not defined: what its statistics pass back is an average over calls or "
    "processes. Leave out create_graph=True, or keep the statistics still where a gradient penalty is computed: "
    "`with streamnorm.frozen(model):`, or model.eval()"
)


def is_recorded() -> bool:
    """Whether only PyTorch's own operations lead on: a transform of torch.func, tangents, or torch.jit.trace."""
    return forward_ad._current_level != -1 or _has_transforms() or _jit_trace() is not None


def refuse(*tensors: Tensor | None) -> None:
    """Refuse, before anything changes, what cannot go through a use that averages over calls or processes.

    Args:
        *tensors: the input of the use, gain and bias.

    Raises:
        RuntimeError: under a transform of torch.func or torch.jit.trace, and where one of the tensors has a tangent.
    """
    if _has_transforms():
        raise RuntimeError(_NO_TRANSFORMS)
    if _jit_trace() is not None:
        raise RuntimeError(_NO_TORCHSCRIPT)
    if has_tangent(*tensors):
        raise RuntimeError(_NO_TANGENTS)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation goes through one of these."""
    return forward_ad._current_level != -1 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def any_order(again: Callable[[Any], Again]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a Function's backward, which gives the gradients of one use and knows no more.

    Args:
        again: what the use was computed from, and how, given the Function's context.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def routed(ctx: Any, *grads: Any) -> Any:
            if is_compiling() or not _asks_for_more(grads):  # compilers have first derivatives only
                return backward(ctx, *grads)
            inputs, function = again(ctx)
            if function is None:
                return _once(backward, ctx, grads, inputs)
            return _by_formulas(function, inputs, ctx.needs_input_grad, grads)

        return routed

    return decorate


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward of a Function that has no derivative beyond the first, nor formulas for one."""
    return any_order(lambda ctx: (ctx.saved_tensors, None))(backward)


def _asks_for_more(grads: Sequence[Tensor | None]) -> bool:
    return (
        torch.is_grad_enabled()
        or forward_ad._current_level != -1
        or any(grad is not None and _is_wrapped(grad) for grad in grads)
    )


def _is_wrapped(t: Tensor) -> bool:
    """Whether a tensor stands for several, or for more than its values, in a transform."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t) or torch._C._functorch.is_legacy_batchedtensor(t)


def _once(backward: Callable[..., Any], ctx: Any, grads: Sequence[Any], inputs: Sequence[Tensor | None]) -> Any:
    """The gradients of a use that advances a stream; under ``create_graph`` they refuse to be differentiated."""
    if any(grad is not None and _is_wrapped(grad) for grad in grads):
        raise RuntimeError(_NO_BATCHES)
    if has_tangent(*grads):
        raise RuntimeError(_NO_TANGENTS)
    if not torch.is_grad_enabled():
        return backward(ctx, *grads)
    with torch.no_grad():
        results = backward(ctx, *grads)
    return _Refuse.apply(len(results), *results, *inputs, *grads)


class _Refuse(torch.autograd.Function):
    """Hands on the first of its arguments; what they depend on follows, so that every way back leads through here."""

    @staticmethod
    def forward(ctx: Any, number: int, *tensors: Any) -> Any:
        return tensors[:number]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(_NO_SECOND_DERIVATIVE)


def _by_formulas(
    function: Function, inputs: Sequence[Tensor | None], needs: Sequence[bool], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients of a use without a stream, by autograd; they can be differentiated where a graph is wanted."""
    with torch.enable_grad():
        # Each is a tensor of its own, also where the same one was given twice.
        own = [None if t is None else t.view_as(t) for t in inputs]
        outputs = [(y, grad) for y, grad in zip(function(*own), grads) if grad is not None]
    wanted = [t for t, need in zip(own, needs) if t is not None and need]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in outputs],
            wanted,
            [grad for _, grad in outputs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    )
    own.extend([None] * (len(needs) - len(own)))
    return tuple(next(found) if need and t is not None else None for need, t in zip(needs, own))
