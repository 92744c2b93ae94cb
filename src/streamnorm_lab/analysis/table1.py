"""Table 1 from the results of its parts: each cell judged by a stated criterion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.analysis.results import CONFIG_ADVICE, Cell, Results
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.forms import FormError, check, parse
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.experiments.table1 import PARTS, SCENARIOS, TECHNIQUES, Scenario

CONFIG = "table1.json"
WORKS, FAILS = 0.95, 0.5
CRITERION = (
    f"A technique works if it gains at least {WORKS:.0%} of what the best of the four gains over guessing, in accuracy "
    f"or in loss; it fails if it gains less than {FAILS:.0%}, or cannot train at all; in between it is suboptimal. "
    "Each is at its own best learning rate, and the gain is the mean over seeds."
)


@dataclass(frozen=True)
class Judged:
    """A cell of the table.

    ``share`` is the gain over guessing, as a share of the best technique's; None if this one cannot train.
    """

    verdict: str
    share: float | None
    cell: Cell
    results: Results


class TableConfig(TypedDict):
    """``table1.json``: the commands that made the table, and where each part is, seen from the table's folder."""

    commands: list[str]
    parts: dict[str, str]


def read_table(folder: Path) -> TableConfig:
    """Read ``table1.json``.

    Raises:
        UserError: it is damaged.
    """
    path = folder / CONFIG
    try:
        config: TableConfig = parse(path.read_bytes())
        check(config, TableConfig)
        if set(config["parts"]) != set(PARTS):
            raise FormError(f"parts must name {', '.join(PARTS)}, not {', '.join(config['parts']) or 'nothing'}")
    except FormError as error:
        raise UserError(f"{path}: {error}. {CONFIG_ADVICE}") from None
    except ValueError:
        raise UserError(f"{path} is not JSON. {CONFIG_ADVICE}") from None
    return config


def judge(folder: Path) -> dict[Scenario, dict[str, Judged]]:
    """Every cell of the table, from the logs.

    Raises:
        UserError: a part has no results.
    """
    results = {name: open_results(folder / place) for name, place in read_table(folder)["parts"].items()}
    for name, part in results.items():
        if part.experiment.name != name:
            raise UserError(f"{folder / CONFIG}: the part {name} holds {part.experiment.name}. {CONFIG_ADVICE}")
    return {scenario: _judge(scenario, results[scenario.experiment]) for scenario in SCENARIOS}


def _judge(scenario: Scenario, results: Results) -> dict[str, Judged]:
    setting = Setting.parse(scenario.setting)
    cells = {name: results.cells.get((trained_as(name, results), setting)) for name in TECHNIQUES}
    gains: dict[str, float | None] = {}
    for name, cell in cells.items():
        if cell is None:
            raise UserError(
                f"{scenario.experiment} has no result of {name} at {setting}: complete it by the command that made it"
            )
        gains[name] = gain(results, cell)
    best = max((value for value in gains.values() if value is not None), default=0.0)
    judged = {}
    for name, cell in cells.items():
        assert cell is not None
        value = gains[name]
        share = None if value is None else value / best if best > 0 else 0.0
        judged[name] = Judged(verdict(share), share, cell, results)
    return judged


def trained_as(technique: str, results: Results) -> str:
    """Without time steps, time-specific Batch Normalization is Batch Normalization."""
    return technique if technique in results.experiment.catalogue else "batch"


def gain(results: Results, cell: Cell) -> float | None:
    """The mean score's gain over uniform guessing; None if the technique cannot train there."""
    if cell.mean is None:
        return None
    sign = -1 if results.experiment.score.lower_is_better else 1
    return sign * (cell.mean.mean - results.guessing)


def verdict(share: float | None) -> str:
    """The criterion.

    Example:
        >>> verdict(0.97), verdict(0.8), verdict(0.1), verdict(None)
        ('works', 'suboptimal', 'fails', 'fails')
    """
    if share is None or share < FAILS:
        return "fails"
    return "works" if share >= WORKS else "suboptimal"
