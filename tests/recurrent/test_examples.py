"""The examples run, and learn what they set out to learn."""

from __future__ import annotations

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
