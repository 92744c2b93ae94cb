"""Finished runs of a folder in one file: ``runs.jsonl.gz`` holds the very lines of their logs, one log after the other.

Runs in progress write files of their own, below ``logs``; ``streamnorm pack`` moves finished ones into the packed file.
Reports and further runs read both.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from streamnorm_lab.common.errors import UserError, first_line
from streamnorm_lab.common.files import locked, replacing
from streamnorm_lab.logs.records import Run
from streamnorm_lab.logs.runlog import ADVICE, LoggedRun, parse_log, read_log

LOGS = "logs"
PACKED = "runs.jsonl.gz"
LARGEST = 1 << 30
"""Bytes. A small file can unpack to more than memory holds."""

RESTORE = "Restore this file from where it came"
_FIRST = b'{"type": "run"'


def log_path(folder: Path, run: Run) -> Path:
    """The path of the log of a run in progress."""
    return folder / LOGS / f"{run.key}.jsonl"


def read_runs(folder: Path) -> list[LoggedRun]:
    """Every run of an output folder, packed or not, in the order of the names of their logs.

    Raises:
        UserError: a file is damaged.
    """
    found = {path: logged for path in _files(folder) if (logged := read_log(path)) is not None}
    found |= {log_path(folder, Run(**logged.run)): logged for logged in read_packed(folder).values()}
    return [found[path] for path in sorted(found)]


def read_packed(folder: Path) -> dict[str, LoggedRun]:
    """The packed runs by their keys.

    Raises:
        UserError: the file is damaged.
    """
    return {key: logged for key, (logged, _) in _packed(folder).items()}


def pack(folder: Path) -> tuple[int, int]:
    """Move finished logs of a folder into its packed file.

    The same logs give the same file, and a kill at any moment loses nothing: logs are removed once it is in place.

    Returns:
        How many runs the file holds, and how many files, of unfinished runs, are left beside it.

    Raises:
        UserError: a file is damaged, or holds another run than its name or the packed file says.
    """
    with locked(folder):
        logs = {key: lines for key, (_, lines) in _packed(folder).items()}
        files = _files(folder)
        finished = {path: logged for path in files if (logged := read_log(path)) is not None and logged.end is not None}
        for path, logged in finished.items():
            run, lines = Run(**logged.run), _lines(path.read_bytes())
            if path != log_path(folder, run) or logs.setdefault(run.key, lines) != lines:
                raise UserError(f"{path}: the name or {PACKED} tells of another log of this run. {ADVICE}")
        if finished:
            _write(folder / PACKED, [logs[key] for key in sorted(logs, key=lambda key: Path(f"{key}.jsonl"))])
        for path in finished:
            path.unlink()
        for place in sorted((folder / LOGS).glob("**"), reverse=True):
            with suppress(OSError):  # it is not empty
                place.rmdir()
    return len(logs), len(files) - len(finished)


def _files(folder: Path) -> list[Path]:
    return sorted((folder / LOGS).glob("**/*.jsonl"))


def _lines(content: bytes) -> list[bytes]:
    """Split into complete lines; the rest after the last newline is torn or empty."""
    return content.split(b"\n")[:-1]


def _write(path: Path, logs: list[list[bytes]]) -> None:
    with (
        replacing(path) as temporary,
        open(temporary, "wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file,
    ):
        for lines in logs:
            file.writelines(line + b"\n" for line in lines)


def _packed(folder: Path) -> dict[str, tuple[LoggedRun, list[bytes]]]:
    """The packed runs and their lines, by key."""
    path, runs = folder / PACKED, {}
    for first, lines in _logs(_lines(_unpacked(path))):
        logged = parse_log(lines, str(path), first, RESTORE)
        assert logged is not None
        key = Run(**logged.run).key
        if logged.end is None or key in runs:
            raise UserError(f"{path}: line {first} begins a run that is not finished, or is there twice. {RESTORE}")
        runs[key] = logged, lines
    return runs


def _logs(lines: list[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    """The lines of each log, and the number of the first one."""
    starts = [number for number, line in enumerate(lines) if line.startswith(_FIRST) or number == 0]
    for start, end in pairwise([*starts, len(lines)]):
        yield start + 1, lines[start:end]


def _unpacked(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            content = file.read(LARGEST)
            if file.read(1):
                raise UserError(f"{path} holds more than {LARGEST:,} bytes, which no experiment writes. {RESTORE}")
    except FileNotFoundError:
        return b""
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}). {RESTORE}") from None
    return content
