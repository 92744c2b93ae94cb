"""What a release is made of agrees with itself: versions, and what the workflow runs."""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

import streamnorm

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_the_version_stands_in_three_places_alike() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert streamnorm.__version__ == version("streamnorm") == citation["version"]


def commands(workflow: dict[str, Any]) -> list[str]:
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_what_a_workflow_runs_is_in_the_repository(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    ours = [command.split() for command in commands(workflow) if not command.startswith("pipx run ")]
    assert ours
    for program, *arguments in ours:
        if program == "make":
            assert set(arguments) <= targets
        else:
            assert os.access(ROOT / program, os.X_OK)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_wait_for_jobs_that_exist(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    assert {needed for job in jobs.values() for needed in job.get("needs", ())} <= set(jobs)
