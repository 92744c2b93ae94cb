"""Errors that a user can correct."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """An error that a user can correct: one line on what is wrong and what to do. The command line exits with 2."""


def unknown(kind: str, word: str, known: Iterable[str]) -> UserError:
    """The error for a word that is none of those known: the nearest one, and all of them.

    Example:
        >>> print(unknown("command", "rnu", ["run", "list"]))
        unknown command 'rnu' (did you mean 'run'?): choose from run, list
    """
    known = list(known)
    near = get_close_matches(word, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return UserError(f"unknown {kind} {word!r}{hint}: choose from {', '.join(known)}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a full stop; its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
