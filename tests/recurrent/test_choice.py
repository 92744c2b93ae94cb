"""What ``norm=`` takes, and what it says when it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import streamnorm as sn
from streamnorm.recurrent import norms
from streamnorm.recurrent.engines import by_hand


def test_a_norm_for_each_path_layer_and_direction() -> None:
    gru: Any = sn.GRU(3, 4, num_layers=2, bidirectional=True)
    paths = {name for name, module in gru.named_children()}
    assert paths == {
        f"norm_{path}_l{layer}{end}" for path in ("ih", "hh") for layer in (0, 1) for end in ("", "_reverse")
    }
    assert gru.norm_ih_l0.num_features == gru.norm_hh_l1_reverse.num_features == 12
    before: Any = sn.GRU(3, 4, reset_after=False)
    assert [before.norm_ih_l0.num_features, before.norm_hh_l0.num_features, before.norm_hn_l0.num_features] == [
        12,
        8,
        4,
    ]
    assert "norm_cell_l0.bias" in sn.LSTM(3, 4, norm_cell=True).state_dict()
    assert "norm_cell_l0.bias" not in sn.LSTM(3, 4, norm_cell=True, bias=False).state_dict()
    assert gru.norm_ih_l0.bias is None


def test_options_reach_the_norms() -> None:
    norm: Any = sn.LSTMCell(3, 4, p=2, center="zero", eps=1e-3, window=50, gain=0.3).norm_hh
    assert (norm.moment.p, norm.moment.center, norm.eps, norm.stream.window) == (2, "zero", 1e-3, 50)
    assert norm.weight.tolist() == pytest.approx([0.3] * 16)
    norm = sn.GRU(3, 4, kappa=0.9).norm_ih_l0
    stream = norm.stream
    assert (stream.alpha[:2], stream.beta, stream.kappa[0]) == (norms.ALPHA, norms.BETA, 0.9)
    batch: Any = sn.RNN(3, 4, norm="batch-per-step", max_steps=7, momentum=0.2).norm_ih_l0
    assert (batch.max_steps, batch.momentum, batch.running_mean.shape) == (7, 0.2, (7, 4))


def test_a_factory_makes_any_module() -> None:
    lstm: Any = sn.LSTM(3, 4, norm=nn.LayerNorm, batch_first=True)
    assert isinstance(lstm.norm_ih_l0, nn.LayerNorm)
    assert lstm(torch.randn(2, 5, 3))[0].shape == (2, 5, 4)
    bare = sn.GRU(3, 4, norm=lambda num_features: nn.Identity())
    bare.load_state_dict(nn.GRU(3, 4).state_dict())
    bare.reset_parameters()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "instance"}, "'instance'"),
        ({"norm": "layer", "window": 50}, "window=50 is an option of norm='streaming', got norm='layer'"),
        ({"norm": "batch", "max_steps": 3}, "max_steps=3 is an option of norm='batch-per-step'"),
        ({"norm": "batch-per-step"}, "max_steps"),
        ({"norm": "batch-per-step", "max_steps": 0}, "max_steps.* got 0"),
        ({"norm": None, "p": 2}, "p=2"),
        ({"norm": nn.LayerNorm, "gain": 0.5}, "gain=0.5"),
        ({"window": 5, "kappa": 0.5}, "exclude"),
        ({"p": 0.5}, "p must be"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    for make in (sn.GRU, sn.LSTMCell):
        with pytest.raises(ValueError, match=message):
            make(3, 4, **options)


def test_wrong_inputs() -> None:
    gru: Any = sn.GRU(3, 4)
    with pytest.raises(ValueError, match="4D"):
        gru(torch.randn(2, 2, 2, 3))
    with pytest.raises(RuntimeError, match="input_size"):
        gru(torch.randn(5, 2, 4))
    with pytest.raises(RuntimeError, match="hidden size"):
        gru(torch.randn(5, 2, 3), torch.zeros(1, 3, 4))
    with pytest.raises(RuntimeError, match="3D"):
        gru(torch.randn(5, 2, 3), torch.zeros(1, 4))
    with pytest.raises(RuntimeError, match="2D"):
        gru(torch.randn(5, 3), torch.zeros(1, 1, 4))
    with pytest.raises(RuntimeError, match="time step"):
        gru(torch.randn(0, 2, 3))
    with pytest.raises(ValueError, match="dtype"):
        gru(torch.randn(5, 2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="lengths"):
        gru(torch.randn(5, 3), lengths=torch.tensor([5]))
    with pytest.raises(ValueError, match="lengths are 2 integers"):
        gru(torch.randn(5, 2, 3), lengths=torch.tensor([5]))
    with pytest.raises(ValueError, match="lengths are 2 integers"):
        gru(torch.randn(5, 2, 3), lengths=torch.tensor([5.0, 3.0]))
    for lengths in ([6, 2], [5, 0]):
        with pytest.raises(ValueError, match="between 1 and 5"):
            gru(torch.randn(5, 2, 3), lengths=torch.tensor(lengths))
    for sizes in ([3, 2, 1, 1, 1], [3, 4]):
        with pytest.raises(ValueError, match="batch_sizes that never increase and add up"):
            gru(PackedSequence(torch.randn(7, 3), torch.tensor(sizes)))
    with pytest.raises(ValueError, match="one tensor, got 2"):
        gru(torch.randn(5, 2, 3), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)))
    lstm: Any = sn.LSTM(3, 4)
    with pytest.raises(ValueError, match=r"a pair of tensors \(h, c\), got 1"):
        lstm(torch.randn(5, 2, 3), torch.zeros(1, 2, 4))
    assert lstm(torch.randn(5, 2, 3), [torch.zeros(1, 2, 4)] * 2)[0].shape == (5, 2, 4)
    cell: Any = sn.GRUCell(3, 4)
    with pytest.raises(ValueError, match="3D"):
        cell(torch.randn(1, 2, 3))
    with pytest.raises(RuntimeError, match="input_size: got 4 expected 3"):
        cell(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="batch size 2 doesn't match hidden0 batch size 3"):
        cell(torch.randn(2, 3), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="write mask"):
        cell(torch.randn(2, 3), mask=torch.ones(2))
    with pytest.raises(ValueError, match="nonlinearity"):
        sn.RNNCell(3, 4, nonlinearity="sigmoid")


def test_an_empty_batch() -> None:
    output, h = sn.GRU(3, 4, bidirectional=True)(torch.randn(5, 0, 3))
    assert (output.shape, h.shape) == ((5, 0, 8), (2, 0, 4))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "norm_ih_l0", nn.LayerNorm(15)),
        lambda model: model.norm_ih_l0.register_forward_hook(lambda *args: None),
        lambda model: model.norm_ih_l0.eval(),
        lambda model: setattr(model.norm_hh_l0, "frozen", True),
        lambda model: setattr(model, "norm_hh_l0", sn.StreamingNorm1d(15)),
        lambda model: setattr(model, "norm_hh_l0", model.norm_ih_l0),
    ],
    ids=["another module", "a hook", "one in evaluation", "one frozen", "one with a bias", "one for both paths"],
)
def test_what_is_left_to_the_loop(change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = sn.GRU(3, 5)
    change(model)
    monkeypatch.setattr(by_hand, "run", lambda *args: pytest.fail("this ran with a backward pass by hand"))
    model(torch.randn(4, 2, 3))[0].sum().backward()
