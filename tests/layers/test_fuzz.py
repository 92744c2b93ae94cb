"""Random sequences of operations on layers and recurrent layers: every engine against the reference in float64.

``make test`` takes the same seeds every time, ``make search`` new ones. A failure names its seed, and
``python tests/support/fuzz.py`` carries that one out again.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from support import fuzz

from streamnorm.ops import plain

# A seed has no smaller one that fails in the same way: nothing is shrunk.
count = 80 if settings.default is not None and settings.default.derandomize else 500
seeds = settings(max_examples=count, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


@pytest.mark.filterwarnings("ignore:.*runs away", "ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", fuzz.KINDS)
@given(seed=st.integers(1 << 20, 1 << 30))
@seeds
def test_any_sequence_of_operations(kind: str, seed: int) -> None:
    fuzz.check(kind, seed)


def test_a_wrong_engine_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is wrong by a thousandth."""
    right = plain.keep_finite

    def wrong(short: torch.Tensor, *others: Any) -> None:
        right(short, *others)
        short.mul_(1.001)

    def check_some() -> None:
        for seed in range(10):
            fuzz.check("layers", seed)

    monkeypatch.setattr(plain, "keep_finite", wrong)
    with pytest.raises(AssertionError, match="off by"):
        check_some()
