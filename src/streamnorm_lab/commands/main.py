"""The command line: ``streamnorm COMMAND …``.

Commands are imported when they are called, so that a package that one of them needs and is not there is named in
one line, and does not keep the others from working.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple, cast

import streamnorm
from streamnorm_lab.common.errors import UserError, unknown


class Command(NamedTuple):
    """Where a command is implemented: ``module:function``, called with the words after the command's name."""

    target: str
    summary: str


COMMANDS = {
    "run": Command("streamnorm_lab.commands.run:run", "run an experiment and write a report"),
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
        print(f"streamnorm {streamnorm.__version__}")
        return 0
    if words[0] not in COMMANDS:
        return _complain(str(unknown("command", words[0], COMMANDS)))
    return guarded(lambda: _call(COMMANDS[words[0]], words[1:]))


def _call(command: Command, words: list[str]) -> int:
    module, name = command.target.split(":")
    function = cast(Callable[[list[str]], int], getattr(import_module(module), name))
    return function(words)


def guarded(command: Callable[[], int]) -> int:
    """The exit code of a command, whose expected errors become one line."""
    try:
        return command()
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package == "streamnorm":
            raise
        return _complain(f'this command needs the package {package!r}: pip install "streamnorm[experiments]"')
    except UserError as error:
        return _complain(str(error))
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _complain(_explain(error))


def _explain(error: OSError) -> str:
    place = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left while writing{place}: free some, then repeat the command; finished runs are kept"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"not allowed to write or read{place} ({error.strerror}): choose another folder, or change its rights"
    return f"{error.strerror or error}{place and ':' + place}: correct this, then give the same command again"


def _complain(message: str) -> int:
    print(f"streamnorm: {message}", file=sys.stderr)
    return 2
