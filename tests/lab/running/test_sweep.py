"""A whole experiment: stages, resuming after kills, refusals, a full disk."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.lab import timeless

from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.commands.main import main
from streamnorm_lab.logs.packed import read_runs
from streamnorm_lab.logs.runlog import read_log

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and devices of POSIX")


def logs_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.jsonl")}


def test_rates_are_chosen_on_validation_images_then_seeds_run_at_the_best(finished):
    results = open_results(finished)
    cell = results.cells["streaming-l1", results.settings[0]]
    assert set(cell.tuning) == {0.003, 0.03}
    assert cell.rate == max(cell.tuning, key=lambda rate: cell.tuning[rate])
    assert set(cell.accuracy) == {0, 1, 2}
    stages = {
        (run.run["stage"], run.run["rate"], run.run["seed"]) for run in results.logs if run.run["method"] == "layer"
    }
    assert {seed for stage, _, seed in stages if stage == "tune"} == {1000}
    assert {seed for stage, _, seed in stages if stage == "final"} == {0, 1, 2}
    ends = [(run.run["stage"], run.end) for run in results.logs if run.end and run.end["status"] == "done"]
    assert {(stage, end["images_evaluated"]) for stage, end in ends} == {("tune", 32), ("final", 500)}


def test_rates_may_be_chosen_with_short_runs(tmp_path, small_command):
    assert main([*small_command, "--tune-limit", "32", "--out", str(tmp_path)]) == 0
    results = open_results(tmp_path)
    ends = [(run.run["stage"], run.end["images"]) for run in results.logs if run.end and run.end["status"] == "done"]
    assert set(ends) == {("tune", 32), ("final", 64)}
    assert "runs on the first 32 of them, judged on the 32 after those" in (tmp_path / "report.html").read_text()


def test_what_cannot_run_is_a_result_with_its_reason(finished):
    results = open_results(finished)
    cell = results.cells["batch", results.settings[1]]
    assert cell.setting.samples == 1
    assert cell.mean is None
    assert "more than 1 value per channel" in (cell.reason or "")


def test_each_log_says_where_and_how_it_was_made(finished):
    for run in read_runs(finished):
        assert run.header["environment"].keys() >= {"streamnorm", "torch", "python", "processor", "threads", "engine"}
        assert run.header["environment"]["threads"] == 1
        assert run.header["options"]["width"] == 16


def test_nothing_but_results_is_left(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {"experiment.json", "logs", "figures", "report.html", "results.csv", "runs.csv"}
    assert not [path for path in finished.rglob("*") if path.suffix in (".ckpt", ".tmp")]


def test_a_second_time_nothing_is_run_again_and_every_line_says_so(finished, small_command, capsys):
    before = logs_of(finished)
    assert main([*small_command, "--out", str(finished)]) == 0
    assert logs_of(finished) == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(before)
    assert all(line.endswith("(kept from before)") for line in lines)


def test_an_unfinished_and_a_missing_run_are_made_up_with_the_same_numbers(finished, small_command):
    before = {path: read_log(finished / path) for path in logs_of(finished)}
    finals = sorted(path for path in before if "final/streaming-l1_4x1" in path)
    (finished / finals[0]).unlink()
    torn = (finished / finals[1]).read_bytes()
    (finished / finals[1]).write_bytes(torn[: len(torn) // 2])
    assert main([*small_command, "--out", str(finished)]) == 0
    after = {path: read_log(finished / path) for path in logs_of(finished)}
    assert {path: timeless(log) for path, log in after.items()} == {path: timeless(log) for path, log in before.items()}


@pytest.mark.parametrize(
    ("option", "word"),
    [
        (["--width", "17"], "holds runs with --width 16, not 17: choose"),
        (["--epochs", "2"], "holds runs with --epochs 1, not 2: choose"),
        (["--limit", "65"], "holds runs with --limit 64, not 65: choose"),
        (["--validation", "33"], "holds runs with --validation 32, not 33: choose"),
        (["--tune-limit", "50"], "holds runs with --tune-limit 64, not 50: choose"),
    ],
)
def test_a_folder_of_other_runs_is_refused(finished, small_command, capsys, option, word):
    before = logs_of(finished)
    assert main([*small_command, *option, "--out", str(finished)]) == 2
    message = capsys.readouterr().err
    assert word in message
    assert "--out" in message
    assert logs_of(finished) == before
    assert not (finished / "cache").exists()


def test_a_folder_of_runs_on_other_data_is_refused(finished, small_command, capsys):
    """The same number of images of the same name."""
    path = finished / "experiment.json"
    config = json.loads(path.read_text())
    fingerprint = config["data"]["fingerprint"]
    config["data"]["fingerprint"] = config["identity"]["images"] = "another"
    path.write_text(json.dumps(config))
    assert main([*small_command, "--out", str(finished)]) == 2
    assert f"holds runs with images of digits of fingerprint another, not {fingerprint}" in capsys.readouterr().err
    config["data"]["name"] = "cats"
    path.write_text(json.dumps(config))
    assert main([*small_command, "--out", str(finished)]) == 2
    assert "holds runs with the data cats, not digits" in capsys.readouterr().err


def test_two_commands_do_not_share_a_folder(finished, small_command, capsys):
    fcntl = pytest.importorskip("fcntl")
    descriptor = os.open(finished, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert main([*small_command, "--out", str(finished)]) == 2
    finally:
        os.close(descriptor)
    assert "another command is writing" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_while_images_are_decoded(finished, small_command, capsys):
    before = logs_of(finished)
    (finished / "cache").mkdir()
    (finished / "cache" / "train.pixels").symlink_to("/dev/full")
    assert main([*small_command, "--out", str(finished)]) == 2
    assert one_line(capsys.readouterr().err).startswith("streamnorm: no space left")
    assert logs_of(finished) == before
    assert not (finished / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [100, 150])
def test_a_full_disk_at_some_moment_of_a_run(tmp_path, small_command, kilobytes):
    """On a real file system that is too small: with more room the same command makes up what is missing."""
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*inside, "mount -t tmpfs none /mnt"], capture_output=True).returncode
    ):
        pytest.skip("this system does not let a user mount a file system")
    words = shlex.join([sys.executable, "-m", "streamnorm", *small_command, "--out", str(tmp_path / "out")])
    script = f"""
        mount -t tmpfs -o size={kilobytes}k none {tmp_path}
        {words}
        echo "exit $?"
        find {tmp_path} -name '.*.tmp' -o -name cache
        mount -o remount,size=100m {tmp_path}
        {words} >/dev/null 2>&1
        echo "exit $?"
    """
    done = subprocess.run([*inside, script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["exit 2", "exit 0"]
    assert "no space left" in one_line(done.stderr)
    assert "Traceback" not in done.stderr


def one_line(errors: str) -> str:
    """The complaint, without the progress before it."""
    lines = [line for line in errors.splitlines() if not line.startswith("[")]
    assert len(lines) == 1, errors
    return lines[0]


LONG = [
    *("run", "online-fc", "--methods", "streaming-l1", "--settings", "1x2", "--rates", "0.001", "--seeds", "1"),
    *("--limit", "600", "--validation", "50", "--checkpoint-every", "0.1", "--jobs", "1"),
]


@needs_posix
@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_numbers(tmp_path):
    """SIGKILL at whatever moment, also in the middle of a write; the whole process group or the parent alone."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    subprocess.run(command(whole), check=True, capture_output=True)
    for kill in (os.killpg, os.kill):
        with subprocess.Popen(command(torn), start_new_session=True, stderr=subprocess.DEVNULL) as process:
            wait_for_checkpoint(torn, process)
            kill(process.pid, signal.SIGKILL)
    (checkpoint,) = torn.rglob("*.ckpt")
    log = checkpoint.with_suffix(".jsonl")
    first_line = log.read_bytes().splitlines()[0]
    subprocess.run(command(torn), check=True, capture_output=True)
    found = {path: timeless(read_log(torn / path)) for path in logs_of(torn)}
    assert found == {path: timeless(read_log(whole / path)) for path in logs_of(whole)}
    assert log.read_bytes().splitlines()[0] == first_line, "the run started again; it did not continue"


def command(folder: Path, epochs: int = 3) -> list[str]:
    return [sys.executable, "-m", "streamnorm", *LONG, "--epochs", str(epochs), "--out", str(folder)]


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Until a checkpoint is written that was not there before, or the command ended."""
    known = {path: path.stat().st_mtime_ns for path in folder.rglob("*.ckpt")}
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        for path in folder.rglob("*.ckpt"):
            try:
                if path.stat().st_mtime_ns != known.get(path):
                    return
            except FileNotFoundError:
                continue
        time.sleep(0.02)
    pytest.fail("no checkpoint came")


def heed_ctrl_c() -> None:
    """What a shell starts in the background ignores it, and so would we."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@needs_posix
@pytest.mark.slow
def test_ctrl_c_says_how_to_continue(tmp_path):
    process = subprocess.Popen(
        command(tmp_path / "out", epochs=1000),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    wait_for_checkpoint(tmp_path / "out", process)  # type: ignore[arg-type]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: parent and workers
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "continue with: streamnorm run online-fc" in errors
    assert "Traceback" not in errors
