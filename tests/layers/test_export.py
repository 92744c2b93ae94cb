"""torch.export of models that evaluate, of what they are deployed as, and of layers without a stream that train."""

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


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output(model, x).pow(3).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


TRAINED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "sample": (lambda: nn.Sequential(nn.Linear(3, 6), sn.SampleNorm(6), nn.Linear(6, 2)), (4, 3)),
    "batch": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), sn.GeneralBatchNorm(6, ("group", 2), p=1)), (4, 3, 5, 5)),
    "frozen": (lambda: sn.freeze(nn.Sequential(nn.Linear(3, 6), sn.StreamingNorm1d(6))), (4, 3)),
    "GRU, layer": (lambda: sn.GRU(3, 4, norm="layer"), (5, 4, 3)),
    "GRU, batch": (lambda: sn.GRU(3, 4, norm="batch"), (5, 4, 3)),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["sample", "batch", "frozen"])
def test_training_of_what_was_exported(name: str, strict: bool) -> None:
    """Three steps of the exported program beside three of the model, for other batch sizes too."""
    make, shape = TRAINED[name]
    model = make().double()
    twin = copy.deepcopy(model)
    dynamic = ({0: torch.export.Dim("samples", min=2)},)
    x = torch.randn(shape, dtype=torch.float64)
    exported = torch.export.export(model, (x,), dynamic_shapes=dynamic, strict=strict).module()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (exported, twin)]
    for more in range(3):
        x = torch.randn(shape[0] + more, *shape[1:], dtype=torch.float64)
        torch.testing.assert_close(gradients(exported, x), gradients(twin, x))
        for optimizer in optimizers:
            optimizer.step()
    expected = dict(twin.named_buffers())
    for key, kept in exported.named_buffers():  # those that the graph uses
        torch.testing.assert_close(kept, expected[key])


@pytest.mark.parametrize("name", ["GRU, layer", "GRU, batch"])
def test_training_of_an_exported_recurrent_layer(name: str) -> None:
    """Unrolled over the steps that it was exported with."""
    make, shape = TRAINED[name]
    model = make().double()
    twin, x = copy.deepcopy(model), torch.randn(shape, dtype=torch.float64)
    exported = torch.export.export(model, (x,)).module()
    for _ in range(2):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(gradients(exported, x), gradients(twin, x))
    torch.testing.assert_close(dict(exported.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("make", [lambda: sn.StreamingNorm1d(4), lambda: sn.GRUCell(4, 4)], ids=["layer", "cell"])
def test_training_of_a_stream_is_not_exported(make: Callable[[], nn.Module], strict: bool) -> None:
    """The graph would have another gradient, and notice no weight updates."""
    model = make()
    before = copy.deepcopy(model.state_dict())
    for dynamic in (None, ({0: torch.export.Dim("samples")},)):
        with pytest.raises(Exception, match=r"StreamingNorm\w* in evaluation, not in training.*model\.eval\(\)"):
            torch.export.export(model, (torch.randn(5, 4),), dynamic_shapes=dynamic, strict=strict)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_the_batch_size_of_an_exported_recurrent_layer_stays_free() -> None:
    """The length does not, as with torch.nn's."""
    model, x = trained(sn.GRU(3, 4, 2, bidirectional=True), 5, 4, 3), torch.randn(5, 4, 3)
    free = ({1: torch.export.Dim("samples")},)
    program = torch.export.export(model, (x,), dynamic_shapes=free).module()
    more = torch.randn(5, 7, 3)
    torch.testing.assert_close(program(more), model(more))
