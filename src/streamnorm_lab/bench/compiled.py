"""Compiled layers: ``python -m streamnorm_lab.bench.compiled --help``.

A compiled streaming layer beside a compiled BatchNorm, and what the end of the graph at a recurrent layer costs: a
compiled model beside the same model as it is. The default backend takes a C++ compiler, and minutes to compile.
"""

from __future__ import annotations

import json
import sys
from functools import partial

import torch
import tyro
from rich.console import Console
from torch import Tensor, nn

import streamnorm as sn
from streamnorm_lab.bench.cases import STEPS, Case, Match, batch_norm, input_pool, streaming
from streamnorm_lab.bench.command import WIDTH, machine_load, warn_if_busy
from streamnorm_lab.bench.contestants import LayerSteps
from streamnorm_lab.bench.results import Pairing, Results, TimeRow, time_rows
from streamnorm_lab.bench.tables import print_results, save_times
from streamnorm_lab.bench.timing import Comparison, Effort, compare
from streamnorm_lab.common.environment import environment
from streamnorm_lab.common.files import locked, output_folder, typed_path, write_text
from streamnorm_lab.common.guard import guarded

FULL = Effort(seconds=2.0, rounds=21)
QUICK = Effort(seconds=0.1, rounds=3, warm_up=0.01)

SHAPES = ((1, 128), (8, 512), (1, 64, 32, 32), (8, 64, 32, 32), (32, 256, 8, 8))
RECURRENT = ((1, 128), (32, 128))
"""Sequences, and hidden units."""


class AroundRecurrent(nn.Module):
    """A recurrent layer between two linear ones, whose part in a graph ends where the recurrent layer begins."""

    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.before, self.recurrent, self.after = nn.Linear(width, width), recurrent, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of all steps."""
        y: Tensor = self.after(torch.relu(self.recurrent(torch.relu(self.before(x)))[0]))
        return y


def compiled_cases() -> list[Case]:
    """Every case; ``--quick`` keeps the first of each kind."""
    return [
        *(Case("compiled", f"{shape}", partial(_layers, shape), shape == SHAPES[0]) for shape in SHAPES),
        *(
            Case("graph break", f"GRU B{batch} H{hidden}", partial(_break, batch, hidden), batch == 1)
            for batch, hidden in RECURRENT
        ),
    ]


def _layers(shape: tuple[int, ...]) -> list[Match]:
    """BatchNorm gets two samples where one is too few for it, and its compiled form divides by zero."""
    fitting = (2, *shape[1:]) if len(shape) == 2 and shape[0] == 1 else shape
    ours, rival = (torch.compile(layer, fullgraph=True) for layer in (streaming(shape), batch_norm(fitting)))
    name = "BatchNorm" if fitting == shape else f"BatchNorm, {fitting}"
    pair = LayerSteps("streaming L1", ours, input_pool(shape)), LayerSteps(name, rival, input_pool(fitting))  # type: ignore[arg-type]
    return [Match(*pair, stock=True)]


def _break(batch: int, hidden: int) -> list[Match]:
    """torch.nn's layer is the end of a graph, too."""
    inputs = input_pool((STEPS, batch, hidden))
    matches = []
    for name, layer in (
        ("sn.GRU streaming", sn.GRU(hidden, hidden, norm="streaming")),
        ("nn.GRU", nn.GRU(hidden, hidden)),
    ):
        model = AroundRecurrent(layer, hidden)
        compiled = LayerSteps(f"{name}, compiled", torch.compile(model), inputs)  # type: ignore[arg-type]
        matches.append(Match(compiled, LayerSteps(f"{name}, not compiled", model, inputs)))
    return matches


def measure(cases: list[Case], effort: Effort) -> list[TimeRow]:
    """Every case on one thread."""
    rows: list[TimeRow] = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for case in cases:
            torch.manual_seed(0)
            torch.compiler.reset()
            for match in case.make():
                rounds = compare(match.ours, match.rival, effort)
                rows += time_rows(case, Pairing.of(match, 1), Comparison.of(rounds))
    finally:
        torch.set_num_threads(before)
    return rows


def bench_compiled(out: str = "runs/bench-compiled", quick: bool = False) -> int:
    """Measure compiled layers on one thread; leave the machine alone meanwhile.

    Args:
        out: folder for ``times.csv``, ``tables.txt`` and ``environment.json``.
        quick: a case of each kind, measured briefly: to see that it works, not for figures to report.
    """
    folder = output_folder(typed_path(out))
    console = Console(record=True, width=WIDTH)
    with locked(folder):
        load = machine_load()
        warn_if_busy(Console(stderr=True), load, 0)
        cases = [case for case in compiled_cases() if case.quick or not quick]
        results = Results(measure(cases, QUICK if quick else FULL), [], dict(environment()))
        results.environment.update(threads=1, load_before=load, load_after=machine_load(), options={"quick": quick})
        save_times(results, folder)
        write_text(folder / "environment.json", json.dumps(results.environment, indent=2) + "\n")
        print_results(results, console)
        warn_if_busy(console, load, 0)
        write_text(folder / "tables.txt", console.export_text())
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: tyro.cli(bench_compiled, config=(tyro.conf.FlagCreatePairsOff,))))
