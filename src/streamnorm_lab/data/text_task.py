"""Predicting each next character of a text: so many weight updates on pieces of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.data.task import Batch, Scores, Split, Task
from streamnorm_lab.data.text import Text, TextData, load_text, open_text

MOST_PIECES = 100_000_000
"""Pieces of text in a run: where each begins is drawn before the first one is read."""


@dataclass(frozen=True)
class TextTask(Task[TextData]):
    """Pieces that begin anywhere in the training text.

    Args:
        path: a text file; None for Python's standard library.
        limit: how many characters are used; None for all, or for a first look at the library.
        steps: characters of a piece.
        updates: weight updates of a run.
        curve_characters: characters of the test text for the points of a curve.
    """

    path: str | None
    limit: int | None
    steps: int
    updates: int
    curve_characters: int

    unit: ClassVar[str] = "characters"

    @property
    def units_per_sample(self) -> int:
        """A sample is a piece."""
        return self.steps

    def open(self, settings: Sequence[Setting]) -> Text:
        """Read the text."""
        for setting in settings:
            pieces = setting.samples * setting.batches * self.updates
            if pieces > MOST_PIECES:
                raise UserError(
                    f"setting {setting}: {self.updates} updates need {pieces:,} pieces of text; more than "
                    f"{MOST_PIECES:,} are not drawn"
                )
        return open_text(self.path, self.limit, self.steps)

    def load(self, folder: Path) -> TextData:
        """Map the characters into memory."""
        return load_text(folder, self.steps)

    def schedule(self, data: TextData, setting: Setting) -> tuple[int, int]:
        """One pass of so many updates."""
        return 1, self.updates

    def batches(self, data: TextData, setting: Setting, seed: int, epoch: int, first_update: int) -> Iterator[Batch]:
        """The same pieces wherever a setting has as many samples per update."""
        per_update = setting.samples * setting.batches
        starts = data.train.random_starts(self.updates * per_update, seed)
        return map(data.train.pieces, starts[first_update * per_update :].split(setting.samples))

    def watched(self, data: TextData) -> Split:
        """The first pieces of the test text."""
        return data.test.first(self.curve_characters)

    def mini_batches(self, facts: Mapping[str, Any], setting: Setting, stage: str) -> int:
        """The mini-batches of all updates."""
        return self.updates * setting.batches

    def amounts(self, facts: Mapping[str, Any]) -> dict[str, int]:
        """The number of characters in all."""
        return {"limit": facts["train"] + facts["validation"] + facts["test"]}

    @staticmethod
    def guess(classes: int) -> Scores:
        """The scores of a uniform guess among all characters."""
        return {"loss": math.log(classes), "accuracy": 1 / classes}
