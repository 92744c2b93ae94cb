"""The suites of ``streamnorm bench``: which contestants are compared on which inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import streamnorm as sn
from streamnorm_lab.bench.contestants import Contestant, Floor, LayerSteps, NetworkSteps, NoArithmetic, Pair
from streamnorm_lab.bench.inference import INFERENCE, folded_beside_group
from streamnorm_lab.bench.networks import resnet20
from streamnorm_lab.networks.images import fully_connected

FLOOR_FROM = 1 << 18
"""Inputs of fewer bytes are bound by calls, not by memory: copies are no floor for them."""

POOL_BYTES = 1 << 26
"""Inputs rotate through so much memory, twice the last-level cache of many machines, where 16 of them reach it."""

STEPS = 100
"""Time steps of the recurrent layers."""


class Match(NamedTuple):
    """Two contestants that are timed in turns; ``stock`` where the second is the layer that users would have taken."""

    ours: Contestant
    rival: Contestant
    stock: bool = False


@dataclass(frozen=True)
class Case:
    """The comparisons on one kind of input; ``make`` builds them, so that only one case at a time holds memory."""

    suite: str
    name: str
    make: Callable[[], list[Match]]
    quick: bool = False
    """Whether ``--quick`` keeps it."""


def all_cases() -> list[Case]:
    """Every case, suite by suite."""
    return [
        *_layer_cases(),
        *_one_pass_cases(),
        *_mask_cases(),
        *_recurrent_cases(),
        *_network_cases(),
        *_inference_cases(),
    ]


SUITES = ("layers", "one-pass", "masks", "recurrent", "networks", "inference")


def _layer_cases() -> list[Case]:
    small = ((1, 128), (1, 1024), (8, 512))
    images = ((1, 512, 7, 7), (1, 64, 32, 32), (8, 64, 32, 32), (32, 256, 8, 8), (128, 64, 32, 32))
    last = ((8, 64, 32, 32), (128, 64, 32, 32))
    quick = ((1, 128), (8, 64, 32, 32))
    return [
        *(Case("layers", f"{shape}", partial(_layers, shape), shape in quick) for shape in (*small, *images)),
        *(Case("layers", f"{shape} channels_last", partial(_layers, shape, True)) for shape in last),
    ]


def _layers(shape: tuple[int, ...], channels_last: bool = False) -> list[Match]:
    """Streaming layers against torch.nn's, against the PyTorch engine, against each other, and against the floor."""
    inputs = input_pool(shape, channels_last)
    channels = shape[1]
    l1, l2 = (LayerSteps(f"streaming L{p}", streaming(shape, p=p), inputs) for p in (1, 2))
    torch1, torch2 = (LayerSteps(f"PyTorch engine L{p}", streaming(shape, p=p), inputs, engine="torch") for p in (1, 2))
    batch = LayerSteps("BatchNorm", batch_norm(shape), inputs)
    layer, group = nn.LayerNorm(shape[1:]), nn.GroupNorm(32, channels)
    layer_norm = LayerSteps("LayerNorm", layer, inputs)
    matches = [
        Match(l1, batch, stock=True),
        Match(l2, batch, stock=True),
        Match(l1, layer_norm),
        Match(l1, LayerSteps("GroupNorm", group, inputs)),
        Match(l1, torch1),
        Match(l2, torch2),
        Match(l1, l2),
    ]
    if 4 * math.prod(shape) >= FLOOR_FROM:
        floor = Floor(inputs)
        matches += [Match(l1, floor), Match(batch, floor)]
        cold = {
            name: LayerSteps(f"{name}, cold inputs", module, inputs, cold=True)
            for name, module in (
                (l1.name, l1.module),
                (l2.name, l2.module),
                ("BatchNorm", batch.module),
                ("LayerNorm", layer),
                ("GroupNorm", group),
            )
        }
        matches += [Match(cold[l1.name], cold[rival]) for rival in ("BatchNorm", "LayerNorm", "GroupNorm")]
        matches.append(Match(cold[l2.name], cold["BatchNorm"]))
    if len(shape) == 2:
        nothing = LayerSteps("no arithmetic", NoArithmetic(channels), inputs)
        matches += [Match(l1, nothing), Match(layer_norm, nothing)]
    return matches


