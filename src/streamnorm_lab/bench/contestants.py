"""The measured steps: of a layer, of a recurrent layer, of a network, and the memory floor of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pair(NamedTuple):
    """An input and the gradient that comes back to the output."""

    x: Tensor
    dy: Tensor


class Contestant(ABC):
    """Something that makes training steps.

    Args:
        name: what tables call it.
        engine: the engine of ``streamnorm.ops`` that it is bound to, or None for the usual choice.
    """

    parts: ClassVar[tuple[str, ...]] = ("forward", "backward")
    """The parts of a step that are timed; ``update`` may only be tidying."""

    has_memory = True
    """Whether its memory is measured, too."""

    def __init__(self, name: str, engine: str | None = None) -> None:
        self.name = name
        self.engine = engine

    def before_forward(self, turn: int) -> None:  # noqa: B027  (most have nothing to do)
        """The untimed work of the layer before: write the input."""

    @abstractmethod
    def forward(self, turn: int) -> Tensor:
        """The output for this turn's input."""

    def before_backward(self, turn: int) -> None:  # noqa: B027
        """The untimed work of the layer after: write the gradient of the output."""

    @abstractmethod
    def backward(self, output: Tensor, turn: int) -> None:
        """The backward pass."""

    @abstractmethod
    def update(self) -> None:
        """The end of a step."""

    def own_tensors(self) -> list[Tensor]:
        """Parameters and buffers: memory that is there with or without a step."""
        return []


class LayerSteps(Contestant):
    """Forward and backward of one layer, with gradients for its input and its parameters.

    Args:
        name: what tables call it.
        module: the layer.
        inputs: what it is applied to, one after the other; ``x`` requires its gradient.
        engine: as Contestant.
        cold: inputs are found where earlier steps left them, in main memory if they are large. Otherwise each is
            rewritten just before it is read, as the layers around it do in training.
    """

    def __init__(
        self, name: str, module: nn.Module, inputs: list[Pair], engine: str | None = None, cold: bool = False
    ) -> None:
        super().__init__(name, engine)
        self.module = module
        self.inputs = inputs
        self._cold = cold
        self.has_memory = not cold  # which is that of the layer whose inputs are warm
        self._parameters = list(module.parameters())
        self._used = inputs[0].x

    def before_forward(self, turn: int) -> None:
        """Rewrite the input."""
        if not self._cold:
            _rewrite(self.inputs[turn % len(self.inputs)].x)

    def forward(self, turn: int) -> Tensor:
        """The output; of a recurrent layer, the hidden states of all steps."""
        self._used = self.inputs[turn % len(self.inputs)].x
        output = self.module(self._used)
        return output[0] if isinstance(output, tuple) else output

    def before_backward(self, turn: int) -> None:
        """Rewrite the gradient of the output."""
        if not self._cold:
            _rewrite(self.inputs[turn % len(self.inputs)].dy)

    def backward(self, output: Tensor, turn: int) -> None:
        """Gradients of input and parameters."""
        output.backward(self.inputs[turn % len(self.inputs)].dy)

    def update(self) -> None:
        """Drop the gradients, as ``zero_grad`` does; not timed."""
        self._used.grad = None
        for parameter in self._parameters:
            parameter.grad = None

    def own_tensors(self) -> list[Tensor]:
        """Parameters and buffers."""
        return [*self.module.parameters(), *self.module.buffers()]


class NetworkSteps(Contestant):
    """Full training steps: loss, gradients, and the weight update with everything that it triggers.

    Args:
        name: what tables call it.
        network: maps images to class scores.
        images: mini-batches.
        labels: of each mini-batch.
        engine: as Contestant.
    """

    parts = ("forward", "backward", "update")

    def __init__(
        self, name: str, network: nn.Module, images: list[Tensor], labels: list[Tensor], engine: str | None = None
    ) -> None:
        super().__init__(name, engine)
        self.network, self.images, self.labels = network, images, labels
        self._optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def forward(self, turn: int) -> Tensor:
        """The loss."""
        i = turn % len(self.images)
        return F.cross_entropy(self.network(self.images[i]), self.labels[i])

    def backward(self, output: Tensor, turn: int) -> None:
        """Gradients of all weights."""
        output.backward()

    def update(self) -> None:
        """The weight update; streaming layers commit at it."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    def own_tensors(self) -> list[Tensor]:
        """Parameters and buffers."""
        return [*self.network.parameters(), *self.network.buffers()]


class _ComputesNothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.parameters = weight, bias
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return torch.empty_like(x), *map(torch.empty_like, ctx.parameters)


class NoArithmetic(nn.Module):
    """The floor of a small layer that is no part of PyTorch: an autograd function that allocates what it returns."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Memory for an output."""
        # What Function.apply does before it calls this is of use to functorch, and takes time.
        return super(torch.autograd.Function, _ComputesNothing).apply(x, self.weight, self.bias)


class Floor(Contestant):
    """The copies that move as many bytes as a layer of this input cannot avoid to move.

    Forward reads x and writes y: one copy. Backward reads x and dy and writes dx: one copy and a half. This is the
    least even where every channel stays in cache between two looks at it.
    """

    has_memory = False

    def __init__(self, inputs: list[Pair]) -> None:
        super().__init__("floor")
        self._sources = [pair.x.detach() for pair in inputs]
        self._targets = [torch.empty_like(source) for source in self._sources[:2]]

    def before_forward(self, turn: int) -> None:
        """Rewrite the source."""
        _rewrite(self._sources[turn % len(self._sources)])

    def forward(self, turn: int) -> Tensor:
        """One copy."""
        return self._targets[turn // 2 % 2].copy_(self._sources[turn % len(self._sources)])

    def before_backward(self, turn: int) -> None:
        """Rewrite the other source."""
        _rewrite(self._sources[(turn + 2) % len(self._sources)])

    def backward(self, output: Tensor, turn: int) -> None:
        """A copy and a half."""
        source, target = self._sources[(turn + 2) % len(self._sources)], self._targets[(turn // 2 + 1) % 2]
        half = len(flat := _flat(source)) // 2
        target.copy_(source)
        _flat(output)[:half].copy_(flat[half : 2 * half])

    def update(self) -> None:
        """Nothing to tidy."""


def _rewrite(tensor: Tensor) -> None:
    """Leave a tensor in the caches as an elementwise layer leaves its output, by all threads."""
    tensor.detach().neg_()


def _flat(tensor: Tensor) -> Tensor:
    """The elements in the order in which they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))
