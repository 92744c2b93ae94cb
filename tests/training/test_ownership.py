"""Which optimizer's steps are updates of a layer: whatever wraps, replaces, freezes or computes what it trains."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel

import streamnorm as sn
from streamnorm.training import updates


def block(inputs: int, outputs: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), sn.StreamingNorm1d(outputs, **options), nn.Tanh())


def network(**options: Any) -> nn.Sequential:
    """Two blocks and a head."""
    return nn.Sequential(block(3, 4, **options), block(4, 4, **options), nn.Linear(4, 2))


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, sn.Norm)]


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for layer in layers(model) for parameter in layer.parameters()]


def others(model: nn.Module) -> list[nn.Parameter]:
    norms = {id(parameter) for parameter in norm_parameters(model)}
    return [parameter for parameter in model.parameters() if id(parameter) not in norms]


def waiting(model: nn.Module) -> list[int]:
    """Of each layer the samples that no update has taken in."""
    return [int(layer.samples) for layer in layers(model)]


def backward(model: nn.Module, samples: int = 5) -> None:
    model(torch.randn(samples, 3)).square().mean().backward()


def update(model: nn.Module, optimizer: Any, samples: int = 5) -> None:
    optimizer.zero_grad()
    backward(model, samples)
    optimizer.step()


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    for (name, ours), theirs in zip(first.state_dict().items(), second.state_dict().values()):
        assert ours.equal(theirs), name


# Optimizers that wrap others


class Wrapper(Optimizer):
    """Written by hand, without ``super().__init__``."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner

    param_groups = property(lambda self: self.inner.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class Holder:
    """No optimizer, and one inside of a dict."""

    def __init__(self, inner: Optimizer) -> None:
        self.parts = {"optimizers": [inner]}

    def zero_grad(self) -> None:
        self.parts["optimizers"][0].zero_grad()

    def step(self) -> None:
        self.parts["optimizers"][0].step()


class SharpnessAware(Optimizer):
    """Its own ``step`` is never called: the base optimizer makes the update."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base = SGD(self.param_groups, lr=0.01)

    @torch.no_grad()
    def ascend(self) -> None:
        self.moves = [(p, 0.05 * p.grad.sign()) for group in self.param_groups for p in group["params"]]
        for parameter, move in self.moves:
            parameter += move
        self.zero_grad()

    @torch.no_grad()
    def descend(self) -> None:
        for parameter, move in self.moves:
            parameter -= move
        self.base.step()
        self.zero_grad()


WRAPPERS: dict[str, Callable[[Optimizer], Any]] = {
    "none": lambda inner: inner,
    "wrapper": Wrapper,
    "wrapper of a wrapper": lambda inner: Wrapper(Wrapper(inner)),
    "holder": Holder,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("affine", [True, False])
def test_bound_to_a_wrapper_is_bound_to_what_it_wraps(wrap: Callable[[Optimizer], Any], affine: bool) -> None:
    bound, free = network(affine=affine), network(affine=affine)
    free.load_state_dict(bound.state_dict())
    inner = SGD(bound.parameters(), lr=0.1)
    wrapped = wrap(inner)
    sn.bind(bound, wrapped)
    twin = SGD(free.parameters(), lr=0.1)
    for seed in range(4):
        for model, optimizer in ((bound, wrapped), (free, twin)):
            torch.manual_seed(seed)
            update(model, optimizer)
            assert waiting(model) == [0, 0]
    assert_same_state(bound, free)


@pytest.mark.parametrize("bound", [True, False])
def test_two_step_sharpness_aware_minimization(bound: bool) -> None:
    model = network()
    optimizer = SharpnessAware(model.parameters())
    if bound:
        sn.bind(model, optimizer)
    for _ in range(3):
        backward(model)
        optimizer.ascend()
        backward(model)
        assert waiting(model) == [10, 10]
        optimizer.descend()
        assert waiting(model) == [0, 0]


def test_bound_layers_follow_whoever_trains_these_parameters() -> None:
    """The optimizer that was bound is replaced by a later one, and still lives."""
    model, other = network(affine=False), network()
    first = SGD(model.parameters(), lr=0.1)
    sn.bind(model, first)
    second = Adam(model.parameters())
    update(model, second)
    assert waiting(model) == [0, 0]
    backward(model)
    update(other, SGD(other.parameters(), lr=0.1))
    assert waiting(model) == [5, 5]


@pytest.mark.parametrize("thing", [None, "sgd", StepLR, object()], ids=["None", "str", "type", "object"])
def test_bind_refuses_what_holds_no_optimizer(thing: Any) -> None:
    model = network()
    with pytest.raises(TypeError, match=r"finds none in this \w+: its step\(\) would.*streamnorm\.commit\(model\)"):
        sn.bind(model, thing)
    update(model, SGD(model.parameters(), lr=0.1))
    assert waiting(model) == [0, 0]


def test_bind_refuses_an_optimizer_of_another_kind() -> None:
    class OfAnotherKind:
        def __init__(self, parameters: Iterable[Tensor]) -> None:
            self.param_groups = [{"params": list(parameters)}]

        def step(self) -> None:
            raise AssertionError

    model = network()
    with pytest.raises(TypeError, match="OfAnotherKind"):
        sn.bind(model, OfAnotherKind(model.parameters()))


# Stages: other parts of a network are trained, by another optimizer


def freeze_gains(model: nn.Sequential) -> list[nn.Parameter]:
    for layer in layers(model):
        layer.requires_grad_(False)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def leave_out_gains(model: nn.Sequential) -> list[nn.Parameter]:
    return others(model)


def first_weights_only(model: nn.Sequential) -> list[nn.Parameter]:
    """The second layer stands in a block that is frozen, and its input changes all the same."""
    model.requires_grad_(False)
    linear: Any = model[0]
    return [parameter.requires_grad_() for parameter in linear[0].parameters()]


def head_only(model: nn.Sequential) -> list[nn.Parameter]:
    return list(model[2].parameters())


def an_adapter(model: nn.Sequential) -> list[nn.Parameter]:
    """New parameters beside frozen ones, as in low-rank adaptation."""

    class Adapted(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear, self.added = linear, nn.Parameter(torch.zeros(linear.weight.shape))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x) + x @ self.added.t()
            return y

    model.requires_grad_(False)
    parts: Any = model
    for part in parts[:2]:
        part[0] = Adapted(part[0])
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


STAGES = [freeze_gains, leave_out_gains, first_weights_only, head_only, an_adapter]
FIRST: dict[str, Callable[[nn.Module], list[nn.Parameter]]] = {
    "all": lambda model: list(model.parameters()),
    "gains": norm_parameters,
    "weights": others,
}


@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)
@pytest.mark.parametrize("second", STAGES)
def test_every_step_of_a_second_stage_is_an_update(
    first: Callable[[nn.Module], list[nn.Parameter]], second: Callable[[nn.Sequential], list[nn.Parameter]]
) -> None:
    """Whether or not somebody still holds the optimizer of the first."""
    results = []
    for keep in (True, False):
        torch.manual_seed(0)
        model = network()
        kept: list[Any] = [SGD(first(model), lr=0.1)]
        kept.append(StepLR(kept[0], 3))
        for _ in range(3):
            update(model, kept[0])
            kept[1].step()
        if not keep:
            kept.clear()
            gc.collect()
        optimizer = SGD(second(model), lr=0.1)
        for _ in range(4):
            update(model, optimizer)
            assert waiting(model) == [0, 0]
        results.append(model)
    assert_same_state(*results)


def test_a_second_stage_in_one_flat_module() -> None:
    """It has nothing in common with the first, and trains what lies before the layer."""
    model = nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    first = SGD([*model[1].parameters(), *model[3].parameters()], lr=0.1)
    second = SGD(model[0].parameters(), lr=0.1)
    for optimizer in (first, second):
        for _ in range(3):
            update(model, optimizer)
            assert waiting(model) == [0]


def test_a_part_that_is_trained_no_more() -> None:
    """Its statistics follow the part before it, once its own optimizer has not stepped for a while.

    For the first steps this looks like the turn of a generator.
    """
    model = network()
    last, first = SGD(model[1:].parameters(), lr=0.1), SGD(model[0].parameters(), lr=0.1)
    update(model, last)
    assert waiting(model) == [0, 0]
    for number in range(1, 200):
        update(model, first)
        assert waiting(model) == [0, 5 * number if number <= updates.PATIENCE else 0]
    update(model, last)
    update(model, first)
    assert waiting(model) == [0, 5]


def test_a_frozen_part_beside_a_network_that_is_trained() -> None:
    """Nobody trains it, and its statistics follow the other's steps after a while."""
    extractor, model = nn.Sequential(network(affine=False), nn.Linear(2, 3)).requires_grad_(False), network()
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(updates.PATIENCE + 3):
        optimizer.zero_grad()
        model(extractor(torch.randn(2, 3))).square().mean().backward()
        optimizer.step()
    assert waiting(extractor) == [0, 0]


def test_a_network_that_becomes_a_part_of_another() -> None:
    """What is around a layer is found out again when an optimizer steps for the first time."""
    body = network()
    update(body, SGD(body.parameters(), lr=0.1))
    body.requires_grad_(False)
    whole = nn.Sequential(nn.Linear(3, 3), body)
    optimizer = SGD(whole[0].parameters(), lr=0.1)
    for _ in range(updates.PATIENCE + 3):
        update(whole, optimizer)
    assert waiting(whole) == [0, 0]


def test_only_the_head_is_trained() -> None:
    """From the start, beside a critic of its own: no optimizer was ever seen to train the rest."""
    model, other = network(), network()
    model[:2].requires_grad_(False)
    head = SGD(model[2].parameters(), lr=0.1)
    for _ in range(3):
        backward(other)
        update(model, head)
        assert waiting(model) == [0, 0]


@pytest.mark.parametrize("of_gains", [norm_parameters, lambda model: [p for p in model.parameters() if p.dim() == 1]])
def test_gains_that_are_stepped_now_and_then(of_gains: Callable[[nn.Module], list[nn.Parameter]]) -> None:
    """Weights by one optimizer, gains (and biases) by another: each step is an update of the network."""
    model = network()
    gains = of_gains(model)
    rarely = SGD(gains, lr=0.1)
    often = SGD([p for p in model.parameters() if all(p is not gain for gain in gains)], lr=0.1)
    for number in range(9):
        backward(model)
        if number % 3 == 0:
            rarely.step()
            assert waiting(model) == [0, 0]
            backward(model)
        often.step()
        assert waiting(model) == [0, 0]


def test_layers_called_without_a_module_around_them() -> None:
    """In a script: what they stand in cannot be known."""
    linear, norm, head = nn.Linear(3, 4), sn.StreamingNorm1d(4), nn.Linear(4, 1)
    optimizer = SGD([*linear.parameters(), *norm.parameters(), *head.parameters()], lr=0.1)
    for stage in range(2):
        for _ in range(2):
            optimizer.zero_grad()
            head(norm(linear(torch.randn(5, 3)))).square().mean().backward()
            optimizer.step()
            assert int(norm.samples) == 0
        if stage == 0:
            norm.requires_grad_(False)
            kept, optimizer = optimizer, SGD([*linear.parameters(), *head.parameters()], lr=0.1)
    assert kept is not optimizer


# Gains that are computed


def pruned(layer: Any) -> nn.Module:
    prune.random_unstructured(layer, "weight", amount=0.5)
    return layer


def parametrized(layer: Any) -> nn.Module:
    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.softplus(x)

    parametrize.register_parametrization(layer, "weight", Positive())
    return layer


def normed(layer: Any) -> nn.Module:
    weight_norm(layer, dim=0)
    return layer


class LowRank(nn.Module):
    """A wrapper whose parameters add to a frozen gain, which becomes a plain attribute."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.start = base, base.weight.detach()
        del base.weight, base.bias
        base.bias = None
        self.added = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.base.__dict__["weight"] = self.start + self.added
        y: Tensor = self.base(x)
        return y


class ByAnother(nn.Module):
    """The gain comes from a network that lies elsewhere, as a hypernetwork does."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.size = base, base.num_features
        self.elsewhere = [nn.Linear(1, base.num_features)]  # a list: no submodule
        base.requires_grad_(False)

    def parameters(self, recurse: bool = True) -> Any:
        return [*super().parameters(recurse), *self.elsewhere[0].parameters()]

    def forward(self, x: Tensor) -> Tensor:
        gain = 1 + self.elsewhere[0](torch.ones(1))
        y: Tensor = torch.func.functional_call(self.base, {"weight": gain}, (x,))
        return y


COMPUTED = [pruned, parametrized, normed, LowRank, ByAnother]


def computing(how: Callable[[Any], nn.Module]) -> nn.Sequential:
    model: Any = network()
    for part in model[:2]:
        part[1] = how(part[1])
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    parts = [module for module in model.modules() if isinstance(module, ByAnother)]
    return [*model.parameters(), *(p for part in parts for p in part.elsewhere[0].parameters())]


@pytest.mark.parametrize("how", COMPUTED)
def test_a_layer_whose_gain_is_computed(how: Callable[[Any], nn.Module]) -> None:
    """Its own optimizer's steps are updates, and another's are not; also if it trains the parts of the gain alone."""
    model, other = computing(how), network()
    optimizer, strange = SGD(trainable(model), lr=0.1), SGD(other.parameters(), lr=0.1)
    weights = {id(p) for module in model.modules() if type(module) is nn.Linear for p in module.parameters()}
    parts = SGD([p for p in trainable(model) if id(p) not in weights], lr=0.1)
    for _ in range(3):
        for each in (optimizer, parts):
            backward(model)
            update(other, strange)
            assert waiting(model) == [5, 5]
            each.step()
            assert waiting(model) == [0, 0]


# Two networks: the critic's layers do not commit at the generator's step, whatever their gains are


def frozen_gains(layer: Any) -> nn.Module:
    layer.requires_grad_(False)
    return layer


def no_gain(layer: Any) -> nn.Module:
    return sn.StreamingNorm1d(layer.num_features, affine=False)


def plain_gain(layer: Any) -> nn.Module:
    return layer


class Pair(nn.Module):
    """Both networks in one module, which is called for the generator's turn."""

    def __init__(self, generator: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.generator, self.critic = generator, critic

    def forward(self, z: Tensor) -> Tensor:
        y: Tensor = self.critic(self.generator(z))
        return y


@pytest.mark.parametrize("how", [*COMPUTED, frozen_gains, no_gain, plain_gain])
@pytest.mark.parametrize("first", ["critic", "generator"])
@pytest.mark.parametrize("toggle", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_a_critic_does_not_commit_at_the_generators_step(
    how: Callable[[Any], nn.Module], first: str, toggle: bool, together: bool
) -> None:
    generator, critic = nn.Sequential(network(), nn.Linear(2, 3)), nn.Sequential(computing(how), nn.Linear(2, 1))
    if how is not plain_gain:
        generator, critic = critic, generator  # each kind in either place
        generator.append(nn.Linear(1, 3))
        critic.append(nn.Linear(3, 1))
    both = Pair(generator, critic)
    of_generator = SGD(trainable(generator), lr=0.01)
    of_critic = SGD(trainable(critic), lr=0.01)

    def turn_of_critic(number: int) -> None:
        before = waiting(generator)
        fake = generator(torch.randn(5, 3))
        critic(fake.detach()).mean().backward()
        of_critic.step()
        assert waiting(critic) == [0, 0]
        assert waiting(generator) == [n + 5 for n in before]

    def turn_of_generator(number: int) -> None:
        trained = [parameter for parameter in trainable(critic) if parameter.requires_grad and toggle]
        for parameter in trained:
            parameter.requires_grad_(False)
        (both(torch.randn(5, 3)) if together else critic(generator(torch.randn(5, 3)))).mean().backward()
        of_generator.step()
        assert waiting(generator) == [0, 0]
        if number or not together:  # the first step of all
            assert waiting(critic) == [5, 5]
        for parameter in trained:
            parameter.requires_grad_()

    turns = [turn_of_critic, turn_of_generator]
    for number in range(3):
        for turn in turns if first == "critic" else turns[::-1]:
            turn(number)


def test_two_networks_in_one_flat_module() -> None:
    """Once both optimizers have stepped, which gain is whose is known."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g1, self.gn, self.g2 = nn.Linear(3, 4), sn.StreamingNorm1d(4), nn.Linear(4, 3)
            self.c1, self.cn, self.c2 = nn.Linear(3, 4), sn.StreamingNorm1d(4), nn.Linear(4, 1)

        def forward(self, z: Tensor) -> Tensor:
            y: Tensor = self.c2(self.cn(self.c1(self.g2(self.gn(self.g1(z))))))
            return y

    model = Flat()
    of_generator = SGD([*model.g1.parameters(), *model.gn.parameters(), *model.g2.parameters()], lr=0.1)
    of_critic = SGD([*model.c1.parameters(), *model.cn.parameters(), *model.c2.parameters()], lr=0.1)
    for number in range(6):
        backward(model)
        (of_critic if number % 2 == 0 else of_generator).step()
        if number > 1:
            assert waiting(model) == ([5, 0] if number % 2 == 0 else [0, 5])


def test_many_steps_of_the_critic() -> None:
    """The generator collects over 100 of them, and nobody says a word."""
    generator, critic = network(), nn.Sequential(nn.Linear(2, 3), network())
    of_generator, of_critic = SGD(generator.parameters(), lr=0.01), SGD(critic.parameters(), lr=0.01)
    for number in range(1, 405):
        critic(generator(torch.randn(2, 3)).detach()).mean().backward()
        of_critic.step()
        of_critic.zero_grad()
        if number % 101 == 0:
            assert waiting(generator) == [202, 202]
            critic(generator(torch.randn(2, 3))).mean().backward()
            of_generator.step()
            assert waiting(generator) == [0, 0]
            assert waiting(critic) == [2, 2]


# Copies made within an update


def by_pickle(things: Any) -> Any:
    return pickle.loads(pickle.dumps(things))


def by_torch(things: Any) -> Any:
    file = io.BytesIO()
    torch.save(things, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copier", [copy.deepcopy, by_pickle, by_torch])
@pytest.mark.parametrize("how", [plain_gain, frozen_gains, no_gain, pruned, LowRank])
@pytest.mark.parametrize("model_first", [True, False])
def test_copies_of_model_and_optimizer_within_an_update(
    copier: Callable[[Any], Any], how: Callable[[Any], nn.Module], model_first: bool
) -> None:
    """They go on as the originals do, from their first step on."""
    model = computing(how)
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        update(model, optimizer)
    optimizer.zero_grad()
    backward(model)
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    for layer in layers(model):  # PyTorch copies no tensors of a graph
        if "weight" in layer.__dict__:
            layer.__dict__["weight"] = layer.__dict__["weight"].detach()
    if model_first:
        twin, its_optimizer = copier((model, optimizer))
    else:
        its_optimizer, twin = copier((optimizer, model))
    for parameter, gradient in zip(twin.parameters(), gradients):
        parameter.grad = gradient
    its_optimizer.step()
    assert waiting(twin) == [0, 0]
    assert waiting(model) == [5, 5]
    optimizer.step()
    for seed in range(3):
        for each, its in ((model, optimizer), (twin, its_optimizer)):
            torch.manual_seed(seed)
            update(each, its)
    assert_same_state(model, twin)


def test_a_copy_waits_for_its_own_optimizer() -> None:
    """Such as an average of the model, or another member of a population."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    update(model, optimizer)
    backward(model)
    twin, layer = copy.deepcopy(model), copy.copy(layers(model)[0])
    optimizer.step()
    assert waiting(model) == [0, 0]
    assert waiting(twin) == [5, 5]
    assert layer._ties is not layers(model)[0]._ties


# Hooks of the optimizer's own


@pytest.mark.parametrize("when", ["before the first use", "after it"])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"kappa": 0.7}])
def test_an_average_in_a_hook_is_that_of_the_line_after_step(when: str, options: dict[str, Any]) -> None:

    def averaged(in_hook: bool) -> nn.Module:
        torch.manual_seed(0)
        model = network(**options)
        optimizer = SGD(model.parameters(), lr=0.1)
        average = AveragedModel(model, use_buffers=True)
        seen: list[list[int]] = []
        if when == "after it":
            update(model, optimizer)
        if in_hook:
            optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))
            optimizer.register_step_post_hook(lambda *_: seen.append(waiting(model)))
        for _ in range(3):
            update(model, optimizer)
            if not in_hook:
                average.update_parameters(model)
        assert seen == [[0, 0]] * (3 * in_hook)
        return average

    assert_same_state(averaged(in_hook=True), averaged(in_hook=False))


def test_a_step_commits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    model = network()
    own = set(layers(model))  # those of earlier tests may be there still, and wait for updates
    monkeypatch.setattr(updates, "_commit", lambda select, optimizer: calls.append(len(own & set(select()))))
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        update(model, optimizer)
    assert calls == [2, 2, 2]
    assert list(optimizer._optimizer_step_post_hooks.values()) == [updates._after_step]


def test_a_step_that_began_before_the_layers_were_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its closure is what uses them for the first time."""
    for handle in updates._hooks:
        handle.remove()
    monkeypatch.setattr(updates, "_hooks", [])
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        loss: Tensor = model(torch.randn(5, 3)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert waiting(model) == [0, 0]
    assert not optimizer._optimizer_step_post_hooks
    optimizer.step(closure)
    assert waiting(model) == [0, 0]
    assert len(optimizer._optimizer_step_post_hooks) == 1
