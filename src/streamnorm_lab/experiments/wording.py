"""The sentences of reports, figures and tables, for images and for text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from streamnorm_lab.common.score import LOSS, bits
from streamnorm_lab.methods.method import Method

Config = Mapping[str, Any]
"""The configuration of the experiment in a folder: ``experiment.json``."""


def data_name(config: Config) -> str:
    """The name of the data as a reader knows it.

    Example:
        >>> data_name({"data": {"name": "cifar10"}}), data_name({"data": {"name": "digits"}})
        ('CIFAR-10', 'digits')
    """
    name = str(config["data"]["name"])
    return _NAMES.get(name, name)


_NAMES = {
    "cifar10": "CIFAR-10",
    "one-scanner": "one scanner",
    "many-scanners": "many scanners",
    "one-scanner-standardized": "one scanner, standardized",
    "many-scanners-standardized": "many scanners, standardized",
}


SETTINGS = "From left to right the mini-batches get smaller."


class Words(ABC):
    """The sentences of one kind of data."""

    numbers: str
    """The description of the cells of the large table, with places for the spread and for ``difference``."""
    difference: str
    """The description of differences in these cells, with a place for the reference; left out if that was not run."""
    measure: str
    """The name of the measured quantity in a sentence."""
    difference_unit: str
    chosen_by: str
    """The criterion for choosing rates, with a note that its data serve nothing else; after "the rate with"."""
    guessing: str
    """The name of the score that a run that diverged counts with."""
    table_title: str
    difference_title: str
    test_axis: str
    validation_axis: str
    test_curve: str
    """The axis of the lower row of curves."""
    samples: str = ""
    """The introduction to the made-up texts, where there are some."""

    @abstractmethod
    def summary(self, config: Config) -> tuple[str, str]:
        """The summary figure: in short for those who do not see it, and its caption."""

    @abstractmethod
    def curves(self, config: Config) -> tuple[str, str]:
        """The same for the curves."""

    @abstractmethod
    def rates(self) -> tuple[str, str]:
        """The same for the rates."""

    @abstractmethod
    def length(self, config: Config) -> str:
        """The length of a run."""

    @abstractmethod
    def protocol(self, config: Config, methods: Sequence[Method]) -> list[str]:
        """The protocol: data, optimizer."""

    @abstractmethod
    def loss_axis(self, losses: Sequence[float], guessing: float) -> tuple[float, float]:
        """The axis for these losses, cut above guessing: one method that blows up must not flatten the others."""

    def notes(self, score: float, train_loss: float | None) -> list[str]:
        """Extra lines in a cell of the large table with this mean score and training loss."""
        return []

    def columns(self, score: float | None, train_loss: float | None) -> dict[str, float | None]:
        """Extra columns of results.csv."""
        return {}


class ImageWords(Words):
    """Classifying images."""

    numbers = "Test accuracy in percent, {spread}.{difference}"
    difference = (
        " Below it, smaller: the difference to {reference} in percentage points, paired by seed, since the same seed "
        "means the same initial weights and the same order of the images. It is coloured where the interval excludes "
        "zero."
    )
    measure = "test accuracy"
    difference_unit = "percentage points"
    chosen_by = "the best accuracy on the validation images, which are neither trained on nor tested on"
    guessing = "accuracy of guessing"
    table_title = "Test accuracy in %"
    difference_title = "Difference in points, paired by seed"
    test_axis = "test accuracy"
    validation_axis = "validation accuracy"
    test_curve = "test accuracy"
    augmentation = "Nothing is augmented."

    def summary(self, config: Config) -> tuple[str, str]:
        """Test accuracy by setting."""
        data = config["data"]
        return (
            "Final test accuracy of each method at each setting",
            f"Accuracy on {data['test']:,} test images, mean over seeds with its 95% interval, each method at its "
            "own best learning rate.",
        )

    def curves(self, config: Config) -> tuple[str, str]:
        """Training loss and test accuracy along the pass."""
        shown = min(config["options"]["curve_images"], config["data"]["test"])
        return (
            "Training loss and test accuracy along the pass, one panel per setting",
            "Top: training loss, the mean since the previous point, each image judged before the network learns from "
            f"it. Bottom: accuracy on the first {shown:,} test images. Lines are means over seeds, bands reach from "
            "the lowest to the highest seed.",
        )

    def rates(self) -> tuple[str, str]:
        """Validation accuracy by rate."""
        return (
            "Validation accuracy by learning rate, one panel per setting",
            "How much each method depends on its learning rate; the ring marks the rate chosen.",
        )

    def length(self, config: Config) -> str:
        """Passes over the images."""
        epochs = config["options"]["epochs"]
        passes = "one pass" if epochs == 1 else f"{epochs} passes"
        return f"{passes} over {config['data']['train']:,} images"

    def _rates(self, data: Mapping[str, Any]) -> str:
        """The data that learning rates are chosen on; folders of earlier versions have no short runs."""
        short = data.get("tune", data["train"])
        if short == data["train"]:
            return f"on the next {data['validation']:,}"
        return f"with runs on the first {short:,} of them, judged on the {data['validation']:,} after those"

    def protocol(self, config: Config, methods: Sequence[Method]) -> list[str]:
        """Images, standardization, SGD."""
        data = config["data"]
        shape = "×".join(str(size) for size in data["shape"])
        return [
            f"Images: {data['description']}; {shape} values each. Trained on the first {data['train']:,}, rates chosen "
            f"{self._rates(data)}, tested on {data['test']:,} others.",
            self._inputs(data),
            f"{self.optimizer(config)} With several mini-batches per update their gradients are averaged, and the "
            "weights change once (DAU).",
            "All methods start from the same weights and see the same images in the same order at a given seed.",
            "“Recalibrated Batch” is the same trained network with statistics recomputed from the training images in "
            "mini-batches of about 128, so that Batch Normalization is not judged by its running statistics alone."
            if any(method.trained_as != method.name for method in methods)
            else "",
        ]

    def _inputs(self, data: Mapping[str, Any]) -> str:
        """The description of the preprocessing of images; other samples have a dtype."""
        if "dtype" in data:
            return "Inputs are as the data sets give them, each read once."
        return f"Inputs are standardized per channel with the training images' mean and deviation. {self.augmentation}"

    def optimizer(self, config: Config) -> str:
        """The optimizer."""
        return "SGD with momentum, constant learning rate."

    def loss_axis(self, losses: Sequence[float], guessing: float) -> tuple[float, float]:
        """The axis from 0 to a little above guessing."""
        return 0.0, 1.15 * guessing


class CompareWords(ImageWords):
    """Classifying with a network of the user's own."""

    def protocol(self, config: Config, methods: Sequence[Method]) -> list[str]:
        """The network, then as for images."""
        options = config["options"]
        changed = f" (code {options['code']})" if options.get("code") else ""
        return [f"Network: what {options['function']} builds{changed}.", *super().protocol(config, methods)]


