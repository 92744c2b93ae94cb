"""The neurons of examples/neuron.py compute what the layers compute, and the documentation shows their table."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import streamnorm as sn

ROOT = Path(__file__).parents[1]
NEURON = runpy.run_path(str(ROOT / "examples" / "neuron.py"))
Number = NEURON["Number"]


def numbers(values: torch.Tensor) -> list:
    return [Number(value) for value in values.tolist()]


@pytest.mark.parametrize("p", [1, 2])
def test_a_streaming_neuron(p):
    torch.manual_seed(0)
    layer = sn.StreamingNorm1d(
        1, affine=False, p=p, scale="raw", alpha=(0.7, 0.3), beta=(0.7, 0.3), kappa=0.7, dtype=torch.float64
    )
    neuron = NEURON["Streaming"](p)
    for _ in range(5):
        for x, grad in (2 * torch.randn(3, 2, dtype=torch.float64) + 1).tolist():
            there = torch.tensor([[x]], dtype=torch.float64, requires_grad=True)
            y = layer(there)
            y.backward(torch.tensor([[grad]], dtype=torch.float64))
            assert y.item() == pytest.approx(float(neuron.forward(Number(x))), rel=1e-12)
            assert there.grad is not None
            assert there.grad.item() == pytest.approx(float(neuron.backward(Number(grad))), rel=1e-12)
        sn.commit(layer)
        neuron.update()


def test_neurons_that_wait_for_each_other():
    torch.manual_seed(0)
    x, grad = torch.randn(2, 7, dtype=torch.float64)
    x.requires_grad_()
    y = nn.functional.layer_norm(x, (7,))
    y.backward(grad)
    neurons = NEURON["Together"]()
    assert [float(value) for value in neurons.forward(numbers(x))] == pytest.approx(y.tolist(), rel=1e-12)
    assert x.grad is not None
    assert [float(value) for value in neurons.backward(numbers(grad))] == pytest.approx(x.grad.tolist(), rel=1e-9)


def test_the_documentation_shows_the_table():
    assert NEURON["main"]() in (ROOT / "docs" / "plausibility.md").read_text(encoding="utf-8")
