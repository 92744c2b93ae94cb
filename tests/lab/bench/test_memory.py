"""Memory of steps whose allocations are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import streamnorm as sn
from streamnorm_lab.bench.cases import input_pool
from streamnorm_lab.bench.contestants import LayerSteps
from streamnorm_lab.bench.memory import Memory, measure_memory

SHAPE = (8, 16, 8, 8)
X = 4 * 8 * 16 * 8 * 8


def memory(module: nn.Module, shape: tuple[int, ...] = SHAPE, engine: str | None = None) -> Memory:
    return measure_memory(LayerSteps("", module, input_pool(shape)[:2], engine))


def test_stock_layers():
    assert memory(nn.Sigmoid()) == (X, 2 * X)  # saves its output; makes output and gradient
    assert memory(nn.Identity()).saved == 0
    assert memory(nn.BatchNorm2d(16)).saved == X + 2 * 4 * 16  # x, mean and deviation; no parameter


@pytest.mark.parametrize("engine", [None, "torch"])
def test_streaming_layers_save_x_and_three_vectors(engine):
    layer = sn.StreamingNorm2d(16)
    vectors = 3 * 4 * 16
    found = memory(layer, engine=engine)
    assert X + vectors <= found.saved <= X + vectors + 128  # the C++ engine's come in a bytes object of its own size
    assert found.peak >= 2 * X + vectors


class Keeping(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        class Run:
            def __init__(self) -> None:
                self.parts = {"a": [torch.zeros(10)], "again": x, "weight": weight}
                self.myself = self

        ctx.run, ctx.data = Run(), bytes(100)
        return x * weight

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return dy.clone(), None


class KeepingLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return Keeping.apply(x, self.weight)


def test_what_functions_keep_in_objects_is_found_once():
    assert memory(KeepingLayer()) == (X + 40 + 100, 2 * X + 40 + 100)


def test_recurrent_layers_keep_at_least_their_gates():
    found = memory(sn.GRU(8, 8), (5, 2, 8))
    assert found.saved >= 4 * (5 * 2 * 8) * (1 + 1 + 3)  # input, output, three gates
