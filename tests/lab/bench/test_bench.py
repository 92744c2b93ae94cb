"""``streamnorm bench``: its options, its files and what it says."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import streamnorm as sn
from streamnorm_lab.bench import command, compiled, fresh, inference, resident, timing
from streamnorm_lab.bench.cases import (
    FLOOR_FROM,
    MASKS,
    Case,
    _layers,
    _masks,
    _networks,
    _recurrent,
    _resnet,
    all_cases,
    input_pool,
)
from streamnorm_lab.bench.contestants import Floor, LayerSteps
from streamnorm_lab.bench.memory import Memory
from streamnorm_lab.bench.networks import resnet20
from streamnorm_lab.bench.results import (
    MemoryRow,
    Results,
    TimeRow,
    copied_bytes,
    l1_verdict,
    memory_rows,
    targets_line,
)
from streamnorm_lab.bench.targets import MEMORY_TARGETS, RIVAL_TARGETS, TIME_TARGETS
from streamnorm_lab.bench.timing import Effort
from streamnorm_lab.commands.main import main

ROW = TimeRow(
    "layers", "(1, 128)", 1, "streaming L1", "streaming L2", "together", 0.9, 0.8, 0.95, 1, 1, 7, False, None, None
)


def test_every_target_belongs_to_a_case():
    cases = {(case.suite, case.name) for case in [*all_cases(), *compiled.compiled_cases()]}
    assert {key[:2] for key in TIME_TARGETS} <= cases
    assert set(MEMORY_TARGETS) <= {suite for suite, _ in cases}
    rivals = {match.rival.name for match in _layers((8, 64, 32, 32))}
    assert {rival for _, rival in RIVAL_TARGETS} <= rivals


def test_every_contestant_trains():
    """Each forward gives what its backward takes, and leaves gradients for the update."""
    trained = (_layers((2, 32, 8, 8)), _layers((1, 64)), _recurrent("LSTM", 2, 4), _networks(2, _resnet))
    assert all(any(match.stock for match in matches) for matches in trained)
    for matches in (*trained, *(_masks((2, 3, 8), kind) for kind in MASKS)):
        for match in matches:
            for turn, contestant in enumerate(match[:2]):
                contestant.backward(contestant.forward(turn), turn)
                contestant.update()


def test_a_folded_network_has_no_normalization_left(monkeypatch: pytest.MonkeyPatch):
    """And it gives what the network gave; without onnxruntime it is measured in PyTorch alone."""
    monkeypatch.setattr(inference, "find_spec", lambda name: None)
    images = [torch.randn(1, 3, 32, 32)]
    folded = inference.folded_network(resnet20, images)
    assert not any(isinstance(module, sn.Norm) for module in folded.modules())
    ((ours, rival),) = inference.folded_beside_group("ResNet-20")
    for contestant in (ours, rival):
        assert not contestant.forward(0).requires_grad
        assert set(timing._Runner(contestant, 0).block(1)) == {"forward", "together"}
    assert isinstance(rival, inference.InferenceSteps)
    assert isinstance(rival._run, nn.Module)
    assert any(isinstance(module, nn.GroupNorm) for module in rival._run.modules())


def test_the_lstm_is_measured_without_onednn_too():
    stock, without = _recurrent("LSTM", 2, 4)
    assert type(stock.rival.forward(0).grad_fn).__name__ == "MkldnnRnnLayerBackward0"
    assert type(without.rival.forward(0).grad_fn).__name__ != "MkldnnRnnLayerBackward0"
    assert not without.stock
    assert torch._C._get_mkldnn_enabled()


def test_memory_targets_are_for_our_layers():
    found = {name: Memory(1, 1) for name in ("sn.LSTM streaming", "nn.LSTM", "nn.LSTM without oneDNN")}
    rows = memory_rows(Case("recurrent", "LSTM B1 H8", list), found, "nn.LSTM")
    assert [row.target is not None for row in rows] == [True, False, False]


def test_large_inputs_do_not_stay_in_cache():
    pool = input_pool((8, 64, 32, 32))
    assert len(pool) == 16
    assert len(input_pool((1, 4))) == 16
    assert len({pair.x.data_ptr() for pair in pool}) == 16
    assert len(input_pool((64, 64, 32, 32))) == 4
    assert input_pool((2, 4, 3, 3), channels_last=True)[0].dy.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_floor_copies(channels_last):
    inputs = input_pool((2, 4, 8, 8), channels_last)
    floor = Floor(inputs)
    output = floor.forward(2)
    assert output.equal(inputs[2].x)
    floor.backward(output, 2)
    assert floor._targets[0].equal(inputs[4].x)


def test_the_layers_around_write_what_is_read():
    inputs = input_pool((2, 4))
    before = [(pair.x.clone(), pair.dy.clone()) for pair in inputs]
    warm, cold = (LayerSteps("", torch.nn.BatchNorm1d(4), inputs, cold=cold) for cold in (False, True))
    for contestant, turn in ((warm, 2), (cold, 3), (Floor(inputs), 4)):
        contestant.before_forward(turn)
        contestant.before_backward(turn)
    changed = [
        (i, part) for i, pair in enumerate(inputs) for part in (0, 1) if not torch.equal(pair[part], before[i][part])
    ]
    assert changed == [(2, 0), (2, 1), (4, 0), (6, 0)]  # the floor reads two of the inputs


def test_small_inputs_have_no_floor_and_are_never_cold():
    for channels, large in ((64, True), (32, False)):
        shape = (1, channels, 32, 32)
        assert (4 * channels * 32 * 32 >= FLOOR_FROM) is large
        assert ({"floor", "BatchNorm, cold inputs"} <= {match.rival.name for match in _layers(shape)}) is large


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One small case of each kind, measured for no time."""
    cases = [
        Case("layers", "(1, 128)", partial(_layers, (1, 128)), quick=True),
        Case("layers", "(1, 64, 32, 32)", partial(_layers, (1, 64, 32, 32)), quick=True),
        Case("recurrent", "GRU B1 H128", partial(_recurrent, "GRU", 1, 8), quick=True),
        Case("masks", "(2, 3, 8) lengths", partial(_masks, (2, 3, 8), "lengths"), quick=True),
        Case("recurrent", "left out", partial(_recurrent, "GRU", 1, 8)),
    ]
    monkeypatch.setattr(command, "all_cases", lambda: cases)
    monkeypatch.setattr(command, "QUICK", Effort(0, 3, 0, 0))
    monkeypatch.setattr(fresh, "in_fresh_process", fresh.measure_here)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_processes_are_put_together(monkeypatch: pytest.MonkeyPatch):
    """Each is a new one: what it did to the allocator and the threads is not seen here."""
    threads = torch.get_num_threads()
    case = Case("recurrent", "GRU B1 H128", partial(_recurrent, "GRU", 1, 8))
    times, memory = fresh.measure(case, [1], Effort(0, 3, 0, 0), processes=2, keep_memory=False)
    assert {(row.ours, row.rival, row.rounds) for row in times} == {("sn.GRU streaming", "nn.GRU", 6)}
    assert {row.contestant for row in memory} == {"sn.GRU streaming", "nn.GRU"}
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("brief")
def test_files_and_words(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.getloadavg", lambda: (3.2, 0, 0))
    assert main(["bench", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    names = {"times.csv", "memory.csv", "ratios.png", "ratios.svg", "tables.txt", "environment.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    with open(tmp_path / "times.csv") as file:
        times = list(csv.DictReader(file))
    assert {row["part"] for row in times} == {"forward", "backward", "together"}
    layers = {"(1, 128)", "(1, 64, 32, 32)"}
    assert {row["case"] for row in times} == {*layers, "(2, 3, 8) lengths", "GRU B1 H128"}
    aimed = [row for row in times if row["target"]]
    assert {row["part"] for row in aimed} == {"together"}
    others = {f"{name}{inputs}" for name in ("LayerNorm", "GroupNorm") for inputs in ("", ", cold inputs")}
    assert {row["rival"] for row in aimed} == {"BatchNorm", "nn.GRU", *others}
    assert all(row["met"] == str(float(row["ratio"]) <= float(row["target"])) for row in aimed)
    assert all(0 < float(row["ratio_q1"]) <= float(row["ratio"]) <= float(row["ratio_q3"]) for row in times)
    with open(tmp_path / "memory.csv") as file:
        memory = list(csv.DictReader(file))
    assert all(int(row["peak_bytes"]) > 0 for row in memory)
    assert not any("floor" in row["contestant"] or "cold" in row["contestant"] for row in memory)
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert facts["load_before"] == 3.2
    assert facts["options"]["quick"] is True
    assert "targets met" in captured.out
    assert "L1 is faster than L2" in captured.out
    assert "GB/s" in captured.out
    assert "The machine is busy: a load average of 3.2" in captured.out.replace("\n", " ")
    assert "--quick measures too briefly" in captured.out
    assert "streaming L1" in (tmp_path / "tables.txt").read_text()


@pytest.mark.usefixtures("brief")
def test_memory_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    monkeypatch.setattr(command, "_can_keep_memory", lambda: True)
    monkeypatch.setattr(fresh, "keep_freed_memory", lambda: told.append("glibc"))
    assert main(["bench", "--quick", "--threads", "1", "--keep-memory"]) == 0
    assert told == ["glibc"] * 4  # cases
    facts = json.loads((tmp_path / "runs/bench-quick-kept/environment.json").read_text())
    assert facts["options"]["keep_memory"] is True


def test_compiled_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Without the compiler: what is measured, and what is written."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(compiled, "QUICK", Effort(0, 3, 0, 0))
    monkeypatch.setattr("os.getloadavg", lambda: (3.2, 0, 0))
    compiled.bench_compiled(str(tmp_path), quick=True)
    with open(tmp_path / "times.csv") as file:
        times = [row for row in csv.DictReader(file) if row["part"] == "together"]
    assert [(row["ours"], row["rival"], row["target"]) for row in times] == [
        ("streaming L1", "BatchNorm, (2, 128)", "1.7"),
        ("sn.GRU streaming, compiled", "sn.GRU streaming, not compiled", ""),
        ("nn.GRU, compiled", "nn.GRU, not compiled", ""),
    ]
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert facts["load_before"] == facts["load_after"] == 3.2
    assert "The machine is busy" in capsys.readouterr().out
    assert "nn.GRU, compiled" in (tmp_path / "tables.txt").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resident, "KEPT_MIB", {"streaming L1": (64, 0)})
    resident.bench_resident(str(tmp_path), quick=True)
    with open(tmp_path / "memory.csv") as file:
        kept, dropped = csv.DictReader(file)
    assert (kept["kept_mib"], dropped["kept_mib"], dropped["waiting"]) == ("64", "0", "0")
    for row in (kept, dropped):
        before, after, peak = (float(row[part]) for part in ("before", "after", "peak"))
        assert 0 < before < peak
        assert after <= peak
    assert "ResNet-18, 8 images of 32×32" in (tmp_path / "tables.txt").read_text()


def test_memory_is_kept_by_glibc_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert main(["bench", "--keep-memory"]) == 2
    assert "--keep-memory: only glibc's allocator" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "tpu"], "--device tpu: choose cpu or cuda"),
        (
            ["--only", "layer"],
            "--only: unknown suite 'layer' (did you mean 'layers'?): choose from layers, one-pass,",
        ),
        (["--only"], "--only: name at least one"),
        (["--threads", "0"], "--threads 0: choose from 1 to"),
        (["--threads", "4096"], "--threads 4096: choose from 1 to"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def results(*times: TimeRow, memory: tuple[MemoryRow, ...] = ()) -> Results:
    return Results(list(times), list(memory), {})


def test_the_verdict_follows_the_quartiles():
    faster, unclear = ROW, replace(ROW, ratio_q3=1.1)
    slower = replace(ROW, ratio=1.2, ratio_q1=1.1, ratio_q3=1.3)
    assert "holds here: of 1 comparisons L1 is faster in 1, slower in 0" in (l1_verdict(results(faster)) or "")
    assert "holds in part" in (l1_verdict(results(faster, unclear, unclear)) or "")
    assert "does not hold" in (l1_verdict(results(faster, slower)) or "")
    assert l1_verdict(results(replace(ROW, rival="BatchNorm"))) is None


def test_missed_targets_are_named():
    met = replace(ROW, rival="BatchNorm", stock=True, target=1.0, met=True)
    missed = replace(met, ratio=1.25, met=False)
    other = replace(missed, rival="LayerNorm", stock=False)
    memory = MemoryRow("recurrent", "GRU B1 H128", "sn.GRU", 20, 30, 2.0, 1.0, 1.5, False)
    assert targets_line(results(met)) == "1 of 1 targets met."
    line = targets_line(results(met, missed, other, memory=(memory,)))
    assert line.startswith("1 of 4 targets met; missed: ")
    assert "streaming L1 against LayerNorm, (1, 128), 1 thread: 1.25 for 1" in line
    assert "streaming L1, (1, 128), 1 thread: 1.25 for 1" in line
    assert "memory of sn.GRU, GRU B1 H128: 2.00 saved, 1.00 peak" in line
    assert targets_line(results(ROW)) == "No target belongs to what was measured."


def test_a_copy_reads_and_writes():
    assert copied_bytes("(8, 64, 32, 32) channels_last") == 2 * 4 * 8 * 64 * 32 * 32
