"""torch.compile: one graph for a training step, and what it computes is what eager mode computes, state included."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import streamnorm as sn

pytestmark = [
    # Raised inside the compiler: of gradients that are no leaves', and of functions that it inlines.
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]


@pytest.fixture(autouse=True)
def _no_graphs_of_others() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


class Twice(nn.Module):
    """A layer used twice, in order."""

    def __init__(self, norm: nn.Module, linear: nn.Module | None = None) -> None:
        super().__init__()
        self.linear, self.norm = linear or nn.Linear(6, 6), norm

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + torch.relu(self.norm(self.linear(x)))
        return x


class Masked(Twice):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x), x[:, 0] > 0.5)
        return y


class InPlace(nn.Sequential):
    """As most networks have it."""

    def __init__(self) -> None:
        norms = sn.StreamingNorm1d(6), sn.GeneralBatchNorm(6)
        super().__init__(*(part for norm in norms for part in (nn.Linear(6, 6), norm, nn.ReLU(inplace=True))))


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = sn.GRUCell(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.gru(x, self.gru(x))
        return y


def convolutional(norm: nn.Module) -> nn.Module:
    return Twice(norm, nn.Conv2d(6, 6, 3, padding=1))


VECTORS: list[tuple[int, ...]] = [(5, 6), (7, 6), (2, 6), (9, 6)]
IMAGES: list[tuple[int, ...]] = [(3, 6, 5, 5), (4, 6, 5, 5), (6, 6, 5, 5)]
Model = Callable[[], nn.Module]
MODELS: dict[str, tuple[Model, list[tuple[int, ...]]]] = {
    "streaming": (lambda: Twice(sn.StreamingNorm1d(6)), VECTORS),
    "paper": (
        lambda: Twice(
            sn.StreamingNorm1d(6, alpha=(0.5, 0.3, 0.2), beta=(0.5, 0.3, 0.2), p=2, center="zero", affine=False)
        ),
        VECTORS,
    ),
    "p=3": (lambda: Twice(sn.StreamingNorm1d(6, p=3, scale="gaussian", bias=False)), VECTORS[:2]),
    "masked": (lambda: Masked(sn.StreamingNorm1d(6)), VECTORS),
    "convolutional": (lambda: convolutional(sn.StreamingNorm2d(6)), IMAGES),
    "own reference": (
        lambda: convolutional(sn.Norm(6, sn.NormRef.of("n c h w -> c h", h=5), sn.LpMoment(1), sn.Stream())),
        IMAGES[:2],
    ),
    "sample": (lambda: convolutional(sn.SampleNorm(6)), IMAGES[:2]),
    "batch": (lambda: convolutional(sn.GeneralBatchNorm(6)), IMAGES[:2]),
    "ghosts": (lambda: Twice(sn.GeneralBatchNorm(6, ghosts=2, momentum=None)), [(4, 6), (6, 6)]),
    "cells": (Cells, VECTORS[:2]),
    "in place": (InPlace, VECTORS[:2]),
}


class Side:
    """A model with its optimizer, in eager mode or compiled."""

    def __init__(self, model: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
        self.model, self.run = model, run
        self.optimizer = torch.optim.SGD([*model.parameters()], lr=0.1)
        if any(isinstance(module, sn.Norm) and module.stream is not None for module in model.modules()):
            sn.bind(model, self.optimizer)

    def accumulate(self, inputs: list[Tensor], number: int) -> list[Tensor]:
        """Two forward passes and one backward; now and then a commit between them; every other time a step."""
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = [self.run(x) for x in leaves]
        if number == 2:
            sn.commit(self.model)
        torch.manual_seed(number)
        sum((y * torch.randn_like(y)).sum() for y in outputs).backward()  # type: ignore[union-attr]
        results = [*outputs, *(x.grad for x in leaves if x.grad is not None)]
        results += [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        if number % 2:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return [result.detach() for result in results] + [buffer.clone() for buffer in self.model.buffers()]


def assert_same(
    model: nn.Module,
    compiled: Any,
    shapes: list[tuple[int, ...]],
    near: float = 1e-10,
    beside: nn.Module | None = None,
) -> None:
    """``compiled``, which trains ``model``, against ``beside`` in eager mode: a copy of the model if not given."""
    twin = copy.deepcopy(model) if beside is None else beside
    ours, theirs = Side(model, compiled), Side(twin, twin)
    dtype = next(model.parameters()).dtype
    for number, shape in enumerate(shapes):
        torch.manual_seed(number)
        inputs = [torch.randn(shape, dtype=dtype) * 2 + 1 for _ in range(2)]
        for a, b in zip(ours.accumulate(inputs, number), theirs.accumulate(inputs, number), strict=True):
            torch.testing.assert_close(a, b, rtol=near, atol=near)


@pytest.mark.parametrize("name", list(MODELS))
def test_training_is_as_in_eager_mode(name: str) -> None:
    """In one graph, for all batch sizes: one of the first size, and one for all others (0 and 1 are special)."""
    make, shapes = MODELS[name]
    model = make().double()
    assert_same(model, torch.compile(model, backend="aot_eager", fullgraph=True), [shapes[0], *shapes])
    assert counters["stats"]["unique_graphs"] <= 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler, g++")
@pytest.mark.parametrize("name", ["streaming", "convolutional"])
def test_training_with_the_default_backend(name: str) -> None:
    make, shapes = MODELS[name]
    model = make()
    assert_same(model, torch.compile(model, fullgraph=True), shapes, near=2e-4)


def test_reduced_precision_and_a_scaler() -> None:
    model = nn.Sequential(nn.Linear(6, 6), sn.StreamingNorm1d(6))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    sn.bind(model, optimizer, scaler=scaler)
    sn.bind(twin, twin_optimizer)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(4):
        x = torch.randn(5, 6)
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = compiled(x), twin(x)
        assert y.dtype == expected.dtype
        scaler.scale(y.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        expected.float().square().mean().backward()
        twin_optimizer.step()
        for each in (optimizer, twin_optimizer):
            each.zero_grad()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-2, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1  # the scale is no constant of the graph


def test_evaluation_freezing_and_calibration() -> None:
    model = convolutional(sn.StreamingNorm2d(6)).double()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    sn.calibrate(model, [x], forward=compiled)
    before = [buffer.clone() for buffer in model.buffers()]
    assert int(before[4].sum()) == 0
    for prepared in (model.eval(), sn.freeze(model.train())):
        torch.testing.assert_close(compiled(x), prepared(x), rtol=1e-10, atol=1e-10)
    assert all(a.equal(b) for a, b in zip(before, model.buffers(), strict=True))


def test_a_copy_notices_its_own_updates() -> None:
    """A graph that was made for one model serves another, which has not been used before."""
    model = nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(4))
    for each in (model, copy.deepcopy(model)):
        compiled = torch.compile(each, backend="aot_eager", fullgraph=True)
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        compiled(torch.randn(5, 3)).square().mean().backward()
        layer: Any = each[1]
        assert int(layer.samples) == 5
        optimizer.step()
        assert int(layer.samples) == 0


@torch._dynamo.config.patch(recompile_limit=64)  # of a piece of code, for all models together
def test_models_with_other_constants() -> None:
    """The same code with other numbers: a compiler that notices it would make them inputs of the graph."""
    norms: list[sn.Norm] = [
        sn.StreamingNorm1d(6),
        sn.GeneralBatchNorm(6),
        sn.StreamingNorm1d(6, p=2, window=50),
        sn.StreamingNorm1d(6, p=3, eps=1e-3, scale="gaussian", beta=(0.5, 0.2, 0.3)),
        sn.SampleNorm(6, eps=1e-2),
    ]
    for norm in norms:
        model = nn.Sequential(nn.Linear(6, 6), norm).double()
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_same(model, compiled, VECTORS[:1])
        x = torch.randn(4, 6, dtype=torch.float64)
        torch.testing.assert_close(compiled.eval()(x), model(x), rtol=1e-10, atol=1e-10)
    layer = norms[0].train()
    layer.set_stream(sn.Stream(window=7))
    layer.zero_grad()
    model = nn.Sequential(nn.Linear(6, 6), layer).double()
    assert_same(model, torch.compile(model, backend="aot_eager", fullgraph=True), VECTORS[:1])


def test_a_recurrent_layer_is_a_boundary() -> None:
    """As torch.nn's own are: the graph breaks there, and the engine of eager mode runs."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = sn.GRU(4, 5, bidirectional=True), nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.gru(x.sin())[0])
            return y

    model = Model()
    assert_same(model, torch.compile(model, backend="aot_eager"), [(3, 2, 4), (3, 4, 4)], near=1e-4)


