"""Results by their folder alone."""

from __future__ import annotations

from pathlib import Path

from streamnorm_lab.analysis.results import Results, damaged, load_results, read_config
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.experiments.catalogue import find


def open_results(folder: Path) -> Results:
    """Read a folder that ``streamnorm run`` wrote.

    Raises:
        UserError: the folder is not one, or one of its files is damaged.
    """
    name = read_config(folder)["experiment"]
    try:
        experiment = find(name)
    except UserError as error:
        raise damaged(folder, error) from None
    return load_results(folder, experiment)
