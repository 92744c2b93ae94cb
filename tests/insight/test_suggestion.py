"""The suggestion: it disturbs nothing, and what it says is so."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

import streamnorm as sn
from streamnorm.insight import Suggestion
from streamnorm.insight import suggestion as module

cross_entropy: Callable[..., Tensor] = F.cross_entropy


def network(**options: Any) -> nn.Sequential:
    """With layers of others that keep statistics, and one that draws random numbers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        sn.StreamingNorm2d(6, **options),
        nn.ReLU(),
        nn.BatchNorm2d(6),
        nn.Dropout(0.1),
        nn.Conv2d(6, 8, 3),
        sn.StreamingNorm2d(8, **options),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


@cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16, torch.tensor(data.target)[order]


def batches(size: int, count: int) -> list[tuple[Tensor, Tensor]]:
    x, y = digits()
    return list(zip(x.split(size), y.split(size)))[:count]


few = partial(sn.suggest, loss=cross_entropy, rates=(1e-3, 1e-1), updates=4)
"""As little as can be tried."""


class Shuffled(TensorDataset):
    """Data that draw random numbers of every kind when they are read."""

    def __getitem__(self, index: Any) -> Any:
        random.random(), np.random.rand()  # noqa: NPY002
        return super().__getitem__(index)


# Nothing is disturbed


@pytest.mark.parametrize("affine", [True, False])
def test_training_goes_on_as_if_nothing_had_been(affine: bool) -> None:
    """In the middle of an update, bit for bit: weights, statistics, gradients, the optimizer, random numbers."""
    ends = []
    for asked in (True, False):
        model = network(affine=affine)
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
        own = torch.Generator().manual_seed(4)
        loader = DataLoader(Shuffled(*(part[:64] for part in digits())), 4, shuffle=True, generator=own)
        plain = DataLoader(Shuffled(*(part[:64] for part in digits())), 4, shuffle=True)
        for i, batch in enumerate(loader):
            model.eval() if i == 7 else model.train()
            cross_entropy(model(batch[0]), batch[1]).backward()
            if asked and i in (0, 7):
                before = [parameter.grad for parameter in model.parameters()]
                few(model, loader), few(model, plain)
                assert all(a is b for a, b in zip(before, (parameter.grad for parameter in model.parameters())))
                assert all(module.training == (i != 7) for module in model.modules())
            if i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
        of_numpy = np.random.rand()  # noqa: NPY002
        drawn = [torch.tensor((random.random(), of_numpy)), torch.rand(2), own.get_state()]
        kept = [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]
        ends.append([*kept, *(s["momentum_buffer"] for s in optimizer.state.values()), *drawn])
    for ours, theirs in zip(*ends, strict=True):
        assert ours.equal(theirs)


def test_layers_that_no_optimizer_trains_wait_however_many_steps_are_made() -> None:
    """Without set_aside these would take the steps of an optimizer that trains copies for their own."""
    model = network(affine=False)
    for x, _ in batches(4, 3):
        model(x)
    other = nn.Sequential(nn.Linear(2, 2), sn.StreamingNorm1d(2, affine=False))
    other(torch.randn(3, 2))
    sn.suggest(model, batches(4, 40), cross_entropy, rates=(1e-4, 1e-3), updates=100)
    assert [int(m.samples) for m in (model[1], model[6], other[1])] == [12, 12, 3]  # type: ignore[arg-type]


def test_a_monitor_counts_no_updates_of_copies() -> None:
    model = network()
    with sn.monitor(model, 1) as watching:
        few(model, batches(4, 8))
        assert watching.record.updates == 0


def test_hooks_of_parameters_stay_quiet() -> None:
    """An optimizer whose steps are made within backward would train the model."""
    model = network()
    called: list[Tensor] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(called.append)
    few(model, batches(4, 8))
    assert not called


def test_all_is_as_before_when_the_loss_raises() -> None:
    model = network()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        few(model, batches(4, 8), loss=loss)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert torch.get_rng_state().equal(state)


# What it says is so


def test_a_loss_is_that_of_the_training_that_it_stands_for() -> None:
    """Written out: the mean loss of the second half, each mini-batch judged before it is learnt from."""
    model, made = network(), batches(4, 32)
    found = sn.suggest(model, made, cross_entropy, accumulate=2, rates=(3e-3,), updates=12)
    own = network()
    optimizer = SGD(own.parameters(), lr=3e-3, momentum=0.9)
    losses = []
    for group in sn.accumulate(made[:24], 2):
        optimizer.zero_grad()
        values = [weight * cross_entropy(own(x), y) for (x, y), weight in group]
        for value in values:
            value.backward()
        optimizer.step()
        losses.append(sum(value.item() for value in values))
    # Dropout draws other numbers there.
    assert found.rates[3e-3] == pytest.approx(sum(losses[6:]) / 6, rel=0.3)
    assert (found.updates, found.samples) == (12, 8)


