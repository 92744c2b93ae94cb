"""Functions on the statistics of a model: freeze, calibrate and reset them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .core import arguments
from .core.stream import Stream
from .layers import GeneralBatchNorm, Norm, streaming_layers
from .training import agreement, updates
from .training.streaming import Streaming

_AVERAGE_ALL = Stream(alpha=(0, 1), beta=(0, 0), kappa=(0, 1, 1, 0))
"""Normalize by all that was seen since the start, and let that become the long-term statistics."""


def freeze(model: nn.Module) -> nn.Module:
    """Let every layer of ``model`` normalize by its evaluation statistics and collect nothing, also in training mode.

    Gain and bias continue to learn. ``model.train()`` does not undo it; :func:`unfreeze` does.

    Args:
        model: a layer, or any module that holds some.

    Returns:
        ``model``.

    Example:
        >>> import streamnorm as sn
        >>> layer = freeze(sn.StreamingNorm1d(2)).train()
        >>> _ = layer(torch.ones(4, 2))
        >>> int(layer.samples)
        0
    """
    _set_frozen(model, True)
    return model


def unfreeze(model: nn.Module) -> nn.Module:
    """Undo :func:`freeze`.

    Example:
        >>> import streamnorm as sn
        >>> unfreeze(freeze(sn.StreamingNorm1d(2))).frozen
        False
    """
    _set_frozen(model, False)
    return model


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """:func:`freeze` for the length of a ``with`` block; layers that were frozen before stay so.

    Example:
        >>> import streamnorm as sn
        >>> model = sn.StreamingNorm1d(2)
        >>> with frozen(model):
        ...     _ = model(torch.ones(4, 2))
        >>> int(model.samples)
        0
    """
    thawed = [layer for layer in _layers(model) if not layer.frozen]
    try:
        yield freeze(model)
    finally:
        for layer in thawed:
            layer.frozen = False


def reset_stats(model: nn.Module) -> None:
    """Reset the statistics of every layer of ``model`` to its prior; gain and bias stay.

    Example:
        >>> import streamnorm as sn
        >>> model = sn.StreamingNorm1d(2)
        >>> _ = model(torch.ones(4, 2))
        >>> reset_stats(model)
        >>> int(model.samples)
        0
    """
    for layer in _layers(model):
        layer.reset_stats()


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any] | None = None) -> None:
    """Replace the statistics of every layer by their exact average over ``batches``; only forward passes are run.

    While it runs, a layer normalizes by what it has collected so far, and the rest of the model is in evaluation
    mode. Use it after :func:`streamnorm.convert` of layers that keep no statistics, or for statistics of less variance
    at the end of training. The streamed gradients are reset. A layer that the mini-batches do not reach keeps its
    statistics, and so does a time step of ``norm="batch-per-step"``.
    With several processes, all of them have to call it, each with mini-batches of its own: the average is over all.

    "Exact" means that every element weighs the same, however the data are divided into mini-batches. Deviations about
    the mean (``center="mean"``) are those about the location known when their mini-batch was seen, so the first few
    mini-batches should not be tiny; raw moments (``center="zero"``) are those of the union.

    Args:
        model: a layer, or any module that holds some; its training modes are restored.
        batches: mini-batches of any size. Of a tuple or list the first item goes to the model; of a dict, all items
            as keywords.
        forward: a function to call on each mini-batch instead, such as ``lambda batch: model(batch["image"])``.

    Raises:
        ValueError: if there is no mini-batch, the model has no layer with statistics, or one of them meets nothing but
            NaN and infinity; they stay as they were.

    Example:
        >>> import streamnorm as sn
        >>> layer, data = sn.StreamingNorm1d(2), torch.randn(50, 2)
        >>> calibrate(layer, data.split(8))
        >>> torch.allclose(layer.long[0], data.mean(0), atol=1e-6)
        True
    """
    streaming = streaming_layers(model)
    running = [layer for layer in _layers(model) if isinstance(layer, GeneralBatchNorm)]
    if not streaming and not running:
        raise ValueError(
            f"{type(model).__name__} holds no layer with statistics to calibrate; call streamnorm.convert(model) first"
        )
    if forward is not None and not callable(forward):
        raise TypeError(f"forward is a function of a mini-batch, got {forward!r}")
    iterator = arguments.iterator(batches, "batches")
    nothing = object()
    first = next(iterator, nothing)
    if first is nothing:
        raise ValueError("there are no mini-batches to calibrate with; a generator that was used up must be made again")

    layers = (*streaming, *running)
    with _kept_on_error(layers) as before, _averaging(model, layers):
        for batch in chain((first,), iterator):
            forward(batch) if forward is not None else _run(model, batch)
        collected = agreement.merged(lambda: [*streaming])
        _check_collected(model, collected)
        seen = [layer.samples > 0 for layer in streaming] + [layer.num_batches_tracked > 0 for layer in running]
        updates.commit_merged(collected)
        for layer, reached in zip(layers, seen):
            _keep_where(~reached, _statistics(layer), before[layer])


@contextmanager
def _kept_on_error(layers: Iterable[Norm]) -> Iterator[dict[Norm, list[Tensor]]]:
    """Yield copies of the layers' statistics, and restore them if the block raises an error."""
    before = {layer: [t.clone() for t in _statistics(layer)] for layer in layers}
    try:
        yield before
    except BaseException:
        for layer, values in before.items():
            torch._foreach_copy_(_statistics(layer), values)
        raise


