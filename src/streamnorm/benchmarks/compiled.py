"""A compiled training step of a streaming layer against one of BatchNorm: ``python -m streamnorm.benchmarks.compiled``.

Both layers are compiled by ``torch.compile`` with its default backend, which takes a C++ compiler and some minutes.
"""

from __future__ import annotations

import torch
from torch import nn

import streamnorm as sn
from streamnorm.benchmarks.contestants import LayerSteps, Pair
from streamnorm.benchmarks.timing import TOGETHER, Effort, compare

CASES = {
    (1, 128): 1.7,
    (8, 512): 1.7,
    (1, 64, 32, 32): 1.3,
    (8, 64, 32, 32): 1.3,
    (32, 256, 8, 8): 1.3,
}
"""Shapes, and the largest ratio that was asked for."""


def steps(name: str, layer: nn.Module, shape: tuple[int, ...]) -> LayerSteps:
    """Steps of a compiled layer on four inputs."""
    inputs = [Pair(torch.randn(shape, requires_grad=True), torch.randn(shape)) for _ in range(4)]
    return LayerSteps(name, torch.compile(layer, fullgraph=True), inputs)  # type: ignore[arg-type]


def main() -> None:
    """Measure and print a line for each shape."""
    torch.set_num_threads(1)
    print("shape | ours, µs | BatchNorm, µs | ratio (quartiles) | asked")
    for shape, target in CASES.items():
        ours, stock = (sn.StreamingNorm2d, nn.BatchNorm2d) if len(shape) == 4 else (sn.StreamingNorm1d, nn.BatchNorm1d)
        # BatchNorm refuses to train on one value per channel: it gets two samples.
        fitting = shape if shape != (1, 128) else (2, 128)
        torch.compiler.reset()
        pair = (steps("streaming", ours(shape[1]), shape), steps("batch", stock(shape[1]), fitting))
        result = compare(*pair, Effort(seconds=2.0, rounds=21))
        ratio, own, rival = result.ratio[TOGETHER], result.ours[TOGETHER].median, result.rival[TOGETHER].median
        print(
            f"{shape} | {own * 1e6:.1f} | {rival * 1e6:.1f} | {ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f}) "
            f"| {target}",
            flush=True,
        )


if __name__ == "__main__":
    main()
