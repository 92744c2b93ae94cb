"""A checkpoint taken anywhere: the training that goes on from it ends where the uninterrupted one does, bit for bit."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import resume
import torch
from resume import TOTAL, Training
from torch import Tensor

import streamnorm as sn

FIXTURE = Path(__file__).parent / "fixtures" / "state-v1.pt"


def flat(state: Any) -> list[Any]:
    """All leaves of a checkpoint, in order."""
    if isinstance(state, dict):
        return [leaf for key in state for leaf in flat(state[key])]
    if isinstance(state, (list, tuple)):
        return [leaf for each in state for leaf in flat(each)]
    return [state]


def assert_same(ours: Any, theirs: Any) -> None:
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    training = Training()
    training.run(TOTAL)
    return copy.deepcopy(training.state())


@pytest.mark.parametrize("pause", range(TOTAL + 1))
def test_going_on_from_any_mini_batch(whole: dict[str, Any], tmp_path: Path, pause: int) -> None:
    first = Training()
    first.run(pause)
    torch.save(first.state(), tmp_path / "checkpoint.pt")
    first.run(TOTAL)  # whoever goes on is not in the way
    torch.manual_seed(99)
    assert_same(resume.resume(tmp_path / "checkpoint.pt"), whole)


@pytest.mark.parametrize("pause", [6, 10], ids=["after an update", "inside an update"])
def test_going_on_in_a_new_process(whole: dict[str, Any], tmp_path: Path, pause: int) -> None:
    training = Training()
    training.run(pause)
    torch.save(training.state(), tmp_path / "checkpoint.pt")
    command = [sys.executable, resume.__file__, str(tmp_path / "checkpoint.pt"), str(tmp_path / "end.pt")]
    paths = os.pathsep.join([str(Path(sn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths})
    assert_same(torch.load(tmp_path / "end.pt", weights_only=True), whole)


def test_the_checkpoint_of_this_version_loads() -> None:
    """The file was written by ``python tests/test_resume.py`` with version 1 of the layers' state, and is kept.

    A later version that stores something else has to read it: migrate in ``_load_from_state_dict`` by its
    ``local_metadata["version"]``, and keep a file of the new version beside this one.
    """
    saved = torch.load(FIXTURE, weights_only=True)
    training = Training()
    training.load(saved["checkpoint"])
    assert saved["checkpoint"]["model"]._metadata["dense.1"]["version"] == 1
    x = torch.linspace(-1, 1, 24).view(2, 4, 3)
    torch.testing.assert_close(training.model.eval()(x), saved["evaluation"])
    training.model.train()
    training.run(TOTAL)
    for name, value in training.model.state_dict().items():
        torch.testing.assert_close(value, saved["end"][name], rtol=1e-4, atol=1e-6)


def write_fixture() -> None:
    training = Training()
    training.run(10)
    checkpoint = copy.deepcopy(training.state())
    x = torch.linspace(-1, 1, 24).view(2, 4, 3)
    evaluation = copy.deepcopy(training.model).eval()(x).detach()
    training.run(TOTAL)
    torch.save({"checkpoint": checkpoint, "evaluation": evaluation, "end": training.model.state_dict()}, FIXTURE)


if __name__ == "__main__":
    write_fixture()
