"""Sinks for the samples of a monitor: TensorBoard, Weights & Biases, and the callbacks of two trainers.

The libraries are imported when they are asked for, and none of them is a dependency.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .monitor import Monitor, Sink, monitor
from .record import Sample

if TYPE_CHECKING:
    from torch import nn

PREFIX = "streamnorm-"
"""Before the name of each curve, so that drift has a group of its own beside the curves of others."""


def tensorboard(where: Any) -> Sink:
    """A sink that writes each number as a curve of TensorBoard, ``streamnorm-drift/<layer>`` and so on.

    Args:
        where: a folder, or a ``torch.utils.tensorboard.SummaryWriter``, which stays open.

    Raises:
        ModuleNotFoundError: without the package: ``pip install "streamnorm[tensorboard]"``.

    Example:
        >>> import streamnorm as sn
        >>> watching = sn.monitor(model, sinks=[sn.insight.tensorboard("runs/first")])         # doctest: +SKIP
    """
    return _TensorBoard(where)


class _TensorBoard:
    def __init__(self, where: Any) -> None:
        self._mine = not hasattr(where, "add_scalar")
        if self._mine:
            from torch.utils.tensorboard import SummaryWriter

            where = SummaryWriter(str(where))
        self._writer = where

    def __call__(self, sample: Sample) -> None:
        for name, value in sample.scalars().items():
            self._writer.add_scalar(PREFIX + name, value, sample.update)

    def close(self) -> None:
        """Close the writer if it was made here."""
        self._writer.close() if self._mine else self._writer.flush()


def wandb(run: Any = None) -> Sink:
    """A sink that logs each number to Weights & Biases, over the number of the weight update.

    Args:
        run: what ``wandb.init`` gave; None takes the run that is active.

    Raises:
        ValueError: if no run is active.

    Example:
        >>> import streamnorm as sn
        >>> run = wandb.init(project="digits")                                                  # doctest: +SKIP
        >>> watching = sn.monitor(model, sinks=[sn.insight.wandb(run)])                         # doctest: +SKIP
    """
    if run is None:
        import wandb as library

        run = library.run
    if run is None:
        raise ValueError("no run of Weights & Biases is active: call wandb.init() before streamnorm.insight.wandb()")
    update = PREFIX + "update"
    run.define_metric(update, hidden=True)
    run.define_metric(PREFIX + "*", step_metric=update)

    def log(sample: Sample) -> None:
        run.log({update: sample.update, **{PREFIX + name: value for name, value in sample.scalars().items()}})

    return log


def lightning_callback(every: int = 50, out: str | Path | None = None, sinks: Iterable[Sink] = ()) -> Any:
    """A callback for Lightning's ``Trainer``, which watches the module that it fits.

    The trainer's own loggers get the numbers too.

    Args:
        every: as in :func:`streamnorm.monitor`.
        out: likewise.
        sinks: likewise.

    Returns:
        A ``lightning.pytorch.Callback``; its ``monitor`` is the monitor, from the start of training on.

    Example:
        >>> import streamnorm as sn
        >>> trainer = lightning.Trainer(callbacks=[sn.insight.lightning_callback(out="seen")])  # doctest: +SKIP
    """
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:  # the same library under its older name
        from pytorch_lightning import Callback

    class MonitorCallback(Callback):  # type: ignore[misc]  # without annotations where it is not installed
        monitor: Monitor | None = None

        def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
            def log(sample: Sample) -> None:
                numbers = {PREFIX + name: value for name, value in sample.scalars().items()}
                for logger in trainer.loggers:
                    logger.log_metrics(numbers, step=sample.update)

            self.monitor = monitor(pl_module, every, out, [*sinks, log])
            self.monitor.start(trainer.global_step)

        def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
            self._stop("finished")

        def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
            self._stop(f"stopped by {type(exception).__name__}")

        def _stop(self, status: str) -> None:
            if self.monitor is not None:
                self.monitor.stop(status)

    return MonitorCallback()


def transformers_callback(every: int = 50, out: str | Path | None = None, sinks: Iterable[Sink] = ()) -> Any:
    """A callback for the ``Trainer`` of transformers, which watches the model that it trains.

    Args:
        every: as in :func:`streamnorm.monitor`.
        out: likewise.
        sinks: likewise.

    Returns:
        A ``transformers.TrainerCallback``; its ``monitor`` is the monitor, from the start of training on.

    Example:
        >>> import streamnorm as sn
        >>> trainer = Trainer(model, callbacks=[sn.insight.transformers_callback(out="seen")])  # doctest: +SKIP
    """
    from transformers import TrainerCallback

    class MonitorCallback(TrainerCallback):  # type: ignore[misc]  # likewise
        monitor: Monitor | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.monitor = monitor(kwargs["model"], every, out, sinks)
            self.monitor.start(state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.monitor is not None:
                self.monitor.note("checkpoint", f"saved at step {state.global_step}")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.monitor is not None:
                self.monitor.stop()

    return MonitorCallback()
