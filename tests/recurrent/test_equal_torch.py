"""With ``norm=None`` the layers and cells are torch.nn's: parameters, outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import streamnorm as sn

PAIRS = {"RNN": (sn.RNN, nn.RNN), "GRU": (sn.GRU, nn.GRU), "LSTM": (sn.LSTM, nn.LSTM)}
CELLS = {"RNN": (sn.RNNCell, nn.RNNCell), "GRU": (sn.GRUCell, nn.GRUCell), "LSTM": (sn.LSTMCell, nn.LSTMCell)}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "batch_first": True, "dropout": 0.4},
    {"bias": False, "bidirectional": True, "batch_first": True},
]


@pytest.fixture(params=["torch's own kernel", "our loop"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equality is asked of the loop as well, which such a layer would not use."""
    if request.param == "our loop":
        monkeypatch.setattr("streamnorm.recurrent.base.Normalized._is_plain", lambda self: False)


def twins(name: str, options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's from the same seed; float64."""
    ours_type, theirs_type = PAIRS[name]
    torch.manual_seed(1)
    ours = ours_type(3, 4, norm=None, **options, dtype=torch.float64)
    torch.manual_seed(1)
    theirs = theirs_type(3, 4, **options, dtype=torch.float64)
    return ours, theirs


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flat(part)]


def assert_same(ours: nn.Module, theirs: nn.Module, *inputs: Any) -> None:
    """Outputs, hidden states, and the gradients of parameters, input and initial hidden state."""
    gradients = []
    outputs = []
    for module in (ours, theirs):
        torch.manual_seed(2)
        parts = flat(module(*inputs))
        torch.manual_seed(3)
        loss = torch.stack([(part * torch.randn_like(part)).sum() for part in parts]).sum()
        leaves = [*module.parameters(), *(t for t in flat(inputs) if t.requires_grad)]
        gradients.append(torch.autograd.grad(loss, leaves))
        outputs.append(parts)
    for a, b in zip([*outputs[0], *gradients[0]], [*outputs[1], *gradients[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def start(name: str, *shape: int) -> Any:
    """Initial hidden states that want a gradient."""
    h = torch.randn(*shape, 4, dtype=torch.float64, requires_grad=True)
    return (h, torch.randn_like(h).requires_grad_()) if name == "LSTM" else h


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_layer(name: str, options: dict[str, Any]) -> None:
    ours, theirs = twins(name, options)
    x = torch.randn(5, 5, 3, dtype=torch.float64, requires_grad=True)
    assert_same(ours, theirs, x)
    layers = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    assert_same(ours, theirs, x, start(name, layers, 5))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", PAIRS)
def test_packed_sequences(name: str) -> None:
    ours, theirs = twins(name, {"num_layers": 2, "bidirectional": True, "dropout": 0.3})
    sequences = [torch.randn(length, 3, dtype=torch.float64, requires_grad=True) for length in (2, 5, 4, 5)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    assert_same(ours, theirs, packed)
    assert_same(ours, theirs, packed, start(name, 4, 4))
    ours_packed = ours(packed)[0]
    assert ours_packed.unsorted_indices is packed.unsorted_indices


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", PAIRS)
def test_one_sequence(name: str) -> None:
    ours, theirs = twins(name, {"bidirectional": True, "batch_first": True})
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert_same(ours, theirs, x)
    assert_same(ours, theirs, x, start(name, 2))


@pytest.mark.usefixtures("engine")
def test_relu_and_projection() -> None:
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    assert_same(*twins("RNN", {"nonlinearity": "relu", "num_layers": 2}), x)
    options = {"proj_size": 2, "num_layers": 2, "bidirectional": True}
    h = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    c = torch.randn(4, 2, 4, dtype=torch.float64, requires_grad=True)
    assert_same(*twins("LSTM", options), x, (h, c))


@pytest.mark.parametrize("name", PAIRS)
def test_weights_are_exchanged(name: str) -> None:
    ours_type, theirs_type = PAIRS[name]
    options = {"num_layers": 2, "bidirectional": True}
    ours, theirs = ours_type(3, 4, norm=None, **options), theirs_type(3, 4, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    normalized = ours_type(3, 4, **options)
    missing, unexpected = normalized.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("norm_") for name in missing)


@pytest.mark.parametrize("name", PAIRS)
def test_weights_start_as_torchs(name: str) -> None:
    """Also those of a normalized layer, and again after ``reset_parameters``."""
    ours_type, theirs_type = PAIRS[name]
    torch.manual_seed(5)
    theirs = theirs_type(3, 4, 2)
    torch.manual_seed(5)
    ours = ours_type(3, 4, 2)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    ours(torch.randn(4, 2, 3))[0].sum().backward()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 1
    torch.manual_seed(5)
    ours.reset_parameters()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_cell(name: str, bias: bool) -> None:
    ours_type, theirs_type = CELLS[name]
    ours = ours_type(3, 4, bias, norm=None, dtype=torch.float64)
    theirs = theirs_type(3, 4, bias, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert_same(ours, theirs, x)
    assert_same(ours, theirs, x, start(name, 5))
    alone = (start(name)[0].detach(), start(name)[1].detach()) if name == "LSTM" else start(name).detach()
    assert_same(ours, theirs, x[0], alone)


def test_positional_arguments_are_torchs() -> None:
    assert sn.RNN(3, 4, 2, "relu", False, True, 0.1, True).nonlinearity == "relu"
    gru = sn.GRU(3, 4, 2, False, True, 0.1, True)
    assert (gru.num_layers, gru.bias, gru.batch_first, gru.dropout, gru.bidirectional) == (2, False, True, 0.1, True)
    lstm = sn.LSTM(3, 4, 2, False, True, 0.1, True, 2)
    assert (lstm.dropout, lstm.bidirectional, lstm.proj_size) == (0.1, True, 2)
    assert isinstance(gru, nn.GRU)
    assert isinstance(sn.LSTMCell(3, 4), nn.LSTMCell)