class FinetuneWords(ImageWords):
    """Classifying images with a network that was trained on others."""

    def protocol(self, config: Config, methods: Sequence[Method]) -> list[str]:
        """The network and where its weights are from, then as for images."""
        return [self._network(config), *super().protocol(config, methods)]

    def _network(self, config: Config) -> str:
        options, data = config["options"], config["data"]
        head = (
            "Its last layer is replaced by a new one, with other random weights for each seed; all weights are trained."
        )
        if "first_accuracy" not in data:
            return f"Network: {options['backbone']} with trained weights. {head}"
        return (
            "Network: that of `streamnorm run conv`, trained with Batch Normalization on the first half of the classes "
            f"({options['first_epochs']} passes at 32×1, {100 * data['first_accuracy']:.1f}% of their test images), "
            f"the same for all runs. {head}"
        )

    def _inputs(self, data: Mapping[str, Any]) -> str:
        """As the trained network has learnt to expect it."""
        return f"Inputs are standardized as they were when the network was trained. {self.augmentation}"


class VolumeWords(ImageWords):
    """Segmenting volumes."""

    numbers = (
        "Dice coefficient on the test volumes in percent, {spread}: the mean over volumes and over the two kinds of "
        "bodies.{difference}"
    )
    difference = ImageWords.difference.replace("images", "volumes")
    measure = "Dice coefficient"
    chosen_by = "the best Dice coefficient on the validation volumes, which are neither trained on nor tested on"
    guessing = "Dice coefficient of finding nothing, which is 0"
    table_title = "Dice coefficient on test volumes in %"
    test_axis = "Dice coefficient, test"
    validation_axis = "Dice coefficient, validation"
    test_curve = "Dice coefficient, test"

    def summary(self, config: Config) -> tuple[str, str]:
        """Dice coefficient by setting."""
        return (
            "Final Dice coefficient of each method at each setting",
            f"Dice coefficient on all {config['data']['test']:,} test volumes, mean over seeds with its 95% interval, "
            "each method at its own best learning rate.",
        )

    def curves(self, config: Config) -> tuple[str, str]:
        """Training loss and Dice coefficient along the pass."""
        shown = min(config["options"]["curve_images"], config["data"]["test"])
        return (
            "Training loss and Dice coefficient along the pass, one panel per setting",
            "Top: training loss, the mean over places since the previous point, each volume judged before it is "
            f"learnt from. Bottom: Dice coefficient on the first {shown:,} test volumes. Lines are means over seeds, "
            "bands reach from the lowest to the highest seed.",
        )

    def rates(self) -> tuple[str, str]:
        """Dice coefficient by rate."""
        return (
            "Dice coefficient on the validation volumes by learning rate, one panel per setting",
            "How much each method depends on its learning rate; the ring marks the rate chosen.",
        )

    def length(self, config: Config) -> str:
        """Passes over the volumes."""
        return super().length(config).replace("images", "volumes")

    def protocol(self, config: Config, methods: Sequence[Method]) -> list[str]:
        """Volumes, network, SGD."""
        data, options = config["data"], config["options"]
        shape = "×".join(str(size) for size in data["shape"][1:])
        return [
            f"Volumes: {data['description']}; {shape} places. Trained on the first {data['train']:,}, rates chosen "
            f"{self._rates(data)}, tested on {data['test']:,} others. The bodies are the same whatever the scanners.",
            f"Network: a 3D U-Net of two steps down and up, with {options['width']} channels at full resolution and "
            "seven normalization layers. The loss is the cross entropy of all places.",
            f"{self.optimizer(config)} With several mini-batches per update their gradients are averaged, and the "
            "weights change once (DAU).",
            "All methods start from the same weights and see the same volumes in the same order at a given seed.",
            "“Recalibrated Batch” is the same trained network with statistics recomputed from the training volumes in "
            "mini-batches of about 128."
            if any(method.trained_as != method.name for method in methods)
            else "",
        ]