def _one_pass_cases() -> list[Case]:
    shapes = ((8, 64, 32, 32), (128, 64, 32, 32))
    return [Case("one-pass", f"{shape}", partial(_one_pass, shape), shape[0] == 8) for shape in shapes]


def _one_pass(shape: tuple[int, ...]) -> list[Match]:
    """Statistics known before the step: one look at x forward, two reads and one write backward."""
    inputs = input_pool(shape)
    past = {"alpha": (1, 0, 0), "beta": (1, 0, 0)}
    batch = LayerSteps("BatchNorm", batch_norm(shape), inputs)
    l1, l2 = (LayerSteps(f"one-pass L{p}", streaming(shape, p=p, **past), inputs) for p in (1, 2))
    return [Match(l1, batch, stock=True), Match(l2, batch, stock=True), Match(l1, l2), Match(l1, Floor(inputs))]


MASKS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "lengths": lambda places: (
        (torch.arange(places[-1]) < torch.randint(1, places[-1] + 1, (places[0], 1)))
        .view(places[0], *[1] * (len(places) - 2), -1)
        .expand(places)
        .contiguous()
    ),
    "places": lambda places: torch.rand(places) < 0.5,
}
"""The places that masks keep: of each sample all up to a length, as in padded sequences; or half of all."""


def _mask_cases() -> list[Case]:
    shapes = ((32, 128, 100), (8, 64, 32, 32))
    return [
        Case("masks", f"{shape} {kind}", partial(_masks, shape, kind), (len(shape), kind) == (3, "lengths"))
        for shape in shapes
        for kind in MASKS
    ]


def _masks(shape: tuple[int, ...], kind: str) -> list[Match]:
    """A layer under a mask beside itself without, and on the PyTorch engine."""
    torch.manual_seed(0)
    inputs, mask = input_pool(shape), MASKS[kind]((shape[0], *shape[2:]))

    kind_of_layer = sn.StreamingNorm1d if len(shape) == 3 else sn.StreamingNorm2d
    layer, other = kind_of_layer(shape[1]), kind_of_layer(shape[1])
    masked = LayerSteps("streaming L1, masked", _Masked(layer, mask), inputs)
    return [
        Match(masked, LayerSteps("streaming L1", layer, inputs)),
        Match(masked, LayerSteps("PyTorch engine L1, masked", _Masked(other, mask), inputs, engine="torch")),
    ]


class _Masked(nn.Module):
    """A layer that is always called with the same mask."""

    def __init__(self, layer: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.layer, self.mask = layer, mask

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, self.mask)
        return y


def _recurrent_cases() -> list[Case]:
    return [
        Case(
            "recurrent",
            f"{kind} B{batch} H{hidden}",
            partial(_recurrent, kind, batch, hidden),
            kind == "GRU" and (batch, hidden) == (1, 128),
        )
        for kind in ("GRU", "LSTM", "RNN")
        for batch in (1, 32)
        for hidden in (128, 512)
    ]


def _recurrent(kind: str, batch: int, hidden: int) -> list[Match]:
    """Streaming normalization of both paths against the plain layer of torch.nn, over 100 steps.

    nn.LSTM alone has a kernel of oneDNN, which takes whole sequences. It is measured without it, too, since that is
    what nn.GRU and nn.RNN always are.
    """
    inputs = input_pool((STEPS, batch, hidden))
    ours = LayerSteps(f"sn.{kind} streaming", getattr(sn, kind)(hidden, hidden, norm="streaming"), inputs)
    matches = [Match(ours, LayerSteps(f"nn.{kind}", getattr(nn, kind)(hidden, hidden), inputs), stock=True)]
    if kind == "LSTM":
        matches.append(Match(ours, LayerSteps("nn.LSTM without oneDNN", _PlainLSTM(hidden, hidden), inputs)))
    return matches


