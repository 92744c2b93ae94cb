"""What torch.nn's layers and cells refuse, normalized ones refuse as they do, before any statistic has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import streamnorm as sn

NAMES = ("RNN", "GRU", "LSTM")
NORMS: list[dict[str, Any]] = [
    {},
    {"norm": "batch"},
    {"norm": "batch-per-step", "max_steps": 3},
    {"norm": "layer"},
    {"norm": None},
]


def used(model: nn.Module, *inputs: Any, **options: Any) -> nn.Module:
    """In the middle of an update, so that every buffer holds something."""
    out = model(*inputs, **options)
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    return model


def refusal(call: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # which one is compared
        call()
    return caught.value


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(value.equal(before[name]) for name, value in model.state_dict().items())


x, h = torch.randn(2, 3), torch.randn(2, 4)
CELL_INPUTS: dict[str, tuple[Any, Any]] = {
    "3D": (x[None], None),
    "0D": (x.sum(), None),
    "features": (torch.randn(2, 5), h),
    "features without a hidden state": (torch.randn(2, 5), None),
    "features of one row": (torch.randn(5), None),
    "rows of the hidden state": (x, torch.randn(3, 4)),
    "features of the hidden state": (x, torch.randn(2, 5)),
    "a hidden state of one row for several": (x, torch.randn(4)),
    "a hidden state of several rows for one": (x[0], torch.randn(1, 4)),
    "a 3D hidden state": (x, h[None]),
    "a 0D hidden state": (x, h.sum()),
    "dtype of the hidden state": (x, h.double()),
    "integers as hidden state": (x, torch.ones(2, 4, dtype=torch.int64)),
    "device of the hidden state": (x, h.to("meta")),
    "no tensor": (x, h.numpy()),
}


@pytest.mark.parametrize("options", NORMS, ids=lambda options: str(options.get("norm", "streaming")))
@pytest.mark.parametrize("wrong", CELL_INPUTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_cell_raises_what_torch_raises(name: str, wrong: str, options: dict[str, Any]) -> None:
    plain, cell = getattr(nn, f"{name}Cell")(3, 4), getattr(sn, f"{name}Cell")(3, 4, **options)
    step = {"step": 1} if options.get("norm") == "batch-per-step" else {}
    used(cell, x, **step)
    before = copy.deepcopy(cell.state_dict())
    given, hidden = CELL_INPUTS[wrong]
    hx = hidden if name != "LSTM" or hidden is None else (hidden, hidden)
    theirs, ours = refusal(lambda: plain(given, hx)), refusal(lambda: cell(given, hx, **step))
    assert (type(ours), str(ours)) == (type(theirs), str(theirs))
    assert unchanged(cell, before)


@pytest.mark.parametrize("norm_cell", [False, True])
@pytest.mark.parametrize(
    "hx",
    [h, (h, h, h), (h, torch.randn(2, 5)), (h, torch.randn(3, 4)), (h, torch.randn(4)), (h,)],
    ids=["no pair", "three", "features of c", "rows of c", "c of one row", "one"],
)
def test_hidden_states_of_an_lstm_cell(hx: Any, norm_cell: bool) -> None:
    plain, cell = nn.LSTMCell(3, 4), used(sn.LSTMCell(3, 4, norm_cell=norm_cell), x)
    before = copy.deepcopy(cell.state_dict())
    theirs, ours = refusal(lambda: plain(x, hx)), refusal(lambda: cell(x, hx))
    assert (type(ours), str(ours)) == (type(theirs), str(theirs))
    assert unchanged(cell, before)


def test_a_cell_state_of_its_own_dtype() -> None:
    """torch.nn takes it; where the cell is normalized it would meet statistics of another dtype."""
    cell, normalized = sn.LSTMCell(3, 4), used(sn.LSTMCell(3, 4, norm_cell=True), x)
    assert cell(x, (h, h.double()))[1].dtype == nn.LSTMCell(3, 4)(x, (h, h.double()))[1].dtype
    before = copy.deepcopy(normalized.state_dict())
    with pytest.raises(ValueError, match=r"a hidden state of shape \(N, 4\), of one dtype"):
        normalized(x, (h, h.double()))
    assert unchanged(normalized, before)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_under_autocast(name: str) -> None:
    """A loop under autocast hands on what it got, in whatever dtype."""
    cell, state = getattr(sn, f"{name}Cell")(3, 4), torch.zeros(2, 4, dtype=torch.bfloat16)
    layer = getattr(sn, name)(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = cell(x, (state, state) if name == "LSTM" else state)
        layer(x[None], (state[None], state[None]) if name == "LSTM" else state[None])
    assert (out[0] if name == "LSTM" else out).isfinite().all()


def test_a_cell_without_features() -> None:
    """As torch.nn's; there is nothing to normalize."""
    for name in NAMES:
        plain, cell = getattr(nn, f"{name}Cell")(3, 0), getattr(sn, f"{name}Cell")(3, 0, norm=None)
        assert [p.shape for p in cell.parameters()] == [p.shape for p in plain.parameters()]
        out = cell(x)
        assert (out[0] if name == "LSTM" else out).shape == (2, 0)
        with pytest.raises(
            ValueError, match=f"{name}Cell with hidden_size=0 has nothing to normalize: write norm=None"
        ):
            getattr(sn, f"{name}Cell")(3, 0)
        with pytest.raises(ValueError, match="hidden_size must be greater than zero"):
            getattr(sn, name)(3, 0)