def checkpointed(region: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y: Tensor = checkpoint(region, x, use_reentrant=False, context_fn=sn.checkpoint_context_fn)
    return y


class Regions(nn.Module):
    """A block used in two regions, and a layer outside of them."""

    def __init__(self, block: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.block, self.norm, self.run = block, norm, checkpointed

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.run(self.block, self.run(self.block, x)))
        return y

    def without_regions(self) -> Regions:
        twin = copy.deepcopy(self)
        twin.run = lambda region, x: region(x)
        return twin


REGIONS: dict[str, Callable[[], Regions]] = {
    "streaming": lambda: Regions(Twice(sn.StreamingNorm1d(6)), sn.StreamingNorm1d(6)),
    "batch": lambda: Regions(Twice(sn.GeneralBatchNorm(6)), sn.GeneralBatchNorm(6)),
    "cells": lambda: Regions(Cells(), sn.StreamingNorm1d(6)),
    "in place": lambda: Regions(InPlace(), sn.StreamingNorm1d(6)),
}


@pytest.mark.filterwarnings("ignore:.*context_fn is passed")
@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "aot_eager") for name in REGIONS), ("streaming", "aot_eager_decomp_partition")],
)
def test_a_checkpoint_inside_a_graph(name: str, backend: str) -> None:
    """With the partition that saves most, and with the default backend's, which weighs memory against time."""
    model = REGIONS[name]().double()
    twin = model.without_regions()
    assert_same(model, torch.compile(model, backend=backend, fullgraph=True), VECTORS[:2], beside=twin)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler, g++")
