"""S/B × B/U: how many samples make a mini-batch, and how many mini-batches make a weight update."""

from __future__ import annotations

import re
from dataclasses import dataclass

from streamnorm_lab.common.errors import UserError


@dataclass(frozen=True)
class Setting:
    """Samples per mini-batch (S/B) and mini-batches per weight update (B/U), written ``2x16``.

    Example:
        >>> Setting.parse("2x16")
        Setting(samples=2, batches=16)
        >>> print(Setting(1, 32))
        1x32
    """

    samples: int
    batches: int

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Read ``SxU``.

        Raises:
            UserError: the text is not two positive numbers joined by x.
        """
        match = re.fullmatch(r"\s*([1-9][0-9]{0,8})\s*[x×]\s*([1-9][0-9]{0,8})\s*", text)
        if match is None:
            message = (
                f"setting {text!r} is not of the form SxU: write samples per mini-batch x mini-batches per update, "
                "for example 2x16"
            )
            raise UserError(message)
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.samples}x{self.batches}"

    @property
    def label(self) -> str:
        """The setting as a reader sees it, with a multiplication sign."""
        return f"{self.samples}×{self.batches}"

    @property
    def words(self) -> str:
        """The setting in words, after "with".

        Example:
            >>> Setting(32, 1).words, Setting(2, 16).words
            ('mini-batches of 32', 'mini-batches of 2, 16 per weight update')
            >>> Setting(1, 1).words, Setting(1, 32).words
            ('one sample at a time', 'one sample at a time, 32 per weight update')
        """
        size = "one sample at a time" if self.samples == 1 else f"mini-batches of {self.samples}"
        return size if self.batches == 1 else f"{size}, {self.batches} per weight update"

    @property
    def update(self) -> int:
        """Samples of a weight update."""
        return self.samples * self.batches

    @property
    def difficulty(self) -> tuple[int, int]:
        """A sorting key: many samples per weight update first, and of those large mini-batches first."""
        return (-self.update, -self.samples)
