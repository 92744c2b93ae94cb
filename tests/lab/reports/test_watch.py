"""Pages of watched runs from their logs, as they were written and with any one value replaced by another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.lab import replacements
from torch import nn

import streamnorm as sn
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.reports.watch import rebuild


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """The log of six weight updates."""
    model = nn.Sequential(nn.Linear(4, 3), sn.StreamingNorm1d(3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = sn.monitor(model, 2, tmp_path)
    monitor.start()
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
    monitor.stop("finished")
    return tmp_path / "monitor.jsonl"


def rebuilt_or_refused(log: Path) -> bool:
    """Whether there is a page; otherwise one line that names the file."""
    try:
        rebuild(log.parent)
    except UserError as error:
        said = str(error)
    else:
        return True
    assert "\n" not in said
    assert str(log) in said
    return False


def test_a_log_of_another_form(log):
    lines = log.read_text().splitlines()
    assert [json.loads(line)["type"] for line in lines] == ["monitor", "event", *["sample"] * 4, "end"]
    outcomes = set()
    for number in (0, 1, 2, len(lines) - 1):
        for changed in replacements(json.loads(lines[number])):
            rest = [*lines[:number], json.dumps(changed), *lines[number + 1 :]]
            log.write_text("\n".join(rest) + "\n")
            outcomes.add(rebuilt_or_refused(log))
    assert outcomes == {True, False}
