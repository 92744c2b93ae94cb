"""What docs/reinforcement-learning.md rests on; the page's own code runs in test_docs.py."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import streamnorm as sn


def network(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), sn.StreamingNorm1d(8), nn.Tanh(), nn.Linear(8, outputs))


def train(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, tau: float) -> None:
    for ours, theirs in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        ours.lerp_(theirs, tau) if ours.is_floating_point() else ours.copy_(theirs)


def test_a_target_that_is_copied_evaluates_as_its_source() -> None:
    critic, x = network(1), torch.randn(6, 4) * 2 + 1
    target = copy.deepcopy(critic).eval()
    for _ in range(3):
        train(critic, x)
    follow(target, critic, 1.0)
    assert target(x).equal(critic.eval()(x))


def test_a_target_that_follows_comes_near_and_has_gone_part_of_the_way() -> None:
    critic, x = network(1), torch.randn(6, 4) * 2 + 1
    target = copy.deepcopy(critic).eval()
    for _ in range(3):
        train(critic, x)
    start, goal = target.get_buffer("1.long").clone(), critic.get_buffer("1.long")
    follow(target, critic, 0.25)
    torch.testing.assert_close(target.get_buffer("1.long"), start + 0.25 * (goal - start))
    for _ in range(200):
        follow(target, critic, 0.25)
    torch.testing.assert_close(target(x), critic.eval()(x))


def test_the_target_is_left_alone_by_the_critics_optimizer() -> None:
    critic, x = network(1), torch.randn(6, 4)
    target = copy.deepcopy(critic).eval()
    target(x)
    before = [value.clone() for value in target.state_dict().values()]
    train(critic, x)
    assert all(a.equal(b) for a, b in zip(before, target.state_dict().values(), strict=True))


def log_ratio(freeze: bool) -> Tensor:
    """Of the probabilities at the first update to those at the rollout, which went step by step."""
    torch.manual_seed(0)
    policy, observations = network(2), torch.randn(16, 4) * 3 + 1
    train(policy, observations)
    if freeze:
        sn.freeze(policy)
    with torch.no_grad():
        before = Categorical(logits=torch.cat([policy(x) for x in observations.split(1)]))
    actions = before.sample()
    return Categorical(logits=policy(observations)).log_prob(actions) - before.log_prob(actions)


def test_rollout_and_update_see_the_same_policy_only_if_it_is_frozen() -> None:
    assert log_ratio(freeze=True).abs().max() < 1e-6
    assert log_ratio(freeze=False).abs().max() > 1e-2
