"""What is said to the compiler without importing it, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def as_constant(function: F) -> F:
    """Let ``torch.compile`` call a function while it makes a graph, and take its result for a constant.

    As ``torch.compiler.assume_constant_result``, whose decorator would import the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
