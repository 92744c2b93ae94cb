"""DAU: a group of mini-batches is worth what their union is worth."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import streamnorm as sn


def weights(groups: Any) -> list[list[float]]:
    return [[weight for _, weight in group] for group in groups]


def sized(*sizes: int) -> list[Tensor]:
    return [torch.randn(size, 3) for size in sizes]


# Groups and weights


@pytest.mark.parametrize(
    ("sizes", "batches", "expected"),
    [
        ((2, 2, 2, 2), 2, [[0.5, 0.5], [0.5, 0.5]]),
        ((2, 2, 2), 2, [[0.5, 0.5], [1.0]]),
        ((1, 3, 4, 6, 2), 3, [[1 / 8, 3 / 8, 4 / 8], [6 / 8, 2 / 8]]),
        ((5, 4), 1, [[1.0], [1.0]]),
        ((5, 5), 9, [[0.5, 0.5]]),
        ((0, 4), 2, [[0.0, 1.0]]),
        ((0,), 2, [[0.0]]),
        ((), 2, []),
    ],
)
def test_a_mini_batch_weighs_its_samples(sizes: tuple[int, ...], batches: int, expected: list[list[float]]) -> None:
    assert weights(sn.accumulate(sized(*sizes), batches)) == expected


def test_every_mini_batch_comes_once_and_in_order() -> None:
    loader = sized(*range(1, 12))
    seen = [batch for group in sn.accumulate(loader, 4) for batch, _ in group]
    assert len(seen) == 11
    assert all(ours is theirs for ours, theirs in zip(seen, loader))


@pytest.mark.parametrize("n", [1, 3, 7, 49, 1000])
def test_the_weights_of_a_group_sum_to_one(n: int) -> None:
    (group,) = weights(sn.accumulate(sized(*([3] * n)), n))
    assert sum(group) == pytest.approx(1, abs=1e-12)


def test_samples_are_counted_in_what_loaders_give() -> None:
    x, target = torch.randn(4, 3), torch.zeros(4)
    batches: list[Any] = [
        x,
        (x, target),
        [x, target],
        {"x": x, "y": target},
        ("name", x),
        {"ids": ["a", "b"], "inner": {"x": x}},
        ([x, x], target),
        (torch.tensor(3.0), x),
        pack_sequence([torch.randn(length, 3) for length in (5, 3, 2, 1)]),
    ]
    for batch in batches:
        assert weights(sn.accumulate([batch, torch.randn(12, 3)], 2)) == [[0.25, 0.75]]


def test_a_data_loader_whose_last_mini_batch_is_shorter() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(23, 3), torch.zeros(23))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    assert weights(sn.accumulate(loader, 4)) == [[0.25] * 4, [4 / 7, 3 / 7]]


def test_one_group_is_held_at_a_time() -> None:
    taken = []

    def loader() -> Iterator[Tensor]:
        for batch in sized(2, 2, 2, 2, 2):
            taken.append(batch)
            yield batch

    groups = sn.accumulate(loader(), 2)
    assert taken == []
    next(groups)
    assert len(taken) == 2
    next(groups)
    assert len(taken) == 4


def test_a_loader_can_be_gone_through_again() -> None:
    loader = sized(2, 4)
    assert weights(sn.accumulate(loader, 2)) == weights(sn.accumulate(loader, 2)) == [[1 / 3, 2 / 3]]


@pytest.mark.parametrize("batches", [0, -3])
def test_fewer_than_one_mini_batch_is_refused_at_once(batches: int) -> None:
    with pytest.raises(ValueError, match=rf"at least 1, got {batches}"):
        sn.accumulate(sized(2), batches)


@pytest.mark.parametrize("batch", ["text", 3, (1, 2), {"ids": ["a"]}, torch.tensor(1.0), []], ids=str)
def test_a_mini_batch_without_a_tensor_is_refused(batch: Any) -> None:
    with pytest.raises(TypeError, match=rf"samples of a {type(batch).__name__}.*samples first"):
        next(sn.accumulate([batch], 2))


# The gradient of the union


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (1, 2, 5, 3), (7,), (1, 1, 1, 1, 1)], ids=str)
def test_the_gradient_is_that_of_the_union(sizes: tuple[int, ...]) -> None:
    """For a model whose samples do not see each other."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    union = copy.deepcopy(model)
    x = torch.randn(sum(sizes), 3, dtype=torch.float64)
    for group in sn.accumulate(x.split(sizes), len(sizes)):
        for batch, weight in group:
            (weight * model(batch).square().mean()).backward()
    union(x).square().mean().backward()
    for ours, theirs in zip(model.parameters(), union.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_a_shorter_last_group_has_the_gradient_of_its_union() -> None:
    model = nn.Linear(3, 1).double()
    loader = [batch.double() for batch in sized(2, 3, 1, 4, 2)]
    gradients = []
    for group in sn.accumulate(loader, 3):
        model.zero_grad()
        for batch, weight in group:
            (weight * model(batch).square().mean()).backward()
        gradients.append(copy.deepcopy(model.weight.grad))
    for gradient, union in zip(gradients, (torch.cat(loader[:3]), torch.cat(loader[3:]))):
        model.zero_grad()
        model(union).square().mean().backward()
        torch.testing.assert_close(gradient, model.weight.grad, rtol=1e-12, atol=1e-14)


# With streaming layers


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def test_it_is_accumulation_by_hand(engine: str) -> None:
    """Equal mini-batches, a power of two of them: each weight is exact, and so is the equality."""
    loader = sized(*([2] * 16))
    ours, by_hand = network(), network()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    for group in sn.accumulate(loader, 4):
        for batch, weight in group:
            (weight * ours(batch).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for number, batch in enumerate(loader, 1):
        (by_hand(batch).square().mean() / 4).backward()
        if number % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
    for (name, tensor), theirs in zip(ours.state_dict().items(), by_hand.state_dict().values()):
        assert tensor.equal(theirs), name


def test_statistics_accumulate_with_the_gradients(engine: str) -> None:
    model = network()
    layer: Any = model[1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    samples = []
    for group in sn.accumulate(sized(2, 3, 1, 4, 2), 3):
        for batch, weight in group:
            (weight * model(batch).square().mean()).backward()
        samples.append((int(layer.samples), int(layer.grad_samples), layer.count.tolist()))
        optimizer.step()
        optimizer.zero_grad()
        assert int(layer.samples) == 0
    assert samples == [(6, 6, [6] * 4), (6, 6, [6] * 4)]