def test_without_random_numbers_it_is_exactly_that() -> None:
    model, made = network().eval(), batches(4, 32)
    model[4] = nn.Identity()
    found = sn.suggest(model, made, cross_entropy, Adam, rates=(3e-3,), updates=12)
    own = network()
    own[4] = nn.Identity()
    optimizer = Adam(own.parameters(), lr=3e-3)
    losses = []
    for x, y in made[:12]:
        optimizer.zero_grad()
        loss = cross_entropy(own(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert found.rates[3e-3] == sum(losses[6:]) / 6
    assert found.memories[1.0] == found.rates[3e-3]


@pytest.mark.filterwarnings("ignore:.* runs away")  # at the highest rates
@pytest.mark.parametrize("size", [1, 8])
def test_the_rate_trains_nearly_as_well_as_the_best_of_all(size: int) -> None:
    """On other data and for longer: the loss is not far above the lowest one of the grid."""
    model = network()
    found = sn.suggest(model, batches(size, 120), cross_entropy, updates=90)
    assert 1e-5 < found.rate < 1
    x, y = (part[800:1200] for part in digits())
    ends = {}
    for rate in (found.rate, *module.RATES[3:9:2]):
        own = network()
        optimizer = SGD(own.parameters(), lr=rate, momentum=0.9)
        losses = []
        for a, b in zip(x.split(size), y.split(size)):
            optimizer.zero_grad()
            loss = cross_entropy(own(a), b)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if not loss.isfinite():
                break
        half = losses[len(losses) // 2 :]
        ends[rate] = sum(half) / len(half)
    best = min(value for value in ends.values() if value == value)
    assert ends[found.rate] < 1.5 * best + 0.1


def test_rates_beyond_the_second_that_is_worse_are_not_tried() -> None:
    found = sn.suggest(network(), batches(4, 60), cross_entropy, rates=(1e-3, 1e-2, 1e4, 1e6, 1e8, 1e10), updates=40)
    assert list(found.rates) == [1e-3, 1e-2, 1e4, 1e6]
    assert found.rates[1e6] == float("inf")
    assert found.rate in (1e-3, 1e-2)
    assert "not finite" in repr(found)


def test_the_smallest_rate_between_which_and_the_best_there_is_no_clear_difference() -> None:
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    quiet = [0.1 * value for value in noise]

    def trial(mean: float, around: list[float]) -> Any:
        return module._Trial([mean + value for value in around], mean)

    assert module._smallest_of_the_best({1e-3: trial(1.05, noise), 1e-2: trial(1.0, quiet)}) == 1e-3
    assert module._smallest_of_the_best({1e-3: trial(1.05, quiet), 1e-2: trial(1.0, quiet)}) == 1e-2
    assert module._smallest_of_the_best({1e-3: trial(2.0, noise), 1e-2: trial(1.0, quiet)}) == 1e-2
    assert module._smallest_of_the_best({1e-3: trial(1.0, quiet), 1e-2: module._Trial([float("inf")], 9.0)}) == 1e-3


def test_a_memory_that_is_much_too_long_is_shortened_and_applied() -> None:
    """Statistics that hardly move from where they start are not those of the data."""
    layer = sn.StreamingNorm1d(32)
    layer.set_stream(sn.Stream(window=2000.0, limit=math.inf))  # the bound would make up for it
    layer.long[1] = 100.0
    layer.seen.fill_(10**6)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), layer, nn.ReLU(), nn.Linear(32, 10))
    found = sn.suggest(model, batches(8, 120), cross_entropy, rates=(1e-2,), updates=100)
    assert found.memory < 1
    assert found.windows == {"2": found.memory * 2000.0}
    assert found.window == found.memory * 2000.0
    assert layer.formula.window == 2000.0
    for _ in range(2):
        found.apply(model)
        assert layer.formula.window == found.window
    assert f"window {found.window:g}" in repr(found)


def test_layers_with_memories_of_their_own_keep_their_ratio() -> None:
    model = network()
    model[6] = sn.StreamingNorm2d(8, window=40)
    found = few(model, batches(4, 8))
    assert found.window is None
    assert found.windows["6"] == 40 * found.memory
    assert "memory ×" in repr(found)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, partial(sn.StreamingNorm2d, kappa=0.7)])
def test_without_a_window_it_is_about_rates_alone(norm: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm(4), nn.Flatten(), nn.Linear(144, 10))
    found = few(model, batches(4, 8))
    assert (found.memory, found.windows, found.memories, found.window) == (1, {}, {}, None)
    assert "window" not in repr(found)
    found.apply(model)


