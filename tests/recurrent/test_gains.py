"""Gains are parameters called ``gain``: "weight" in a name means a matrix, as in torch.nn's layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import streamnorm as sn

NORMS: list[dict[str, Any]] = [{}, {"norm": "batch"}, {"norm": "batch-per-step", "max_steps": 3}, {"norm": "layer"}]
MAKES: list[Callable[..., Any]] = [sn.GRU, sn.LSTM, sn.RNN, sn.GRUCell]


def gains(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(".gain")}


@pytest.mark.parametrize("options", NORMS, ids=str)
@pytest.mark.parametrize("make", MAKES)
def test_the_usual_initialization(make: Callable[..., Any], options: dict[str, Any]) -> None:
    """Weights orthogonal, biases zero, by name."""
    model = make(3, 4, gain=0.5, **options)
    for name, parameter in model.named_parameters():
        if "weight" in name:
            nn.init.orthogonal_(parameter)
        elif "bias" in name:
            nn.init.zeros_(parameter)
    hh = next(parameter for name, parameter in model.named_parameters() if name.startswith("weight_hh"))
    torch.testing.assert_close(hh.T @ hh, torch.eye(4))
    assert len(gains(model)) == 2
    assert all(gain.eq(0.5).all() for gain in gains(model).values())


@pytest.mark.parametrize("options", NORMS, ids=str)
def test_states_from_before(options: dict[str, Any]) -> None:
    """In them the gain is called ``weight``."""
    model: Any = sn.GRU(3, 4, **options)
    with torch.no_grad():
        model.norm_ih_l0.gain.uniform_()
    state = model.state_dict()
    assert {name for name, _ in model.named_parameters()} <= state.keys()
    before = {name.replace(".gain", ".weight"): value for name, value in state.items()}
    assert before.keys() - state.keys() == {"norm_ih_l0.weight", "norm_hh_l0.weight"}
    loaded: Any = sn.GRU(3, 4, **options)
    loaded.load_state_dict(before)
    for name, value in loaded.state_dict().items():
        assert value.equal(state[name]), name
    del before["norm_ih_l0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*norm_ih_l0\.gain"):
        loaded.load_state_dict(before)


def test_weight_is_another_name() -> None:
    model: Any = sn.GRU(3, 4)
    x = torch.randn(5, 2, 3)
    norm: Any = model.norm_ih_l0
    assert norm.weight is norm.gain is model.get_parameter("norm_ih_l0.gain")
    given = nn.Parameter(torch.full((12,), 2.0))
    norm.weight = given
    assert norm.gain is given is dict(model.named_parameters())["norm_ih_l0.gain"]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.norm_ih_l0.gain.fill_(3)
    for name in ("gain", "weight"):
        called = functional_call(copy.deepcopy(model), {f"norm_ih_l0.{name}": torch.full((12,), 3.0)}, (x,))[0]
        assert called.equal(copy.deepcopy(twin)(x)[0])
    assert norm.gain is given


@pytest.mark.parametrize("options", NORMS[1:3], ids=str)
def test_pickles_from_before(options: dict[str, Any]) -> None:
    """In them the gain is called ``weight``."""
    model: Any = sn.GRU(3, 4, **options)
    older = copy.deepcopy(model)
    for norm in (older.norm_ih_l0, older.norm_hh_l0):
        norm.__dict__["_parameters"] = {"weight" if n == "gain" else n: p for n, p in norm._parameters.items()}
    loaded = pickle.loads(pickle.dumps(older))
    assert list(dict(loaded.named_parameters())) == list(dict(model.named_parameters()))
    x = torch.randn(2, 6, 3)
    assert loaded(x)[0].equal(model(x)[0])


def test_a_gain_that_is_computed() -> None:
    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    model: Any = sn.GRU(3, 4)
    x = torch.randn(5, 2, 3)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.norm_ih_l0.gain.fill_(2)
    parametrize.register_parametrization(model.norm_ih_l0, "gain", Doubled())
    torch.testing.assert_close(model(x)[0], twin(x)[0])