@contextmanager
def _averaging(model: nn.Module, layers: Iterable[Norm]) -> Iterator[None]:
    """Let layers average all that they see from now on, with the rest of the model in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    settings = [(layer, layer.frozen, _memory(layer)) for layer in layers]
    try:
        model.eval()
        for layer in layers:
            layer.training, layer.frozen = True, False  # what is inside, such as a dropout, evaluates
            layer.reset_stats()
            _set_memory(layer, _AVERAGE_ALL if layer.stream is not None else None)
        yield
    finally:
        for layer, was_frozen, memory in settings:
            layer.frozen = was_frozen
            _set_memory(layer, memory)
        for module, mode in modes:
            module.training = mode


def _memory(layer: Norm) -> Any:
    """Give a layer's stream, or the momentum of its running statistics."""
    return layer.momentum if isinstance(layer, GeneralBatchNorm) else layer.stream


def _set_memory(layer: Norm, memory: Any) -> None:
    if isinstance(layer, GeneralBatchNorm):
        layer.momentum = memory
    else:
        layer.set_stream(memory)


def _statistics(layer: Norm) -> list[Tensor]:
    """Give the buffers that hold a layer's statistics."""
    if isinstance(layer, GeneralBatchNorm):
        return [layer.running_mean, layer.running_var, layer.num_batches_tracked]
    return list(layer.state)


def _keep_where(rows: Tensor, statistics: Iterable[Tensor], before: Iterable[Tensor]) -> None:
    """Restore statistics: all, or those of some time steps where each step has its own."""
    for now, was in zip(statistics, before):
        now.copy_(torch.where(rows.view(rows.shape + (1,) * (now.dim() - rows.dim())), was, now))


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _check_collected(model: nn.Module, layers: list[Streaming]) -> None:
    """Refuse a calibration in which a statistic met no finite value: the layer would fall back to its prior."""
    names = {id(module): name for name, module in model.named_modules()}
    for layer in layers:
        missed = layer.count == 0
        if layer.samples > 0 and (missed.any() if layer.ref.spans_places else missed.all()):
            raise ValueError(
                f"{names[id(layer)] or 'the layer'} ({type(layer).__name__}) met no finite values in "
                f"{int(missed.sum())} of its {missed.numel()} statistics: look for NaN or infinity in the "
                "mini-batches, or in the weights before it. All statistics stay as they were"
            )


def _layers(model: nn.Module) -> list[Norm]:
    arguments.check_model(model)
    return [module for module in model.modules() if isinstance(module, Norm)]


def _set_frozen(model: nn.Module, value: bool) -> None:
    for layer in _layers(model):
        layer.frozen = value
