"""Graphs made by others: torch.fx, torch.jit.trace, and tensors without memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import streamnorm as sn


def images(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU())


class Recurrent(nn.Module):
    """A layer and a cell between operations, the hidden states given and taken."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.lstm = sn.LSTM(4, 5, 2, norm=norm)
        self.cell = sn.LSTMCell(5, 5, norm=norm)
        self.gru = sn.GRUCell(5, 3, norm=norm)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        output, (h, c) = self.lstm(x * 2, (h, h.sin()))
        h, c = self.cell(output[-1], (h[0], c[0]))
        y: Tensor = self.gru(h, self.gru(c))
        return y


Case = tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]
CASES: dict[str, Case] = {
    "streaming": (lambda: images(sn.StreamingNorm2d(6)), ((2, 3, 8, 8),)),
    "with an activation": (lambda: images(sn.StreamingNormAct2d(6, act=nn.SiLU())), ((2, 3, 8, 8),)),
    "sample": (lambda: images(sn.SampleNorm(6, ("group", 2))), ((2, 3, 8, 8),)),
    "batch": (lambda: images(sn.GeneralBatchNorm(6)), ((2, 3, 8, 8),)),
    "recurrent": (lambda: Recurrent("streaming"), ((7, 2, 4), (2, 2, 5))),
    "recurrent, layer": (lambda: Recurrent("layer"), ((7, 2, 4), (2, 2, 5))),
    "recurrent, none": (lambda: Recurrent(None), ((7, 2, 4), (2, 2, 5))),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", list(CASES))
def test_every_layer_is_one_node_of_a_symbolic_trace(name: str, training: bool) -> None:
    """As torch.nn's: three steps of the graph are three steps of the model, commits included."""
    make, shapes = CASES[name]
    model = make().train(training)
    twin = copy.deepcopy(model)
    graph = fx.symbolic_trace(model)
    called = [type(graph.get_submodule(str(n.target))) for n in graph.graph.nodes if n.op == "call_module"]
    assert [kind for kind in called if kind.__module__.startswith("streamnorm")] == [
        type(m) for m in _outermost(model) for _ in range(2 if isinstance(m, sn.GRUCell) else 1)
    ]
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (graph, twin)]
    for _ in range(3):
        inputs = [torch.randn(shape) for shape in shapes]
        outputs = graph(*inputs), twin(*inputs)
        torch.testing.assert_close(*outputs)
        for y, optimizer in zip(outputs, optimizers, strict=True):
            y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def _outermost(model: nn.Module) -> list[nn.Module]:
    """The modules of ours that lie in no other one of ours."""
    found: list[nn.Module] = []
    for child in model.children():
        ours = type(child).__module__.startswith("streamnorm")
        found.extend([child] if ours else _outermost(child))
    return found


def test_arguments_travel_to_the_node() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.cell = sn.StreamingNorm1d(4), sn.GRUCell(4, 4, norm="batch-per-step", max_steps=3)

        def forward(self, x: Tensor) -> Tensor:
            mask = x[:, 0] > 0
            y: Tensor = self.cell(self.norm(x, mask), step=1, mask=mask)
            return y

    model = Masked()
    graph, x = fx.symbolic_trace(copy.deepcopy(model)), torch.randn(8, 4)
    torch.testing.assert_close(graph(x), model(x))
    torch.testing.assert_close(graph.state_dict(), model.state_dict())


