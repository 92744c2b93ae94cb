"""Cases on a CUDA device: layers of sizes that fit its cache and sizes that do not, and recurrent layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import streamnorm as sn
from streamnorm import ops
from streamnorm_lab.bench.cases import STEPS, streaming

POOL_BYTES = 1 << 28
"""Inputs rotate through so much memory, several times the cache of a GPU, where 16 of them reach it."""

AIMS = {("streaming L1", "BatchNorm"): 1.0, ("streaming L2", "BatchNorm"): 1.0, ("one-pass L1", "BatchNorm"): 0.75}

ONE_PASS: dict[str, Any] = {"alpha": (1, 0, 0), "beta": (1, 0, 0)}


class Steps(NamedTuple):
    """The steps of one contestant, one for each input."""

    forward: list[Callable[[], Any]]
    together: list[Callable[[], Any]]
    needs_host: bool = False
    """Whether it reads values back, as the reference engine does: no graph can hold it."""


@dataclass(frozen=True)
class CudaCase:
    """Contestants on one kind of input; ``make`` says how each is built, the stock layer among them."""

    suite: str
    name: str
    stock: str
    make: Callable[[torch.device], dict[str, Callable[[], Steps]]]
    targets: dict[tuple[str, str], float]
    """By contestant and rival: the largest ratio of device time, of forward and backward together."""
    least_bytes: int | None = None
    """The bytes that every layer has to move: x and y forward, x, dy and dx backward."""
    floor_target: float | None = None
    quick: bool = False


SUITES = ("layers", "recurrent")


def cuda_cases() -> list[CudaCase]:
    """Every case."""
    return [*_layer_cases(), *_recurrent_cases()]


def _layer_cases() -> list[CudaCase]:
    large = ((256, 64, 56, 56), (64, 256, 28, 28), (32, 512, 14, 14))
    small = ((8, 64, 32, 32), (1, 64, 32, 32), (128, 512), (8, 512))
    cases = [
        _layer_case(shape, dtype, last, aimed=True)
        for shape in large
        for dtype in (torch.float32, torch.bfloat16)
        for last in (False, True)
    ]
    return [*cases, *(_layer_case(shape, torch.float32, False, aimed=False) for shape in small)]


def _layer_case(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, *, aimed: bool) -> CudaCase:
    words = [f"{shape}", "bf16" if dtype == torch.bfloat16 else "float32", *["channels_last"] * channels_last]
    return CudaCase(
        "layers",
        " ".join(words),
        "BatchNorm",
        partial(_layers, shape, dtype, channels_last),
        dict(AIMS) if aimed else {},
        5 * math.prod(shape) * dtype.itemsize,
        1.25 if shape[0] == 256 else None,
        quick=shape in ((32, 512, 14, 14), (8, 512)) and not channels_last,
    )


def _layers(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: torch.device
) -> dict[str, Callable[[], Steps]]:
    inputs = _inputs(shape, dtype, channels_last, device)
    modules: dict[str, Callable[[], nn.Module]] = {
        "BatchNorm": lambda: (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1]),
        "streaming L1": lambda: streaming(shape, p=1),
        "streaming L2": lambda: streaming(shape, p=2),
        "one-pass L1": lambda: streaming(shape, p=1, **ONE_PASS),
        "PyTorch engine L1": lambda: streaming(shape, p=1),
        "GroupNorm": lambda: nn.GroupNorm(32, shape[1], dtype=dtype),
        "LayerNorm": lambda: nn.LayerNorm(shape[1:], dtype=dtype),
    }
    return {
        name: partial(_steps, make, inputs, device, "torch" if name.startswith("PyTorch") else None)
        for name, make in modules.items()
    }


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Inputs and gradients of outputs, so many that large ones do not stay in the cache."""
    size = math.prod(shape) * dtype.itemsize
    count = min(16, max(2, math.ceil(POOL_BYTES / (2 * size))))
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def tensor() -> Tensor:
        return torch.randn(shape, device=device).to(dtype).to(memory_format=layout)

    return [(tensor().requires_grad_(), tensor()) for _ in range(count)]


def _steps(
    make: Callable[[], nn.Module], inputs: Sequence[tuple[Tensor, Tensor]], device: torch.device, engine: str | None
) -> Steps:
    """Forward, and forward with the gradients of input and parameters."""
    module = make().to(device)
    wanted = [p for p in module.parameters() if p.requires_grad]

    def forward(x: Tensor) -> Tensor:
        with ops.force(engine) if engine else nullcontext():
            y = module(x)
        return y[0] if isinstance(y, tuple) else y

    def together(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(x), [x, *wanted], dy)

    return Steps(
        [partial(forward, x) for x, _ in inputs],
        [partial(together, x, dy) for x, dy in inputs],
        needs_host=engine == "plain",
    )


def _recurrent_cases() -> list[CudaCase]:
    return [
        CudaCase(
            "recurrent",
            f"GRU B{batch} H{hidden} {STEPS} steps",
            "nn.GRU",
            partial(_recurrent, batch, hidden),
            {("sn.GRU streaming", "nn.GRU"): 1.5, ("sn.GRU streaming", "loop over steps"): 0.1},
            quick=(batch, hidden) == (32, 128),
        )
        for batch, hidden in ((1, 128), (32, 128), (32, 512))
    ]


def _recurrent(batch: int, hidden: int, device: torch.device) -> dict[str, Callable[[], Steps]]:
    inputs = _inputs((STEPS, batch, hidden), torch.float32, False, device)[:4]
    return {
        "nn.GRU": partial(_steps, lambda: nn.GRU(hidden, hidden), inputs, device, None),
        "sn.GRU streaming": partial(_steps, lambda: sn.GRU(hidden, hidden, norm="streaming"), inputs, device, None),
        "loop over steps": partial(_steps, lambda: sn.GRU(hidden, hidden, norm="streaming"), inputs, device, "plain"),
    }
