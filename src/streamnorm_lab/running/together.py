"""One training in several processes: ``torchrun --nproc-per-node 2 -m streamnorm run EXPERIMENT …``.

Every process trains on its share of each mini-batch. The first one reads the options, chooses the runs, writes logs and
checkpoints and evaluates for the report; the others follow it. Streaming layers join their statistics at every weight
update by themselves; methods with statistics of the mini-batch see those of their process's share, as is usual.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.nn  # its default arguments would hold a process group that exists when it is first imported
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from streamnorm_lab.common.errors import UserError, first_line
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.data.task import Batch, Data
from streamnorm_lab.experiments.experiment import Experiment
from streamnorm_lab.logs.records import Run
from streamnorm_lab.logs.runlog import Record, RunLog
from streamnorm_lab.running.pool import Event, Work
from streamnorm_lab.running.train import Training

_TORCHRUN = "start the command by torchrun, or unset the variable"


def count() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def described() -> dict[str, str]:
    """The entry about processes in a log's environment."""
    return {"processes": str(count())} if count() > 1 else {}


def check(settings: Sequence[str]) -> None:
    """Refuse mini-batches that cannot be shared out equally.

    Raises:
        UserError: the number of samples of one is no multiple of the number of processes.
    """
    for setting in settings:
        if Setting.parse(setting).samples % count():
            raise UserError(f"setting {setting}: {count()} processes cannot share its mini-batches equally")


@contextmanager
def joined() -> Iterator[bool]:
    """Join the other processes if torchrun started this one; yield whether this one leads, which it does if alone.

    In a process that does not lead, the ``with`` block is to be left at once: what the leader asks for is done then.
    """
    if _processes_started() == 1:
        yield True
        return
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group()
    except (ValueError, RuntimeError) as error:
        message = f"WORLD_SIZE is set, but the processes do not find each other ({first_line(error)}): {_TORCHRUN}"
        raise UserError(message) from None
    try:
        yield dist.get_rank() == 0
        if dist.get_rank() > 0:
            _follow()
    finally:
        if dist.get_rank() == 0:
            _tell(None)
        # Gloo's threads end with the last holder of the group: models in reference cycles are the others. A thread
        # that dropped a tensor while Python ends would abort the process.
        gc.collect()
        dist.destroy_process_group()


def _processes_started() -> int:
    """The number of processes that torchrun started."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 1:
        raise UserError(f"the environment variable WORLD_SIZE is {size!r}, no number of processes: {_TORCHRUN}")
    return int(size)


def _tell(what: Any) -> Any:
    """Broadcast a value from the first process."""
    box = [what]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _follow() -> None:
    while (order := _tell(None)) is not None:
        work, task = order
        work(task, lambda news: None)


class Together:
    """A runner of one task after the other, each in all processes, with the interface of ``Pool``."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __enter__(self) -> Together:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def run(self, tasks: Iterable[Any]) -> Iterator[Event]:
        """Do all tasks, and yield what happens; an error in one ends the command, for the processes part there."""
        for task in tasks:
            yield Event("start", task)
            _tell((self._work, task))
            self._work(task, lambda news: None)
            yield Event("done", task)


class SharedTraining(Training):
    """A training in which each process learns from its share of every mini-batch."""

    def __init__(self, experiment: Experiment[Any], run: Run, data: Data) -> None:
        super().__init__(experiment, run, data)
        self.network = DistributedDataParallel(self.model)

    def _batches(self, epoch: int, first_update: int) -> Iterator[Batch]:
        rank, processes = dist.get_rank(), dist.get_world_size()
        for inputs, targets in super()._batches(epoch, first_update):
            share = len(inputs) // processes
            per_sample = len(targets) // len(inputs)
            first = rank * share
            yield inputs[first : first + share], targets[first * per_sample : (first + share) * per_sample]

    def _watch(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Meter the mean loss and all hits of the full mini-batch, so that all processes decide alike."""
        hits = (logits.argmax(1) == targets).sum()
        numbers = torch.stack([loss.detach(), hits.to(loss.dtype)])
        dist.all_reduce(numbers)
        mean, correct = numbers[0].item() / count(), int(numbers[1])
        self._note(mean, correct, len(targets) * count())


class SharedLog(RunLog):
    """A log that the first process writes and all continue from."""

    def start(self) -> Record | None:
        """The training state of the last checkpoint, in all processes."""
        return cast("Record | None", _tell(super().start() if dist.get_rank() == 0 else None))

    def write(self, record: Record) -> None:
        """Append one line."""
        if dist.get_rank() == 0:
            super().write(record)

    def save(self, state: Record) -> None:
        """Write a checkpoint."""
        if dist.get_rank() == 0:
            super().save(state)

    def finish(self, record: Record) -> None:
        """Write the last line."""
        if dist.get_rank() == 0:
            super().finish(record)
