"""The constants of Streaming Normalization: what is mixed with what, and how long it is remembered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from streamnorm_lab.experiments.online_fc import OnlineFC
from streamnorm_lab.experiments.options import MethodNames, Rates, SettingNames

DEFAULT = "streaming-l1"
PAPER = "streaming-l1,alpha=0.7+0.3,beta=0.7+0.3+0,kappa=0.7"
RECURRENT = "streaming-l1,alpha=0.7+0.3,beta=0.7+0+0.3,kappa=0.7"
PRESENT_GRADIENT = "streaming-l1,alpha=0.7+0.3,beta=0+0+1,kappa=0.7"
NO_GRADIENT = "streaming-l1,alpha=0.7+0.3,beta=0+0+0,kappa=0.7"
LONG_ONLY = "streaming-l1,alpha=1+0,beta=0.7+0.3+0,kappa=0.7"
SLOW = "streaming-l1,alpha=0.7+0.3,beta=0.7+0.3+0,kappa=0.95"
SHORT_WINDOW, LONG_WINDOW = "streaming-l1,window=50", "streaming-l1,window=1000"


@dataclass(frozen=True, kw_only=True)
class Coefficients(OnlineFC):
    """Compare the constants of Streaming Normalization in a fully connected network.

    The default, a window of 200 samples, with other windows; the paper's constants with others, among them no gradient
    but the present one (beta=0+0+1) and no gradient through the statistics at all (beta=0+0+0); and sigma streamed in
    place of the moment (streaming-sigma). Each gets its best learning rate, chosen on validation images; then several
    seeds are run at that rate and evaluated on the test images.
    """

    name: ClassVar[str] = "coefficients"
    alias: ClassVar[str | None] = None
    title: ClassVar[str] = "The constants of Streaming Normalization"
    summary: ClassVar[str] = "which α, β, κ or window serves best, and whether the gradient's history matters"
    question: ClassVar[str] = (
        "Streaming Normalization mixes long-term, short-term and present statistics with weights α, their gradients "
        "with weights β, and forgets with κ at each weight update; or one window takes the place of all three. Which "
        "constants serve, is the history of the gradients needed, and does it matter whether the moment is streamed or "
        "sigma, its root?"
    )
    reference: ClassVar[str] = DEFAULT
    comparisons: ClassVar[tuple[tuple[str, str], ...]] = (
        (DEFAULT, PAPER),
        (DEFAULT, SHORT_WINDOW),
        (DEFAULT, LONG_WINDOW),
        (PAPER, PRESENT_GRADIENT),
        (PAPER, NO_GRADIENT),
        (PAPER, RECURRENT),
        (PAPER, LONG_ONLY),
        (PAPER, SLOW),
        ("streaming-l2", "streaming-sigma"),
    )

    methods: MethodNames = (
        DEFAULT,
        SHORT_WINDOW,
        LONG_WINDOW,
        PAPER,
        PRESENT_GRADIENT,
        NO_GRADIENT,
        RECURRENT,
        LONG_ONLY,
        SLOW,
        "streaming-l2",
        "streaming-sigma",
    )
    """Variants to compare: a method and options of its layer, as in streaming-l1,window=500.

    Numbers that belong together are joined by +. If any of alpha, beta and kappa is given, the paper's constants stand
    for the others."""

    settings: SettingNames = ("2x16", "1x32", "1x1")
    """Samples per mini-batch x mini-batches per weight update, for example 2x16."""

    rates: Rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates to try. Each variant gets its best one per setting, chosen on data held out for that."""
