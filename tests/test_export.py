"""torch.export of models that evaluate, and of what they are deployed as."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamnorm as sn


def trained(model: nn.Module, *shape: int) -> nn.Module:
    """Evaluation mode, with statistics that are not the prior."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        y = model(torch.randn(shape) * 2 + 1)
        (y[0] if isinstance(y, tuple) else y).square().mean().backward()
        optimizer.step()
    return model.eval()


def convolutional(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), sn.StreamingNorm2d(6, **options), nn.ReLU(), nn.Conv2d(6, 2, 1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Sequential(nn.Linear(3, 6), sn.StreamingNorm1d(6), nn.ReLU()), (4, 3)),
    "convolutional": (convolutional, (4, 3, 8, 8)),
    "groups": (lambda: convolutional(ref=("group", 2), kappa=0.7), (4, 3, 8, 8)),
    "own reference": (
        lambda: sn.Norm(3, sn.NormRef.of("n c h w -> c h", h=8), sn.LpMoment(1), sn.Stream()),
        (4, 3, 8, 8),
    ),
    "sample": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), sn.SampleNorm(6, ("group", 2))), (4, 3, 8, 8)),
    "batch": (lambda: nn.Sequential(nn.Linear(3, 6), sn.GeneralBatchNorm(6)), (4, 3)),
    "gru": (lambda: sn.GRU(3, 4), (5, 4, 3)),
    "cell": (lambda: sn.GRUCell(3, 4), (4, 3)),
}


def output(model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    y = model(x)
    found: Tensor = y[0] if isinstance(y, tuple) else y
    return found


@pytest.mark.parametrize("name", list(MODELS))
def test_an_exported_model_evaluates_as_before(name: str) -> None:
    make, shape = MODELS[name]
    model, x = trained(make(), *shape), torch.randn(shape)
    before = [buffer.clone() for buffer in model.buffers()]
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(output(program.module(), x), output(model, x))
    assert all(a.equal(b) for a, b in zip(before, model.buffers(), strict=True))


def test_the_batch_size_stays_free() -> None:
    model, x = trained(convolutional(), 4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("samples", min=1)},))
    more = torch.randn(9, 3, 8, 8)
    torch.testing.assert_close(program.module()(more), model(more))


@pytest.mark.parametrize("how", [sn.to_batchnorm, sn.fold])
@pytest.mark.parametrize("name", ["dense", "convolutional"])
def test_what_is_deployed_has_no_trace_of_us(how: Callable[[nn.Module], nn.Module], name: str) -> None:
    make, shape = MODELS[name]
    model, x = trained(make(), *shape), torch.randn(shape)
    program = torch.export.export(how(copy.deepcopy(model)).eval(), (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    assert "streamnorm" not in program.graph_module.print_readable(print_output=False)
    assert not {name.rsplit(".")[-1] for name in program.state_dict} & {"long", "short", "long_grad", "samples"}


def test_the_state_of_training_is_not_needed_to_run_what_was_exported() -> None:
    """No operator of ours, so that it runs where streamnorm is not installed."""
    for make, shape in MODELS.values():
        program = torch.export.export(trained(make(), *shape), (torch.randn(shape),))
        assert "streamnorm." not in str(program.graph)
