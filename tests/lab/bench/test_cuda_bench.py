"""``streamnorm bench --device cuda`` without a GPU: on a device whose clock only the contestants move."""

from __future__ import annotations

import csv
import pickle
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from streamnorm import ops
from streamnorm.ops.gpu import ENGINE
from streamnorm.ops.gpu.device import INTERPRETED
from streamnorm.recurrent.engines import gpu as recurrent_gpu
from streamnorm_lab.bench import cuda
from streamnorm_lab.bench import cuda_cases as cuda_cases_module
from streamnorm_lab.bench.cuda_cases import (
    POOL_BYTES,
    SUITES,
    CudaCase,
    Steps,
    _inputs,
    _layers,
    _recurrent,
    cuda_cases,
)
from streamnorm_lab.bench.cuda_timing import Device, Effort, copy_speed, ratio, time_in_turns
from streamnorm_lab.commands.main import main

CPU = torch.device("cpu")
EFFORT = Effort(block=0.1, rounds=4, warm_up=0.2)


class FakeDevice(Device):
    """Steps take what they add to the clock; a replayed graph takes half of it, as if the host had cost the rest."""

    def __init__(self) -> None:
        self.now = 0.0
        self.blocks: list[tuple[Any, int]] = []

    def captured(self, steps: Sequence[Callable[[], object]]) -> Callable[[], object]:
        def replay() -> None:
            begin = self.now
            for step in steps:
                step()
            self.now = begin + (self.now - begin) / 2

        return replay

    def seconds(self, call: Callable[[], object], times: int) -> float:
        self.blocks.append((call, times))
        begin = self.now
        for _ in range(times):
            call()
        return (self.now - begin) / times


def scripted(device: FakeDevice, forward: float, together: float, needs_host: bool = False) -> Steps:
    def take(seconds: float) -> None:
        device.now += seconds

    return Steps([partial(take, forward)] * 3, [partial(take, together)] * 3, needs_host)


def case(device: FakeDevice, **others: Callable[[], Steps]) -> CudaCase:
    contestants = {
        "BatchNorm": lambda: scripted(device, 0.004, 0.010),
        "streaming L1": lambda: scripted(device, 0.002, 0.009),
        **others,
    }
    targets = {("streaming L1", "BatchNorm"): 1.0, ("one-pass L1", "BatchNorm"): 0.75}
    return CudaCase("layers", "(2, 3)", "BatchNorm", lambda _: contestants, targets, 1000, 1.25)


def test_contestants_take_turns_for_about_the_same_time() -> None:
    device = FakeDevice()

    def slow() -> None:
        device.now += 0.05

    def fast() -> None:
        device.now += 0.01

    times = time_in_turns({"slow": slow, "fast": fast}, device, EFFORT)
    assert times["slow"] == pytest.approx([0.05] * 4)
    assert times["fast"] == pytest.approx([0.01] * 4)
    measured = device.blocks[4:]
    assert [call for call, _ in measured] == [slow, fast, fast, slow] * 2
    assert {times for call, times in measured if call is slow} == {2}
    assert {times for call, times in measured if call is fast} == {10}


def test_ratios_are_taken_round_by_round() -> None:
    assert ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == (0.5, 0.5, 0.5)


def test_a_copy_reads_and_writes() -> None:
    device = FakeDevice()
    seconds = device.seconds

    def counted(call: Callable[[], object], times: int) -> float:
        seconds(call, times)
        return 0.25

    device.seconds = counted  # type: ignore[method-assign]
    assert copy_speed(device, torch.randn(1000), EFFORT) == pytest.approx(2 * 4000 / 0.25)


def test_rows_of_a_case() -> None:
    device = FakeDevice()
    rows = cuda.measure(case(device), device, EFFORT, 1e6, CPU)
    found = {(row.way, row.part, row.ours): row for row in rows}
    assert len(found) == len(rows) == 8
    eager, captured = (found[way, "together", "streaming L1"] for way in ("eager", "device"))
    assert eager.seconds == pytest.approx(0.009)
    assert captured.seconds == pytest.approx(0.0045)
    assert captured.ratio == pytest.approx(0.9)
    assert (eager.target, captured.target) == (None, 1.0)
    assert captured.bandwidth == pytest.approx(1000 / 0.0045)
    assert captured.floor == pytest.approx(0.0045 / (1000 / 1e6))
    assert captured.floor_target == 1.25
    forward = found["device", "forward", "streaming L1"]
    assert forward.floor == pytest.approx(0.001 / (400 / 1e6))
    assert forward.target is forward.floor_target is None
    assert cuda.verdict(rows) == "1 of 2 targets met; missed: streaming L1, (2, 3), 4.50 of the floor for 1.25."


