"""The cost of ``streamnorm.monitor`` in a training step: ``python -m streamnorm_lab.bench.monitor --help``.

Two copies of a network train in turns, one of them watched every 50 weight updates, with log and page. A block of steps
is long enough for samples, evaluations and pages to fall into it as often as they do in training.

The cost is taken twice. *Inside*: a clock runs while the monitor does, in steps that are watched; its share of their
time is exact to a few hundredths of a percent. *Beside*: the ratio of watched to other steps, which would also show a
cost that does not lie inside the monitor, and which moves by some percent from block to block.

Both are processor time of the thread that trains. On a busy machine they are too high rather than too low: a monitor
evaluates its samples once a second, however little was trained meanwhile.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import streamnorm as sn
from streamnorm_lab.bench.command import WIDTH, machine_load, warn_if_busy
from streamnorm_lab.bench.contestants import NetworkSteps
from streamnorm_lab.bench.networks import resnet20
from streamnorm_lab.bench.tables import as_csv
from streamnorm_lab.bench.timing import Spread, no_garbage_collection
from streamnorm_lab.common.environment import environment
from streamnorm_lab.common.files import locked, output_folder, typed_path, write_text
from streamnorm_lab.common.guard import guarded
from streamnorm_lab.networks.images import fully_connected
from streamnorm_lab.networks.text import CharModel

EVERY = 50
"""Weight updates from sample to sample, the monitor's default."""

TARGET = 0.01
"""The target set before the monitor was built: a share of the step's time."""


class Watched(NamedTuple):
    """A network to train, and its mini-batches."""

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]


class Effort(NamedTuple):
    """Rounds of two blocks, and about how many seconds a block takes."""

    rounds: int
    block: float


FULL, QUICK = Effort(20, 2.0), Effort(3, 0.05)


@dataclass(frozen=True)
class CostRow:
    """The monitor's share of a step's time; ``beside`` is a median, with quartiles over rounds."""

    network: str
    layers: int
    step_seconds: float
    inside: float
    beside: float
    beside_q1: float
    beside_q3: float
    rounds: int
    steps: int
    target: float
    met: bool


class _Clock:
    """A clock for the listeners registered between its own two, while it is on."""

    def __init__(self) -> None:
        self.on = True
        self.seconds = self.began = 0.0
        self.updates = 0

    def start(self, *_: object) -> None:
        """Listen first."""
        self.began = time.thread_time()

    def stop(self, *_: object) -> None:
        """Listen last."""
        if self.on:
            self.seconds += time.thread_time() - self.began
            self.updates += 1

    @contextmanager
    def around(self, watching: AbstractContextManager[Any]) -> Iterator[None]:
        """Let something listen between."""
        first = sn.insight.before_commit(self.start)
        with watching:
            last = sn.insight.before_commit(self.stop)
            yield
            last.remove()
        first.remove()


def watched_networks() -> list[Watched]:
    """Networks with steps from a third of a millisecond to those of a small convolutional network."""
    image = partial(_images, (3, 32, 32))
    return [
        Watched(
            "2×64 fully connected, batch 1", partial(fully_connected, 64, 10, _norm, 64, 2), partial(_images, (64,), 1)
        ),
        Watched("3×512 fully connected, batch 1", partial(fully_connected, 3072, 10, _norm, 512, 3), partial(image, 1)),
        Watched("ResNet-20, batch 1", partial(resnet20, sn.StreamingNorm2d), partial(image, 1)),
        Watched("ResNet-20, batch 8", partial(resnet20, sn.StreamingNorm2d), partial(image, 8)),
        Watched("GRU of 128, 50 characters", partial(CharModel, 64, 128, _gru), _characters),
    ]


def _norm(width: int, _: int) -> nn.Module:
    return sn.StreamingNorm1d(width)


def _gru(inputs: int, hidden: int) -> nn.RNNBase:
    return sn.GRU(inputs, hidden, batch_first=True)