def test_outputs_with_a_loss_and_mini_batches_that_are_dictionaries() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = network()

        def forward(self, image: Tensor, label: Tensor) -> dict[str, Tensor]:
            return {"loss": cross_entropy(self.inside(image), label)}

    made = [{"image": x, "label": y} for x, y in batches(4, 8)]
    found = sn.suggest(Model(), made, rates=(1e-3, 1e-2), updates=4)
    assert found.samples == 4
    assert found.rate in (1e-3, 1e-2)


def test_the_number_of_updates_follows_from_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which each mini-batch takes a hundredth of a second. A generator is read no further than needed."""
    read, seen = [], []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(len(target))
        return cross_entropy(output, target)

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: len(seen) / 100))

    def loader() -> Any:
        for batch in batches(1, 1600):
            read.append(batch)
            yield batch

    found = sn.suggest(network(), loader(), loss, rates=(1e-4, 1e-3), seconds=4)
    assert module.FEWEST < found.updates < module.MOST
    assert 2 < found.seconds < 6
    assert len(read) == found.updates + -(-found.updates // 4)


def test_evaluation_sees_other_mini_batches_than_training() -> None:
    """As many as fit, and the last ones of a loader that has too few for a whole training."""
    read = module._Batches(range(100))
    assert read.parts(8) == ([*range(8)], [8, 9])
    assert read.parts(4) == ([*range(4)], [4])
    few_of_them = module._Batches(range(10))
    assert few_of_them.parts(20) == ([*range(8), *range(8), *range(4)], [8, 9])
    assert module._Batches(range(1)).parts(3) == ([0, 0, 0], [0])


def test_a_compiled_model_is_tried_as_it_is_without() -> None:
    model = network()
    compiled: Any = torch.compile(model, backend="eager")
    assert few(compiled, batches(4, 8)).rates == few(model, batches(4, 8)).rates


# Mistakes


def refused(error: type[Exception], message: str, *args: Any, **options: Any) -> None:
    """One clear sentence."""
    with pytest.raises(error, match=message):
        sn.suggest(*args, **options)


def test_mistakes_are_named() -> None:
    model, made = network(), batches(4, 4)
    refused(ValueError, "there are no mini-batches in loader", model, [], cross_entropy, updates=2)
    refused(TypeError, "loader is an iterable of mini-batches", model, 5, cross_entropy, updates=2)
    refused(ValueError, "there is no loss: give one", model, made, updates=2)
    refused(ValueError, "loss must give one number", model, made, lambda y, t: y, updates=2)
    refused(ValueError, "rates are the learning rates to try, numbers above 0, got \\(0,\\)", model, made, rates=(0,))
    refused(ValueError, "numbers above 0, got \\[\\]", model, made, rates=[])
    refused(TypeError, "rates are the learning rates to try", model, made, rates=0.1)
    refused(ValueError, "accumulate is the number of mini-batches per update", model, made, accumulate=0)
    refused(ValueError, "updates is the number of weight updates", model, made, updates=0)
    refused(ValueError, "seconds is how long it may take, a number above 0, got -1", model, made, seconds=-1)
    refused(ValueError, "seconds=1e-06 are enough for 0 weight", model, made, cross_entropy, seconds=1e-6)
    refused(ValueError, "not finite at any rate from 1e\\+20 on", model, made, cross_entropy, rates=(1e20,), updates=9)
    refused(TypeError, "in the int that it made", model, made, cross_entropy, lambda p, lr: 5, updates=2)
    refused(TypeError, "expected a layer or a model", [model], made, cross_entropy, updates=2)
    refused(ValueError, "ReLU has no parameter that requires a gradient", nn.ReLU(), made, cross_entropy)


def test_a_model_that_cannot_be_copied() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(3, 3)
            self.computed = 2 * self.inside.weight

    refused(ValueError, "Model cannot be copied, and copies are trained", Model(), batches(4, 4), cross_entropy)


def test_what_was_tried_is_shown() -> None:
    found = Suggestion(0.01, 0.25, {"1": 25.0}, {0.01: 1.25, 0.1: float("inf")}, {1.0: 1.25, 0.25: 1.0}, 50, 4.0, 3.2)
    assert repr(found).splitlines() == [
        "rate 0.01, window 25: 3 trainings of 50 weight updates of 4 samples, 3 s",
        "  rate 0.01     loss 1.25",
        "  rate 0.1      loss not finite",
        "  memory ×0.25   loss 1",
        "  memory ×1      loss 1.25",
        "It is the lowest rate that was tried: give others with rates=",
    ]
