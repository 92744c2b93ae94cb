"""Activation checkpointing: a forward pass that is computed a second time must not count twice.

``torch.utils.checkpoint`` drops the activations of a region and runs its forward pass again during backward. A layer
with a stream would then collect its samples twice, and normalize them by statistics that have moved on. The remedy is
a tape: the first pass notes the state that each use of a layer starts from, and the second pass works on copies of
these states, in the same order, so that its outputs are those of the first bit for bit.

A compiled graph changes buffers by itself. Of its uses the tape notes the statistics, and the operator ``hold`` takes
them from there in the second pass. Where the region is a part of a graph, there is no second pass: the compiler takes
what it computes again from the graph, and has to be told that the statistics are none of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    _CachingTorchDispatchMode,
    create_selective_checkpoint_contexts,
)

from ..core.spec import STATISTICS
from ..ops.graph import Held
from .streaming import Streaming


def checkpoint_context_fn() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for ``torch.utils.checkpoint``, with which layers that keep statistics may stand in its region.

    Outputs, gradients and statistics are those of the same training without checkpointing. Give it as
    ``context_fn``, together with ``use_reentrant=False``; the reentrant form has no place for it.

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
        return create_selective_checkpoint_contexts(_keep_statistics, allow_cache_entry_mutation=True)
    tape = Tape()
    return _Pass(tape, replays=False), _Pass(tape, replays=True)


class Tape:
    """The uses of layers in one region, in order."""

    def __init__(self) -> None:
        self.starts: list[tuple[Streaming, dict[str, Tensor]]] = []
        """In eager mode: the layer, and copies of the buffers that it started from."""
        self.held: list[Held] = []
        """In compiled graphs."""


class _Pass:
    """One pass through a region. It may be made again: a graph that is kept is gone through more than once."""

    def __init__(self, tape: Tape, replays: bool) -> None:
        self.tape, self.replays = tape, replays

    def __enter__(self) -> None:
        self.starts, self.held = iter(self.tape.starts), iter(self.tape.held)
        self.token: Token[tuple[_Pass, ...]] = passes.set((*passes.get(), self))

    def __exit__(self, *_: object) -> None:
        passes.reset(self.token)

    def record(self, layer: Streaming) -> None:
        """Note what a use starts from."""
        start = {name: layer._buffers[name].clone() for name in STATISTICS}  # type: ignore[union-attr]
        self.tape.starts.append((layer, start))

    def replay(self, layer: Streaming) -> dict[str, Tensor]:
        """Copies of the statistics that the next use starts from."""
        noted, start = next(self.starts, (None, {}))
        if noted is not layer:
            raise RuntimeError(_ANOTHER_ORDER.format(type(layer).__name__))
        return {name: buffer.clone() for name, buffer in start.items()}

    def replay_held(self, like: Tensor) -> Held:
        """The pair that the next use in a graph held."""
        noted = next(self.held, None)
        if noted is None or noted[0].shape != like.shape:
            raise RuntimeError(_ANOTHER_ORDER.format("a compiled layer"))
        return noted


passes: ContextVar[tuple[_Pass, ...]] = ContextVar("streamnorm_passes", default=())
"""The passes that this thread is in, the innermost last."""


def concerns() -> bool:
    """Whether a training use has to go through :func:`use`."""
    return bool(passes.get()) or torch._C._current_graph_task_id() != -1  # the second: autograd runs a backward pass


def _roles() -> tuple[_Pass | None, tuple[_Pass, ...]]:
    """The pass that a use repeats, if any, and those that note it: a region may lie in another."""
    inside = passes.get()
    replaying = [number for number, each in enumerate(inside) if each.replays]
    return (inside[replaying[-1]], inside[replaying[-1] + 1 :]) if replaying else (None, inside)


@contextmanager
def use(layers: Iterable[Streaming]) -> Iterator[None]:
    """Around a training use of layers: note what they start from, or let them start from what was noted.

    In a second pass they work on copies of their buffers, which are forgotten.

    Raises:
        RuntimeError: in a second pass that nobody announced.
    """
    replaying, recording = _roles()
    own: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []
    try:
        for layer in layers:
            if not layer._buffers:
                continue
            if replaying is not None:
                own.append((layer._buffers, dict(layer._buffers)))
                copies = {name: None if b is None else b.clone() for name, b in layer._buffers.items()}
                layer._buffers.update(copies)
                if layer.stream is not None:
                    layer._buffers.update(replaying.replay(layer))
            elif torch._C._current_graph_task_id() != -1:
                raise RuntimeError(_UNANNOUNCED.format(type(layer).__name__))
            if layer.stream is not None:
                for each in recording:
                    each.record(layer)
        yield
    finally:
        for buffers, before in own:
            buffers.update(before)


def use_in_graph(held: Held) -> Held | None:
    """As ``use``, for a use in a compiled graph that runs: what it held, if it has been there before."""
    if not concerns():
        return None
    replaying, recording = _roles()
    noted = None if replaying is None else replaying.replay_held(held[0])
    if noted is None and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(_UNANNOUNCED.format("a compiled streamnorm layer"))
    for each in recording:
        values, passed = held if noted is None else noted
        each.tape.held.append((values.clone(), passed))  # a graph reuses the memory of the values
    return noted


def _keep_statistics(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """For a region in a graph: statistics are saved, and all else is computed a second time."""
    held = operator is torch.ops.streamnorm.hold.default
    return CheckpointPolicy.MUST_SAVE if held else CheckpointPolicy.PREFER_RECOMPUTE


@torch.library.register_torch_dispatch("streamnorm::hold", _CachingTorchDispatchMode)
def _hold_in_region(mode: Any, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """A region in a graph whose policy is not ours would have statistics computed a second time."""
    if mode.policy_fn is not _keep_statistics:
        raise RuntimeError(_UNANNOUNCED.format("a compiled streamnorm layer"))
    return mode.__torch_dispatch__(operator, types, args, kwargs)


_UNANNOUNCED = (
    "{} is computed a second time, by activation checkpointing, and its samples would count twice. Write "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=sn.checkpoint_context_fn), with streamnorm "
    "imported as sn"
)

_ANOTHER_ORDER = (
    "{} is used in the second pass through a checkpointed region where it was not in the first: a region has to use "
    "its layers in the same order each time, and be compiled or not each time"
)
