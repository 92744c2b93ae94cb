"""JSON values beside the type hints that they must fit."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from typing_extensions import TypedDict

from streamnorm_lab.common.forms import Between, FormError, check, parse


class Inner(TypedDict):
    rate: Annotated[float, Between(0, above=True)]


class Outer(Inner, total=False):
    name: str | None
    parts: list[Inner]


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (3, int),
        (3, float),
        (0.5, float),
        (None, None | int),
        ([1, 2], list[int]),
        (["a"], tuple[str, ...]),
        ([], tuple[float, ...]),
        ({"a": 1}, dict[str, int]),
        ("run", Literal["run", "end"]),
        (object(), Any),
        ({"rate": 1, "another": []}, Outer),
        ({"rate": 1e-9, "name": None, "parts": [{"rate": 2}]}, Outer),
        (0, Annotated[int, Between(0, 1)]),
    ],
)
def test_what_fits(value, form):
    check(value, form)


@pytest.mark.parametrize(
    ("value", "form", "message"),
    [
        (True, int, "it must be a whole number, not True"),
        (1.0, int, "it must be a whole number, not 1.0"),
        (2**63, int, "it must be a whole number, not 9223372036854775808"),
        (10**400, float, "it must be a finite number, not 1000"),
        (float("nan"), float, "it must be a finite number, not nan"),
        (float("inf"), float, "it must be a finite number, not inf"),
        ("1", float | None, "it must be a finite number or null, not '1'"),
        ((1, 2), list[int], r"it must be a list, not \(1, 2\)"),
        ([1, "b"], list[int], r"it\[1] must be a whole number, not 'b'"),
        ({"a": []}, dict[str, str | int], r"it\.a must be a text or a whole number, not \[]"),
        ("end", Literal["run"], "it must be 'run', not 'end'"),
        ([], Literal["run", "end"], r"it must be 'run' or 'end', not \[]"),
        ([], Outer, r"it must be an object, not \[]"),
        ({}, Outer, "it lacks 'rate'"),
        ({"rate": 0}, Outer, "rate must be above 0, not 0"),
        ({"rate": 1, "parts": [{}]}, Outer, r"parts\[0] lacks 'rate'"),
        (1.5, Annotated[float, Between(0, 1)], "it must be at least 0 and at most 1, not 1.5"),
        ("x" * 99, int, r"not 'xxx.*\.\.\.$"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_does_not_fit_is_named(value, form, message):
    with pytest.raises(FormError, match=message):
        check(value, form)


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "[" * 100_000, "{", b"\xff", "1" * 5000])
def test_what_is_not_json(text):
    with pytest.raises(ValueError, match=r"."):
        parse(text)