def test_a_contestant_that_fails_leaves_the_others() -> None:
    device = FakeDevice()

    def broken() -> Steps:
        raise RuntimeError("out of\nmemory")

    plan = case(device, GroupNorm=broken, loop=lambda: scripted(device, 1, 1, needs_host=True))
    rows = cuda.measure(plan, device, EFFORT, 1e6, CPU)
    assert [row.failure for row in rows if row.ours == "GroupNorm"] == ["RuntimeError: out of memory"]
    assert {row.way for row in rows if row.ours == "loop"} == {"eager"}
    assert sum(row.ratio is not None for row in rows) == 10


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = FakeDevice()
    rows = cuda.measure(case(device), device, EFFORT, 1e6, CPU)
    cuda.save(rows, tmp_path, {"copy_bytes_per_second": 3e12})
    assert {path.name for path in tmp_path.iterdir()} == {
        *("times.csv", "tables.txt", "environment.json", "ratios.png", "ratios.svg")
    }
    with open(tmp_path / "times.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    assert {line["way"] for line in lines} == {"device", "eager"}
    words = (tmp_path / "tables.txt").read_text()
    assert "3,000 GB/s" in words
    assert "1 of 2 targets met" in words
    assert "0.90" in words


def test_every_contestant_trains() -> None:
    """On the CPU, with small inputs; each forward and each step runs, and in every dtype."""
    for make in (
        partial(_layers, (2, 32, 4, 4), torch.float32, True),
        partial(_layers, (2, 32, 4, 4), torch.bfloat16, False),
        partial(_layers, (4, 32), torch.float32, False),
    ):
        for build in make(CPU).values():
            steps = build()
            assert steps.forward[0]().shape[0] in (2, 4)
            assert all(gradient is not None for gradient in steps.together[1]())
    for name, build in _recurrent(2, 4, CPU).items():
        steps = build()
        assert steps.needs_host is name.startswith("loop")
        steps.together[0]()


@pytest.mark.skipif(ENGINE.status().startswith("not available"), reason=ENGINE.status())
def test_the_gru_is_timed_on_its_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted where there is no GPU, which has to be forced."""
    launched = []
    launch = recurrent_gpu._launch

    def noted(name: str, *arguments: Any) -> None:
        launched.append(name)
        launch(name, *arguments)

    monkeypatch.setattr(recurrent_gpu, "_launch", noted)
    monkeypatch.setattr(cuda_cases_module, "STEPS", 2)
    device = torch.device("cpu" if INTERPRETED else "cuda")
    with ops.force("triton") if INTERPRETED else nullcontext():
        _recurrent(1, 4, device)["sn.GRU streaming"]().together[0]()
    assert launched == ["forward_step"] * 2 + ["backward_step"] * 2


def test_inputs_exceed_the_cache() -> None:
    inputs = _inputs((64, 64, 32, 32), torch.bfloat16, True, CPU)
    assert sum(2 * x.numel() * 2 for x, _ in inputs) >= POOL_BYTES
    assert inputs[0][1].is_contiguous(memory_format=torch.channels_last)
    assert len(_inputs((1, 4), torch.float32, False, CPU)) == 16


def test_what_was_asked_for_is_measured() -> None:
    cases = {case.name: case for case in cuda_cases()}
    for shape in ("(256, 64, 56, 56)", "(64, 256, 28, 28)", "(32, 512, 14, 14)"):
        for dtype in ("float32", "bf16"):
            for layout in ("", " channels_last"):
                found = cases[f"{shape} {dtype}{layout}"]
                assert found.targets[("streaming L2", "BatchNorm")] == 1.0
                assert found.targets[("one-pass L1", "BatchNorm")] == 0.75
                assert found.floor_target == (1.25 if shape.startswith("(256") else None)
    assert {case.suite for case in cases.values()} == set(SUITES)
    sent = pickle.loads(pickle.dumps(list(cases.values())))  # to the processes that compile
    assert [case.name for case in sent] == list(cases)
    assert {case.suite for case in cases.values() if case.quick} == set(SUITES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda", "--out", str(tmp_path / "bench")]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "bench").exists()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_with_a_gpu_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = CudaCase(
        "layers", "small", "BatchNorm", partial(_layers, (4, 32, 8, 8), torch.float32, False), {}, 5 * 4 * 8192
    )
    monkeypatch.setattr(cuda, "cuda_cases", lambda: [small])
    monkeypatch.setattr(cuda, "COPY_ELEMENTS", 1 << 20)
    assert cuda.bench_cuda(tmp_path, quick=True) == 0
    with open(tmp_path / "times.csv") as file:
        rows = list(csv.DictReader(file))
    assert not [row["failure"] for row in rows if row["failure"]]
    assert all(float(row["seconds"]) > 0 for row in rows)
