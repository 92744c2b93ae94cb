"""A layer that collects while its network's weights change, and no update is noticed, says so; and no other one."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import streamnorm as sn
from streamnorm.training import updates, watchdog

ENOUGH = 8 * watchdog.USES


def network(**options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4), sn.StreamingNorm1d(4, **options), nn.Tanh(), nn.Linear(4, 4), sn.StreamingNorm1d(4, **options)
    )


def repeat(step: Callable[[], object], times: int = ENOUGH) -> None:
    for _ in range(times):
        step()


def update(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def loss_of(model: nn.Module) -> Tensor:
    loss: Tensor = model(torch.randn(2, 3)).square().mean()
    return loss


class Fused(Optimizer):
    """The update is a part of the backward pass, as in LOMO."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        raise NotImplementedError

    @torch.no_grad()
    def fused_backward(self, loss: Tensor) -> None:
        with torch.enable_grad():
            loss.backward()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad)
                    parameter.grad = None


def fused(model: nn.Module) -> Callable[[], None]:
    optimizer = Fused(model.parameters(), 0.01)
    return lambda: optimizer.fused_backward(loss_of(model))


def fused_at_rate_zero(model: nn.Module) -> Callable[[], None]:
    optimizer = Fused(model.parameters(), 0.0)
    return lambda: optimizer.fused_backward(loss_of(model))


def by_hand(model: nn.Module) -> Callable[[], None]:
    def step() -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss_of(model), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                parameter.sub_(gradient, alpha=0.01)

    return step


def through_data(model: nn.Module) -> Callable[[], None]:
    """Which no version counter tells."""

    def step() -> None:
        model.zero_grad()
        loss_of(model).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data.sub_(parameter.grad, alpha=0.01)

    return step


def functional(model: nn.Module) -> Callable[[], None]:
    """Parameters are replaced, not changed."""
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    parameters = {name: value.detach().requires_grad_() for name, value in trained}

    def step() -> None:
        loss = torch.func.functional_call(model, parameters, (torch.randn(2, 3),)).square().mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for (name, value), gradient in zip([*parameters.items()], gradients):
            parameters[name] = (value - 0.01 * gradient).detach().requires_grad_()

    return step


LOOPS = [fused, fused_at_rate_zero, by_hand, through_data, functional]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", ["gain", "no gain", "frozen gain"])
def test_updates_that_nobody_reports(loop: Callable[[nn.Module], Callable[[], None]], kind: str) -> None:
    model = network(affine=kind != "no gain")
    if kind == "frozen gain":
        for layer in (model[1], model[4]):
            layer.requires_grad_(False)
    with pytest.warns(UserWarning, match="collected statistics") as caught:
        repeat(loop(model))
    assert len(caught) == 1
    text = str(caught[0].message)
    assert text.startswith("1 (StreamingNorm1d) has collected statistics of ")
    assert "streamnorm.commit(model)" in text
    assert "streamnorm.bind(model, optimizer)" in text


@pytest.mark.parametrize("loop", LOOPS)
def test_nothing_is_said_with_a_commit(loop: Callable[[nn.Module], Callable[[], None]]) -> None:
    model = network()
    step = loop(model)

    def step_and_commit() -> None:
        step()
        sn.commit(model)

    repeat(step_and_commit)


def test_recurrent_layers() -> None:
    model = nn.Sequential(sn.GRU(3, 4))

    def step() -> None:
        model(torch.randn(2, 1, 3))[0].square().mean().backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.data.sub_(parameter.grad, alpha=0.01)

    with pytest.warns(UserWarning, match=r"0\.norm_ih_l0 \(RecurrentStreamingNorm\) has collected statistics"):
        repeat(step)


def test_compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "_lease_of_graphs", watchdog.lease(watchdog.USES))  # not that of earlier tests' graphs
    monkeypatch.setattr(updates, "_layers", {})  # nor their layers, by whose number a lease is longer
    model = network()
    step = by_hand(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"1 \(StreamingNorm1d\) has collected"):
        repeat(step)


def test_updates_that_cease_to_be_noticed() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    repeat(lambda: update(model, optimizer))
    with pytest.warns(UserWarning, match="collected statistics"):
        repeat(by_hand(model), 3 * 1024 + ENOUGH)


def test_a_binding_to_an_optimizer_that_trains_something_else() -> None:
    model, other = network(), nn.Linear(2, 2)
    sn.bind(model, SGD(other.parameters(), lr=0.1))
    optimizer = SGD(model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match="name that one"):
        repeat(lambda: update(model, optimizer))


# Silence


def rest(model: nn.Module) -> None:
    """Forward passes alone."""
    repeat(lambda: loss_of(model))


def accumulate(model: nn.Module) -> None:
    optimizer = SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        repeat(lambda: loss_of(model).backward(), 1500)
        optimizer.step()
        optimizer.zero_grad()


def evaluate(model: nn.Module) -> None:
    model.eval()
    repeat(through_data(model))


def freeze(model: nn.Module) -> None:
    sn.freeze(model)
    evaluate(model.train())


def calibrate(model: nn.Module) -> None:
    for _ in range(10):
        sn.calibrate(model, [torch.randn(2, 3) for _ in range(150)])
        for parameter in model.parameters():
            parameter.data *= 0.99


def adversarial(model: nn.Module) -> None:
    """100 steps of a critic, whose weights are clipped, for each one of the generator."""
    critic = nn.Sequential(nn.Linear(4, 3), network(), nn.Linear(4, 1))
    of_generator, of_critic = SGD(model.parameters(), lr=0.01), SGD(critic.parameters(), lr=0.01)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for number in range(2 * ENOUGH):
        if number % 101 == 100:
            critic(model(torch.randn(2, 3))).mean().backward()
            of_generator.step()
            of_generator.zero_grad()
            average.update_parameters(model)
        else:
            critic(model(torch.randn(2, 3)).detach()).mean().backward()
            of_critic.step()
            of_critic.zero_grad()
            for parameter in critic.parameters():
                parameter.data.clamp_(-0.5, 0.5)


def average_by_hand(model: nn.Module) -> None:
    """A target network that follows another, and was used in training once."""
    target = copy.deepcopy(model)
    target(torch.randn(2, 3))
    optimizer = SGD(model.parameters(), lr=0.01)
    for _ in range(ENOUGH):
        update(model, optimizer)
        for ours, theirs in zip(target.parameters(), model.parameters()):
            ours.data.lerp_(theirs.data, 0.1)


@pytest.mark.parametrize(
    "quiet", [rest, accumulate, evaluate, freeze, calibrate, adversarial, average_by_hand], ids=lambda f: f.__name__
)
def test_nothing_is_said_without_need(quiet: Callable[[nn.Module], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(network())


def test_a_layer_that_has_been_looked_at_can_be_copied() -> None:
    model = network()
    repeat(by_hand(model), 2 * watchdog.USES + 3)
    twin = copy.deepcopy(model)
    layer: Any = twin[1]
    assert layer._ties.seen is None
    del model
    gc.collect()
    loss_of(twin).backward()


def test_a_look_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """With updates: after 64 uses, then 128, up to one in a thousand; the use that looks is counted for itself."""
    looks: list[int] = []
    look = watchdog.look
    uses = 0

    def counted(layer: sn.Norm) -> int:
        looks.append(uses)
        return look(layer)

    monkeypatch.setattr(watchdog, "look", counted)
    layer = sn.StreamingNorm1d(4)
    for uses in range(5000):  # noqa: B007
        layer(torch.randn(1, 4))
        sn.commit(layer)
    assert looks == [65, 194, 451, 964, 1989, 3014, 4039]
