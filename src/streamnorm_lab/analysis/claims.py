"""Claims of the paper and of this project, as differences that logs decide: holds, does not hold, or open.

A claim is made of contrasts: how far one training must be ahead of another one, at the least. With the 95% interval of
the paired difference, a contrast holds if the whole interval is above that bound, does not hold if the whole interval
is below it, and is open otherwise. A claim holds if all of its contrasts hold, and does not hold if one of them does
not. A training that cannot run at all is behind every one that can.

Over several results a claim holds where all of them say so, and holds in part where the others are open. It does not
hold where one says so, and is mixed where another one says that it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from streamnorm_lab.analysis.results import Cell, Results
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.common.stats import Interval, paired
from streamnorm_lab.experiments.coefficients import DEFAULT, NO_GRADIENT, PAPER, PRESENT_GRADIENT

HOLDS, FALSE, OPEN = "holds", "does not hold", "open"
PARTLY, MIXED, UNMEASURED = "holds in part", "mixed", "not measured"
VERDICTS = (HOLDS, PARTLY, FALSE, MIXED, OPEN, UNMEASURED)
"""The verdicts that a claim can come to over all results."""
OURS = "not in the paper: our own"


@dataclass(frozen=True)
class Contrast:
    """``ours`` should be ahead of ``theirs`` by more than ``above``: accuracy as a share of 1, or nats."""

    results: Results
    ours: Cell
    theirs: Cell
    above: float

    @property
    def verdict(self) -> str:
        """Holds, does not hold, or open."""
        if self.ours.mean is None:
            return FALSE
        if self.theirs.mean is None:
            return HOLDS
        ahead = self.ahead
        if ahead is None or not ahead.known:
            return OPEN
        return HOLDS if ahead.low > self.above else FALSE if ahead.high < self.above else OPEN

    @property
    def ahead(self) -> Interval | None:
        """The lead of ours, positive where it is better; None if one of the two cannot train."""
        difference = paired(self.ours.scores, self.theirs.scores)
        if difference is None:
            return None
        sign = -1 if self.results.experiment.score.lower_is_better else 1
        return Interval(sign * difference.mean, difference.half)


Contrasts = Callable[[Results], Iterator[Contrast]]


@dataclass(frozen=True)
class Claim:
    """A sentence, its place, and what decides it in the results of ``experiments``."""

    text: str
    place: str
    experiments: tuple[str, ...]
    contrasts: Contrasts


def verdict(contrasts: list[Contrast]) -> str:
    """The verdict on a claim that these contrasts make up."""
    found = {contrast.verdict for contrast in contrasts}
    return FALSE if FALSE in found else OPEN if OPEN in found else HOLDS


def overall(verdicts: Iterable[str]) -> str:
    """The verdict on a claim over several results.

    Example:
        >>> overall([HOLDS, HOLDS]), overall([HOLDS, OPEN]), overall([FALSE, OPEN])
        ('holds', 'holds in part', 'does not hold')
        >>> overall([HOLDS, FALSE]), overall([OPEN]), overall([])
        ('mixed', 'open', 'not measured')
    """
    found = set(verdicts)
    if FALSE in found:
        return MIXED if HOLDS in found else FALSE
    if HOLDS in found:
        return PARTLY if OPEN in found else HOLDS
    return OPEN if found else UNMEASURED


def everywhere(ours: str, *theirs: str, above: float, least: int = 1, most: float = math.inf) -> Contrasts:
    """One method against others, at every setting with that many samples in a mini-batch."""

    def found(results: Results) -> Iterator[Contrast]:
        for setting in results.settings:
            for other in theirs:
                left, right = results.cells.get((ours, setting)), results.cells.get((other, setting))
                if least <= setting.samples <= most and left and right and _was_run(left) and _was_run(right):
                    yield Contrast(results, left, right, above)

    return found


def between(method: str, *pairs: tuple[str, str], above: float) -> Contrasts:
    """One method at a setting against itself at another, for pairs of settings."""

    def found(results: Results) -> Iterator[Contrast]:
        for pair in pairs:
            left, right = (results.cells.get((method, Setting.parse(setting))) for setting in pair)
            if left and right and _was_run(left) and _was_run(right):
                yield Contrast(results, left, right, above)

    return found


def both(*parts: Contrasts) -> Contrasts:
    """The contrasts of several parts."""

    def found(results: Results) -> Iterator[Contrast]:
        for part in parts:
            yield from part(results)

    return found


def _was_run(cell: Cell) -> bool:
    return bool(cell.scores) or cell.reason is not None


CLAIMS = (
    Claim(
        "With p from 1 to 6 Lp normalization does as well as with p = 2 (within 1 point).",
        "figure 3",
        ("lp",),
        both(*(everywhere(f"batch-l{p}", "batch-l2", above=-0.01) for p in (1, 3, 4, 5, 6))),
    ),
    Claim(
        "With p = 7 Lp normalization does worse than with p = 2.",
        "figure 3",
        ("lp",),
        everywhere("batch-l2", "batch-l7", above=0),
    ),
    Claim(
        "DAU improves Batch Normalization much with two samples in a mini-batch (by more than 5 points).",
        "figure 4",
        ("dau",),
        between("batch", ("2x16", "2x1"), above=0.05),
    ),
    Claim(
        "DAU improves Batch Normalization with four and eight samples in a mini-batch.",
        "figure 4",
        ("dau",),
        between("batch", ("4x8", "4x1"), ("8x4", "8x1"), above=0),
    ),
    Claim(
        "Batch Normalization loses more than 5 points with two samples in a mini-batch, and cannot train with one.",
        "figure 5",
        ("online-fc",),
        between("batch", ("32x1", "2x16"), ("32x1", "1x32"), above=0.05),
    ),
    Claim(
        "Streaming Normalization trains with one sample at a time as well as with 32 (within 1 point).",
        "figure 5",
        ("online-fc",),
        between("streaming-l1", ("1x32", "32x1"), ("1x1", "32x1"), above=-0.01),
    ),
    Claim(
        "In convolutional networks, too, Streaming Normalization trains with one sample at a time as well as with 32 "
        "(within 1 point).",
        OURS,
        ("conv",),
        between("streaming-l1", ("1x32", "32x1"), ("1x1", "32x1"), above=-0.01),
    ),
    Claim(
        "With up to four samples in a mini-batch Streaming Normalization does at least as well as Layer Normalization "
        "(within 0.5 points).",
        "figure 5",
        ("online-fc",),
        everywhere("streaming-l1", "layer", above=-0.005, most=4),
    ),
    Claim(
        "With up to four samples in a mini-batch Streaming Normalization does at least as well as Online and Batch "
        "Renormalization (within 0.5 points).",
        OURS,
        ("online-fc", "conv"),
        everywhere("streaming-l1", "online", "batch-renorm", above=-0.005, most=4),
    ),
    Claim(
        "Streaming L1 does as well as streaming L2 (within 0.5 points).",
        "Lp normalization",
        ("online-fc", "conv"),
        everywhere("streaming-l1", "streaming-l2", above=-0.005),
    ),
    Claim(
        "In convolutional networks Layer Normalization is behind Streaming Normalization.",
        "table 1",
        ("conv", "recurrent-conv"),
        everywhere("streaming-l1", "layer", above=0),
    ),
    Claim(
        "In recurrent convolutional networks Batch Normalization with one set of running statistics is far behind "
        "Streaming Normalization (by more than 5 points).",
        "table 1",
        ("recurrent-conv",),
        everywhere("streaming-l1", "batch", above=0.05),
    ),
    Claim(
        "In recurrent convolutional networks Streaming Normalization does as well as time-specific Batch Normalization "
        "(within 1 point).",
        "table 1",
        ("recurrent-conv",),
        everywhere("streaming-l1", "batch-per-step", above=-0.01),
    ),
    Claim(
        "With the paper's constants and small mini-batches the history of the gradients is needed: it is better than "
        "the present gradient alone, and than none.",
        "α, β and κ",
        ("coefficients",),
        everywhere(PAPER, PRESENT_GRADIENT, NO_GRADIENT, above=0, most=2),
    ),
    Claim(
        "The window rule does at least as well as the paper's constants (within 0.5 points).",
        OURS,
        ("coefficients",),
        everywhere(DEFAULT, PAPER, above=-0.005),
    ),
    Claim(
        "In recurrent networks Streaming Normalization does as well as Layer Normalization (within 0.02 nats).",
        "language modelling",
        ("char-rnn", "char-gru", "char-lstm"),
        everywhere("streaming-l1", "layer", above=-0.02),
    ),
    Claim(
        "In recurrent networks Streaming Normalization does as well as time-specific Batch Normalization (within 0.02 "
        "nats), which cannot train with one sequence.",
        "language modelling",
        ("char-rnn", "char-gru", "char-lstm"),
        everywhere("streaming-l1", "batch-per-step", above=-0.02),
    ),
    Claim(
        "ResNet-20 with mini-batches of 128: Streaming Normalization is within 0.3 points of Batch Normalization.",
        OURS,
        ("resnet",),
        everywhere("streaming-l1", "batch", above=-0.003, least=128),
    ),
    Claim(
        "ResNet-20 with 8 samples in a mini-batch: Streaming Normalization is within 1 point of itself with 128.",
        OURS,
        ("resnet",),
        between("streaming-l1", ("8x16", "128x1"), above=-0.01),
    ),
)
