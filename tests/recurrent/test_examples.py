"""The examples run, and learn what they set out to learn."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_truncated_backpropagation_and_online_learning() -> None:
    first, last, first_step, last_step = example("truncated_bptt")["main"]()
    assert last < 0.1 * first
    assert last_step < 0.5 * first_step


def test_recurrent_convolution() -> None:
    assert example("recurrent_convolution")["main"]() > 0.9


def test_the_table_of_gains_is_that_of_the_results() -> None:
    with (ROOT / "results/char-gru-gain/results.csv").open() as file:
        losses = {(row["method"], row["setting"]): float(row["loss"]) for row in csv.DictReader(file)}
    lines = (ROOT / "docs/recurrent.md").read_text().splitlines()
    for method in ("batch", "batch-per-step", "layer", "streaming-l1"):
        cells = [
            f"{losses[name, setting]:.3f}" for setting in ("32x1", "2x2") for name in (method, f"{method},gain=0.1")
        ]
        assert f"| {method} | {' | '.join(cells)} |" in lines
