"""Statistics in programs with several processes: when they are joined, and in which process group."""

from __future__ import annotations

import weakref
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Joinable, JoinHook, _JoinConfig
from torch.nn.parallel import DistributedDataParallel

from .core import arguments
from .layers import GeneralBatchNorm, Norm
from .training import agreement, updates
from .training.ties import Sync

Module = TypeVar("Module", bound=nn.Module)

_EVERY = ("update", "batch", "never")


def synchronize(model: Module, every: str = "update", process_group: dist.ProcessGroup | None = None) -> Module:
    """Choose when the layers of ``model`` join their statistics with those of other processes, and of which.

    The default needs no call: once ``torch.distributed`` is initialized, streaming layers join at every weight update,
    in the process group of their ``DistributedDataParallel`` or ``fully_shard``, or with all processes.

    Args:
        model: a layer, or any module that holds some.
        every: ``"update"``: each process collects by itself, and one all-reduce per weight update joins all layers.
            ``"batch"``: at every forward and backward pass streaming layers and GeneralBatchNorm see the mini-batches
            of all processes as one, as ``nn.SyncBatchNorm`` does. It costs three all-reduces a layer.
            ``"never"``: each process keeps statistics of its own.
        process_group: the processes that train this model together. Default: as described above.

    Returns:
        ``model``.

    Raises:
        ValueError: for an unknown ``every``, a group without this process, a model without such layers, or with
            ``"batch"`` one that cannot: a layer with ghost batches, or a recurrent one, whose processes would have to
            agree in every time step. Nothing is changed.

    Example:
        >>> import streamnorm as sn
        >>> model = nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(4))
        >>> _ = sn.synchronize(model, "batch")
    """
    arguments.check_model(model)
    if every not in _EVERY:
        hint = arguments.nearest(every, _EVERY) if isinstance(every, str) else ""
        raise ValueError(f"every is 'update', 'batch' or 'never', got {every!r}{hint}")
    if process_group is not None and dist.get_rank(process_group) < 0:
        raise ValueError("process_group does not contain this process; give each process the group that it is in")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Norm)]
    layers = [(name, layer) for name, layer in layers if layer.ref.spans_samples]
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no layer whose statistics span samples: there is none to join")
    if every == "batch":
        _check_batch(model, layers)
    updates.enroll(model)
    for _, layer in layers:
        layer._ties.sync, layer._repeats = Sync(every, process_group), False
    return model


def _check_batch(model: nn.Module, layers: list[tuple[str, Norm]]) -> None:
    from .recurrent.base import Normalized

    for name, module in model.named_modules():
        if isinstance(module, Normalized):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}, and every='batch' is not for recurrent layers: "
                "leave it at 'update', and synchronize the other parts of the model by themselves"
            )
    for name, layer in layers:
        if isinstance(layer, GeneralBatchNorm) and layer.ghosts > 1:
            raise ValueError(
                f"{name or 'the layer'} has ghosts={layer.ghosts}: ghost batches divide the mini-batch that "
                "every='batch' would join; set ghosts to 1 or keep every='update'"
            )


def joinable(model: DistributedDataParallel) -> Joinable:
    """The entry of streaming statistics for ``torch.distributed.algorithms.Join``, for unequal numbers of mini-batches.

    A process without data continues to take part in the weight updates of the others, with nothing collected. It does
    so once for every backward pass that averages gradients: accumulate under ``model.no_sync()``.

    Args:
        model: the DistributedDataParallel model, which precedes this entry in the list.

    Example:
        >>> from torch.distributed.algorithms import Join
        >>> with Join([model, joinable(model)]):                                    # doctest: +SKIP
        ...     for x, target in loader:
        ...         train(model, x, target)
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"joinable takes the DistributedDataParallel model, got a {type(model).__name__}")
    ours = _Joinable(model)
    agreement.joinables[model] = ours
    updates.adopt(model)
    return ours


class _Joinable(Joinable):
    def __init__(self, ddp: DistributedDataParallel) -> None:
        self._ddp = weakref.ref(ddp)
        super().__init__()

    @property
    def ddp(self) -> DistributedDataParallel:
        """The model, which owns this object and not the other way round."""
        ddp = self._ddp()
        assert ddp is not None
        return ddp

    @property
    def _join_config(self) -> _JoinConfig:
        return self._config

    @_join_config.setter
    def _join_config(self, config: _JoinConfig) -> None:
        """Join says that it begins, to one after the other in its list."""
        self._config = config
        self.partner = self.ddp._join_config

    def join_hook(self, **kwargs: object) -> JoinHook:
        return _JoinHook(self.ddp)

    @property
    def join_device(self) -> torch.device:
        return self.ddp.join_device

    @property
    def join_process_group(self) -> dist.ProcessGroup:
        return self.ddp.join_process_group


class _JoinHook(JoinHook):
    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.ddp = ddp

    def main_hook(self) -> None:
        """Answer a mini-batch of the others, after DDP's own hook."""
        if self.ddp.require_forward_param_sync:  # so DDP's hook notes that the others averaged their gradients
            updates.commit(self.ddp)
