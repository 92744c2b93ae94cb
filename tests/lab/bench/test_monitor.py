"""The benchmark of the monitor: what its two ways to take the cost see."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest

import streamnorm as sn
from streamnorm.training import updates
from streamnorm_lab.bench import monitor
from streamnorm_lab.bench.monitor import Effort, measure, watched_networks
from streamnorm_lab.common.guard import guarded

BRIEF = Effort(rounds=2, block=0.01)


def test_every_network_is_watched() -> None:
    for network in watched_networks():
        model = network.build()
        inputs, labels = network.data()
        assert model(inputs).shape[0] == labels.shape[0]
        assert sn.monitor(model).record.layers


def test_a_slow_monitor_is_seen_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three milliseconds in each update are many times the step of the smallest network."""
    network = watched_networks()[0]
    fast = measure(network, BRIEF)

    def slow(*_: object) -> None:
        end = time.thread_time() + 0.003
        while time.thread_time() < end:
            pass

    begin = sn.insight.Monitor.start

    def start(self: sn.insight.Monitor, update: int = 0) -> sn.insight.Monitor:
        self.handle = updates.before_commit(slow)  # type: ignore[attr-defined]
        return begin(self, update)

    end = sn.insight.Monitor.stop

    def stop(self: sn.insight.Monitor, status: str = "finished") -> None:
        self.handle.remove()  # type: ignore[attr-defined]
        end(self, status)

    monkeypatch.setattr(sn.insight.Monitor, "start", start)
    monkeypatch.setattr(sn.insight.Monitor, "stop", stop)
    found = measure(network, BRIEF)
    assert found.inside > 1
    assert found.inside > 5 * fast.inside
    assert not found.met


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "QUICK", BRIEF)
    monkeypatch.setattr(monitor, "watched_networks", lambda: watched_networks()[:1])
    assert guarded(lambda: monitor.bench_monitor(str(tmp_path / "out"), quick=True)) == 0
    with open(tmp_path / "out" / "costs.csv", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["network"] == "2×64 fully connected, batch 1"
    assert row["layers"] == "2"
    assert float(row["inside"]) > 0
    facts = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert facts["quick"] is True
    assert facts["load_before"] is not None
    assert "2×64 fully connected" in (tmp_path / "out" / "tables.txt").read_text()
