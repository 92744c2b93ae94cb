"""Streaming gradients have no derivative of their own: refuse it with a message that helps."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

_MESSAGE = (
    "a second derivative through a streamnorm layer is not defined: what its statistics pass back is a running average "
    "over calls. Leave create_graph=True away, or freeze the layer (streamnorm.frozen(model)) where a gradient penalty "
    "is computed. For layers without a stream, set STREAMNORM_ENGINE=plain: that engine has second derivatives"
)


class _Refuse(torch.autograd.Function):
    """Hands on the first of its arguments; what they depend on follows, so that every way back leads through here."""

    @staticmethod
    def forward(ctx: Any, number: int, *tensors: Any) -> Any:
        return tensors[:number]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(_MESSAGE)


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a Function's backward: under ``create_graph`` its results refuse to be differentiated again."""

    @wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        return _Refuse.apply(len(results), *results, *ctx.saved_tensors, *grads)

    return once
