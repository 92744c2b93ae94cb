"""Streaming: a layer as training knows it, with a state, a formula, and ties to optimizers and processes."""

from __future__ import annotations

from operator import itemgetter

from torch import Tensor, nn
from torch.compiler import is_compiling

from ..core import arguments
from ..core.reference import NormRef
from ..core.spec import Formula, State
from ..core.stream import Stream
from .ties import Ties

_state_buffers = itemgetter(*State._fields)


class Streaming(nn.Module):
    """Base class of the layers that can carry a stream. With ``stream=None`` a layer has no state.

    Its buffers are the fields of :class:`State`, whose shapes and meaning are told there.
    """

    stream: Stream | None
    formula: Formula
    frozen: bool
    eps: float
    ref: NormRef
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    long: Tensor
    short: Tensor
    long_grad: Tensor
    short_grad: Tensor
    count: Tensor
    grad_count: Tensor
    samples: Tensor
    grad_samples: Tensor
    seen: Tensor
    lp_moment: Tensor

    _ties: Ties
    _gain = "weight"  # under which name the gain is a parameter

    @property
    def state(self) -> State:
        """The stream's buffers, as an engine takes them."""
        if is_compiling():
            return State(*[getattr(self, name) for name in State._fields])
        try:
            return State._make(_state_buffers(self._buffers))
        except KeyError:
            raise AttributeError(f"{type(self).__name__} carries no stream") from None


def streaming_modules(model: nn.Module) -> list[Streaming]:
    """The layers of a model that carry a stream."""
    arguments.check_model(model)
    return [module for module in model.modules() if isinstance(module, Streaming) and module.stream is not None]
