"""A row of a result table, and methods by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, TypeVar, cast

from streamnorm_lab.common.errors import UserError, first_line, unknown


@dataclass(frozen=True)
class Method:
    """One row of a result table.

    ``colour`` and ``marker`` are the same in every figure. A method that is ``trained_as`` another one is the same
    training evaluated differently, and is reported whenever the other one is.
    """

    name: str
    label: str
    colour: str
    marker: str
    trained_as: str

    def variant(self, options: Mapping[str, Any]) -> Method:
        """This normalization with options of its own.

        Raises:
            Exception: it has no such option, or not with this value.
        """
        raise TypeError(f"{self.name} has no options")


MethodT = TypeVar("MethodT", bound=Method)


class Methods(dict[str, MethodT]):
    """The methods by name, and any of them with options of its own, by a name that says them.

    A variant is written ``method,option=value,…``; several numbers are joined by ``+``.

    Example:
        >>> from streamnorm_lab.methods.layers import METHODS
        >>> METHODS["streaming-l1,beta=0.7+0+0.3,kappa=0.9"].options
        {'p': 1, 'beta': (0.7, 0.0, 0.3), 'kappa': 0.9}
    """

    def __missing__(self, name: str) -> MethodT:
        base, *words = name.split(",")
        if base not in self or not words:
            raise KeyError(name)
        try:
            options = [_option(word) for word in words]
            variant = self[base].variant(dict(options))
            if len(dict(options)) < len(options):
                raise ValueError("an option is named twice")
        except TypeError as error:
            message = f"method {name!r}: a value of another kind is needed ({first_line(error)})"
            raise UserError(message) from None
        except Exception as error:  # layers of many kinds refuse a value each in its way
            raise UserError(f"method {name!r}: {first_line(error)}") from None
        label = ", ".join([self[base].label, *words])
        return cast(MethodT, replace(variant, name=name, label=label, trained_as=name))


def _option(word: str) -> tuple[str, Any]:
    option, equals, text = word.partition("=")
    if not (option and equals and text):
        raise ValueError(f"{word!r} is not of the form option=value, for example streaming-l1,window=20000")
    if text.isdecimal():
        return option, int(text)
    try:
        numbers = tuple(float(number) for number in text.split("+"))
    except ValueError:
        return option, text
    return option, numbers if len(numbers) > 1 else numbers[0]


_NO_OPTIONS = ("features", "axes", "num_features", "affine", "bias", "track_running_stats", "device", "dtype")


def keywords(layer: Callable[..., Any]) -> tuple[str, ...]:
    """The options of a layer that have numbers or words as values."""
    return tuple(name for name in signature(layer).parameters if name not in _NO_OPTIONS)


def refuse_unknown(options: Iterable[str], known: Sequence[str]) -> None:
    """Refuse an option that is none of those known.

    Raises:
        UserError: naming the nearest one.
    """
    for option in options:
        if not known:
            raise UserError("it has no options")
        if option not in known:
            raise unknown("option", option, known)


# For methods that a user put together: colours and markers in the order in which they come.
_SPARE = (
    *(("#56b4e9", "P"), ("#882255", "<"), ("#117733", ">"), ("#332288", "p"), ("#999933", "h"), ("#000000", "*")),
    *(("#aa4499", "d"), ("#44aa99", "H"), ("#661100", "8"), ("#6699cc", "s"), ("#ddaa33", "D"), ("#bb5566", "^")),
)


def trainable(names: Iterable[str], methods: Mapping[str, Method]) -> list[Method]:
    """The methods of these names.

    Raises:
        UserError: a name is unknown, or is a row that comes with another method.
    """
    chosen = []
    for name in names:
        try:
            method = methods[name]
        except KeyError:
            known = [method.name for method in methods.values() if method.trained_as == method.name]
            raise unknown("method", name, known) from None
        if method.trained_as != name:
            raise UserError(f"method {name!r} comes by itself with {method.trained_as!r}: name that one instead")
        chosen.append(method)
    return chosen


def rows(trained: str, methods: Mapping[str, Method]) -> list[Method]:
    """The rows of the result table that one training gives."""
    return [method for method in methods.values() if method.trained_as == trained] or [methods[trained]]


def reported(trained: Set[str], methods: Mapping[str, Method]) -> list[Method]:
    """The rows that these trainings give, in the order of ``methods``; then those that only the user named."""
    known = [method for method in methods.values() if method.trained_as in trained]
    own = sorted(trained - {method.trained_as for method in known})
    spare = (_SPARE[i % len(_SPARE)] for i in range(len(own)))
    return known + [replace(methods[name], colour=c, marker=m) for name, (c, m) in zip(own, spare, strict=True)]
