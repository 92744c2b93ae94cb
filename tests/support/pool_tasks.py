"""Work for the pool's tests; a module of its own, for worker processes import it."""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import Any

import torch


def work(task: Any, send: Any) -> None:
    kind = task[0]
    if kind == "news":
        send(task[1])
    elif kind == "threads":
        send(torch.get_num_threads())
    elif kind == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        send("still here")
    elif kind == "mistake":
        raise RuntimeError("a mistake")
    elif kind == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "some/file")
    elif kind == "die":
        os._exit(7)
    elif kind == "sleep":
        send(os.getpid())
        time.sleep(task[1])
