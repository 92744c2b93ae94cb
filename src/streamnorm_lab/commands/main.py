"""The command line: ``streamnorm COMMAND …``.

Commands are imported when they are called, so that a package that one of them needs and is not there is named in
one line, and does not keep the others from working.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import NamedTuple, cast

from streamnorm_lab.common.errors import UserError, unknown
from streamnorm_lab.common.guard import complain, guarded


class Command(NamedTuple):
    """The implementation of a command: ``module:function``, called with the words after the command's name."""

    target: str
    summary: str


COMMANDS = {
    "run": Command("streamnorm_lab.commands.run:run", "run an experiment and write a report"),
    "compare": Command("streamnorm_lab.commands.compare:compare", "compare normalizations in a network of your own"),
    "list": Command("streamnorm_lab.commands.run:list_experiments", "show all experiments"),
    "report": Command("streamnorm_lab.commands.run:report", "rebuild a report from the logs in a folder"),
    "watch": Command("streamnorm_lab.commands.run:watch", "rebuild the pages of watched runs from their logs"),
    "pack": Command("streamnorm_lab.commands.run:pack_runs", "put the logs of finished runs into one file"),
    "bench": Command("streamnorm_lab.bench.command:bench", "measure time and memory beside torch.nn's own layers"),
    "data": Command("streamnorm_lab.commands.inspection:describe_data", "describe or fetch the images for experiments"),
    "info": Command("streamnorm_lab.commands.inspection:show_info", "show versions, processor and engines"),
}

HELP = """usage: streamnorm COMMAND [OPTIONS]

Normalization for PyTorch that works one sample at a time. This command line reproduces the evidence.

commands:
{commands}

  streamnorm COMMAND --help    explains one command
  streamnorm --version         shows the version

Start with: streamnorm run online-fc    (two minutes, nothing is downloaded)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 0, 1 if runs failed, 2 for what the user can correct, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<8}{command.summary}" for name, command in COMMANDS.items())
        print(HELP.format(commands=lines), end="")
        return 0
    if words[0] in ("-V", "--version"):
        return guarded(_show_version)
    if words[0] not in COMMANDS:
        return complain(str(unknown("command", words[0], COMMANDS)))
    return guarded(lambda: _call(COMMANDS[words[0]], words[1:]))


def _show_version() -> int:
    print(f"streamnorm {_library().__version__}")
    return 0


def _library() -> ModuleType:
    """The layers, which read the environment when they are imported."""
    try:
        return import_module("streamnorm")
    except ValueError as error:
        raise UserError(str(error)) from None


def _call(command: Command, words: list[str]) -> int:
    _library()
    module, name = command.target.split(":")
    function = cast(Callable[[list[str]], int], getattr(import_module(module), name))
    return function(words)
