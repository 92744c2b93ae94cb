"""Memory of a process that trains, with and without kept outputs: ``python -m streamnorm_lab.bench.resident --help``.

The C++ engine keeps freed memory of large outputs for the next ones, up to ``STREAMNORM_KEEP_MIB``. Here ResNet-18
trains on mini-batches of 8 images of 224×224, each time in a process of its own. The system says how much memory the
process holds: at its highest point, and once gradients and outputs are gone.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

import streamnorm as sn
from streamnorm import ops
from streamnorm_lab.bench.command import WIDTH
from streamnorm_lab.bench.contestants import NetworkSteps
from streamnorm_lab.bench.networks import resnet18
from streamnorm_lab.bench.tables import as_csv
from streamnorm_lab.common.environment import environment
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.files import locked, output_folder, typed_path, write_text
from streamnorm_lab.common.guard import guarded

BATCH, SIZE, STEPS = 8, 224, 4
NORMS = {"BatchNorm": nn.BatchNorm2d, "streaming L1": sn.StreamingNorm2d}
KEPT_MIB = {"BatchNorm": (None,), "streaming L1": (256, 0)}
"""Settings of ``STREAMNORM_KEEP_MIB``, the default first, which ``nn.BatchNorm2d`` does not ask for."""


@dataclass(frozen=True)
class ResidentRow:
    """MiB of one process: before training, at most, after it, and what of that waits for the next outputs."""

    norm: str
    kept_mib: int | None
    before: float
    peak: float
    after: float
    waiting: float


def resident(norm: str, size: int) -> dict[str, float]:
    """Train here, and say how much memory this process held, in MiB."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    steps = NetworkSteps(
        norm, resnet18(NORMS[norm]), [torch.randn(BATCH, 3, size, size)], [torch.randint(1000, (BATCH,))]
    )
    before = _status("VmRSS")
    for turn in range(STEPS):
        steps.backward(steps.forward(turn), turn)
        steps.update()
    gc.collect()
    waiting = ops.waiting_memory() / 2**20
    return {"before": before, "peak": _status("VmHWM"), "after": _status("VmRSS"), "waiting": waiting}


def _status(name: str) -> float:
    """A line of what Linux says of this process, in MiB."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.M)
    assert found
    return int(found[1]) / 1024


def measure(norm: str, kept_mib: int | None, size: int) -> ResidentRow:
    """Train in a process of its own."""
    environ = {name: value for name, value in os.environ.items() if name != "STREAMNORM_KEEP_MIB"}
    if kept_mib is not None:
        environ["STREAMNORM_KEEP_MIB"] = str(kept_mib)
    code = (
        f"import json; from streamnorm_lab.bench import resident as r; print(json.dumps(r.resident({norm!r}, {size})))"
    )
    run = subprocess.run([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True, check=True)
    return ResidentRow(norm, kept_mib, **json.loads(run.stdout.splitlines()[-1]))


def bench_resident(out: str = "runs/bench-resident", quick: bool = False) -> int:
    """Measure the memory of processes that train ResNet-18, on Linux; takes a minute or two.

    Args:
        out: folder for ``memory.csv``, ``tables.txt`` and ``environment.json``.
        quick: with small images: to see that it works, not for figures to report.
    """
    if sys.platform != "linux":
        raise UserError("bench.resident reads /proc/self/status, which only Linux has")
    folder = output_folder(typed_path(out))
    console = Console(record=True, width=WIDTH)
    size = 32 if quick else SIZE
    with locked(folder):
        rows = [measure(norm, kept, size) for norm, settings in KEPT_MIB.items() for kept in settings]
        facts = {**environment(), "threads": 1, "batch": BATCH, "image": size, "steps": STEPS}
        write_text(folder / "memory.csv", as_csv([asdict(row) for row in rows]))
        write_text(folder / "environment.json", json.dumps(facts, indent=2) + "\n")
        console.print(_table(rows, size), highlight=False)
        write_text(folder / "tables.txt", console.export_text())
    return 0


def _table(rows: list[ResidentRow], size: int) -> Table:
    title = f"MiB of a process that trains ResNet-18, {BATCH} images of {size}×{size}"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("normalization", "STREAMNORM_KEEP_MIB", "before", "peak", "after", "of which waits"):
        table.add_column(column, justify="left" if column == "normalization" else "right")
    for row in rows:
        numbers = (f"{value:,.0f}" for value in (row.before, row.peak, row.after, row.waiting))
        table.add_row(row.norm, "" if row.kept_mib is None else str(row.kept_mib), *numbers)
    return table


if __name__ == "__main__":
    sys.exit(guarded(lambda: tyro.cli(bench_resident, config=(tyro.conf.FlagCreatePairsOff,))))
