"""Activation checkpointing: everything as without it, bit for bit, or an error that says what to add."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import streamnorm as sn


def checkpointed(region: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(region, *args, use_reentrant=False, context_fn=sn.checkpoint_context_fn)


def directly(region: Callable[..., Any], *args: Any) -> Any:
    return region(*args)


Run = Callable[..., Any]


class Twice(nn.Module):
    """A layer used twice in a region, as a recurrent convolutional network does."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(4, 4), norm(4), nn.Linear(4, 2)

    def block(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + torch.relu(self.norm(self.linear(x)))
        return x

    def forward(self, x: Tensor, run: Run) -> Tensor:
        y: Tensor = self.head(run(self.block, run(self.block, x)))
        return y


class Nested(Twice):
    """A region inside a region."""

    def forward(self, x: Tensor, run: Run) -> Tensor:
        y: Tensor = self.head(run(lambda x: run(self.block, self.norm(run(self.block, x))), x))
        return y


class Masked(Twice):
    """With padding, which has tensors of its own to keep."""

    def block(self, x: Tensor) -> Tensor:
        mask = torch.arange(len(x)) != 1
        return torch.relu(self.norm(self.linear(x), mask) + x)


class Cells(nn.Module):
    """A loop over time steps, each a region."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.gru, self.lstm = sn.GRUCell(4, 4, **options), sn.LSTMCell(4, 4, **options)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        return self.lstm(x, (self.gru(x, h), c))

    def forward(self, x: Tensor, run: Run) -> Tensor:
        h, c = x, x
        for t in range(3):
            h, c = run(self.step, x + t, h, c)
        return h + c


class Layer(nn.Module):
    """A whole recurrent layer in a region."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rnn = sn.LSTM(2, 4, num_layers=2, bidirectional=True, **options)

    def forward(self, x: Tensor, run: Run) -> Tensor:
        return run(lambda x: self.rnn(x)[0], torch.stack([x, x.flip(0)], 2).movedim(1, 0)).square()


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "streaming": sn.StreamingNorm1d,
    "paper": lambda n: sn.StreamingNorm1d(n, alpha=(0.5, 0.3, 0.2), beta=(0.6, 0.2, 0.2), p=2, affine=False),
    "batch": sn.GeneralBatchNorm,
    "batch, average": lambda n: sn.GeneralBatchNorm(n, momentum=None, ghosts=2),
    "sample": sn.SampleNorm,
}
Make = Callable[[], nn.Module]
MODELS: dict[str, Make] = {
    **{f"twice, {name}": partial(Twice, norm) for name, norm in NORMS.items()},
    "nested": partial(Nested, sn.StreamingNorm1d),
    "nested, batch": partial(Nested, sn.GeneralBatchNorm),
    "masked": partial(Masked, sn.StreamingNorm1d),
    **{f"cells, {norm}": partial(Cells, norm=norm) for norm in ("streaming", "batch", "layer")},
    **{f"layer, {norm}": partial(Layer, norm=norm) for norm in ("streaming", "batch", "layer")},
    "layer, per step": partial(Layer, norm="batch-per-step", max_steps=3),
}


def train(model: nn.Module, run: Run, updates: int = 3) -> list[Tensor]:
    """DAU, two mini-batches to an update; the second is gone through backward twice. All that comes out of it."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = []
    for _ in range(updates):
        for samples, times in ((4, 1), (6, 2)):
            x = torch.randn(samples, 4, requires_grad=True)
            loss = model(x, run).square().mean()
            for again in range(times):
                loss.backward(retain_graph=again < times - 1)
            assert x.grad is not None
            seen += [loss.detach(), x.grad]
        optimizer.step()
        seen += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        optimizer.zero_grad()
    return seen + list(model.state_dict().values())


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_all_is_as_without_checkpointing(engine: str, make: Callable[[], nn.Module]) -> None:
    model = make()
    twin = copy.deepcopy(model)
    for ours, theirs in zip(train(model, checkpointed), train(twin, directly), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(engine: str, dtype: torch.dtype) -> None:
    model = Twice(sn.StreamingNorm1d)
    twin = copy.deepcopy(model)
    results = []
    for each, run in ((model, checkpointed), (twin, directly)):
        with torch.autocast("cpu", dtype):
            y = each(torch.linspace(-1, 2, 20).view(5, 4), run)
        y.square().mean().backward()
        results.append([y, *(p.grad for p in each.parameters()), *each.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_commit_between_forward_and_backward(engine: str) -> None:
    """The second pass goes by the long-term statistics that the first one had."""
    results = []
    model = Twice(sn.StreamingNorm1d)
    for each, run in ((copy.deepcopy(model), checkpointed), (model, directly)):
        torch.manual_seed(2)
        y = each(torch.randn(5, 4) + 1, run)
        sn.commit(each)
        y.square().mean().backward()
        results.append([p.grad for p in each.parameters()] + list(each.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_frozen_and_evaluating_layers_need_nothing(engine: str) -> None:
    model = Twice(sn.StreamingNorm1d)
    for prepared in (sn.freeze(model), sn.unfreeze(model).eval()):
        x = torch.randn(3, 4)
        y = prepared(x, lambda region, x: checkpoint(region, x, use_reentrant=False))
        y.sum().backward()
        assert y.equal(prepared(x, directly))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of a region inside a reentrant one
@pytest.mark.parametrize("name", [name for name in MODELS if "sample" not in name and "layer" not in name])
@pytest.mark.parametrize("reentrant", [False, True])
def test_an_unannounced_second_pass_is_refused(engine: str, reentrant: bool, name: str) -> None:
    """And what the first pass collected stays."""
    model = MODELS[name]()
    y = model(torch.randn(4, 4, requires_grad=True), lambda f, *args: checkpoint(f, *args, use_reentrant=reentrant))
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(RuntimeError, match=r"use_reentrant=False, context_fn=sn\.checkpoint_context_fn"):
        y.sum().backward()
    assert all(buffer.equal(kept) for buffer, kept in zip(model.buffers(), before, strict=True))


def test_the_last_layer_of_a_region_without_announcement(engine: str) -> None:
    """Its backward is the first to ask for what was saved."""
    layer = sn.StreamingNorm1d(4)
    y = checkpoint(layer, torch.randn(3, 4, requires_grad=True), use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"context_fn=sn\.checkpoint_context_fn"):
        y.sum().backward()


def test_a_recurrent_layer_without_announcement(engine: str) -> None:
    layer = sn.GRU(4, 4)
    y, _ = checkpoint(layer, torch.randn(3, 2, 4, requires_grad=True), use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"context_fn=sn\.checkpoint_context_fn"):
        y.sum().backward()


def test_a_region_that_changes_its_order_is_refused() -> None:
    first, second = sn.StreamingNorm1d(4), sn.StreamingNorm1d(4)
    order = [first, second]

    def region(x: Tensor) -> Tensor:
        for layer in order:
            x = layer(x).sin()
        order.reverse()
        return x

    y = checkpointed(region, torch.randn(5, 4, requires_grad=True))
    before = [buffer.clone() for layer in (first, second) for buffer in layer.buffers()]
    with pytest.raises(RuntimeError, match="in the same order each time"):
        y.sum().backward()
    after = [buffer for layer in (first, second) for buffer in layer.buffers()]
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))


def test_memory_is_let_go() -> None:
    """The tape goes with the graph."""
    layer = sn.StreamingNorm1d(4)
    y = checkpointed(layer, torch.randn(5, 4, requires_grad=True))
    y.sum().backward()
    gone = weakref.ref(layer)
    del y, layer
    gc.collect()
    assert gone() is None
