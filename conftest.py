"""What an example in a docstring may take for granted: the names that a reader has imported."""

from typing import Any

import pytest
import torch

import streamnorm


@pytest.fixture(autouse=True)
def _imported(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(torch=torch, nn=torch.nn, sn=streamnorm)
