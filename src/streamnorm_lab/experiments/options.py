"""Options of experiments as types: how the help shows them, what values they take, and whether they decide numbers."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from tyro import conf

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.forms import Between, FormError, check


class Free:
    """Marks an option that may change from command to command in one output folder.

    It says which runs are made, where and on what, but does not decide the numbers of a run. For the data, their
    fingerprint does.
    """


FREE = Free()

# For the help: what stands in for the value, and no "(default: None)" where the text tells the default.
Folder = Annotated[str | None, conf.arg(metavar="FOLDER", help_behavior_hint=""), FREE]
File = Annotated[str | None, conf.arg(metavar="FILE", help_behavior_hint=""), FREE]
Amount = Annotated[int | None, conf.arg(metavar="INT", help_behavior_hint=""), FREE, Between(1)]
Positive = Annotated[int, Between(1)]
Repeats = Annotated[int, Between(1), FREE]
MethodNames = Annotated[tuple[str, ...], conf.arg(metavar="METHOD ..."), FREE]
SettingNames = Annotated[tuple[str, ...], conf.arg(metavar="SxU ..."), FREE]
Rates = Annotated[tuple[Annotated[float, Between(0, above=True)], ...], conf.arg(metavar="RATE ..."), FREE]


def hints(kind: Any) -> dict[str, Any]:
    """The types of all options of an experiment, with their marks."""
    found = get_type_hints(kind, include_extras=True)
    return {field.name: found[field.name] for field in fields(kind)}


def is_free(hint: Any) -> bool:
    """True for the type of an option that does not decide numbers."""
    return get_origin(hint) is Annotated and any(isinstance(mark, Free) for mark in get_args(hint)[1:])


def option(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def check_options(experiment: Any) -> None:
    """Check every option's value against its type.

    Raises:
        UserError: a value is out of bounds, or a list is empty or names something twice.
    """
    for name, hint in hints(type(experiment)).items():
        value = getattr(experiment, name)
        if isinstance(value, tuple):
            _check_list(name, value)
            for item in value:
                _check(name, item, get_args(get_args(hint)[0])[0])
        else:
            _check(name, value, hint)


def _check(name: str, value: Any, hint: Any) -> None:
    try:
        check(value, hint)
    except FormError as error:
        raise UserError(f"{option(name)} {_shown(value)}: must be {error.needed}") from None


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_list(name: str, values: tuple[Any, ...]) -> None:
    if not values:
        raise UserError(f"{option(name)}: name at least one")
    shown = [_shown(value) for value in values]
    for value in shown:
        if shown.count(value) > 1:
            raise UserError(f"{option(name)}: {value} is named twice")
