"""A checkpoint taken anywhere: the training that goes on from it ends where the uninterrupted one does, bit for bit."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import resume
from support.resume import TOTAL, Training
from torch import Tensor, nn

import streamnorm as sn

FIXTURES = Path(__file__).parents[1] / "fixtures"


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


@pytest.mark.parametrize("version", [1, 2])
def test_the_checkpoint_of_every_version_loads(version: int) -> None:
    """The file of a version was written by ``python tests/layers/test_resume.py`` at that version, and is kept.

    A later version that stores something else has to read it: by the version that ``saved_state.prepare`` is given.
    Keep a file of the new version beside these.
    """
    saved = torch.load(FIXTURES / f"state-v{version}.pt", weights_only=True)
    training = Training()
    training.load(saved["checkpoint"])
    assert saved["checkpoint"]["model"]._metadata["dense.1"]["version"] == version
    x = torch.linspace(-1, 1, 24).view(2, 4, 3)
    torch.testing.assert_close(training.model.eval()(x), saved["evaluation"])
    training.model.train()
    training.run(TOTAL)
    end = training.model.state_dict()
    if version == sn.Norm._version:
        for name, value in saved["end"].items():
            torch.testing.assert_close(end[name], value, rtol=1e-4, atol=1e-6)
    assert all(value.isfinite().all() for value in end.values())
    new = {name.rpartition(".")[2] for name in end.keys() - saved["end"].keys()}
    assert new == ({"lp_moment", "gain", "seen"} if version == 1 else set())


def test_the_present_version_has_its_file() -> None:
    assert (FIXTURES / f"state-v{sn.Norm._version}.pt").exists()


def test_a_pickle_of_version_1_goes_on() -> None:
    """Whole modules, saved with an unfinished update; they are of the present version from then on."""
    saved = torch.load(FIXTURES / "pickle-v1.pt", weights_only=False)
    model, x = saved["model"], saved["x"]
    torch.testing.assert_close(model(x)[0], saved["evaluation"])
    assert int(model[1].samples) == 4
    again = nn.Sequential(
        nn.Linear(3, 6),
        sn.StreamingNorm1d(6, p=1.5, scale="gaussian", window=20),
        sn.GeneralBatchNorm(6),
        sn.SampleNorm(6, ("group", 2)),
        sn.GRU(6, 4),
    ).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x)[0], saved["evaluation"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    copy.deepcopy(model).train()(x)[0].square().mean().backward()
    model.train()(x)[0].square().mean().backward()
    optimizer.step()
    assert int(model[1].samples) == 0


def write_fixture() -> None:
    training = Training()
    training.run(10)
    checkpoint = copy.deepcopy(training.state())
    x = torch.linspace(-1, 1, 24).view(2, 4, 3)
    evaluation = copy.deepcopy(training.model).eval()(x).detach()
    training.run(TOTAL)
    result = {"checkpoint": checkpoint, "evaluation": evaluation, "end": training.model.state_dict()}
    torch.save(result, FIXTURES / f"state-v{sn.Norm._version}.pt")


if __name__ == "__main__":
    write_fixture()
