"""What every test starts from: one thread, the same random numbers, and no warning let through (pyproject.toml)."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter (tests/ops/test_triton.py); read when streamnorm is imported.
if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from streamnorm import ops
from streamnorm.training import runaway

if (os.environ.get("TRITON_INTERPRET") == "1") != ops.gpu.device.INTERPRETED:
    raise RuntimeError("streamnorm was imported before it was said whether Triton interprets its kernels")

# Test processes share the cores between them (make test).
torch.set_num_threads(1)

# An example that is slow once is no failure. `make test` takes the same examples every time, so that a change is judged
# by what it changed; `make search` draws new ones.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, print_blob=True)
hypothesis.settings.load_profile("same")


# The suites by engine that take the Triton engine too where it is interpreted: it is slow there, and has its own tests.
INTERPRETED_SUITES = {"test_stream.py", "test_accumulate.py", "test_another_pass.py", "test_checks.py"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a suite parametrized by engine would only repeat: there, a Triton engine that does not run."""
    runs = os.environ.get("TRITON_INTERPRET") == "1"
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        runs_here = runs and item.path.name in INTERPRETED_SUITES
        (kept if runs_here or not _of_triton(item) else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def _of_triton(item: pytest.Item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return item.path.name != "test_triton.py" and "triton" in parameters.values()


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Seed PyTorch, and give the next test the defaults that this one may have changed."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture(params=[engine.name for engine in ops.ENGINES])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once with each engine."""
    with ops.force(request.param):
        yield request.param


@pytest.fixture
def nothing_is_read_back(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Calls a step, and fails where it reads a value from the device. On the CPU: where it asks a tensor for one.

    Looks for training that runs away are a part of the step on a GPU alone. On the CPU they read what they measure.
    """

    def check(step: Callable[[], None]) -> None:
        monkeypatch.setattr(runaway, "EVERY", 1 if torch.cuda.is_available() else sys.maxsize)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        else:
            for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu"):
                monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a value was read"))
            step()

    return check