@pytest.mark.filterwarnings("ignore:.*context_fn is passed")
@pytest.mark.parametrize("inside", [False, True])
def test_checkpoints_with_the_default_backend(inside: bool) -> None:
    model = REGIONS["streaming"]()
    twin = model.without_regions()
    if inside:
        assert_same(model, torch.compile(model, fullgraph=True), VECTORS[:2], near=2e-4, beside=twin)
        return
    block = torch.compile(model.block, fullgraph=True)
    model.run = lambda region, x: checkpointed(block, x)
    assert_same(model, model, VECTORS[:2], near=2e-4, beside=twin)


@pytest.mark.parametrize("name", list(REGIONS))
def test_a_graph_inside_a_checkpoint(name: str) -> None:
    """Regions of eager mode around compiled blocks; the layer outside stays as it is."""
    model = REGIONS[name]().double()
    twin = model.without_regions()
    block = torch.compile(model.block, backend="aot_eager", fullgraph=True)
    model.run = lambda region, x: checkpointed(block, x)
    assert_same(model, model, VECTORS[:2], beside=twin)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.filterwarnings("ignore:.*context_fn is passed")
@pytest.mark.parametrize("regions", ["none", "in the graph", "around the graph"])
def test_a_second_backward_pass_counts_no_sample_twice(regions: str) -> None:
    """As in eager mode (``test_another_pass.py``), over several updates, one of them between the passes."""
    model = REGIONS["streaming"]().double()
    twin = model.without_regions()
    run: Any = model
    if regions == "around the graph":
        block = torch.compile(model.block, backend="aot_eager", fullgraph=True)
        model.run = lambda region, x: checkpointed(block, x)
    else:
        model.run = checkpointed if regions == "in the graph" else twin.run
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for number in range(4):
        x = torch.randn(5, 6, dtype=torch.float64)
        dys = torch.randn(2, 5, 6, dtype=torch.float64)
        ends = []
        for forward, each in ((run, model), (twin, twin)):
            leaf = x.clone().requires_grad_()
            y = forward(leaf)
            y.backward(dys[0], retain_graph=True)
            if number == 2:
                sn.commit(each)
            y.backward(dys[1])
            ends.append([leaf.grad, *(p.grad for p in each.parameters()), *(b.clone() for b in each.buffers())])
            each.zero_grad()
            if number % 2:
                sn.commit(each)
        for ours, theirs in zip(*ends, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_region_with_both_kinds_of_layers() -> None:
    """A part of it compiled, regions within regions, a graph that is gone through backward twice."""
    model = Twice(sn.StreamingNorm1d(6)).double()
    plain = sn.StreamingNorm1d(6).double()
    both = nn.ModuleList([model, plain])
    twin = copy.deepcopy(both)
    part = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    y = checkpointed(lambda x: part(plain(checkpointed(part, x))), x)
    z = twin[0](twin[1](twin[0](x)))
    for again in (True, False):
        for results, parameters in ((y, both.parameters()), (z, twin.parameters())):
            results.square().sum().backward(retain_graph=again, inputs=[*parameters])
    for ours, theirs in zip(both.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    for kept, expected in zip(both.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(kept, expected, rtol=1e-10, atol=1e-10)


def test_a_region_in_a_graph_saves_memory() -> None:
    """Of a whole region, what goes in is kept, and what each use needs to be computed again."""
    kept = []
    for run in (checkpointed, lambda region, x: region(x)):
        model = REGIONS["streaming"]()
        model.run = run
        torch.compiler.reset()
        graph: Any = torch.compile(model, backend="aot_eager", fullgraph=True)(torch.randn(1000, 6, requires_grad=True))
        kept.append(sum(len(t) == 1000 for t in graph.grad_fn.saved_tensors if t.dim() == 2))
    assert kept[0] <= 4 < kept[1]


@pytest.mark.parametrize("inside", [False, True])
def test_an_unannounced_checkpoint_is_refused(inside: bool) -> None:
    model = Twice(sn.StreamingNorm1d(6))

    def region(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y: Tensor = checkpoint(run, x, use_reentrant=False)
        return y

    def train() -> None:
        x = torch.randn(4, 6, requires_grad=True)
        if inside:
            y = torch.compile(lambda x: region(model, x), backend="aot_eager", fullgraph=True)(x)
        else:
            y = region(torch.compile(model, backend="aot_eager", fullgraph=True), x)
        y.sum().backward()

    with pytest.raises(Exception, match=r"use_reentrant=False, context_fn=sn\.checkpoint_context_fn"):
        train()
    assert int(model.norm.samples) == (0 if inside else 8)  # type: ignore[arg-type]


def test_a_region_that_changes_its_order_is_refused() -> None:
    """The operator by itself, which is what a compiled graph calls."""
    times = [1, 2]

    def region(x: Tensor) -> Tensor:
        for _ in range(times.pop(0)):
            x = x + torch.ops.streamnorm.hold(x.detach())[0]
        return x.sin()

    y = checkpointed(region, torch.randn(3, 2, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"a compiled layer is used .* in the same order each time"):
        y.sum().backward()


def test_importing_does_not_import_the_compiler() -> None:
    """It takes seconds."""
    code = "import sys, streamnorm; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
