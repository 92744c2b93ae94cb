"""Text to predict character by character: Python's own source files, or a file of the user's.

The parent writes the characters as numbers into the output folder; every worker maps them into its memory.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.files import typed_path

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION = 0.8, 0.1  # of the text, in this order; the last tenth is for the test
FIRST_LOOK = 500_000  # characters of the standard library: enough for a first experiment of two minutes
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class TextSplit:
    """A run of text, and the pieces of ``steps`` characters that it is cut into.

    A piece comes with the character that follows each of its own, so that the last character of a piece is the first
    of the next.
    """

    characters: Tensor
    steps: int

    def __len__(self) -> int:
        return (len(self.characters) - 1) // self.steps

    @property
    def count(self) -> int:
        """The number of characters that its pieces predict."""
        return len(self) * self.steps

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Pieces by their numbers; see ``pieces``."""
        return self.pieces(torch.arange(len(self))[index] * self.steps)

    def pieces(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """The pieces that begin at ``starts``: characters of shape (n, steps), and all that follow them, (n·steps,)."""
        span = self.characters[starts[:, None] + torch.arange(self.steps + 1)].long()
        return span[:, :-1], span[:, 1:].flatten()

    def random_starts(self, count: int, seed: int) -> Tensor:
        """Draw the starts of ``count`` pieces, anywhere in the text; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(self.characters) - self.steps, (count,), generator=generator)

    def first(self, count: int) -> TextSplit:
        """The pieces of the first ``count`` characters."""
        return TextSplit(self.characters[: count + 1], self.steps)


@dataclass(frozen=True)
class TextData:
    """The three parts, in the text's own order. Rates are chosen on ``validation``, the results are from ``test``."""

    vocabulary: str
    train: TextSplit
    validation: TextSplit
    test: TextSplit

    @property
    def classes(self) -> int:
        """The number of different characters."""
        return len(self.vocabulary)

    def spell(self, characters: Tensor) -> str:
        """The text that these numbers stand for."""
        return "".join(self.vocabulary[number] for number in characters.tolist())


@dataclass(frozen=True)
class Text:
    """A text before it is cut."""

    name: str
    description: str
    text: str

    def prepare(self, folder: Path) -> dict[str, Any]:
        """Write the characters into ``folder`` and return what identifies them: name, sizes, a fingerprint."""
        parts = self.parts()
        vocabulary = _vocabulary(parts["train"], self.text)
        folder.mkdir(parents=True, exist_ok=True)
        for split, part in parts.items():
            (folder / f"{split}.characters").write_bytes(_numbers(part, vocabulary).data)
        information = {
            "name": self.name,
            "description": self.description,
            "classes": len(vocabulary),
            "vocabulary": vocabulary,
            **{split: len(part) for split, part in parts.items()},
            "fingerprint": hashlib.sha256(self.text.encode()).hexdigest()[:16],
        }
        (folder / "data.json").write_text(json.dumps(information), encoding="utf-8")
        return information

    def parts(self) -> dict[str, str]:
        """Training, validation and test text."""
        size = len(self.text)
        first, second = int(TRAIN * size), int((TRAIN + VALIDATION) * size)
        return dict(zip(SPLITS, (self.text[:first], self.text[first:second], self.text[second:]), strict=True))


def _vocabulary(train: str, text: str) -> str:
    """The characters of the training text, and one for all others if there are others."""
    known = set(train)
    return "".join(sorted(known)) + (UNKNOWN if set(text) - known else "")


def _numbers(text: str, vocabulary: str) -> np.ndarray:
    number = {character: i for i, character in enumerate(vocabulary)}
    unknown = len(vocabulary) - 1
    return np.fromiter((number.get(character, unknown) for character in text), dtype=np.int32, count=len(text))


@lru_cache(maxsize=1)
def load_text(folder: Path, steps: int) -> TextData:
    """Map the prepared characters into memory, to be cut into pieces of ``steps``."""
    about = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    splits = {}
    for split in SPLITS:
        # Copy on write, for torch wants memory that it may write to.
        array = np.memmap(folder / f"{split}.characters", dtype=np.int32, mode="c", shape=(about[split],))
        splits[split] = TextSplit(torch.from_numpy(array), steps)
    return TextData(about["vocabulary"], **splits)


def open_text(path: str | None, limit: int | None, steps: int) -> Text:
    """The first ``limit`` characters of a file; without a path, of Python's standard library.

    Raises:
        UserError: there is no such text, or too little of it for pieces of ``steps`` characters.
    """
    text = _standard_library(limit or FIRST_LOOK) if path is None else _file(typed_path(path), limit)
    shortest = min(map(len, text.parts().values()))
    if shortest < steps + 1:
        message = (
            f"{text.name} has {len(text.text)} characters, and a tenth of them is no piece of --steps {steps} and the "
            f"character after it: give at least {10 * (steps + 2)} characters"
        )
        raise UserError(message)
    return text


def _file(path: Path, limit: int | None) -> Text:
    if path.is_dir():
        raise UserError(f"--data {path}: this is a folder; name a text file")
    if not path.exists():
        raise UserError(f"--data {path}: no such file")
    if not path.is_file():
        raise UserError(f"--data {path}: this is a device or a pipe; name a text file")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(-1 if limit is None else min(limit, path.stat().st_size))
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    return Text(path.resolve().stem, f"{len(text):,} characters of {path.name}", text)


def _standard_library(limit: int) -> Text:
    folder = Path(sysconfig.get_path("stdlib"))
    parts, size = [], 0
    for source in _modules(folder):
        parts.append(source)
        size += len(source)
        if size >= limit:
            break
    if size < limit:
        message = (
            f"the source files of Python's standard library in {folder} have {size} characters, not {limit}: "
            "lower --limit, or name a text with --data"
        )
        raise UserError(message)
    version = sysconfig.get_python_version()
    description = f"{limit:,} characters of Python {version}'s standard library, its modules in alphabetical order"
    return Text("python", description, "".join(parts)[:limit])


def _modules(folder: Path) -> Iterator[str]:
    """The sources of the modules that are single files, by name; the same on every machine with this Python."""
    for path in sorted(folder.glob("*.py")):
        if not path.name.startswith("_sysconfigdata"):  # made when Python was built, and different everywhere
            yield path.read_text(encoding="utf-8")
