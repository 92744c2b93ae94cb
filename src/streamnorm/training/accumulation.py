"""DAU, decoupled accumulation and update: several mini-batches, then one step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..core import arguments

Batch = TypeVar("Batch")


def accumulate(loader: Iterable[Batch], batches: int) -> Iterator[list[tuple[Batch, float]]]:
    """Group mini-batches that share a weight update, each with its weight in the group (the paper's DAU).

    The weight of a mini-batch is its share of the group's samples, so that a group of unequal mini-batches gives the
    gradient of their union. The last group may be shorter. One group is held in memory at a time.

    Args:
        loader: any iterable of mini-batches: tensors, or tuples, lists or dicts that hold some, samples first.
        batches: mini-batches per update (B/U), at least 1.

    Yields:
        Groups, each a list of ``(batch, weight)``.

    Raises:
        ValueError: if ``batches`` is below 1.
        TypeError: if ``batches`` is no integer, or a mini-batch holds no tensor to count samples by.

    Example:
        >>> import torch
        >>> model, loader = torch.nn.Linear(3, 1), [torch.randn(2, 3), torch.randn(6, 3), torch.randn(4, 3)]
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for group in accumulate(loader, 2):
        ...     optimizer.zero_grad()
        ...     for batch, weight in group:
        ...         (weight * model(batch).square().mean()).backward()
        ...     optimizer.step()
        ...     print([weight for _, weight in group])
        [0.25, 0.75]
        [1.0]
    """
    meaning = "batches is the number of mini-batches per weight update, an integer of at least 1"
    batches = arguments.whole(batches, meaning)
    return _groups(arguments.iterator(loader, "loader"), batches)


def _groups(loader: Iterator[Batch], batches: int) -> Iterator[list[tuple[Batch, float]]]:
    while group := list(islice(loader, batches)):
        sizes = [num_samples(batch) for batch in group]
        total = sum(sizes) or 1
        yield [(batch, size / total) for batch, size in zip(group, sizes)]


def num_samples(batch: Any) -> int:
    """Samples of a mini-batch: the length of the first tensor in it."""
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    if isinstance(batch, Tensor) and batch.dim() > 0:
        return len(batch)
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else ()
    for part in () if isinstance(batch, str) else parts:
        try:
            return num_samples(part)
        except TypeError:
            continue
    raise TypeError(
        f"cannot count the samples of a {type(batch).__name__}: a mini-batch holds a tensor with the samples first"
    )
