"""Learning without labels at test time: what is left of a network's accuracy when its images change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import TypedDict

import streamnorm as sn
from streamnorm_lab.common.chart import Chart, Line, Panel, Row, fit
from streamnorm_lab.common.forms import Between
from streamnorm_lab.common.score import ACCURACY
from streamnorm_lab.common.stats import Interval, interval, spread_words
from streamnorm_lab.data.corruptions import CORRUPTIONS, corrupt
from streamnorm_lab.data.images import Data, Split
from streamnorm_lab.experiments.conv import ConvExperiment
from streamnorm_lab.experiments.experiment import Finals, Section
from streamnorm_lab.experiments.options import MethodNames, Positive, Rates, SettingNames
from streamnorm_lab.experiments.wording import data_name
from streamnorm_lab.logs.records import End, Run, Share
from streamnorm_lab.methods.layers import NormFactory
from streamnorm_lab.networks.images import feedforward_convolutional


class Mode(NamedTuple):
    """A way of evaluating: its addition to a method's name, and its look if not the method's own."""

    addition: str
    colour: str | None = None
    marker: str | None = None


MODES = {
    "as trained": Mode(""),
    "each image": Mode(", statistics of each image", "#8a8a8a", "v"),
    "64 images": Mode(", statistics of 64 images", "#e69f00", "D"),
    "entropy": Mode(", entropy of 64 images", "#56b4e9", "^"),
    "adapting": Mode(", adapting", "#ee3377", "P"),
}
"""The ways of evaluating, in the order of the table."""

ORDERED, GRADUAL = "ordered", "gradual"
"""Streams of another order: clean images, one class after the other; fog that comes and goes."""

KINDS = ("clean", *CORRUPTIONS, ORDERED, GRADUAL)
"""The streams, in the order of the table; logs of earlier versions lack the last two."""

ENTROPY_RATE = 1e-3
"""The learning rate of Adam for gains and biases in entropy minimization: that of its authors for CIFAR-10."""

Evaluate = Callable[[nn.Module, Tensor], Tensor]
"""Logits of a stream of images, from a model that may be changed."""


class _Accuracies(TypedDict):
    clean: Share
    noise: Share
    blur: Share
    contrast: Share
    fog: Share


class Accuracies(_Accuracies, total=False):
    """Accuracy by kind of stream."""

    ordered: Share
    gradual: Share


class AdaptEnd(End, total=False):
    """The last line of a log; accuracies by way of evaluating."""

    adaptation: dict[str, Accuracies]


@dataclass(frozen=True, kw_only=True)
class Adapt(ConvExperiment):
    """Corrupt the test images of a trained convolutional network, and let normalizations adapt without labels.

    Networks are trained on clean images as by `streamnorm run conv`. Then test images come one at a time, clean or
    with noise, blur, low contrast or fog; clean ones also ordered by class, and with fog that comes and goes. Streaming
    Normalization is evaluated as trained, and with `sn.adapt`, which lets every test image update its statistics;
    Batch Normalization as trained, with the statistics of each test image, or of 64 of them, and with gains and biases
    that are trained meanwhile on the entropy of its predictions for these 64. All other weights stay as they are.
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
        streams = {
            "clean": clean,
            **{kind: _corrupted(clean, kind, run.seed) for kind in CORRUPTIONS},
            ORDERED: _ordered(clean),
            GRADUAL: _gradual(clean, run.seed),
        }
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
            modes["entropy"] = partial(_by_entropy, size=64)
        if any(isinstance(layer, sn.Norm) and layer.stream is not None for layer in model.modules()):
            modes["adapting"] = partial(_adapting, window=self.window)
        return modes

    @staticmethod
    def evaluated(finals: Iterable[Finals]) -> list[Evaluated]:
        """The accuracies of each training in each way of evaluating."""
        found = ((one, mode, _means(one.ends, mode)) for one in finals for mode in MODES)
        return [Evaluated(one, mode, means) for one, mode, means in found if means]

    @classmethod
    def section(cls, config: Mapping[str, Any], finals: Iterable[Finals]) -> Section:
        """The table of corruptions."""
        evaluated = [
            Evaluated(one, mode, means) for one in finals for mode in MODES if (means := _means(one.ends, mode))
        ]
        options = config["options"]
        ways = (
            "“Adapting”: sn.adapt lets each image, before it is judged, update the statistics, with a memory of "
            f"{options['window']:g} images. “Statistics of 64 images” waits for 64 of them before it judges the first."
        )
        text = (
            "Accuracy in percent on the first "
            f"{min(options['stream_images'], config['data']['test']):,} test images, which come one at a time. "
            "Noise: normal, with a deviation of a sixth of the range. Blur: Gaussian, with a deviation of a 24th of "
            "the height. Contrast: 30% of it is left. Fog: between a quarter and three quarters of white, in clouds."
        )
        kinds = _kinds(evaluated)
        if ORDERED in kinds:
            text += (
                " Ordered: clean images, one class after the other. Gradual: fog that becomes thicker over the first "
                "half of the images, and thinner over the second. “Entropy of 64 images” is Tent (Wang et al. 2021): "
                "the statistics of 64 images, and a step of Adam for gains and biases on the entropy of their "
                f"predictions, at a rate of {ENTROPY_RATE:g}."
            )
        rows = [
            (one.label, one.finals.setting.label, *(_number(one.means[kind]) for kind in kinds)) for one in evaluated
        ]
        head = ("Method", "Trained at", *kinds)
        return Section(
            "adaptation",
            "When the images change",
            text,
            head,
            rows,
            _chart(config, evaluated, ways),
            _headline(evaluated),
        )


