"""Layers notice weight updates by themselves, whatever optimizer makes them."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, RMSprop

import streamnorm as sn
from streamnorm import ops
from streamnorm.training import updates

FORMS: list[tuple[Callable[..., Optimizer], dict[str, Any]]] = [
    *((cls, form) for cls in (SGD, Adam, AdamW) for form in ({}, {"foreach": True}, {"fused": True})),
    *((RMSprop, form) for form in ({}, {"foreach": True})),  # RMSprop has no fused form
]
FORM_IDS = [f"{getattr(cls, '__name__', cls)} {'/'.join(form) or 'default'}" for cls, form in FORMS]


def network(width: int = 4, **options: Any) -> nn.Sequential:
    """Two streaming layers, three batch shapes' worth of weights."""
    return nn.Sequential(
        nn.Linear(3, width),
        sn.StreamingNorm1d(width, **options),
        nn.ReLU(),
        nn.Linear(width, width),
        sn.StreamingNorm1d(width, **options),
        nn.Linear(width, 2),
    )


def layers(model: nn.Module) -> list[sn.Norm]:
    return [module for module in model.modules() if isinstance(module, sn.Norm)]


def backward(model: nn.Module, samples: int = 5) -> None:
    model(torch.randn(samples, 3)).square().mean().backward()


def collecting(model: nn.Module) -> bool:
    """Whether the layers hold statistics that no commit has taken in; all of them do, or none."""
    states = {bool(layer.samples > 0) for layer in layers(model)}
    assert len(states) == 1
    return states.pop()


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    """Parameters and buffers, bit for bit."""
    for (name, ours), theirs in zip(first.state_dict().items(), second.state_dict().values()):
        assert ours.equal(theirs), name


def assert_same_statistics(first: nn.Module, second: nn.Module) -> None:
    for (name, ours), theirs in zip(first.named_buffers(), second.buffers()):
        assert ours.equal(theirs), name


# Every optimizer, in every form


@pytest.mark.parametrize(("cls", "form"), FORMS, ids=FORM_IDS)
def test_a_step_is_a_commit(engine: str, cls: Callable[..., Optimizer], form: dict[str, Any]) -> None:
    model = network()
    optimizer = cls(model.parameters(), lr=0.01, **form)
    for batches in (1, 3, 2):
        for _ in range(batches):
            backward(model)
        expected = copy.deepcopy(model)
        sn.commit(expected)
        assert not collecting(expected)
        assert collecting(model)
        optimizer.step()
        assert_same_statistics(model, expected)
        optimizer.zero_grad()
    assert all(not torch.equal(layer.long, sn.StreamingNorm1d(4).long) for layer in layers(model))
    assert all(bool(layer.long_grad.any()) for layer in layers(model))


