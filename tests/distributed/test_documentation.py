"""The page on several processes and its example, run by several processes."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist
from support.processes import Processes

ROOT = Path(__file__).parents[2]


def run_page(rank: int, path: str) -> int:
    """All Python blocks of the page one after the other; the process group is there already."""
    blocks = re.findall(r"^```python\n(.*?)^```$", Path(path).read_text(encoding="utf-8"), re.M | re.S)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert names["several"] is True
    assert dist.get_world_size() == 2
    return len(blocks)


def test_the_page(processes: Processes) -> None:
    first, second = processes(run_page, str(ROOT / "docs" / "distributed.md"))
    assert first == second > 2


def test_the_example_under_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, str(ROOT / "examples" / "distributed.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    lines = re.findall(r"process (\d): accuracy (\d\.\d+), statistics equal", result.stdout)
    assert sorted(rank for rank, _ in lines) == ["0", "1"]
    assert all(float(accuracy) > 0.85 for _, accuracy in lines)


def test_the_example_in_one_process() -> None:
    spec = importlib.util.spec_from_file_location("distributed_example", ROOT / "examples" / "distributed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main() > 0.85
