"""Runs as jobs of a SLURM cluster, by submitit; on a machine without SLURM the same jobs run as local processes.

The interface is that of ``Pool``. A job works on the output folder, which all nodes must see. If the command that
submitted it dies, a job goes on; the next command submits the run again, and that job waits for the first one.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.files import waited_for
from streamnorm_lab.running.pool import Event, Work

FOLDER = "slurm"
POLL_SECONDS = 0.5


class Cluster:
    """Jobs of one thread that run tasks, so many of them submitted at a time; leaving the block cancels the rest.

    Args:
        jobs: how many jobs are in the queue or running at a time.
        work: does one task. What it sends is not listened to.
        folder: the output folder; what submitit writes goes into ``slurm`` there, until all jobs have ended well.
        partition: where to submit to, or None for the cluster's default.
        minutes: after which a job is ended.

    Raises:
        UserError: submitit is not installed.
    """

    def __init__(self, jobs: int, work: Work, folder: Path, partition: str | None, minutes: int) -> None:
        try:
            import submitit
        except ImportError:
            message = '--launcher slurm needs the package submitit: pip install "streamnorm[slurm]"'
            raise UserError(message) from None
        self._jobs = jobs
        self._work = work
        self._folder = folder / FOLDER
        self._executor = submitit.AutoExecutor(self._folder / "%j")
        self._executor.update_parameters(name="streamnorm", timeout_min=minutes, cpus_per_task=1)
        if partition is not None:
            self._executor.update_parameters(slurm_partition=partition)
        self._submitted: dict[Any, Any] = {}
        self._failed = False

    @property
    def name(self) -> str:
        """The destination of jobs: "slurm", or "local" on a machine without it."""
        return str(self._executor.cluster)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for job in self._submitted.values():
            job.cancel()
        if error is None and not self._failed:
            shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, tasks: Iterable[Any]) -> Iterator[Event]:
        """Do all tasks, and yield what happens."""
        waiting, started = deque(tasks), set()
        while waiting or self._submitted:
            while waiting and len(self._submitted) < self._jobs:
                task = waiting.popleft()
                self._submitted[task] = self._executor.submit(_job, self._work, task, self._folder / "locks")
            for task, job in list(self._submitted.items()):
                done = job.done()
                if task not in started and (done or job.state == "RUNNING"):
                    started.add(task)
                    yield Event("start", task)
                if done:
                    del self._submitted[task]
                    yield self._outcome(task, job)
            time.sleep(POLL_SECONDS)

    def _outcome(self, task: Any, job: Any) -> Event:
        error = job.exception()
        if error is None:
            return Event("done", task)
        self._failed = True
        return Event("failed", task, str(error))


def _job(work: Work, task: Any, locks: Path) -> None:
    """One task in a process of its own, after any earlier job for it has ended."""
    import torch

    torch.set_num_threads(1)
    with waited_for(locks / task.key.replace("/", "_")):
        work(task, lambda news: None)
