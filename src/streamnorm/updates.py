"""Noticing weight updates: layers commit their statistics after ``optimizer.step()``, and no loop changes for it."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from . import agreement, ops
from .ops import traced

if TYPE_CHECKING:
    from .norm import Norm

    Listener = Callable[[Sequence[Norm], Optimizer | None], None]

_layers: dict[int, weakref.ref[Norm]] = {}
"""The streaming layers that were used in training, in the order of their first use."""

_hook: RemovableHandle | None = None

_listeners: OrderedDict[int, Listener] = OrderedDict()
"""Called at weight updates; :func:`before_commit` adds to them."""


def watch(layer: Norm) -> None:
    """Let a layer commit at its optimizer's steps; called at its first forward pass in training."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)
    key = id(layer)
    _layers[key] = weakref.ref(layer, lambda _: _layers.pop(key, None))
    layer._watched = True


def enroll(model: nn.Module) -> None:
    """Let the streaming layers of a model commit in the order in which they stand in it, and know them by name."""
    from .norm import Norm

    for name, module in model.named_modules():
        if isinstance(module, Norm) and module.stream is not None:
            _layers.pop(id(module), None)
            watch(module)
            module._name = name


def notice(layer: Norm) -> None:
    """A layer is used in training for the first time, or by a DistributedDataParallel for the first time."""
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is not None:
        adopt(ddp)
        layer._ddp = weakref.ref(ddp)  # also where the model does not register it
    if not layer._watched:
        watch(layer)


def notice_in_graph(_: Tensor) -> None:
    """As ``notice``, where a compiled graph runs: it knows no layers. All of a model are noticed at once."""
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is not None and not agreement.is_adopted(ddp):
        adopt(ddp)


traced.listeners.append(notice_in_graph)


def adopt(ddp: DistributedDataParallel) -> None:
    """Take the layers of a DistributedDataParallel model as they stand in it, in every process alike."""
    agreement.adopt(ddp)
    enroll(ddp.module)


def before_commit(listener: Listener) -> RemovableHandle:
    """Call ``listener(layers, optimizer)`` at every weight update that is noticed, just before the layers commit.

    The listener sees the short- and the long-term statistics of this update side by side, joined over the processes
    where there are several. ``layers`` are those that are about to commit; the list is empty at a step of an optimizer
    that no layer follows. ``optimizer`` is None after :func:`commit`. It runs in every step of training, so it has to
    be cheap. The layers commit also if it raises.

    Args:
        listener: the function.

    Returns:
        A handle, whose ``remove`` ends the calls.

    Example:
        >>> import streamnorm as sn
        >>> layer = sn.StreamingNorm1d(2)
        >>> handle = before_commit(lambda layers, optimizer: print(int(layers[0].samples), "samples"))
        >>> _ = layer(torch.randn(4, 2))
        >>> sn.commit(layer)
        4 samples
        >>> handle.remove()
    """
    handle = RemovableHandle(_listeners)
    _listeners[handle.id] = listener
    return handle


def commit(model: nn.Module) -> None:
    """Say that the weights of ``model`` changed: short-term statistics move into the long-term ones.

    Needed only where no ``torch.optim`` optimizer makes the update. A second call changes nothing, since nothing was
    collected in between. With several processes, all of them have to call it: their statistics are joined first.

    Args:
        model: a layer, or any module that holds some.

    Example:
        >>> import streamnorm as sn
        >>> layer = sn.StreamingNorm1d(2)
        >>> _ = layer(torch.randn(4, 2))
        >>> sn.commit(layer)
        >>> int(layer.samples)
        0
    """
    from .norm import streaming_layers

    _commit(lambda: streaming_layers(model))


def bind(model: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler | None = None) -> None:
    """Name the optimizer, and the GradScaler if any, of a model's streaming layers.

    Needed in two cases. Layers whose gain and bias no optimizer owns commit at any optimizer's step: where there are
    several optimizers, say which one is theirs. And a GradScaler multiplies the loss by a number that changes, while
    streamed gradients have a memory: given the scaler, layers stream unscaled gradients, and a change of scale
    changes nothing.

    With several processes it also names the layers, whose order must be the same in all of them
    (:func:`streamnorm.synchronize`).

    Args:
        model: a layer, or any module that holds some.
        optimizer: the one whose step changes the weights of this model.
        scaler: the GradScaler of the training loop.

    Raises:
        ValueError: if the model holds no streaming layer.

    Example:
        >>> import streamnorm as sn
        >>> model = nn.Sequential(nn.Linear(3, 2), sn.StreamingNorm1d(2, affine=False))
        >>> sn.bind(model, torch.optim.SGD(model.parameters(), lr=0.1))
    """
    from .norm import streaming_layers

    layers = streaming_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no streaming layer to bind; call streamnorm.convert(model) first"
        )
    if isinstance(model, DistributedDataParallel):
        adopt(model)
    else:
        enroll(model)
    for layer in layers:
        layer._optimizer = weakref.ref(optimizer)
        layer._grad_scale = None if scaler is None else _live_scale(scaler, layer)


def _live_scale(scaler: torch.amp.GradScaler, layer: Norm) -> Tensor | None:
    """The scaler's own tensor, which it changes in place; made by the first call of ``scale``."""
    if not scaler.is_enabled():
        return None
    if scaler._scale is None:
        scaler.scale(torch.zeros((), device=layer.state.long.device))
    return scaler._scale


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """The hook that torch.optim calls after every step of any optimizer."""
    if not _layers:
        return
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None and found_inf.item():
        return  # fused optimizers are called on a step that the GradScaler skips: no weight changed
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}

    def following() -> list[Norm]:
        layers = (reference() for reference in list(_layers.values()))
        return [layer for layer in layers if layer is not None and _follows(layer, optimizer, trained)]

    _commit(following, optimizer)


def _follows(layer: Norm, optimizer: Optimizer, trained: set[int]) -> bool:
    """Whether a step of this optimizer is an update of the layer's network."""
    if layer._optimizer is not None and layer._optimizer() is not None:
        return layer._optimizer() is optimizer
    if id(layer.weight) in trained or id(layer.bias) in trained:
        layer._owner = weakref.ref(optimizer)
        return True
    if layer._owner is not None and layer._owner() is not None:
        return False
    ddp = None if layer._ddp is None else layer._ddp()
    return ddp is None or any(id(parameter) in trained for parameter in ddp.parameters())


@torch.no_grad()
def _commit(select: Callable[[], list[Norm]], optimizer: Optimizer | None = None) -> None:
    layers = agreement.merged(select)
    try:
        for listener in tuple(_listeners.values()):
            listener(layers, optimizer)
    finally:
        commit_merged(layers)


def commit_merged(layers: list[Norm]) -> None:
    """Move the short-term statistics of these layers, which are those of all processes by now, into the long-term."""
    if layers:
        ops.commit([(layer.state, layer.formula) for layer in layers])
