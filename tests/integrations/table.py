"""The table in docs/compatibility.md, from what the tests recorded.

``make compatibility`` runs the tests with ``--record`` and then this file.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "results" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- table: make compatibility -->\n", "<!-- end of the table -->\n"

ROW = "row"
"""The property under which a test's report carries its row."""


class Row(NamedTuple):
    """What was seen to work."""

    library: str
    what: str
    how: str


def save(path: Path, passed: Mapping[Row, bool]) -> None:
    """Write the rows that hold, and the versions that they hold with; nothing if a row does not."""
    failed = [row for row, holds in passed.items() if not holds]
    if failed:
        print(f"\n{path} is not written, since these do not hold: {failed}", file=sys.stderr)
        return
    libraries = sorted({row.library for row in passed} | {"torch"})
    record = {
        "python": platform.python_version(),
        "versions": {library: version(library).split("+")[0] for library in libraries},
        "rows": sorted(passed),
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def text(record: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    lines = ["| library | version | what | how |", "|---|---|---|---|"]
    for library, what, how in record["rows"]:
        lines.append(f"| {library} | {record['versions'][library]} | {what} | {how} |")
    where = f"Seen with Python {record['python']} and torch {record['versions']['torch']} on a CPU."
    return "\n".join([where, "", *lines]) + "\n"


def page_with(table: str, page: str) -> str:
    """The page with this table in the place of the one it has."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + table + "\n" + END + rest.split(END)[1]


def main() -> None:
    """Write the table into the page."""
    table = text(json.loads(RECORD.read_text(encoding="utf-8")))
    PAGE.write_text(page_with(table, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
