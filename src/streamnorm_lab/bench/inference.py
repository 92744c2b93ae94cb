"""Inference: a folded network beside the same network with Group Normalization, in PyTorch and in onnxruntime.

Statistics, gain and bias of a streaming layer go into the convolution before it (``streamnorm.fold``): nothing is left
of the layer. Group Normalization, which people use where batches are small, computes its statistics for each image.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import streamnorm as sn
from streamnorm_lab.bench.contestants import Contestant
from streamnorm_lab.bench.networks import resnet18, resnet20

INFERENCE: dict[str, tuple[Callable[[Callable[[int], nn.Module]], nn.Module], tuple[int, ...]]] = {
    "ResNet-20": (resnet20, (1, 3, 32, 32)),
    "ResNet-18": (resnet18, (1, 3, 224, 224)),
}
"""Networks by name, each with the shape of its input."""

IN_ONNXRUNTIME = "in onnxruntime"
"""The ending of the names of contestants that run in onnxruntime."""


class InferenceSteps(Contestant):
    """Outputs of one image after the other, without gradients.

    Args:
        name: what tables call it.
        run: from an image to the output.
        images: what it is applied to.
    """

    parts = ("forward",)
    has_memory = False

    def __init__(self, name: str, run: Callable[[Tensor], Any], images: list[Tensor]) -> None:
        super().__init__(name)
        self._run, self._images = run, images

    def forward(self, turn: int) -> Any:
        """The output of this turn's image."""
        with torch.inference_mode():
            return self._run(self._images[turn % len(self._images)])

    def backward(self, output: Any, turn: int) -> None:
        """Nothing: there is no gradient."""

    def update(self) -> None:
        """Nothing: no weight changes."""


class InOnnxruntime:
    """A network exported to ONNX and run by onnxruntime, on as many threads as PyTorch has.

    Args:
        network: in evaluation.
        example: an input.
    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own
            path = Path(folder) / "network.onnx"
            torch.onnx.export(network, (example,), path, dynamo=True, verbose=False, external_data=False)
            self._model = path.read_bytes()
        self._sessions: dict[int, Any] = {}

    def __call__(self, x: Tensor) -> Any:
        """The output, a NumPy array."""
        session = self._sessions.get(torch.get_num_threads()) or self._open(torch.get_num_threads())
        return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]

    def _open(self, threads: int) -> Any:
        onnxruntime: Any = import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(self._model, options, providers=["CPUExecutionProvider"])
        self._sessions[threads] = session
        return session


def missing_libraries() -> list[str]:
    """The libraries for onnxruntime that are not installed (they come with ``streamnorm[integrations]``)."""
    return [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]


def folded_beside_group(name: str) -> list[tuple[Contestant, Contestant]]:
    """The folded network and the one with Group Normalization; without onnxruntime in PyTorch alone."""
    build, shape = INFERENCE[name]
    images = [torch.randn(shape) for _ in range(4)]
    folded, group = folded_network(build, images), build(_group_norm).eval()
    pairs: list[tuple[Contestant, Contestant]] = [
        (InferenceSteps("folded", folded, images), InferenceSteps("GroupNorm", group, images))
    ]
    if not missing_libraries():
        exported = [InOnnxruntime(network, images[0]) for network in (folded, group)]
        names = (f"{each} {IN_ONNXRUNTIME}" for each in ("folded", "GroupNorm"))
        pairs.append(tuple(map(partial(InferenceSteps, images=images), names, exported)))  # type: ignore[arg-type]
    return pairs


def folded_network(build: Callable[[Callable[[int], nn.Module]], nn.Module], images: list[Tensor]) -> nn.Module:
    """A network with streaming layers that have seen the images, folded."""
    network = build(sn.StreamingNorm2d)
    sn.calibrate(network, images)
    return sn.fold(network.eval())


def _group_norm(channels: int) -> nn.Module:
    """32 groups, and fewer where a group would have one channel."""
    return nn.GroupNorm(min(32, channels // 2), channels)
