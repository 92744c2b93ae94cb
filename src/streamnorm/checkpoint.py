"""Activation checkpointing: a forward pass that is computed a second time must not count twice.

``torch.utils.checkpoint`` drops the activations of a region and runs its forward pass again during backward. A layer
with a stream would then collect its samples twice, and normalize them by statistics that have moved on. The remedy is
a tape: the first pass notes the state that each use of a layer starts from, and the second pass works on copies of
these states, in the same order, so that its outputs are those of the first bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .ops.traced import REPEATED

if TYPE_CHECKING:
    from .norm import Norm

_READ_FORWARD = ("long", "short", "count", "samples")
"""The part of a state that a forward pass reads; the streams of gradients are backward's."""


def checkpoint_context_fn() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for ``torch.utils.checkpoint``, with which layers that keep statistics may stand in its region.

    Outputs, gradients and statistics are those of the same training without checkpointing. Give it as
    ``context_fn``, together with ``use_reentrant=False``; the reentrant form has no place for it.

    Raises:
        RuntimeError: under ``torch.compile``, which knows another kind of checkpointing.

    Returns:
        A context for the forward pass, and one for its recomputation.

    Example:
        >>> import streamnorm as sn
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer, x = sn.StreamingNorm1d(2), torch.randn(4, 2, requires_grad=True)
        >>> y = checkpoint(layer, x, use_reentrant=False, context_fn=sn.checkpoint_context_fn)
        >>> y.sum().backward()
        >>> int(layer.samples)
        4
    """
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:  # a graph is being made
        raise RuntimeError(REPEATED)
    tape: Tape = []
    return _Pass(tape, replays=False), _Pass(tape, replays=True)


Tape = list[tuple["Norm", dict[str, Tensor]]]
"""The uses of layers in one region, in order: the layer, and copies of the buffers that it started from."""


class _Pass:
    """One pass through a region. It may be made again: a graph that is kept is gone through more than once."""

    def __init__(self, tape: Tape, replays: bool) -> None:
        self.tape, self.replays = tape, replays
        self.position = 0

    def __enter__(self) -> None:
        self.position = 0
        self.token: Token[tuple[_Pass, ...]] = passes.set((*passes.get(), self))

    def __exit__(self, *_: object) -> None:
        passes.reset(self.token)

    def record(self, layer: Norm) -> None:
        """Note what a use starts from."""
        self.tape.append((layer, {name: layer._buffers[name].clone() for name in _READ_FORWARD}))  # type: ignore[union-attr]

    def replay(self, layer: Norm) -> dict[str, Tensor]:
        """What the next use starts from."""
        position, self.position = self.position, self.position + 1
        if position >= len(self.tape) or self.tape[position][0] is not layer:
            raise RuntimeError(
                f"{type(layer).__name__} is used in the second pass through a checkpointed region where it was not "
                "in the first: a region has to use its layers in the same order each time, and torch.compile has to "
                "take the model together with its checkpoints"
            )
        return {name: buffer.clone() for name, buffer in self.tape[position][1].items()}


passes: ContextVar[tuple[_Pass, ...]] = ContextVar("streamnorm_passes", default=())
"""The passes that this thread is in, the innermost last."""


def concerns() -> bool:
    """Whether a training use has to go through :func:`use`."""
    return bool(passes.get()) or torch._C._current_graph_task_id() != -1  # the second: autograd runs a backward pass


@contextmanager
def use(layers: Iterable[Norm]) -> Iterator[None]:
    """Around a training use of layers: note what they start from, or let them start from what was noted.

    In a second pass they work on copies of their buffers, which are forgotten.

    Raises:
        RuntimeError: in a second pass that nobody announced.
    """
    inside = passes.get()
    replaying = [number for number, each in enumerate(inside) if each.replays]
    recording = inside[replaying[-1] + 1 :] if replaying else inside
    own: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []
    try:
        for layer in layers:
            if not layer._buffers:
                continue
            if replaying:
                own.append((layer._buffers, dict(layer._buffers)))
                copies = {name: None if b is None else b.clone() for name, b in layer._buffers.items()}
                layer._buffers.update(copies)
                if layer.stream is not None:
                    layer._buffers.update(inside[replaying[-1]].replay(layer))
            elif torch._C._current_graph_task_id() != -1:
                raise RuntimeError(_UNANNOUNCED.format(type(layer).__name__))
            if layer.stream is not None:
                for each in recording:
                    each.record(layer)
        yield
    finally:
        for buffers, before in own:
            buffers.update(before)


_UNANNOUNCED = (
    "{} runs inside a backward pass: activation checkpointing computes its forward pass a second time, and its samples "
    "would count twice. Write torch.utils.checkpoint.checkpoint(..., use_reentrant=False, "
    "context_fn=sn.checkpoint_context_fn), with streamnorm imported as sn"
)
