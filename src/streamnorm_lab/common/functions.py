"""Functions of the user's own, named ``MODULE:FUNCTION``."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from streamnorm_lab.common.errors import UserError, first_line

_FORM = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)", re.ASCII)


def names_a_function(text: str) -> bool:
    """Whether a text has the form ``MODULE:FUNCTION``.

    Example:
        >>> names_a_function("mine:digits"), names_a_function("data/cifar10")
        (True, False)
    """
    return _FORM.fullmatch(text) is not None


def find_function(text: str) -> Callable[..., Any]:
    """Import a function; modules of the current folder come first.

    Raises:
        UserError: there is no such module or function, or importing it fails.
    """
    form = _FORM.fullmatch(text)
    if form is None:
        raise UserError(
            f"{text!r} is not of the form MODULE:FUNCTION: write mine:build for a function build in mine.py"
        )
    folder = os.getcwd()
    if folder not in sys.path:  # a script that pip installed has its own folder there
        sys.path.insert(0, folder)
    module = _import(text, form["module"])
    function = getattr(module, form["name"], None)
    if function is None:
        near = get_close_matches(form["name"], [name for name in vars(module) if not name.startswith("_")], 1)
        hint = f"; did you mean {near[0]!r}?" if near else f" in {getattr(module, '__file__', module.__name__)}"
        raise UserError(f"{text}: there is no function {form['name']!r}{hint}")
    if not callable(function):
        raise UserError(f"{text}: {form['name']} is no function, it is of type {type(function).__name__}")
    return function


def _import(text: str, name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name != missing and not name.startswith(f"{missing}."):
            raise UserError(f"{text}: {name} imports {missing!r}, which is not installed") from None
        hint = f"write {text.replace('.py', '', 1)}" if name.endswith(".py") else f"looked in {os.getcwd()}"
        raise UserError(f"{text}: there is no module {missing!r}, {hint}") from None
    except Exception as error:  # a module of the user's own raises anything
        raise UserError(f"{text}: importing it raises {described(error)}") from None


def described(error: BaseException) -> str:
    """An error's type, its first line, and where it was raised, as far as that is not in a library.

    Example:
        >>> described(ValueError("too large"))
        'ValueError: too large'
    """
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_of_the_user(frame.filename)]
    place = f" ({os.path.basename(own[-1].filename)}, line {own[-1].lineno})" if own else ""
    said = first_line(error)
    kind = type(error).__name__
    return f"{kind}{place}" if said == kind else f"{kind}: {said}{place}"


def _is_of_the_user(filename: str) -> bool:
    library = sysconfig.get_paths()["stdlib"]
    ours = f"{os.sep}streamnorm_lab{os.sep}" in filename
    return not (ours or filename.startswith(("<", library)) or "site-packages" in filename)
