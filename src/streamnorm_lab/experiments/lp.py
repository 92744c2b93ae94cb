"""The paper's figure 3: normalization by the p-th moment, for p from 1 to 7."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

import streamnorm as sn
from streamnorm_lab.experiments.conv import ConvExperiment
from streamnorm_lab.experiments.options import MethodNames, Rates, Repeats, SettingNames
from streamnorm_lab.methods.layers import METHODS, LayerMethod, NormFactory
from streamnorm_lab.methods.method import Method, Methods, keywords
from streamnorm_lab.networks.images import feedforward_convolutional

ORDERS = range(1, 8)
# Okabe and Ito's colours, which people with the common kinds of colour blindness can tell apart.
_COLOURS = ("#009e73", "#d55e00", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def _batch(features: int, axes: int, **options: Any) -> nn.Module:
    return sn.GeneralBatchNorm(features, **options)


def _family(label: str, markers: str, like: LayerMethod) -> Iterator[LayerMethod]:
    for p, colour, marker in zip(ORDERS, _COLOURS, markers, strict=True):
        name = f"{label.lower()}-l{p}"
        yield replace(
            like, name=name, label=f"{label} L{p}", colour=colour, marker=marker, trained_as=name, options={"p": p}
        )


BATCH = tuple(
    _family("Batch", "os^vDPX", replace(METHODS["batch"], factory=_batch, accepts=keywords(sn.GeneralBatchNorm)))
)
STREAMING = tuple(_family("Streaming", "<>hp*d8", METHODS["streaming-l1"]))


@dataclass(frozen=True, kw_only=True)
class Lp(ConvExperiment):
    """Compare Lp normalizations, whose scale is the p-th root of the p-th absolute moment, for p from 1 to 7.

    In a feedforward convolutional network, as General Batch Normalization (the default, as in the paper) or as
    Streaming Normalization. Each gets its best learning rate, chosen on validation images; then several seeds are run
    at that rate and evaluated on the test images.
    """

    name: ClassVar[str] = "lp"
    alias: ClassVar[str | None] = "figure3"
    title: ClassVar[str] = "Normalization by the p-th moment"
    summary: ClassVar[str] = "whether the order p of the moment that activations are divided by matters"
    question: ClassVar[str] = (
        "Batch Normalization divides by the standard deviation, the root of the second moment. The paper reports that "
        "the p-th root of the p-th absolute moment does as well for every p from 1 to 7, but for p = 7, which does "
        "slightly worse. Does it?"
    )
    reference: ClassVar[str] = "batch-l2"
    comparisons: ClassVar[tuple[tuple[str, str], ...]] = tuple(
        (f"{family}-l{p}", f"{family}-l2") for family in ("batch", "streaming") for p in ORDERS if p != 2
    )
    across: ClassVar[str | None] = "p, the order of the moment"
    catalogue: ClassVar[Mapping[str, LayerMethod]] = Methods(
        {method.name: method for method in (METHODS["none"], *BATCH, *STREAMING)}
    )

    methods: MethodNames = tuple(method.name for method in BATCH)
    """Normalizations to compare: batch-l1 to batch-l7, streaming-l1 to streaming-l7, none."""

    settings: SettingNames = ("32x1",)
    """Samples per mini-batch x mini-batches per weight update, for example 2x16."""

    rates: Rates = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    """Learning rates to try. Each method gets its best one per setting, chosen on data held out for that."""

    seeds: Repeats = 5
    """Number of final runs per method and setting; each has its own initial weights and order of the data."""

    def network(self, shape: tuple[int, ...], classes: int, norm: NormFactory) -> nn.Module:
        """Architecture B."""
        return feedforward_convolutional(shape[0], classes, norm, self.width)

    @classmethod
    def family(cls, method: Method) -> tuple[str, float] | None:
        """Batch or Streaming, and p."""
        p = method.options.get("p") if isinstance(method, LayerMethod) else None
        return None if p is None else (method.label.rpartition(" ")[0], float(p))
