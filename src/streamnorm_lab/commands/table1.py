"""The runs behind table 1, or the folders that hold them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.analysis.table1 import CONFIG
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.files import output_folder, typed_path, write_text
from streamnorm_lab.experiments.table1 import PARTS, Table1
from streamnorm_lab.reports.report import build_report
from streamnorm_lab.running.sweep import run_sweep


def run_table(table: Table1, command: str) -> tuple[Path, int]:
    """Do all runs of all parts that are not done yet; return the folder, and how many runs failed.

    Raises:
        UserError: an option cannot be meant.
        OSError: the disk is full, or similar; what is finished stays.
    """
    folder = typed_path(table.out)
    if table.results:
        _write_config(folder, command, _folders_given(table.results))
        return folder, 0
    table.check()
    parts = list(table.parts())
    failed = 0
    for part in parts:
        part_folder, part_failed = run_sweep(part, command)
        build_report(part_folder)
        failed += part_failed
    _write_config(folder, command, {part.name: folder / part.name for part in parts})
    return folder, failed


def _folders_given(given: tuple[str, ...]) -> dict[str, Path]:
    """The folder of each part, told by the experiment that it holds."""
    folders: dict[str, Path] = {}
    for path in map(typed_path, given):
        name = open_results(path).experiment.name
        if name not in PARTS or name in folders:
            wrong = "is a second one of" if name in folders else "is of"
            raise UserError(f"--results: {path} {wrong} {name}; give one folder each of {', '.join(PARTS)}")
        folders[name] = path
    missing = [name for name in PARTS if name not in folders]
    if missing:
        raise UserError(f"--results: no folder of {', '.join(missing)}; give one each of {', '.join(PARTS)}")
    return folders


def _write_config(folder: Path, command: str, parts: Mapping[str, Path]) -> None:
    """Note how the table was made, and from where, so that ``streamnorm report`` can rebuild it."""
    output_folder(folder)
    places = {name: Path(os.path.relpath(part, folder)).as_posix() for name, part in parts.items()}
    write_text(folder / CONFIG, json.dumps({"commands": [command], "parts": places}, indent=1))