def _images(shape: tuple[int, ...], batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, *shape), torch.randint(10, (batch,))


def _characters() -> tuple[Tensor, Tensor]:
    return torch.randint(64, (1, 50)), torch.randint(64, (50,))


def measure(network: Watched, effort: Effort) -> CostRow:
    """Train two copies in turns, one of them watched."""
    torch.manual_seed(0)
    inputs, labels = zip(*(network.data() for _ in range(16)))
    bare, seen = (NetworkSteps(network.name, network.build(), list(inputs), list(labels)) for _ in range(2))
    ratios, without, watched = [], [], 0.0
    with no_garbage_collection(), tempfile.TemporaryDirectory() as folder:
        empty, clock = _Clock(), _Clock()
        with empty.around(nullcontext()):
            _block(bare, 10 * EVERY)
        steps = EVERY * max(1, round(effort.block / _block(bare, EVERY) / EVERY))
        monitor = sn.monitor(seen.network, EVERY, folder)
        with clock.around(monitor):
            for turn in range(effort.rounds):
                seconds = {}
                for each in (bare, seen) if turn % 2 else (seen, bare):
                    clock.on = each is seen
                    seconds[each] = _block(each, steps)
                ratios.append(seconds[seen] / seconds[bare] - 1)
                without.append(seconds[bare])
                watched += seconds[seen] * steps
    inside = clock.seconds - clock.updates * empty.seconds / empty.updates
    beside, share = Spread.of(ratios), inside / (watched - inside)
    return CostRow(
        network.name,
        len(monitor.record.layers),
        Spread.of(without).median,
        share,
        beside.median,
        beside.low,
        beside.high,
        effort.rounds,
        steps,
        TARGET,
        share <= TARGET,
    )


def _block(contestant: NetworkSteps, steps: int) -> float:
    """Mean seconds of a step."""
    began = time.thread_time()
    for turn in range(steps):
        contestant.backward(contestant.forward(turn), turn)
        contestant.update()
    return (time.thread_time() - began) / steps


def bench_monitor(out: str = "runs/bench-monitor", quick: bool = False) -> int:
    """Measure what the monitor adds to training steps, on one thread; takes about ten minutes.

    Args:
        out: folder for ``costs.csv``, ``tables.txt`` and ``environment.json``.
        quick: briefly, to see that it works; not for figures to report.
    """
    folder = output_folder(typed_path(out))
    console = Console(record=True, width=WIDTH)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with locked(folder):
            load = machine_load()
            warn_if_busy(Console(stderr=True), load, 0)
            rows = [measure(network, QUICK if quick else FULL) for network in watched_networks()]
            facts = {**environment(), "threads": 1, "load_before": load, "load_after": machine_load(), "quick": quick}
            write_text(folder / "costs.csv", as_csv([asdict(row) for row in rows]))
            write_text(folder / "environment.json", json.dumps(facts, indent=2) + "\n")
            console.print(_table(rows), highlight=False)
            warn_if_busy(console, load, 0)
            write_text(folder / "tables.txt", console.export_text())
    finally:
        torch.set_num_threads(before)
    return 0


def _table(rows: list[CostRow]) -> Table:
    table = Table(title=f"What streamnorm.monitor adds to a step at every={EVERY}", title_justify="left", box=None)
    for column in ("network", "layers", "µs/step", "inside", "target", "beside", "quartiles"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in rows:
        table.add_row(
            row.network,
            f"{row.layers}",
            f"{1e6 * row.step_seconds:,.0f}",
            f"{row.inside:.2%}",
            f"≤ {row.target:.0%} {'met' if row.met else 'missed'}",
            f"{row.beside:+.1%}",
            f"{row.beside_q1:+.1%} to {row.beside_q3:+.1%}",
        )
    return table


if __name__ == "__main__":
    sys.exit(guarded(lambda: tyro.cli(bench_monitor, config=(tyro.conf.FlagCreatePairsOff,))))
