"""What an example in a docstring may take for granted: the names that a reader has imported."""

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _imported(doctest_namespace: dict[str, Any]) -> None:
    import streamnorm  # and not before: tests/conftest.py says first whether Triton interprets its kernels

    doctest_namespace.update(torch=torch, nn=torch.nn, sn=streamnorm)
