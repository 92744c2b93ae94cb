"""Paths that a user typed, files that are written whole or not at all, and folders that one command uses at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamnorm_lab.common.errors import UserError


def typed_path(text: str) -> Path:
    """The path that a user typed, with ``~`` as the home folder.

    Raises:
        UserError: there is no such home folder.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: no such user's home folder; write the whole path") from None


def output_folder(path: Path, option: str = "--out") -> Path:
    """Make the folder that ``option`` names.

    Raises:
        UserError: a file is in its place, or in that of a folder above it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        taken = next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), path)
        raise UserError(f"{option} {path}: {taken} is a file; name a folder") from None
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place at the end, or leaves no trace after an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other commands out of ``folder``; the lock ends with the process, however it ends.

    Raises:
        UserError: another command holds the folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no flock; there two commands in one folder are the user's own care
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another command is writing to {folder}: wait for it, or choose another folder with --out"
            raise UserError(message) from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def waited_for(path: Path) -> Iterator[None]:
    """Wait until no other process is in a block for this path; the lock ends with the process, however it ends."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