def _network_cases() -> list[Case]:
    return [
        Case("networks", "3×512 fully connected, batch 1", partial(_networks, 1, _fully_connected), True),
        Case("networks", "ResNet-20, batch 8", partial(_networks, 8, _resnet)),
    ]


def _networks(batch: int, build: Callable[[str], nn.Module]) -> list[Match]:
    """Full training steps with SGD, beside the stock normalization and the PyTorch engine."""
    images = [torch.randn(batch, 3, 32, 32) for _ in range(16)]
    labels = [torch.randint(10, (batch,)) for _ in images]

    def steps(name: str, norm: str, engine: str | None = None) -> NetworkSteps:
        torch.manual_seed(0)
        return NetworkSteps(name, build(norm), images, labels, engine)

    stock = "LayerNorm" if batch == 1 else "BatchNorm"  # one sample in a fully connected layer: BatchNorm refuses
    l1 = steps("streaming L1", "L1")
    return [
        Match(l1, steps(stock, stock), stock=True),
        Match(steps("streaming L2", "L2"), steps(stock, stock), stock=True),
        Match(l1, steps("PyTorch engine L1", "L1", engine="torch")),
    ]


def _fully_connected(norm: str) -> nn.Module:
    kinds: dict[str, Callable[[int], nn.Module]] = {
        "L1": partial(sn.StreamingNorm1d, p=1),
        "L2": partial(sn.StreamingNorm1d, p=2),
        "LayerNorm": nn.LayerNorm,
    }
    return fully_connected(3 * 32 * 32, 10, lambda width, _: kinds[norm](width), width=512, depth=3)


def _resnet(norm: str) -> nn.Module:
    kinds: dict[str, Callable[[int], nn.Module]] = {
        "L1": partial(sn.StreamingNorm2d, p=1),
        "L2": partial(sn.StreamingNorm2d, p=2),
        "BatchNorm": nn.BatchNorm2d,
    }
    return resnet20(kinds[norm])


def _inference_cases() -> list[Case]:
    return [Case("inference", f"{name}, batch 1", partial(_inference, name), name == "ResNet-20") for name in INFERENCE]


def _inference(name: str) -> list[Match]:
    return [Match(*pair) for pair in folded_beside_group(name)]


def input_pool(shape: tuple[int, ...], channels_last: bool = False) -> list[Pair]:
    """Inputs and gradients of their outputs, an even number of each, so many that large ones do not stay in cache."""
    count = math.ceil(POOL_BYTES / (8 * math.prod(shape)))
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def tensor() -> Tensor:
        return torch.randn(shape).to(memory_format=layout)

    return [Pair(tensor().requires_grad_(), tensor()) for _ in range(2 * min(8, max(2, math.ceil(count / 2))))]


def streaming(shape: tuple[int, ...], **options: Any) -> nn.Module:
    """The streaming layer for inputs of this shape."""
    return (sn.StreamingNorm1d if len(shape) == 2 else sn.StreamingNorm2d)(shape[1], **options)


def batch_norm(shape: tuple[int, ...]) -> nn.Module:
    """``nn.BatchNorm``, or a layer around ``torch.batch_norm`` where the module refuses one value per channel."""
    if math.prod(shape) == shape[1]:
        return _BatchNormFunction(shape[1])
    return (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1])


class _BatchNormFunction(nn.BatchNorm1d):
    """BatchNorm without the look at the input's size, and without the count of batches."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.batch_norm(
            input,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            True,
            self.momentum or 0.0,
            self.eps,
            False,
        )


class _PlainLSTM(nn.LSTM):
    """nn.LSTM on PyTorch's own operations. The public ``mkldnn.flags`` would warn of a setting that is not touched."""

    def forward(self, *args: Any) -> Any:
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            return super().forward(*args)
        finally:
            torch._C._set_mkldnn_enabled(before)