class Doubled(sn.StreamingNorm1d):
    """Somebody's own forward around ours."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return 2 * super().forward(x, mask)


def test_what_is_more_than_our_forward_is_no_node_by_itself() -> None:
    """The graph would do twice what comes after our forward, since the node calls all of the module."""
    hooked = sn.StreamingNorm1d(4)
    hooked.register_forward_hook(lambda module, inputs, y: 2 * y)
    for layer in (Doubled(4), hooked):
        with pytest.raises(TypeError, match=r"torch\.fx\.Tracer whose is_leaf_module is true"):
            fx.symbolic_trace(nn.Sequential(layer))

    class Leaf(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, sn.Norm) or super().is_leaf_module(m, module_qualified_name)

    model, x = nn.Sequential(Doubled(4)).eval(), torch.randn(3, 4)
    torch.testing.assert_close(fx.GraphModule(model, Leaf().trace(model))(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*", "ignore:.*deprecated", "ignore:Please use quant_min")
def test_quantization_aware_training_of_a_graph() -> None:
    """prepare_qat_fx puts observers beside the layers, and the statistics stream on."""
    model, x = images(sn.StreamingNorm2d(6)), torch.randn(2, 3, 8, 8)
    prepared = prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (x,))
    (layer,) = (m for m in prepared.modules() if isinstance(m, sn.Norm))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    for _ in range(2):
        prepared(x).square().mean().backward()
        assert int(layer.samples) == 2
        optimizer.step()
        assert int(layer.samples) == 0
    assert not layer.long.equal(sn.StreamingNorm2d(6).long)


TRACED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "streaming": (lambda: images(sn.StreamingNorm2d(6)), (2, 3, 8, 8), (5, 3, 9, 7)),
    "groups": (lambda: images(sn.StreamingNorm2d(6, ref=("group", 2))), (2, 3, 8, 8), (5, 3, 9, 7)),
    "sample": (lambda: images(sn.SampleNorm(6, ("group", 2))), (2, 3, 8, 8), (5, 3, 9, 7)),
    "position": (lambda: images(sn.SampleNorm(6, "position")), (2, 3, 8, 8), (5, 3, 9, 7)),
    "batch": (lambda: images(sn.GeneralBatchNorm(6)), (2, 3, 8, 8), (5, 3, 9, 7)),
    "GRU": (lambda: sn.GRU(4, 5, 2, bidirectional=True), (5, 3, 4), (7, 2, 4)),
    "LSTM": (lambda: sn.LSTM(4, 5, norm="batch", batch_first=True), (5, 3, 4), (7, 2, 4)),
    "LSTM, cell": (lambda: sn.LSTM(4, 5, norm_cell=True), (5, 3, 4), (5, 3, 4)),  # step by step: for this length
    "RNN, layer": (lambda: sn.RNN(4, 5, norm="layer"), (5, 3, 4), (5, 3, 4)),
    "cell": (lambda: sn.GRUCell(4, 5), (3, 4), (7, 4)),
}
_OF_TORCHSCRIPT = pytest.mark.filterwarnings(
    "ignore:.torch.jit.* is deprecated", "ignore::torch.jit.TracerWarning", "ignore:The given buffers"
)


def first(y: Any) -> Tensor:
    found: Tensor = y[0] if isinstance(y, tuple) else y
    return found


@_OF_TORCHSCRIPT
@pytest.mark.parametrize("name", list(TRACED))
def test_evaluation_is_traced_by_torchscript(name: str) -> None:
    """With its own check, which traces a second time; and for other sizes."""
    make, shape, other = TRACED[name]
    model = make()
    first(model(torch.randn(shape))).sum().backward()
    model.eval()
    x = torch.randn(shape)
    model(x)  # an input of this shape is known to the layers
    traced = torch.jit.trace(model, x)
    for size in (shape, other):
        again = torch.randn(size)
        torch.testing.assert_close(first(traced(again)), first(model(again)))


@_OF_TORCHSCRIPT
@pytest.mark.parametrize("make", [lambda: sn.StreamingNorm1d(4), lambda: sn.GRU(4, 4)], ids=["layer", "recurrent"])
def test_training_is_not_traced_by_torchscript(engine: str, make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.randn(5, 4) if isinstance(make(), sn.Norm) else torch.randn(5, 3, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace does not go through .* model\.eval\(\)"):
        torch.jit.trace(model, x, check_trace=False)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@_OF_TORCHSCRIPT
def test_batch_statistics_are_traced_as_batch_norm_s_are() -> None:
    """In training too: the recorded graph moves the running statistics."""
    ours, theirs = nn.Sequential(sn.GeneralBatchNorm(4)), nn.Sequential(nn.BatchNorm1d(4))
    x = torch.randn(5, 4)
    for model in (ours, theirs):
        torch.jit.trace(model, x, check_trace=False)(x + 1)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


WITHOUT_MEMORY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "window": (lambda: nn.Sequential(nn.Linear(4, 6), sn.StreamingNorm1d(6)), (5, 4)),
    "constants": (lambda: nn.Sequential(nn.Linear(4, 6), sn.StreamingNorm1d(6, kappa=0.7)), (5, 4)),
    "batch": (lambda: nn.Sequential(nn.Linear(4, 6), sn.GeneralBatchNorm(6)), (5, 4)),
    "sample": (lambda: nn.Sequential(nn.Linear(4, 6), sn.SampleNorm(6)), (5, 4)),
    "in place": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), sn.StreamingNorm2d(6), nn.ReLU(True)), (2, 3, 8, 8)),
    "RNN": (lambda: sn.RNN(4, 5, norm="batch-per-step", max_steps=3), (5, 3, 4)),
    "GRU": (lambda: sn.GRU(4, 5, bidirectional=True), (5, 3, 4)),
    "LSTM": (lambda: sn.LSTM(4, 5, norm_cell=True, proj_size=2), (5, 3, 4)),
    "GRU, layer": (lambda: sn.GRU(4, 5, norm="layer", reset_after=False), (5, 3, 4)),
    "cell": (lambda: sn.GRUCell(4, 5), (5, 4)),
}


@pytest.mark.parametrize("engine", ["native", "torch"], indirect=True)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", list(WITHOUT_MEMORY))
def test_training_without_memory(engine: str, name: str, device: str) -> None:
    """Fake tensors, with which others measure a training step, and tensors on the meta device."""
    make, shape = WITHOUT_MEMORY[name]
    real = make()
    with FakeTensorMode() if device == "cpu" else torch.device("meta"):
        model, x = make(), torch.randn(shape)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for training in (True, True, False):
            y = first(model.train(training)(x))
            y.square().mean().backward()
            optimizer.step()
    assert y.device.type == device
    assert y.shape == first(real(torch.randn(shape))).shape


def test_a_step_on_fake_tensors_commits_no_real_statistics(engine: str) -> None:
    """A layer that no optimizer owns commits at any optimizer's step, and this one changes no weight."""
    layer = sn.StreamingNorm1d(4, affine=False)
    layer(torch.randn(5, 4))
    with FakeTensorMode():
        weight = nn.Parameter(torch.randn(3))
        weight.sum().backward()
        torch.optim.SGD([weight], lr=0.1).step()
    assert int(layer.samples) == 5