def _corrupted(split: Split, kind: str, seed: int) -> Split:
    pixels = corrupt(split.pixels.cpu(), kind, seed).to(split.pixels.device)
    return Split(pixels, split.labels, split.mean, split.std)


def _ordered(split: Split) -> Split:
    order = split.labels.argsort(stable=True)
    return Split(split.pixels[order], split.labels[order], split.mean, split.std)


def _gradual(split: Split, seed: int) -> Split:
    """Fog that grows from nothing to all of it in the middle of the stream, and goes away again."""
    foggy = _corrupted(split, "fog", seed).pixels.float()
    share = 1 - torch.linspace(-1, 1, len(split), device=foggy.device).abs().view(-1, 1, 1, 1)
    pixels = torch.lerp(split.pixels.float(), foggy, share).round().to(torch.uint8)
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


@torch.enable_grad()
def _by_entropy(model: nn.Module, images: Tensor, size: int) -> Tensor:
    """The same, while gains and biases are trained on the entropy of the predictions.

    Each part is predicted before it is learnt from.

    Reference:
        Wang, Shelhamer, Liu, Olshausen, Darrell: Tent: Fully Test-Time Adaptation by Entropy Minimization, ICLR 2021.
    """
    model.train().requires_grad_(False)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    trained = [parameter.requires_grad_() for norm in norms for parameter in norm.parameters()]
    optimizer, found = torch.optim.Adam(trained, ENTROPY_RATE), []
    for part in images.split(size):
        logits = model(part)
        optimizer.zero_grad()
        torch.distributions.Categorical(logits=logits).entropy().mean().backward()
        optimizer.step()
        found.append(logits.detach())
    return torch.cat(found)


def _adapting(model: nn.Module, images: Tensor, window: float) -> Tensor:
    """One image at a time, each of which updates the statistics."""
    model.eval()
    with sn.adapt(model, window=window):
        return torch.cat([model(image) for image in images.split(1)])


@dataclass(frozen=True)
class Evaluated:
    """The accuracy of one training, evaluated in one way, by kind of images."""

    finals: Finals
    mode: str
    means: Mapping[str, Interval]

    @property
    def label(self) -> str:
        """The method and the way."""
        return self.finals.method.label + MODES[self.mode].addition


def _means(ends: Iterable[Mapping[str, Any]], mode: str) -> dict[str, Interval]:
    """Mean accuracies by kind of images; nothing if no run was evaluated in this way."""
    tables = [end["adaptation"][mode] for end in ends if mode in end.get("adaptation", {})]
    kinds = [kind for kind in KINDS if all(kind in table for table in tables)]
    return {kind: interval([table[kind] for table in tables]) for kind in kinds} if tables else {}


def _kinds(evaluated: Iterable[Evaluated]) -> tuple[str, ...]:
    """The streams that all were evaluated on."""
    found = [set(one.means) for one in evaluated]
    return tuple(kind for kind in KINDS if all(kind in kinds for kinds in found))


def _number(mean: Interval) -> str:
    return ACCURACY.number(mean.mean) + (f" ± {ACCURACY.number(mean.half)}" if mean.known else "")


def _chart(config: Mapping[str, Any], evaluated: Sequence[Evaluated], caption: str) -> Chart:
    """Accuracy by kind of images, for each method and way of evaluating."""
    kinds = _kinds(evaluated)
    lines = [_line(one, kinds) for one in evaluated]
    seeds = spread_words(len(one.finals.ends) for one in evaluated)
    return Chart(
        title=f"Test images that change: {data_name(config)}",
        subtitle=f"without labels, one image at a time unless it says 64, {seeds}",
        description="Accuracy of trained networks on clean and on corrupted test images",
        caption=caption,
        x="test images",
        rows=(Row("test accuracy", (Panel("", lines),), fit(lines), "%"),),
        names=kinds,
        breaks=tuple(float(place) for place in range(1, len(kinds))),
    )


def _line(one: Evaluated, kinds: Sequence[str]) -> Line:
    method, mode, means = one.finals.method, MODES[one.mode], [one.means[kind] for kind in kinds]
    halves = [mean.half if mean.known else 0.0 for mean in means]
    return Line(
        one.label,
        mode.colour or method.colour,
        mode.marker or method.marker,
        tuple(map(float, range(len(means)))),
        tuple(100 * mean.mean for mean in means),
        tuple(100 * (mean.mean - half) for mean, half in zip(means, halves, strict=True)),
        tuple(100 * (mean.mean + half) for mean, half in zip(means, halves, strict=True)),
        faint=one.mode == "each image",
    )


def _headline(evaluated: Iterable[Evaluated]) -> str:
    """The accuracy that adapting gave back, in a sentence."""
    found = {(one.finals.method.name, one.mode): one for one in evaluated}
    adapting = next((one for (_, mode), one in found.items() if mode == "adapting"), None)
    if adapting is None:
        return ""
    method = adapting.finals.method
    trained = found[method.name, "as trained"]
    before, after = (
        ", ".join(f"{100 * one.means[kind].mean:.0f}%" for kind in CORRUPTIONS) for one in (trained, adapting)
    )
    clean = [ACCURACY.value(one.means["clean"].mean) for one in (trained, adapting)]
    return (
        f"Under {', '.join(CORRUPTIONS)} {method.label} classifies {before} of the test images as trained, and {after} "
        f"when its statistics adapt, one image at a time (clean images: {' and '.join(clean)})."
    )
