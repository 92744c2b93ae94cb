"""The third step of a shape takes a short way: whatever changed in between counts as it does on the long one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import streamnorm as sn
from streamnorm import ops
from streamnorm.layers import Norm


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _parametrize(layer: Norm) -> None:
    parametrize.register_parametrization(layer, "weight", _Doubled())


def _load_other_precision(layer: Norm) -> None:
    state = {name: t.double() if t.is_floating_point() else t for name, t in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def _new_gain(layer: Norm) -> None:
    layer.weight = nn.Parameter(torch.full((6,), 3.0))


CHANGES: dict[str, Callable[[Norm], object]] = {
    "nothing": lambda layer: None,
    "other constants": lambda layer: layer.set_stream(sn.Stream(alpha=(0.2, 0.3, 0.5), beta=(0, 0, 1))),
    "double precision": lambda layer: layer.double(),
    "a state of double precision": _load_other_precision,
    "a new gain": _new_gain,
    "a parametrized gain": _parametrize,
    "frozen": sn.freeze,
    "eval": lambda layer: layer.eval(),
    "a forgotten past": sn.reset_stats,
    "a commit": sn.commit,
}


def _step(layer: Norm, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.to(layer.long.dtype).requires_grad_()
    y = layer(x)
    y.backward(dy.to(x.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, *(buffer.clone() for buffer in layer.state)]


def _same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_between_two_steps_of_a_shape_counts(change: Callable[[Norm], object]) -> None:
    layer = sn.StreamingNorm2d(6)
    inputs = [torch.randn(3, 6, 4, 4) + i for i in range(3)]
    for _ in range(2):
        _step(layer, inputs[0], inputs[1])
    fresh = copy.deepcopy(layer)  # which has not taken any shape yet
    assert layer._repeats
    assert not fresh._repeats
    change(layer)
    change(fresh)
    assert _same(_step(layer, inputs[1], inputs[2]), _step(fresh, inputs[1], inputs[2]))


def test_masks_and_other_shapes_in_between_count() -> None:
    layer = sn.StreamingNorm2d(6)
    x, small = torch.randn(3, 6, 4, 4), torch.randn(2, 6, 4, 4)
    for _ in range(2):
        _step(layer, x, x)
    fresh = copy.deepcopy(layer)
    results = []
    for used in (layer, fresh):
        with torch.no_grad():
            used(x, mask=torch.tensor([True, False, True]))
            used(small)
        results.append(_step(used, x, x))
    assert _same(*results)


def test_an_input_that_is_refused_changes_nothing() -> None:
    layer = sn.StreamingNorm2d(6)
    x = torch.randn(3, 6, 4, 4)
    for _ in range(2):
        layer(x)
    before = [buffer.clone() for buffer in layer.state]
    for wrong, error, message in (
        (x.double(), TypeError, "input is torch.float64 and the layer's state torch.float32"),
        (x.long(), TypeError, "floating point"),
        (x.to("meta"), RuntimeError, r"input is on meta and the layer's state on cpu: .* model.to\('meta'\)"),
    ):
        with pytest.raises(error, match=message):
            layer(wrong)
    assert _same(list(layer.state), before)


def test_a_forced_engine_is_taken() -> None:
    layer = sn.StreamingNorm2d(6)
    x = torch.randn(3, 6, 4, 4)
    for _ in range(2):
        layer(x)
    with ops.force("plain"):
        name = type(layer(x).grad_fn).__name__
    assert name != type(layer(x).grad_fn).__name__


def _count_tries(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that are tried on the short way from now on."""
    tries, attempt = [], ops.short_way.attempt

    def counted(x: Tensor, *others: Any) -> Any:
        tries.append(x)
        return attempt(x, *others)

    monkeypatch.setattr(ops.short_way, "attempt", counted)
    return tries


def test_one_try_where_the_engine_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose inputs are not for the short way does not pay for trying it."""
    layer, tries = sn.StreamingNorm2d(6), _count_tries(monkeypatch)
    gaps = torch.randn(3, 6, 4, 8)[..., ::2]
    for _ in range(3):
        layer(gaps)
    assert len(tries) == 3


def test_one_try_where_each_input_has_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with sequences of different lengths: only after two of a kind the next is expected to be like them."""
    layer, tries = sn.StreamingNorm1d(6), _count_tries(monkeypatch)
    for length in (2, 3, 4, 5):
        layer(torch.randn(3, 6, length))
    assert len(tries) == 4
    for length in (5, 4, 4, 4):
        layer(torch.randn(3, 6, length))
    assert len(tries) == 4 + 4 + 1
