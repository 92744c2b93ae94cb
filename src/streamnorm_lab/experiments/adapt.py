"""Learning without labels at test time: what is left of a network's accuracy when its images change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import TypedDict

import streamnorm as sn
from streamnorm_lab.common.forms import Between
from streamnorm_lab.common.score import ACCURACY
from streamnorm_lab.common.stats import interval
from streamnorm_lab.data.corruptions import CORRUPTIONS, corrupt
from streamnorm_lab.data.images import Data, Split
from streamnorm_lab.experiments.conv import ConvExperiment
from streamnorm_lab.experiments.experiment import Finals, Section
from streamnorm_lab.experiments.options import MethodNames, Positive, Rates, SettingNames
from streamnorm_lab.logs.records import End, Run, Share
from streamnorm_lab.methods.layers import NormFactory
from streamnorm_lab.networks.images import feedforward_convolutional

MODES = {
    "as trained": "",
    "each image": ", statistics of each image",
    "64 images": ", statistics of 64 images",
    "adapting": ", adapting",
}
"""The ways of evaluating, in the order of the table, and what they add to a method's name."""

Evaluate = Callable[[nn.Module, Tensor], Tensor]
"""Logits of a stream of images, from a model that may be changed."""


class Accuracies(TypedDict):
    """Accuracy by kind of images."""

    clean: Share
    noise: Share
    blur: Share
    contrast: Share
    fog: Share


class AdaptEnd(End, total=False):
    """The last line of a log; accuracies by way of evaluating."""

    adaptation: dict[str, Accuracies]


@dataclass(frozen=True, kw_only=True)
class Adapt(ConvExperiment):
    """Corrupt the test images of a trained convolutional network, and let normalizations adapt without labels.

    Networks are trained on clean images as by `streamnorm run conv`. Then test images come one at a time, clean or
    with noise, blur, low contrast or fog. Streaming Normalization is evaluated as trained, and with `sn.adapt`, which
    lets every test image update its statistics; Batch Normalization as trained, and with the statistics of each test
    image, or of 64 of them. Weights stay as they are.
    """

    name: ClassVar[str] = "adapt"
    title: ClassVar[str] = "Test images that change, and statistics that follow"
    summary: ClassVar[str] = "whether statistics that adapt at test time help when images are corrupted"
    question: ClassVar[str] = (
        "A trained network meets images with noise, blur, low contrast or fog, one at a time and without labels. How "
        "much of its accuracy is lost, and how much comes back when only the statistics of its normalization follow "
        "the images?"
    )

    methods: MethodNames = ("batch", "layer", "streaming-l1")
    """Normalizations to train with."""

    settings: SettingNames = ("32x1",)
    """Samples per mini-batch x mini-batches per weight update of the training, for example 2x16."""

    rates: Rates = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    """Learning rates to try. Each method gets its best one per setting, chosen on data held out for that."""

    epochs: Positive = 3
    """Passes over the training images."""

    window: Annotated[float, Between(0, above=True)] = 200
    """Memory of `sn.adapt`, in test images."""

    stream_images: Positive = 1000
    """Test images of each stream, the first ones."""

    end_form: ClassVar[type] = AdaptEnd

    def network(self, shape: tuple[int, ...], classes: int, norm: NormFactory) -> nn.Module:
        """Architecture B."""
        return feedforward_convolutional(shape[0], classes, norm, self.width)

    def epilogue(self, model: nn.Module, data: Data, run: Run) -> dict[str, Any]:
        """The accuracy on clean and on corrupted test images, in each way of evaluating."""
        if run.stage != "final":
            return {}
        clean = data.test.first(self.stream_images)
        streams = {"clean": clean, **{kind: _corrupted(clean, kind, run.seed) for kind in CORRUPTIONS}}
        return {
            "adaptation": {
                mode: {kind: _accuracy(evaluate, model, stream) for kind, stream in streams.items()}
                for mode, evaluate in self._modes(model).items()
            }
        }

    def _modes(self, model: nn.Module) -> dict[str, Evaluate]:
        """The ways in which this model can be evaluated."""
        modes: dict[str, Evaluate] = {"as trained": _as_trained}
        if any(isinstance(layer, _BatchNorm) for layer in model.modules()):
            modes |= {"each image": partial(_by_batch, size=1), "64 images": partial(_by_batch, size=64)}
        if any(isinstance(layer, sn.Norm) and layer.stream is not None for layer in model.modules()):
            modes["adapting"] = partial(_adapting, window=self.window)
        return modes

    @classmethod
    def section(cls, config: Mapping[str, Any], finals: Iterable[Finals]) -> Section:
        """The table of corruptions."""
        rows = [
            (one.method.label + addition, one.setting.label, *_numbers(one.ends, mode))
            for one in finals
            for mode, addition in MODES.items()
            if any(mode in end.get("adaptation", {}) for end in one.ends)
        ]
        options = config["options"]
        text = (
            "Accuracy in percent on the first "
            f"{min(options['stream_images'], config['data']['test']):,} test images, which come one at a time, "
            "mean ± 95% interval over seeds. “Adapting”: sn.adapt lets each image, before it is judged, update the "
            f"statistics, with a memory of {options['window']:g} images. “Statistics of 64 images” has to wait for 64 "
            "images before it judges the first. Noise: normal, with a deviation of a sixth of the range. Blur: "
            "Gaussian, with a deviation of a 24th of the height. Contrast: 30% of it is left. Fog: between a quarter "
            "and three quarters of white, in clouds."
        )
        return Section(
            "adaptation", "When the images change", text, ("Method", "Trained at", "clean", *CORRUPTIONS), rows
        )


def _corrupted(split: Split, kind: str, seed: int) -> Split:
    pixels = corrupt(split.pixels.cpu(), kind, seed).to(split.pixels.device)
    return Split(pixels, split.labels, split.mean, split.std)


@torch.no_grad()
def _accuracy(evaluate: Evaluate, model: nn.Module, split: Split) -> float:
    images, labels = split.batch(slice(None))
    logits = evaluate(copy.deepcopy(model), images)
    return float((logits.argmax(1) == labels).float().mean())


def _as_trained(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(part) for part in images.split(1000)])


def _by_batch(model: nn.Module, images: Tensor, size: int) -> Tensor:
    """Logits with the statistics of ``size`` images at a time, as in training."""
    model.train()
    return torch.cat([model(part) for part in images.split(size)])


def _adapting(model: nn.Module, images: Tensor, window: float) -> Tensor:
    """One image at a time, each of which updates the statistics."""
    model.eval()
    with sn.adapt(model, window=window):
        return torch.cat([model(image) for image in images.split(1)])


def _numbers(ends: Iterable[Mapping[str, Any]], mode: str) -> list[str]:
    """Mean accuracies with their intervals, a column for each kind of images."""
    tables = [end["adaptation"][mode] for end in ends if mode in end.get("adaptation", {})]
    texts = []
    for kind in ("clean", *CORRUPTIONS):
        mean = interval([table[kind] for table in tables])
        spread = f" ± {ACCURACY.number(mean.half)}" if mean.known else ""
        texts.append(ACCURACY.number(mean.mean) + spread)
    return texts
