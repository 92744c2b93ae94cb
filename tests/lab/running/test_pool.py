"""Worker processes: order, news, errors, deaths."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from support.pool_tasks import work

from streamnorm_lab.running.pool import Pool


def test_each_task_is_started_and_ended_once_and_its_news_arrive():
    tasks = [("news", number) for number in range(6)]
    with Pool(2, work) as pool:
        events = list(pool.run(tasks))
        again = list(pool.run([("threads",)]))
    assert Counter((event.kind, event.task) for event in events) == Counter(
        (kind, task) for task in tasks for kind in ("start", "news", "done")
    )
    assert [event.task for event in events if event.kind == "start"] == tasks
    assert all(event.payload == event.task[1] for event in events if event.kind == "news")
    assert [event.payload for event in again if event.kind == "news"] == [1]


def test_a_bad_task_does_not_stop_the_others():
    with Pool(1, work) as pool:
        events = [e for e in pool.run([("mistake",), ("die",), ("full",), ("interrupt",)]) if e.kind != "start"]
    mistake, death, full, news, done = events
    assert mistake.kind == "failed"
    assert "RuntimeError: a mistake" in mistake.payload
    assert (death.kind, death.payload) == ("failed", "its process ended with exit code 7")
    assert (full.kind, full.payload) == ("broken", (errno.ENOSPC, "No space left on device", "some/file"))
    assert (news.payload, done.kind) == ("still here", "done")  # Ctrl-C is the parent's business


PARENT = """
import sys
sys.path.insert(0, {folder!r})
from support.pool_tasks import work
from streamnorm_lab.running.pool import Pool
if __name__ == "__main__":
    with Pool(1, work) as pool:
        for event in pool.run([("sleep", 60)]):
            if event.kind == "news":
                print(event.payload, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(folder=str(Path(__file__).parents[2])))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 20
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and waits to be collected does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z")
