"""Worker processes of one thread each, one task at a time each.

A worker that dies takes only its own task with it. When the parent dies, however suddenly, its workers end too:
two workers on one log would spoil it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, NamedTuple

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
"""For glibc: what a worker has freed it keeps. Giving memory back and asking for it again at every step took 40% of
the time of a small network trained one sample at a time. Other allocators do not read these variables."""

Send = Callable[[Any], None]
Work = Callable[[Any, Send], None]
"""Does one task; may send news of it. Must be a module's own function or a partial of one."""


class Event(NamedTuple):
    """News of ``task``.

    ``kind`` is "start"; "news", with what was sent; "done"; "failed", with the traceback of an error in the task; or
    "broken", with the arguments of an OSError, which other tasks would meet too.
    """

    kind: str
    task: Any
    payload: Any = None


class Pool:
    """Worker processes, ``jobs`` of them, that run tasks; leaving the ``with`` block ends them."""

    def __init__(self, jobs: int, work: Work) -> None:
        self._jobs = jobs
        self._work = work
        self._context = multiprocessing.get_context("spawn")
        self._idle: list[Connection] = []
        self._processes: dict[Connection, SpawnProcess] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.join()

    def run(self, tasks: Iterable[Any]) -> Iterator[Event]:
        """Do all tasks, in their order as workers become free, and yield what happens."""
        waiting = deque(tasks)
        busy: dict[Connection, Any] = {}
        while waiting or busy:
            while waiting and (worker := self._free_worker(len(busy))):
                busy[worker] = waiting.popleft()
                worker.send(busy[worker])
                yield Event("start", busy[worker])
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                event = self._receive(ready, busy[ready])
                if event.kind != "news":
                    del busy[ready]
                yield event

    def _free_worker(self, busy: int) -> Connection | None:
        if self._idle:
            return self._idle.pop()
        return self._start_worker() if busy < self._jobs else None

    def _start_worker(self) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._work), daemon=True)
        # A Ctrl-C reaches all processes of the terminal; the parent alone decides what follows.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        environment = dict(os.environ)
        os.environ.update(KEEP_MEMORY | environment)
        try:
            process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
            for name in KEEP_MEMORY.keys() - environment.keys():
                del os.environ[name]
        theirs.close()
        self._processes[ours] = process
        return ours

    def _receive(self, worker: Connection, task: Any) -> Event:
        try:
            kind, payload = worker.recv()
        except (EOFError, ConnectionResetError):
            process = self._processes.pop(worker)
            process.join()
            return Event("failed", task, f"its process ended with exit code {process.exitcode}")
        if kind != "news":
            self._idle.append(worker)
        return Event(kind, task, payload)


def _serve(connection: Connection, work: Work) -> None:
    """A worker's life: tasks come in, news and outcomes go out."""
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send_news(payload: Any) -> None:
        connection.send(("news", payload))

    while True:
        task = connection.recv()
        try:
            work(task, send_news)
            connection.send(("done", None))
        except OSError as error:
            connection.send(("broken", (error.errno, error.strerror or str(error), error.filename)))
        except Exception:
            connection.send(("failed", traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
