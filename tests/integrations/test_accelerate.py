"""accelerate: the state after its loops is that of the same loop written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations import loops
from integrations.training import assert_same_state
from torch import nn

import streamnorm as sn

pytestmark = pytest.mark.integration("accelerate")


@pytest.fixture(autouse=True)
def _new_runtime() -> None:
    """accelerate keeps its settings for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def accelerated(
    accumulate: int,
    clip: float | None = None,
    folder: Path | None = None,
    stop: int | None = None,
    bind: bool = False,
    **options: Any,
) -> nn.Module:
    """An epoch; with a folder, saved there and stopped after ``stop`` mini-batches, or taken up from there."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **options)
    plain = loops.network()
    model, optimizer, batches = accelerator.prepare(plain, loops.make_optimizer(plain), loops.loader())
    if bind:
        sn.bind(model, optimizer)
    model.train()
    done = 0
    if folder is not None and stop is None:
        accelerator.load_state(folder)
        done = 6
        batches = accelerator.skip_first_batches(batches, done)
    for index, batch in enumerate(batches, done):
        if index == stop:
            accelerator.save_state(folder)
            break
        with accelerator.accumulate(model):
            with accelerator.autocast():
                value = loops.loss(model, batch)
            accelerator.backward(value)
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return plain


@pytest.mark.shows("`accumulate`", "as it is")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_accumulation(accumulate: int) -> None:
    assert_same_state(accelerated(accumulate), loops.by_hand(accumulate=accumulate))


@pytest.mark.shows("`clip_grad_norm_`", "as it is")
def test_gradient_clipping() -> None:
    assert_same_state(accelerated(3, clip=0.1), loops.by_hand(accumulate=3, clip=0.1))


@pytest.mark.shows('`mixed_precision="bf16"`', "as it is")
def test_mixed_precision() -> None:
    model = accelerated(3, mixed_precision="bf16")
    assert_same_state(model, loops.by_hand(accumulate=3, autocast=torch.bfloat16))
    assert model.get_buffer("1.long").dtype == torch.float32


@pytest.mark.shows("checkpoint and resume", "`save_state`, `load_state`, `skip_first_batches`")
def test_checkpoint_and_resume(tmp_path: Path) -> None:
    accelerated(3, folder=tmp_path, stop=6)
    assert_same_state(accelerated(3, folder=tmp_path), loops.by_hand(accumulate=3))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_bound_to_the_prepared_optimizer(accumulate: int) -> None:
    assert_same_state(accelerated(accumulate, bind=True), loops.by_hand(accumulate=accumulate))
