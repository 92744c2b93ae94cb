"""Checks of arguments: an error names the class that the user wrote, quotes the value and says what to write."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache, wraps
from typing import Any, TypeVar

from torch import nn
from torch.compiler import is_compiling

_Class = TypeVar("_Class", bound=type)
_Item = TypeVar("_Item")


def real(value: Any, meaning: str) -> float:
    """The number that ``value`` is; infinity where it is an integer too large for one.

    Raises:
        TypeError: for what is no number: a string, None, a sequence, and True or False too.
    """
    if not isinstance(value, (bool, str, bytes, bytearray)):
        try:
            return float(value)
        except OverflowError:
            return math.inf
        except (TypeError, ValueError, RuntimeError):  # the last two from tensors of several elements
            pass
    raise TypeError(f"{meaning}, got {value!r}")


def reals(values: Any, meaning: str) -> tuple[float, ...]:
    """The numbers of a list, a tuple or a vector.

    Raises:
        TypeError: for anything else, a single number included.
    """
    if is_vector(values):
        try:
            return tuple(real(value, "") for value in values)
        except TypeError:  # quoted as a whole
            pass
    raise TypeError(f"{meaning}, got {values!r}")


def is_vector(values: Any) -> bool:
    """Whether these are several values in an order: a list, a tuple, or a vector of numpy or PyTorch."""
    return getattr(values, "ndim", 0) == 1 or (isinstance(values, Sequence) and not isinstance(values, str))


def whole(value: Any, meaning: str, least: int = 1) -> int:
    """The integer that ``value`` is.

    Raises:
        TypeError: for what is no integer, True and False among it.
        ValueError: for one below ``least``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{meaning}, got {value!r}")
    if number < least:
        raise ValueError(f"{meaning}, got {value!r}")
    return number


def flag(name: str, value: Any) -> bool:
    """``value``, which is True or False.

    Raises:
        TypeError: for anything else, which Python would take for one of them.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, got {value!r}")
    return value


def iterator(values: Iterable[_Item], name: str) -> Iterator[_Item]:
    """``iter(values)``.

    Raises:
        TypeError: for what cannot be iterated over.
    """
    try:
        return iter(values)
    except TypeError:
        kind = type(values).__name__
        raise TypeError(f"{name} is an iterable of mini-batches, such as a DataLoader, got {kind}") from None


def check_model(value: Any) -> None:
    """Refuse what is no module, such as a list of modules, an optimizer or a class.

    Raises:
        TypeError: says what was given.
    """
    if not isinstance(value, nn.Module):
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"expected a layer or a model, which is a torch.nn.Module, got {got}")


def nearest(word: str, known: Iterable[str]) -> str:
    """A question about the known word that is most like this one; empty where none is."""
    similar = get_close_matches(word, list(known), 1)
    return f"; did you mean {similar[0]!r}?" if similar else ""


def unexpected(
    caller: str, keyword: str, value: Any, known: Sequence[str], hints: Mapping[str, str] | None = None
) -> TypeError:
    """The error for a keyword that ``caller`` does not have.

    Args:
        caller: the class or function that the user called.
        keyword: the name that it does not have.
        value: what was given for it.
        known: the names that it has.
        hints: what to write in place of names that users of other layers know.
    """
    elsewhere = {name: hint for name, hint in (hints or {}).items() if name not in known}
    for similar in get_close_matches(keyword, [*known, *elsewhere], 1):
        if similar in elsewhere:
            return TypeError(f"{caller} takes no {similar}, got {keyword}={value!r}: {elsewhere[similar]}")
    said = nearest(keyword, known) or f"; it takes {', '.join(known)}"
    return TypeError(f"{caller} got an unexpected keyword argument {keyword!r}{said}")


def explained(cls: _Class) -> _Class:
    """Decorate a class: arguments that its constructor cannot take are explained under the name that the user wrote.

    Python names the function in which the mistake is met, such as the constructor of a private base class. The name
    here is that of the class being made, and a misspelt keyword comes with the nearest one. What is worth more words
    stands in the class attribute ``_hints``, by keyword.
    """
    init: Any = cls.__init__  # type: ignore[misc]

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if not is_compiling():  # a compiler cannot follow it
            _check_call(self, init, args, kwargs)
        init(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


def keywords(cls: type) -> list[str]:
    """The names of all arguments that a class can be made with, those of the classes below it first."""
    names: dict[str, None] = {}
    for each in cls.__mro__:
        if "__init__" in each.__dict__ and each not in (nn.Module, object):
            parameters = list(inspect.signature(each.__dict__["__init__"]).parameters.values())[1:]
            names.update((p.name, None) for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    return list(names)


_signature = lru_cache(inspect.signature)


def _check_call(made: Any, init: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    signature = _signature(init)
    try:
        signature.bind(made, *args, **kwargs)
    except TypeError as error:
        raise _explain(type(made), signature, args, kwargs, error) from None


def _explain(
    cls: type, signature: inspect.Signature, args: Sequence[Any], kwargs: dict[str, Any], error: TypeError
) -> TypeError:
    for keyword, value in kwargs.items():
        if keyword not in signature.parameters:
            return unexpected(cls.__name__, keyword, value, keywords(cls), getattr(cls, "_hints", {}))
    parameters = list(signature.parameters.values())[1:]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(args) > len(positional):
        by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        return TypeError(
            f"{cls.__name__} takes {', '.join(positional)} by position"
            f"{' and ' + ', '.join(by_name) + ' by name' if by_name else ''}, got {len(args)} arguments by position"
        )
    return TypeError(f"{cls.__name__}: {error}")