def test_lbfgs_commits_once_a_step(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    commits = []
    commit = ops.commit

    def counted(uses: list[Any]) -> None:
        ours = {id(layer.long) for layer in layers(model)}
        commits.append(sum(id(state.long) in ours for state, _ in uses))
        commit(uses)

    monkeypatch.setattr(ops, "commit", counted)
    optimizer = LBFGS(model.parameters(), lr=0.01, max_iter=4)
    x = torch.randn(5, 3)
    evaluations = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(x).square().mean()
        loss.backward()
        evaluations.append(collecting(model))
        return loss

    for _ in range(2):
        optimizer.step(closure)
        assert not collecting(model)
    assert len(evaluations) > 2
    assert all(evaluations)
    assert commits == [2, 2]


def test_parameter_groups(engine: str) -> None:
    model = network()
    norms = [parameter for layer in layers(model) for parameter in layer.parameters()]
    others = [parameter for parameter in model.parameters() if all(parameter is not norm for norm in norms)]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": norms, "lr": 0.0}]
    optimizer = SGD(groups, lr=0.1)
    backward(model)
    optimizer.step()
    assert not collecting(model)


def test_a_group_that_is_added_later(engine: str) -> None:
    head, body = nn.Linear(2, 2), network()
    other_layer = sn.StreamingNorm1d(2)
    other = SGD(other_layer.parameters(), lr=0.1)
    optimizer = SGD(head.parameters(), lr=0.1)
    optimizer.add_param_group({"params": body.parameters()})
    head(body(torch.randn(4, 3))).sum().backward()
    optimizer.step()
    assert not collecting(body)
    backward(body)
    other.step()
    assert collecting(body)


def test_an_optimizer_that_owns_one_of_two_parameters(engine: str) -> None:
    model = network()
    for owned in ("weight", "bias"):
        backward(model)
        SGD([layer.get_parameter(owned) for layer in layers(model)], lr=0.1).step()
        assert not collecting(model)


def test_a_step_inside_backward(engine: str) -> None:
    """One optimizer for each parameter, which steps as soon as its gradient is there."""
    model = network()
    optimizers = {parameter: SGD([parameter], lr=0.01) for parameter in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        optimizers[parameter].zero_grad()  # type: ignore[index]

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        backward(model)
        assert not collecting(model)
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())
    assert all(bool(layer.long_grad.any()) for layer in layers(model))


# Several optimizers, several models


def test_two_optimizers_over_two_models(engine: str) -> None:
    """As in a GAN: each model's statistics move at the steps of its own optimizer."""
    generator, critic = network(), nn.Sequential(nn.Linear(2, 3), network())
    of_generator, of_critic = Adam(generator.parameters()), Adam(critic.parameters())
    sn.bind(generator, of_generator)
    sn.bind(critic, of_critic)
    for _ in range(3):
        fake = generator(torch.randn(6, 3))
        critic(fake.detach()).mean().backward()
        of_critic.step()
        assert collecting(generator)
        assert not collecting(critic)
        critic(fake).mean().neg().backward()
        of_generator.step()
        assert not collecting(generator)
        assert collecting(critic)
        of_critic.zero_grad()
        of_generator.zero_grad()


def test_without_binding_the_owners_are_known_after_their_first_step(engine: str) -> None:
    first, second = network(), network()
    of_first, of_second = SGD(first.parameters(), 0.1), SGD(second.parameters(), 0.1)
    for model, optimizer in ((first, of_first), (second, of_second)):
        backward(model)
        optimizer.step()
    for _ in range(2):
        backward(first)
        backward(second)
        of_first.step()
        assert not collecting(first)
        assert collecting(second)
        of_second.step()
        assert not collecting(second)


@pytest.mark.parametrize("how", ["no gain", "gain frozen", "gain left out"])
def test_layers_that_no_optimizer_owns(engine: str, how: str) -> None:
    model = network(affine=how != "no gain")
    if how == "gain frozen":
        for layer in layers(model):
            layer.requires_grad_(False)
    weights = [parameter for module in model if isinstance(module, nn.Linear) for parameter in module.parameters()]
    optimizer = SGD(weights, lr=0.1)
    for _ in range(2):
        backward(model)
        assert collecting(model)
        optimizer.step()
        assert not collecting(model)


def test_binding_names_the_optimizer_of_layers_without_parameters(engine: str) -> None:
    model, other = network(affine=False), nn.Linear(2, 2)
    optimizer, other_optimizer = SGD(model.parameters(), lr=0.1), SGD(other.parameters(), lr=0.1)
    sn.bind(model, optimizer)
    for _ in range(2):
        backward(model)
        other_optimizer.step()
        assert collecting(model)
        optimizer.step()
        assert not collecting(model)


def test_binding_anew_takes_the_place_of_the_old(engine: str) -> None:
    model = network()
    old, new = SGD(model.parameters(), lr=0.1), SGD(model.parameters(), lr=0.1)
    sn.bind(model, old)
    sn.bind(model, new)
    backward(model)
    old.step()
    assert collecting(model)
    new.step()
    assert not collecting(model)


def test_bind_refuses_a_model_without_a_streaming_layer() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), sn.SampleNorm(2))
    with pytest.raises(ValueError, match=r"Sequential holds no streaming layer.*streamnorm\.convert"):
        sn.bind(model, SGD(model.parameters(), lr=0.1))


