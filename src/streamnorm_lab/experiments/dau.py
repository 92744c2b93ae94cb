"""The paper's figure 4: plain mini-batches against decoupled accumulation and update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from streamnorm_lab.experiments.online_fc import OnlineFC
from streamnorm_lab.experiments.options import MethodNames, Positive, SettingNames


@dataclass(frozen=True, kw_only=True)
class DAU(OnlineFC):
    """Compare weight updates after every mini-batch with updates after several (DAU), in a fully connected network.

    At each number of samples per mini-batch the same images are seen in the same order, with one mini-batch per weight
    update and with as many as make 32 samples. Each method gets its best learning rate at each setting, chosen on
    validation images; then several seeds are run at that rate and evaluated on the test images.
    """

    name: ClassVar[str] = "dau"
    alias: ClassVar[str | None] = "figure4"
    title: ClassVar[str] = "Plain mini-batches and DAU"
    summary: ClassVar[str] = "what it helps to change the weights after several small mini-batches instead of each one"
    question: ClassVar[str] = (
        "With two samples in a mini-batch, Batch Normalization gets poor statistics and poor gradients. Decoupled "
        "accumulation and update (DAU) leaves the statistics as they are and averages the gradients of several "
        "mini-batches before the weights change. The paper finds that this helps Batch Normalization much. Does it, "
        "when both see as many images and each has its own best learning rate? DAU then makes fewer weight updates."
    )
    reference: ClassVar[str] = "streaming-l1"
    setting_pairs: ClassVar[tuple[tuple[str, str], ...]] = (("8x4", "8x1"), ("4x8", "4x1"), ("2x16", "2x1"))

    methods: MethodNames = ("batch", "streaming-l1")
    """Normalizations to compare."""

    settings: SettingNames = (
        "32x1",
        "8x4",
        "8x1",
        "4x8",
        "4x1",
        "2x16",
        "2x1",
    )
    """Samples per mini-batch x mini-batches per weight update. Compared: 8x4 with 8x1, 4x8 with 4x1, 2x16 with 2x1."""

    epochs: Positive = 4
    """Passes over the training images; with 32 samples per weight update one pass over the digits has 25 updates."""
