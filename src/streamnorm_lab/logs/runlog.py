"""The log of one run, written as it goes, and the checkpoint that lets a killed run continue.

A log is JSON lines: a ``run`` line (what is run, and where), ``point`` lines, and an ``end`` line. The checkpoint
beside it holds the training state and the length that the log had at that moment. After a kill the log is cut back
to that length and training continues from there, so that the log ends as if nothing had happened.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.files import replacing
from streamnorm_lab.common.forms import FormError, check, parse
from streamnorm_lab.logs.records import End, Header, Line, Point

Record = dict[str, Any]
ADVICE = "Delete this file and give the command of the experiment again to redo the run"


@dataclass(frozen=True)
class LoggedRun:
    """The content of a log: its ``run`` line, its points, and its ``end`` line once the run is over.

    ``place`` is the file, for messages, and ``advice`` what to do if it is damaged.
    """

    header: Record
    points: list[Record] = field(default_factory=list)
    end: Record | None = None
    place: str = ""
    advice: str = ""

    @property
    def run(self) -> Record:
        """The identity of the run: stage, method, setting, rate, seed."""
        return dict(self.header["run"])


class RunLog:
    """The log and the checkpoint of one attempt at a run.

    Args:
        path: the log, ``….jsonl``; the checkpoint lies beside it as ``….ckpt``.
        header: what is run and in which environment. A log or a checkpoint with another header is not continued.
    """

    def __init__(self, path: Path, header: Record) -> None:
        self.path = path
        self.checkpoint_path = path.with_suffix(".ckpt")
        self.header = {"type": "run", **json.loads(json.dumps(header))}

    def start(self) -> Record | None:
        """Begin or continue: return the training state of the last checkpoint, or None for a run from the start."""
        state = self._last_checkpoint()
        if state is None:
            self.checkpoint_path.unlink(missing_ok=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"")
            self.write({**self.header, "started": datetime.now(timezone.utc).isoformat(timespec="seconds")})
            return None
        os.truncate(self.path, state.pop("log_bytes"))
        return state

    def write(self, record: Record) -> None:
        """Append one line; it is in the file when this returns."""
        line = json.dumps(record, allow_nan=False, ensure_ascii=False)
        with open(self.path, "ab") as file:
            file.write(line.encode() + b"\n")

    def save(self, state: Record) -> None:
        """Write the checkpoint that belongs to the log as it is now."""
        with open(self.path, "rb+") as file:
            os.fsync(file.fileno())
        whole = {**state, "header": json.dumps(self.header), "log_bytes": self.path.stat().st_size}
        buffer = io.BytesIO()  # written by Python, for torch's own writer reports a full disk as another kind of error
        torch.save(whole, buffer)
        with replacing(self.checkpoint_path) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def finish(self, record: Record) -> None:
        """Write the ``end`` line; from now on the run is skipped."""
        self.checkpoint_path.unlink(missing_ok=True)
        self.write({"type": "end", **record})

    def _last_checkpoint(self) -> Record | None:
        try:
            state: Record = torch.load(self.checkpoint_path, weights_only=True)
            same = state.pop("header") == json.dumps(self.header)
            whole = self.path.exists() and self.path.stat().st_size >= state["log_bytes"] >= 0
        except Exception:  # torch.load raises whatever a damaged file leads to
            return None  # none, not ours, or damaged: the run starts again
        return state if same and whole else None


def read_log(path: Path) -> LoggedRun | None:
    """Read a log; None if not even its first line is complete. A torn last line is what a kill leaves, and ignored.

    Raises:
        UserError: a line other than a torn last one is damaged, or is not what `RunLog` writes.
    """
    lines = path.read_bytes().split(b"\n")
    return parse_log(lines[:-1], str(path))  # what follows the last newline is torn or empty


def parse_log(lines: Sequence[bytes], place: str, first: int = 1, advice: str = ADVICE) -> LoggedRun | None:
    """The log that these lines are, of which ``first`` is the number of the first one; None without lines.

    Raises:
        UserError: a line is not what `RunLog` writes.
    """
    records: list[Record] = []
    for number, line in enumerate(lines, start=first):
        try:
            record = parse(line)
            check(record, Line)
            kind = record["type"]
            if (kind == "run") != (not records) or (records and records[-1]["type"] == "end"):
                raise FormError("a log is one line of type 'run', then 'point' lines, then one of type 'end'")
            check(record, {"run": Header, "point": Point, "end": End}[kind])
        except FormError as error:
            raise UserError(f"{place}: line {number}: {error}. {advice}") from None
        except ValueError:
            raise UserError(f"{place}: line {number} is not JSON. {advice}") from None
        records.append(record)
    if not records:
        return None
    end = records.pop() if records[-1]["type"] == "end" else None
    return LoggedRun(records[0], records[1:], end, f"{place}: line {first}" if first > 1 else place, advice)