def test_an_optimizer_of_something_else_changes_nothing(engine: str) -> None:
    model, other = network(), nn.Linear(2, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    backward(model)
    before = copy.deepcopy(model)
    SGD(other.parameters(), lr=0.1).step()
    assert_same_state(model, before)


def test_a_step_without_a_use_changes_nothing(engine: str) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy(model)
    optimizer.step()
    model.eval()(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    assert_same_statistics(model, before)


@pytest.mark.parametrize("how", ["deleted", "still there"])
def test_an_optimizer_made_anew(engine: str, how: str) -> None:
    model = network()
    old = SGD(model.parameters(), lr=0.1)
    backward(model)
    old.step()
    kept = [old] if how == "still there" else []
    del old
    gc.collect()
    new = Adam(model.parameters())
    backward(model)
    new.step()
    assert not collecting(model)
    assert len(kept) == (how == "still there")


def test_layers_hold_no_optimizer_and_no_scaler_alive() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    sn.bind(model, optimizer)
    backward(model)
    optimizer.step()
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    backward(model)
    SGD(model.parameters(), lr=0.1).step()  # a dead binding binds no more
    assert not collecting(model)


# Loss scaling


def scaled_run(
    scale: float | None, form: dict[str, Any], changing: bool = False, bound: bool = True, dtype: Any = torch.float32
) -> tuple[nn.Module, list[Tensor]]:
    """Five updates of two mini-batches, and the unscaled gradients of the inputs."""
    torch.manual_seed(5)
    model = network().to(dtype)
    optimizer = AdamW(model.parameters(), lr=0.01, **form)
    enabled = scale is not None
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, growth_interval=1 if changing else 1000)
    if enabled and bound:
        sn.bind(model, optimizer, scaler=scaler)
    gradients = []
    for _ in range(5):
        for _ in range(2):
            x = torch.randn(4, 3, dtype=dtype, requires_grad=True)
            loss = model(x).square().mean()
            (scaler.scale(loss) if enabled else loss).backward()
            assert x.grad is not None
            gradients.append(x.grad / scaler.get_scale() if enabled else x.grad)
        if enabled:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
    return model, gradients


@pytest.mark.parametrize("form", [{}, {"foreach": True}, {"fused": True}], ids=["default", "foreach", "fused"])
@pytest.mark.parametrize("changing", [False, True])
@pytest.mark.parametrize("scale", [2.0**-3, 1.0, 2.0**12])
def test_a_run_does_not_depend_on_a_bound_scaler(
    engine: str, scale: float, changing: bool, form: dict[str, Any]
) -> None:
    """Powers of two change no digit: weights, statistics and gradients are those without a scaler."""
    model, gradients = scaled_run(None, form)
    scaled, scaled_gradients = scaled_run(scale, form, changing)
    assert_same_state(model, scaled)
    for ours, theirs in zip(gradients, scaled_gradients):
        assert ours.equal(theirs)


def test_a_run_does_not_depend_on_an_odd_scale_either(engine: str) -> None:
    model, gradients = scaled_run(None, {}, dtype=torch.float64)
    scaled, scaled_gradients = scaled_run(1234.5, {}, changing=True, dtype=torch.float64)
    for (name, ours), theirs in zip(model.state_dict().items(), scaled.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=name)
    for ours, theirs in zip(gradients, scaled_gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_unbound_a_run_depends_on_a_changing_scale(engine: str) -> None:
    """What the documentation warns of, and what binding is for."""
    _, gradients = scaled_run(None, {})
    _, scaled = scaled_run(4.0, {}, changing=True, bound=False)
    assert not all(torch.allclose(ours, theirs, rtol=1e-3) for ours, theirs in zip(gradients, scaled))


@pytest.mark.parametrize("form", [{}, {"foreach": True}, {"fused": True}], ids=["default", "foreach", "fused"])
@pytest.mark.parametrize("bound", [True, False])
def test_a_skipped_step_is_no_update(engine: str, form: dict[str, Any], bound: bool) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, **form)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    if bound:
        sn.bind(model, optimizer, scaler=scaler)
    for overflows in (False, True, False):
        scaler.scale(model(torch.randn(4, 3)).square().mean()).backward()
        if overflows:
            grad = model.get_parameter("0.weight").grad
            assert grad is not None
            grad[0, 0] = torch.inf
        before = copy.deepcopy(model)
        scaler.step(optimizer)
        scaler.update()
        if overflows:
            assert_same_state(model, before)
            assert collecting(model)
        else:
            assert not collecting(model)
        optimizer.zero_grad()


def test_an_overflow_in_the_loss_leaves_the_stream_finite(engine: str) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    sn.bind(model, optimizer, scaler=scaler)
    before = copy.deepcopy(model)
    scaler.scale(1e6 * model(torch.randn(4, 3)).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())
    assert collecting(model)
    for ours, theirs in zip(model.parameters(), before.parameters()):
        assert ours.equal(theirs)


def test_a_scaler_that_is_switched_off(engine: str) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    sn.bind(model, optimizer, scaler=scaler)
    scaler.scale(model(torch.randn(4, 3)).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not collecting(model)


def test_a_scale_that_is_loaded_or_set_is_seen(engine: str) -> None:
    model, plain = network().double(), network().double()
    plain.load_state_dict(model.state_dict())
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    sn.bind(model, optimizer, scaler=scaler)
    scaler.load_state_dict({**scaler.state_dict(), "scale": 64.0})
    x = torch.randn(4, 3, dtype=torch.float64)
    scaler.scale(model(x).square().mean()).backward()
    plain(x).square().mean().backward()
    assert_same_statistics(model, plain)
    scaler.update(16.0)
    scaler.scale(model(x).square().mean()).backward()
    plain(x).square().mean().backward()
    assert_same_statistics(model, plain)


# Copies, moves, loads


def by_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle, by_torch])
@pytest.mark.parametrize("bound", [False, True])
def test_a_copy_goes_its_own_way(engine: str, how: Callable[[nn.Module], Any], bound: bool) -> None:
    """Even one of a model that was used and bound."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    if bound:
        sn.bind(model, optimizer, scaler=torch.amp.GradScaler("cpu"))
    backward(model)
    optimizer.step()
    backward(model)
    other = how(model)
    assert_same_state(model, other)
    its_optimizer = SGD(other.parameters(), lr=0.1)
    backward(other)
    assert int(layers(model)[0].samples) == 5
    assert int(layers(other)[0].samples) == 10
    its_optimizer.step()
    assert collecting(model)
    assert not collecting(other)


def test_a_model_that_is_moved(engine: str) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    model.to(torch.float64)
    assert layers(model)[0].long.dtype == torch.float64
    model(torch.randn(5, 3, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    assert not collecting(model)


def test_a_state_that_is_loaded_between_steps(engine: str) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    saved, x = copy.deepcopy(model.state_dict()), torch.randn(5, 3)
    runs = []
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        runs.append(copy.deepcopy(model.state_dict()))
        model.load_state_dict(saved)
    for name, tensor in runs[0].items():
        assert tensor.equal(runs[1][name]), name
    assert not runs[0]["1.long"].equal(saved["1.long"])


def test_layers_that_are_gone_leave_the_registry() -> None:
    model = network()
    backward(model)
    keys = [id(layer) for layer in layers(model)]
    alive = [weakref.ref(layer) for layer in layers(model)]
    assert all(key in updates._layers for key in keys)
    del model
    gc.collect()
    assert [layer() for layer in alive] == [None, None]
    assert not any(key in updates._layers for key in keys)


def test_evaluation_registers_nothing() -> None:
    model = network().eval()
    model(torch.randn(2, 3))
    assert not any(id(layer) in updates._layers for layer in layers(model))


# By hand


def test_a_manual_loop(engine: str) -> None:
    by_hand, by_torch = network(), network()
    by_torch.load_state_dict(by_hand.state_dict())
    optimizer = SGD(by_torch.parameters(), lr=0.25)
    for _ in range(3):
        x = torch.randn(5, 3)
        by_torch(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        gradients = torch.autograd.grad(by_hand(x).square().mean(), list(by_hand.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients):
                parameter.sub_(gradient, alpha=0.25)
        sn.commit(by_hand)
    assert_same_state(by_hand, by_torch)


def test_a_second_commit_changes_nothing(engine: str) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    before = copy.deepcopy(model)
    sn.commit(model)
    sn.commit(model)
    assert_same_state(model, before)
    backward(model)
    sn.commit(model)
    before = copy.deepcopy(model)
    sn.commit(model)
    assert_same_state(model, before)


def test_commit_takes_a_layer_or_a_model_without_one() -> None:
    layer = sn.StreamingNorm1d(3)
    layer(torch.randn(2, 3))
    sn.commit(layer)
    assert int(layer.samples) == 0
    sn.commit(nn.Linear(2, 2))


# Threads


def updates_of(model: nn.Module, optimizer: Optimizer, batches: list[Tensor]) -> None:
    for x in batches:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("bound", [True, False])
def test_two_threads_train_two_models(bound: bool) -> None:
    """As one thread after the other does. Unbound, each optimizer has to be known by a first step."""
    models = [network(affine=not bound) for _ in range(2)]
    alone = copy.deepcopy(models)
    batches = [[torch.randn(3, 3) for _ in range(60)] for _ in models]
    runs = []
    for each in (models, alone):
        optimizers = [SGD(model.parameters(), lr=0.01) for model in each]
        for model, optimizer in zip(each, optimizers):
            if bound:
                sn.bind(model, optimizer)
            else:
                updates_of(model, optimizer, [torch.ones(2, 3)])
        runs.append(list(zip(each, optimizers, batches)))
    threads = [threading.Thread(target=updates_of, args=run) for run in runs[0]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run in runs[1]:
        updates_of(*run)
    for ours, theirs in zip(models, alone):
        assert_same_state(ours, theirs)
        assert not collecting(ours)


def test_statistics_of_an_unfinished_update_are_committed_after_loading(engine: str) -> None:
    model, resumed = network(), network()
    backward(model)
    resumed.load_state_dict(model.state_dict())
    for parameter, twin in zip(resumed.parameters(), model.parameters()):
        parameter.grad = None if twin.grad is None else twin.grad.clone()
    for each in (model, resumed):
        SGD(each.parameters(), lr=0.1).step()
    assert not collecting(resumed)
    assert_same_state(resumed, model)


def test_a_listener_sees_both_memories_before_the_commit(engine: str) -> None:
    first, second = (nn.Sequential(nn.Linear(2, 2), sn.StreamingNorm1d(2)) for _ in range(2))
    optimizer, unused = (SGD(model.parameters(), lr=0.1) for model in (first, second))
    sn.bind(second, unused)
    heard: list[tuple[Optimizer | None, list[tuple[nn.Module, int]]]] = []
    ours = (first[1], second[1])  # there may be layers of other tests
    handle = updates.before_commit(
        lambda layers, who: heard.append((who, [(layer, int(layer.samples)) for layer in layers if layer in ours]))
    )
    other = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    for model in (first, second):
        model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    sn.commit(second)
    other.step()
    handle.remove()
    optimizer.step()
    assert heard == [(optimizer, [(first[1], 3)]), (None, [(second[1], 3)]), (other, [])]


def test_layers_commit_though_a_listener_raises(engine: str) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    layer = sn.StreamingNorm1d(2)
    layer(torch.randn(3, 2))
    handle = updates.before_commit(fail)
    try:
        with pytest.raises(OSError, match="full"):
            sn.commit(layer)
    finally:
        handle.remove()
    assert not layer.samples
    assert layer.long[0].all()
