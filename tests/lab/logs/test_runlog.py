"""Logs and checkpoints, as a kill at any moment may leave them."""

from __future__ import annotations

import json

import pytest
import torch

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.logs.runlog import RunLog, read_log

RUN = {"stage": "final", "method": "layer", "setting": "1x1", "rate": 0.1, "seed": 0}
HEADER = {
    "experiment": "online-fc",
    "run": RUN,
    "options": {},
    "environment": {"torch": "1"},
    "started": "2020-01-01T00:00:00+00:00",
}
END = {"status": "done", "updates": 1, "seconds": 0.5}


@pytest.fixture
def log(tmp_path):
    return RunLog(tmp_path / "folder" / "run_rate0.1.jsonl", HEADER)


def point(update):
    return {"type": "point", "update": update, "train": {"loss": 1.0, "accuracy": 0.5}}


def lines(log):
    return [json.loads(line) for line in log.path.read_text().splitlines()]


def test_a_run_from_its_start_to_its_end(log):
    assert log.start() is None
    log.write(point(1))
    log.save({"updates": 1})
    log.finish(END)
    assert [record["type"] for record in lines(log)] == ["run", "point", "end"]
    assert not log.checkpoint_path.exists()
    logged = read_log(log.path)
    assert logged is not None
    assert logged.run == RUN
    assert logged.points == [point(1)]
    assert logged.end == {"type": "end", **END}


def test_continues_from_the_checkpoint_and_cuts_the_log_back_to_it(log):
    log.start()
    log.write(point(1))
    log.save({"updates": 1, "weight": torch.tensor([1.5])})
    log.write(point(2))
    with open(log.path, "ab") as file:
        file.write(b'{"type": "poi')
    state = RunLog(log.path, HEADER).start()
    assert state == {"updates": 1, "weight": torch.tensor([1.5])}
    assert [record["type"] for record in lines(log)] == ["run", "point"]


def test_without_a_checkpoint_it_starts_anew(log):
    log.start()
    log.write(point(1))
    assert RunLog(log.path, HEADER).start() is None
    assert [record["type"] for record in lines(log)] == ["run"]


@pytest.mark.parametrize("header", [{**HEADER, "run": {**RUN, "rate": 0.2}}, {**HEADER, "environment": {"torch": "2"}}])
def test_a_checkpoint_of_another_run_or_environment_is_not_continued(log, header):
    log.start()
    log.save({"updates": 1})
    assert RunLog(log.path, header).start() is None
    assert not log.checkpoint_path.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut"])
def test_a_damaged_checkpoint_is_not_continued(log, content):
    log.start()
    log.checkpoint_path.write_bytes(content)
    assert RunLog(log.path, HEADER).start() is None


@pytest.mark.parametrize("state", [None, 5, [1], {}, {"header": "another"}, {"log_bytes": 5}])
def test_a_checkpoint_of_another_form_is_not_continued(log, state):
    log.start()
    torch.save(state, log.checkpoint_path)
    assert RunLog(log.path, HEADER).start() is None


@pytest.mark.parametrize("log_bytes", [-1, "5", None, 10**9])
def test_a_checkpoint_of_a_length_that_cannot_be_is_not_continued(log, log_bytes):
    log.start()
    log.save({"updates": 1})
    state = torch.load(log.checkpoint_path)
    torch.save({**state, "log_bytes": log_bytes}, log.checkpoint_path)
    assert RunLog(log.path, HEADER).start() is None


def test_a_log_shorter_than_its_checkpoint_is_not_continued(log):
    log.start()
    log.write(point(1))
    log.save({"updates": 1})
    log.path.write_bytes(b"")
    assert RunLog(log.path, HEADER).start() is None


def test_a_torn_last_line_is_no_error(log):
    log.start()
    with open(log.path, "ab") as file:
        file.write(b'{"type": "end", "status"')
    logged = read_log(log.path)
    assert logged is not None
    assert logged.end is None


def test_a_log_torn_in_its_first_line_says_nothing(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"type": "ru')
    assert read_log(tmp_path / "log.jsonl") is None


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    first = json.dumps({"type": "run", **HEADER})
    (tmp_path / "log.jsonl").write_text(f'{first}\nnonsense\n{{"type": "end"}}\n')
    with pytest.raises(UserError, match=r"log\.jsonl: line 2 is not JSON"):
        read_log(tmp_path / "log.jsonl")


def test_a_line_after_the_last_one_is_named(log):
    log.start()
    log.finish(END)
    log.write(point(2))
    with pytest.raises(UserError, match="line 3: a log is one line of type 'run', then"):
        read_log(log.path)


def test_no_number_that_json_does_not_know_is_written(log):
    log.start()
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write({"loss": float("nan")})
