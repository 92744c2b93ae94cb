"""The loss of a mini-batch, whatever form the mini-batch and the model's output have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def loss_of(model: nn.Module, batch: Any, loss: Callable[..., Tensor] | None) -> Tensor | None:
    """Run a model forward on a mini-batch; give the loss, or None where the output holds none.

    Args:
        model: the model.
        batch: of a tuple or list the first item goes to the model; of a dict, all items as keywords.
        loss: called with the model's output and the other items of a tuple or list. None takes the output's own
            ``loss``, or the output if it is one number.

    Raises:
        ValueError: if ``loss`` gives something else than one number.
    """
    several = isinstance(batch, (tuple, list))
    output = model(**batch) if isinstance(batch, Mapping) else model(batch[0] if several else batch)
    value: Any
    if loss is not None:
        value = loss(output, *(batch[1:] if several else ()))
    else:
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            return None
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"loss must give one number, as a tensor, got {_kind(value)}")
    return value.reshape(())


def _kind(value: object) -> str:
    return f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
