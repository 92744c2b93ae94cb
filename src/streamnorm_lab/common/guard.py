"""Exit codes from errors: one line for what a user can correct, a traceback for everything else."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from streamnorm_lab.common.errors import UserError


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
        return complain(f'this command needs the package {package!r}: pip install "streamnorm[experiments]"')
    except UserError as error:
        return complain(str(error))
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return complain(_explain(error))


def _explain(error: OSError) -> str:
    place = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left while writing{place}: free some, then repeat the command; finished runs are kept"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"not allowed to write or read{place} ({error.strerror}): choose another folder, or change its rights"
    return f"{error.strerror or error}{place and ':' + place}: correct this, then give the same command again"


def complain(message: str) -> int:
    """Print an error; return its exit code."""
    print(f"streamnorm: {message}", file=sys.stderr)
    return 2
