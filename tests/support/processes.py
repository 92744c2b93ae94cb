"""Processes that run a test's function together, connected by gloo: started once, kept for the whole session."""

from __future__ import annotations

import datetime
import importlib.util
import multiprocessing
import pickle
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.distributed_c10d import _set_pg_timeout

from streamnorm.training import updates


class Processes:
    """Up to three processes. Each call has a process group of its own, so that no failure outlives its test."""

    def __init__(self, most: int = 3) -> None:
        context = multiprocessing.get_context("spawn")
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.calls = 0
        self.connections: list[Connection] = []
        self.processes = []
        for _ in range(most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any, world: int = 2, patience: float = 120) -> list[Any]:
        """Run ``function(rank, *args)`` in ``world`` processes; the results in the order of the ranks.

        Args:
            function: at the top level of a test file, which the processes load by its path.
            args: pickled; lists, numbers, tensors.
            world: how many processes.
            patience: the seconds that a collective waits for a process that does not come.
        """
        self.calls += 1
        place = (function.__code__.co_filename, function.__name__)
        for rank, connection in enumerate(self.connections[:world]):
            call = (place, args, rank, world, (self.store.port, str(self.calls)), patience)
            connection.send_bytes(pickle.dumps(call))
        answers = [pickle.loads(connection.recv_bytes()) for connection in self.connections[:world]]
        failures = [f"process {rank}:\n{result}" for rank, (failed, result) in enumerate(answers) if failed]
        assert not failures, "\n".join(failures)
        return [result for _, result in answers]

    def close(self) -> None:
        for connection, process in zip(self.connections, self.processes):
            connection.close()
            process.kill()  # it has nothing to put in order


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    modules: dict[str, ModuleType] = {}
    while True:
        try:
            place, args, rank, world, (port, call), patience = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            function = getattr(_module(place[0], modules), place[1])
            store = PrefixStore(call, TCPStore("127.0.0.1", port, is_master=False))
            dist.init_process_group("gloo", world_size=world, rank=rank, store=store)
            dist.barrier()  # a busy machine may start one much later than the other: this is not what is tested
            _set_pg_timeout(datetime.timedelta(seconds=patience))
            answer = (False, function(rank, *args))
        except BaseException:
            answer = (True, traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            updates._layers.clear()  # models that PyTorch keeps alive would commit in the next call
        connection.send_bytes(pickle.dumps(answer))


def _module(path: str, loaded: dict[str, ModuleType]) -> ModuleType:
    if path not in loaded:
        spec = importlib.util.spec_from_file_location(f"tasks_{len(loaded)}", path)
        assert spec is not None
        assert spec.loader is not None
        loaded[path] = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = loaded[path]
        spec.loader.exec_module(loaded[path])
    return loaded[path]
