"""The form of JSON values, written as type hints and checked before a value is used.

Files that the command line reads back may have been edited, cut, or written by another program: valid JSON of another
form must lead to one clear line, not to an error somewhere in a report.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from typing_extensions import is_typeddict

LARGEST = 1e300
"""Numbers beyond this are refused: means and intervals of them would overflow."""

_WORDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false", NoneType: "null"}


class FormError(ValueError):
    """A value of another form; the message names it and the form needed, and ``needed`` is the latter alone."""

    def __init__(self, message: str, needed: str = "") -> None:
        super().__init__(message)
        self.needed = needed


@dataclass(frozen=True)
class Between:
    """Bounds of a number, as metadata, both included unless ``above`` or ``below`` say otherwise.

    Example:
        >>> check(1, Annotated[float, Between(0, 1, below=True)], "momentum")
        Traceback (most recent call last):
        ...
        streamnorm_lab.common.forms.FormError: momentum must be at least 0 and below 1, not 1
    """

    low: float
    high: float = LARGEST
    above: bool = False
    below: bool = False

    def words(self) -> str:
        """The bounds as a reader sees them."""
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        if self.high == LARGEST:
            return low
        return f"{low} and {'below' if self.below else 'at most'} {self.high:g}"

    def hold(self, value: float) -> bool:
        """Check a number against the bounds."""
        inside = self.low <= value <= self.high
        return inside and not (self.above and value == self.low) and not (self.below and value == self.high)


Count = Annotated[int, Between(0)]
Size = Annotated[int, Between(1)]


def parse(text: str | bytes) -> Any:
    """Decode JSON as the standard has it, without NaN and infinities.

    Raises:
        ValueError: this is not JSON.
    """

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is not a number of JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("brackets within brackets too many times") from None


def check(value: object, form: Any, name: str = "it") -> None:
    """Compare a JSON value with a type hint.

    Args:
        value: what was read.
        form: int, float, str, bool, None, ``list[T]``, ``tuple[T, ...]`` (a list in JSON), ``dict[str, T]``,
            ``Literal``, unions, ``Annotated`` with `Between`, a ``TypedDict`` (which may have more keys), or ``Any``.
        name: what the value is called in the error.

    Raises:
        FormError: it has another form.

    Example:
        >>> check({"rate": [0.1]}, dict[str, list[float]])
        >>> check({"rate": "fast"}, dict[str, float], "run")
        Traceback (most recent call last):
        ...
        streamnorm_lab.common.forms.FormError: run.rate must be a finite number, not 'fast'
    """
    if form is Any:
        return
    if is_typeddict(form):
        _check_record(value, form, name)
        return
    origin, arguments = get_origin(form), get_args(form)
    if origin is Annotated:
        check(value, arguments[0], name)
        for bounds in arguments[1:]:
            if isinstance(bounds, Between) and isinstance(value, int | float):
                _require(bounds.hold(value), value, bounds.words(), name)
    elif origin in (Union, UnionType):
        _require(any(_fits(value, one) for one in arguments), value, _words(form), name)
    elif origin is Literal:
        _require(value in arguments, value, _words(form), name)
    elif origin in (list, tuple):
        _require(isinstance(value, list), value, "a list", name)
        assert isinstance(value, list)
        for i, item in enumerate(value):
            check(item, arguments[0], f"{name}[{i}]")
    elif origin is dict:
        _require(isinstance(value, dict), value, "an object", name)
        assert isinstance(value, dict)
        for key, item in value.items():
            check(item, arguments[1], f"{name}.{key}")
    elif form in (int, float):
        _require(_is_number(value, form), value, _words(form), name)
    else:
        _require(isinstance(value, form), value, _words(form), name)


def _check_record(value: object, form: Any, name: str) -> None:
    _require(isinstance(value, dict), value, "an object", name)
    assert isinstance(value, dict)
    for key, part in _hints(form).items():
        if key in value:
            check(value[key], part, key if name == "it" else f"{name}.{key}")
        elif key in form.__required_keys__:
            raise FormError(f"{name} lacks {key!r}")


@lru_cache
def _hints(form: Any) -> dict[str, Any]:
    return get_type_hints(form, include_extras=True)


def _is_number(value: object, form: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if form is int else int | float):
        return False
    return abs(value) < (2**63 if form is int else LARGEST) and not math.isnan(value)


def _fits(value: object, form: Any) -> bool:
    try:
        check(value, form)
    except FormError:
        return False
    return True


def _require(held: bool, value: object, words: str, name: str) -> None:
    if not held:
        shown = repr(value)
        raise FormError(f"{name} must be {words}, not {shown if len(shown) <= 40 else shown[:37] + '...'}", words)


def _words(form: Any) -> str:
    arguments = get_args(form)
    if get_origin(form) is Literal:
        return " or ".join(map(repr, arguments))
    if arguments and get_origin(form) in (Union, UnionType):
        return " or ".join(map(_words, arguments))
    return _WORDS.get(form, "an object" if get_origin(form) is dict else "a list")
