"""``streamnorm run``, ``list`` and ``report``: from typed words to a report."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from streamnorm_lab.analysis.headline import headline
from streamnorm_lab.analysis.results import CONFIG, Results, read_config
from streamnorm_lab.analysis.table1 import CONFIG as TABLE1_CONFIG
from streamnorm_lab.analysis.verdict import sentences, warnings
from streamnorm_lab.commands.table1 import run_table
from streamnorm_lab.common.errors import UserError, unknown
from streamnorm_lab.common.files import typed_path
from streamnorm_lab.experiments.catalogue import EXPERIMENTS
from streamnorm_lab.experiments.table1 import Table1
from streamnorm_lab.logs.packed import PACKED, pack
from streamnorm_lab.reports.overview import build_overview, print_overview
from streamnorm_lab.reports.report import REPORT, build_report
from streamnorm_lab.reports.table1 import build_table, print_table
from streamnorm_lab.reports.tables import print_tables
from streamnorm_lab.reports.watch import rebuild
from streamnorm_lab.running import together
from streamnorm_lab.running.sweep import run_sweep

ALL: tuple[Any, ...] = (*EXPERIMENTS.values(), Table1)

RUN_HELP = """usage: streamnorm run EXPERIMENT [OPTIONS]

Run an experiment: choose each method's learning rate, train with several seeds, and write a report.
Without options it uses data that come with scikit-learn or Python and ends within two minutes.

experiments:
{experiments}

  streamnorm run EXPERIMENT --help    shows the options of one

An interrupted run continues with the same command.
"""


def run(words: Sequence[str]) -> int:
    """``streamnorm run EXPERIMENT …``."""
    if not words or words[0] in ("-h", "--help"):
        print(RUN_HELP.format(experiments=_lines()), end="")
        return 0
    kind = _find(words[0])
    experiment = tyro.cli(kind, args=list(words[1:]), prog=f"streamnorm run {kind.name}")
    command = shlex.join(["streamnorm", "run", *words])
    return carry_out(run_table if isinstance(experiment, Table1) else run_sweep, experiment, command)


def carry_out(do: Callable[[Any, str], tuple[Path, int]], experiment: Any, command: str) -> int:
    """Do all runs of an experiment and show its report; the exit code."""
    try:
        with together.joined() as leads:
            if not leads:
                return 0
            folder, failed = do(experiment, command)
    except KeyboardInterrupt:
        print(f"\nStopped. What is done is kept; continue with: {command}", file=sys.stderr)
        return 130
    _report(folder)
    if failed:
        print(f"streamnorm: {failed} runs failed; run the same command to try them again", file=sys.stderr)
    return 1 if failed else 0


def _find(name: str) -> Any:
    """The experiment of this name or alias, ``table1`` among them."""
    for kind in ALL:
        if name in (kind.name, kind.alias):
            return kind
    raise unknown("experiment", name, [kind.name for kind in ALL])


def list_experiments(words: Sequence[str]) -> int:
    """``streamnorm list``."""
    _no_options(words, "usage: streamnorm list\n\nShow all experiments, and what each one asks.")
    table = Table(box=None, pad_edge=False)
    table.add_column("experiment", style="bold", no_wrap=True)
    table.add_column("in the paper", no_wrap=True)
    table.add_column("asks")
    for experiment in ALL:
        table.add_row(experiment.name, _in_the_paper(experiment.alias), experiment.summary)
    console = Console()
    console.print(table)
    console.print("\nstreamnorm run EXPERIMENT --help shows the options of one.", highlight=False)
    console.print(
        "streamnorm compare MODULE:FUNCTION compares normalizations in a network of your own.", highlight=False
    )
    return 0


def _in_the_paper(alias: str | None) -> str:
    """``figure5`` as one writes it."""
    return re.sub(r"(?<=[a-z])(?=\d)", " ", alias) if alias else "–"


REPORT_HELP = """usage: streamnorm report FOLDER ...

Rebuild tables, figures and page from the logs of a finished or running experiment.
FOLDER is what `streamnorm run` wrote, for example runs/online-fc-digits.

A folder that holds several of these, such as runs, gets one page over all of them: what the paper and we claim, what
was measured, and the verdict on each claim. The pages of the single experiments stay.
"""


def report(words: Sequence[str]) -> int:
    """``streamnorm report FOLDER …``."""
    for folder in _folders(words, REPORT_HELP):
        _report(folder)
    return 0


WATCH_HELP = """usage: streamnorm watch FOLDER ...

Rebuild the pages of watched runs from their logs, monitor.jsonl, and an index where there are several.
FOLDER is what `streamnorm run … --watch` or streamnorm.monitor(model, out=FOLDER) wrote, at any depth.
"""


def watch(words: Sequence[str]) -> int:
    """``streamnorm watch FOLDER …``."""
    for folder in _folders(words, WATCH_HELP):
        print(rebuild(folder))
    return 0


PACK_HELP = """usage: streamnorm pack FOLDER ...

Move the logs of finished runs, one file each, into one file, runs.jsonl.gz.
FOLDER is what `streamnorm run` wrote. Reports read either, and `streamnorm run` continues with either.
"""


def pack_runs(words: Sequence[str]) -> int:
    """``streamnorm pack FOLDER …``."""
    for folder in _folders(words, PACK_HELP):
        read_config(folder)
        packed, left = pack(folder)
        unfinished = f"; {left} are not finished, and stay files of their own" if left else ""
        print(f"{folder / PACKED}: {packed} runs{unfinished}")
    return 0


def _folders(words: Sequence[str], usage: str) -> list[Path]:
    """The folders that were named, at least one."""
    for word in words or ["--help"]:
        if word.startswith("-"):
            _no_options([word], usage)
    return [typed_path(word) for word in words]


def _report(folder: Path) -> None:
    """Make a folder's report and show what it says."""
    console = Console()
    if (folder / TABLE1_CONFIG).exists():
        print_table(build_table(folder), console)
    elif not (folder / CONFIG).exists() and any(folder.glob(f"*/**/{CONFIG}")):
        print_overview(build_overview(folder), console)
    else:
        _show(build_report(folder), console)
    console.print(f"\nReport: [bold]{folder / REPORT}[/]", highlight=False, soft_wrap=True)


def _show(results: Results, console: Console) -> None:
    print_tables(results, console)
    for sentence in (headline(results), *sentences(results)):
        console.print(f"• {sentence}", highlight=False)
    for warning in warnings(results):
        console.print(f"[yellow]! {warning}", highlight=False)


def _lines() -> str:
    names = {experiment.name: experiment.summary for experiment in ALL}
    return "\n".join(f"  {name:<16}{summary}" for name, summary in names.items())


def _no_options(words: Sequence[str], usage: str) -> None:
    if not words:
        return
    if words[0] in ("-h", "--help"):
        print(usage)
        raise SystemExit(0)
    raise UserError(f"unexpected {words[0]!r}; {usage.splitlines()[0]}")
