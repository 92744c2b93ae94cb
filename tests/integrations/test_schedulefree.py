"""schedulefree: its wrapper is no ``torch.optim.Optimizer``, and holds the one that makes the steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integrations import loops
from integrations.training import assert_same_state, layers
from torch import nn

import streamnorm as sn

pytestmark = pytest.mark.integration("schedulefree")


def trained(kind: str, bind: bool) -> nn.Module:
    import schedulefree

    model = loops.network().train()
    optimizer: Any
    if kind == "wrapper":
        optimizer = schedulefree.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1), momentum=0.9)
    else:
        optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01)
    if bind:
        sn.bind(model, optimizer)
    optimizer.train()
    for batch in loops.loader():
        optimizer.zero_grad()
        loops.loss(model, batch).backward()
        optimizer.step()
        assert not any(layer.samples for layer in layers(model))
    return model


@pytest.mark.parametrize("kind", ["wrapper", "optimizer"])
def test_each_step_is_an_update(kind: str) -> None:
    assert_same_state(trained(kind, bind=True), trained(kind, bind=False))
