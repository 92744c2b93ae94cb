"""Tests beside other people's libraries: which library each needs, and what it shows to work.

``integration("timm")`` names the library. Where it is not installed the test is skipped by that name, and with
``--require-libraries`` it fails. ``shows("what", "how")`` is a row of the table in docs/compatibility.md: it stands
there if all tests with the same words pass. ``--record FILE`` writes the rows down for ``table.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from integrations import libraries, table


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("integrations")
    group.addoption("--require-libraries", action="store_true", help="fail where a library is missing")
    group.addoption("--record", type=Path, metavar="FILE", help="write what was seen to work, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "shows(what, how): a row of the table in docs/compatibility.md")
    path = config.getoption("--record", default=None)
    if path is not None and not hasattr(config, "workerinput"):  # one process gathers the reports of all
        config.pluginmanager.register(Recorder(path))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _library(item) is not None:  # the warnings of other libraries are not ours to mend
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(autouse=True)
def _beside_its_library(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    library = _library(request.node)
    shown = request.node.get_closest_marker("shows")
    if shown is not None:
        record_property(table.ROW, [library or "torch", *shown.args])
    if library is None:
        return
    if find_spec(library) is None:
        message = f"{library} is not installed: make test-integrations installs it"
        if request.config.getoption("--require-libraries", default=False):
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    libraries.prepare()


def _library(item: pytest.Item) -> str | None:
    marker = item.get_closest_marker("integration")
    return None if marker is None else marker.args[0]


class Recorder:
    """Gathers the rows of all reports."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.passed: dict[table.Row, bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A row holds while none of its tests has failed or been skipped."""
        row = dict(report.user_properties).get(table.ROW)
        if row is not None:
            key = table.Row(*row)
            self.passed[key] = self.passed.get(key, True) and report.passed

    def pytest_sessionfinish(self) -> None:
        table.save(self.path, self.passed)