@pytest.mark.parametrize("mask", [[True, True], torch.ones(2), torch.ones(3, dtype=torch.bool)])
def test_masks_of_a_cell(mask: Any) -> None:
    cell = used(sn.GRUCell(3, 4), x)
    before = copy.deepcopy(cell.state_dict())
    with pytest.raises(
        (TypeError, ValueError), match=r"mask is a bool tensor of shape \(2,\), True where a row counts"
    ):
        cell(x, mask=mask)
    assert unchanged(cell, before)


@pytest.mark.parametrize("step", ["1", 1.5, -1, True])
def test_steps_of_a_cell(step: Any) -> None:
    cell = used(sn.GRUCell(3, 4, norm="batch-per-step", max_steps=3), x, step=0)
    before = copy.deepcopy(cell.state_dict())
    with pytest.raises((TypeError, ValueError), match=r"write cell\(x, h, step=t\), from 0 on, got"):
        cell(x, step=step)
    assert unchanged(cell, before)


s, start = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
packed = pack_padded_sequence(s, [5, 3])
LAYER_INPUTS: dict[str, tuple[Any, Any]] = {
    "4D": (s[None], None),
    "1D": (s[0, 0], None),
    "features": (torch.randn(5, 2, 4), None),
    "integers": (s.long(), None),
    "dtype": (s.double(), None),
    "rows of the hidden state": (s, torch.randn(1, 3, 4)),
    "features of the hidden state": (s, torch.randn(1, 2, 5)),
    "layers of the hidden state": (s, torch.randn(2, 2, 4)),
    "a 2D hidden state": (s, start[0]),
    "a 3D hidden state for one sequence": (s[:, 0], start[:, :1]),
    "dtype of the hidden state": (s, start.double()),
    "integers as hidden state": (s, torch.ones(1, 2, 4, dtype=torch.int64)),
    "device of the hidden state": (s, start.to("meta")),
    "no time steps": (s[:0], None),
    "dtype of the hidden state, packed": (packed, start.double()),
    "device of the hidden state, packed": (packed, start.to("meta")),
    "rows of the hidden state, packed": (packed, torch.randn(1, 3, 4)),
}


@pytest.mark.parametrize("options", NORMS, ids=lambda options: str(options.get("norm", "streaming")))
@pytest.mark.parametrize("wrong", LAYER_INPUTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_refuses_what_torch_refuses(name: str, wrong: str, options: dict[str, Any]) -> None:
    plain, layer = getattr(nn, name)(3, 4), used(getattr(sn, name)(3, 4, **options), s)
    before = copy.deepcopy(layer.state_dict())
    given, hidden = LAYER_INPUTS[wrong]
    hx = hidden if name != "LSTM" or hidden is None else (hidden, hidden)
    theirs, ours = refusal(lambda: plain(given, hx)), refusal(lambda: layer(given, hx))
    assert type(ours) is type(theirs)
    assert unchanged(layer, before)


@pytest.mark.parametrize("c", [torch.randn(1, 3, 4), torch.randn(2, 4), start.double(), start.to("meta")])
def test_the_cell_state_of_an_lstm(c: Tensor) -> None:
    layer = used(sn.LSTM(3, 4), s)
    before = copy.deepcopy(layer.state_dict())
    assert type(refusal(lambda: layer(s, (start, c)))) is type(refusal(lambda: nn.LSTM(3, 4)(s, (start, c))))
    assert unchanged(layer, before)


def test_the_message_says_what_to_write() -> None:
    with pytest.raises(
        RuntimeError, match=r"not the same dtype, .* torch.float32 .* torch.float64: write hx.to\(torch.float32"
    ):
        sn.GRU(3, 4)(s, start.double())
    with pytest.raises(RuntimeError, match=r"not at the same device, .* cpu .* meta: write hx.to\('cpu'\)"):
        sn.GRU(3, 4)(s, start.to("meta"))


@pytest.mark.parametrize(
    "batch_sizes", [[1, 2, 2, 2, 1], [2, 2, 2, 2, 2], [2, 2, 2]], ids=["growing", "more than rows", "fewer than rows"]
)
def test_packed_sequences_that_are_none(batch_sizes: list[int]) -> None:
    layer = used(sn.GRU(3, 4), s)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="batch_sizes that never increase and add up to its rows of data, got"):
        layer(PackedSequence(packed.data, torch.tensor(batch_sizes)))
    assert unchanged(layer, before)


@pytest.mark.parametrize(
    "lengths", ["53", [5.0, 3.0], [5, 0], [6, 3], [5], 5, [None, 1], [True, True], [[5, 3]], [5, -1]], ids=str
)
def test_lengths(lengths: Any) -> None:
    layer = used(sn.GRU(3, 4), s)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises((TypeError, ValueError), match=r"lengths (are 2 integers, one for each|lie between 1 and 5)"):
        layer(s, lengths=lengths)
    assert unchanged(layer, before)