class AugmentedWords(ImageWords):
    """Classifying images with ResNet-20, as it is usually trained."""

    augmentation = (
        "Whenever an image is trained on, it is shifted at random by up to an eighth of its size, with zeros beyond "
        "its edge, and colour images are mirrored at random."
    )

    def optimizer(self, config: Config) -> str:
        """SGD, and how its rate falls."""
        options = config["options"]
        falls = {
            "cosine": "a learning rate that falls to 0 along half a cosine",
            "step": "a learning rate divided by 10 after one half and again after three quarters of the updates",
            "constant": "a constant learning rate",
        }
        return f"SGD with momentum, weight decay {options['weight_decay']:g} and {falls[options['anneal']]}."


class TextWords(Words):
    """Predicting the next character."""

    numbers = (
        "Loss on the test text in nats per character, lower is better, {spread}. Below it, smaller: {difference}the "
        "loss in bits per character; and the training loss in nats, over the last part of the run, each piece judged "
        "before it is learnt from."
    )
    difference = (
        "the difference to {reference}, paired by seed, since the same seed means the same initial weights and the "
        "same pieces of text in the same order, coloured where the interval excludes zero; "
    )
    measure = "test loss"
    difference_unit = "nats per character"
    chosen_by = "the lowest loss on the validation text, which is neither trained on nor tested on"
    guessing = "loss of guessing among all characters alike"
    table_title = "Test loss in nats per character, lower is better"
    difference_title = "Difference in nats, paired by seed, below zero is better"
    test_axis = "test loss, nats per character (lower is better)"
    validation_axis = "validation loss, nats"
    test_curve = "test loss, nats"
    samples = (
        "<p>Text that the trained networks continue, seed 0: small, the first characters of the test text, which they "
        "were given; after it, what they drew, character by character.</p>\n"
    )

    def summary(self, config: Config) -> tuple[str, str]:
        """Test loss by setting."""
        data = config["data"]
        return (
            "Final test loss of each method at each setting",
            f"Loss on the last {data['test']:,} characters of the text, mean over seeds with its 95% interval, each "
            "method at its own best learning rate; lower is better. A sample is a piece of "
            f"{config['options']['steps']} characters.",
        )

    def curves(self, config: Config) -> tuple[str, str]:
        """Training and test loss along the run."""
        shown = min(config["options"]["curve_characters"], config["data"]["test"])
        return (
            "Training and test loss along the run, one panel per setting",
            "Top: training loss, the mean since the previous point, each piece judged before the network learns from "
            f"it. Bottom: loss on the first {shown:,} characters of the test text. Lines are means over seeds, bands "
            "reach from the lowest to the highest seed.",
        )

    def rates(self) -> tuple[str, str]:
        """Validation loss by rate."""
        return (
            "Validation loss by learning rate, one panel per setting",
            "How much each method depends on its learning rate (lower is better); the ring marks the rate chosen.",
        )

    def length(self, config: Config) -> str:
        """Weight updates."""
        options = config["options"]
        return f"{options['updates']:,} weight updates on pieces of {options['steps']} characters"

    def protocol(self, config: Config, methods: Sequence[Method]) -> list[str]:
        """The text, its pieces, Adam."""
        data, options = config["data"], config["options"]
        return [
            f"Text: {data['description']}; {data['classes']} different characters. In the text's own order: trained on "
            f"the first {data['train']:,} characters, rates chosen on the next {data['validation']:,}, tested on the "
            f"last {data['test']:,}.",
            f"A sample is a piece of {options['steps']} characters that begins anywhere in the training text; the "
            "network starts each with a hidden state of zeros and predicts the character after each one. The "
            "validation and test texts are cut into such pieces, one after the other.",
            "Characters enter one-hot. Adam, constant learning rate. With several mini-batches per update their "
            "gradients are averaged, and the weights change once (DAU).",
            "At a setting every method sees the same number of characters; at a given seed all start from the same "
            "weights and see the same pieces in the same order.",
        ]

    def loss_axis(self, losses: Sequence[float], guessing: float) -> tuple[float, float]:
        """Around the losses, for they are never near 0."""
        low, high = min(losses, default=0.0), max(losses, default=guessing)
        return low - 0.1, min(high, guessing) + 0.1

    def notes(self, score: float, train_loss: float | None) -> list[str]:
        """The loss in bits, and the training loss."""
        train = [f"train {LOSS.number(train_loss)}"] if train_loss is not None else []
        return [f"{LOSS.number(bits(score))} bits", *train]

    def columns(self, score: float | None, train_loss: float | None) -> dict[str, float | None]:
        """The loss in bits, and the training loss."""
        return {"bits_per_character": None if score is None else bits(score), "train_loss": train_loss}
