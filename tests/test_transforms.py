"""torch.func: its transforms pass where nothing is collected, and are refused, with all left as it was, where it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import streamnorm as sn


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By torch.func, for the sum of the squared outputs."""

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        y = functional_call(model, parameters, (x,))
        return (y[0] if isinstance(y, tuple) else y).square().sum()

    return grad(loss)({name: value.detach() for name, value in model.named_parameters()})


def backward(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The same by autograd."""
    y = model(x)
    (y[0] if isinstance(y, tuple) else y).square().sum().backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


Transform = Callable[[nn.Module, Tensor], Any]
TRANSFORMS: dict[str, Transform] = {
    "grad": gradients,
    "vjp": lambda model, x: torch.func.vjp(model, x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "vmap": lambda model, x: vmap(model)(x[None]),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by jvp itself
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
@pytest.mark.parametrize("make", [sn.StreamingNorm1d, lambda n: sn.GRU(n, n)], ids=["layer", "recurrent"])
def test_a_layer_that_collects_refuses(engine: str, make: Callable[[int], nn.Module], transform: Transform) -> None:
    model = make(4)
    x = torch.randn(3, 4) if isinstance(model, sn.StreamingNorm1d) else torch.randn(5, 3, 4)
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(RuntimeError, match=r"model\.eval\(\), or `with streamnorm\.frozen\(model\)"):
        transform(model, x)
    assert all(buffer.equal(kept) for buffer, kept in zip(model.buffers(), before, strict=True))
    assert len(backward(model, x)) == len(list(model.parameters()))  # and goes on as before


@pytest.mark.parametrize("name", ["frozen", "evaluating", "sample", "recurrent, layer"])
def test_what_keeps_nothing_passes(engine: str, name: str) -> None:
    norm: nn.Module = sn.SampleNorm(4) if name == "sample" else sn.StreamingNorm1d(4)
    model: nn.Module = (
        sn.GRU(4, 4, norm="layer") if name == "recurrent, layer" else nn.Sequential(nn.Linear(4, 4), norm)
    )
    if name == "frozen":
        sn.freeze(model)
    model = model.double().train(name != "evaluating")
    x = torch.randn(*((5,) if name == "recurrent, layer" else ()), 3, 4, dtype=torch.float64)
    ours, theirs = gradients(model, x), backward(model, x)
    assert ours.keys() == theirs.keys()
    for parameter, value in theirs.items():
        torch.testing.assert_close(ours[parameter], value, rtol=1e-10, atol=1e-12)
