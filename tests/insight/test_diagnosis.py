"""The diagnosis: it disturbs nothing, says what is so, and following its advice helps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD

import streamnorm as sn
from streamnorm.layers import streaming_layers
from streamnorm.training import updates

pytestmark = pytest.mark.filterwarnings("ignore:.* runs away: ")  # rates that are too high are tried here

cross_entropy: Callable[..., Tensor] = F.cross_entropy


def network(affine: bool = True) -> nn.Sequential:
    """With layers of others that keep statistics, and one that draws random numbers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        sn.StreamingNorm2d(6, affine=affine),
        nn.ReLU(),
        nn.BatchNorm2d(6),
        nn.Dropout(0.2),
        nn.Conv2d(6, 4, 3),
        sn.GeneralBatchNorm(4),
        sn.StreamingNorm2d(4, window=7),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )


@cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(data.target)


def some(count: int, seed: int = 2, start: int = 0, end: int = 1400) -> tuple[Tensor, Tensor]:
    """Digits to train and diagnose with; those from 1400 on are for evaluation."""
    x, y = digits()
    index = torch.randint(start, end, (count,), generator=torch.Generator().manual_seed(seed))
    return x[index], y[index]


def train(model: nn.Module, step: float | SGD | Callable[[], None], count: int) -> float:
    """One sample at a time; the mean loss of the second half, infinite if it is not finite.

    ``step`` is a learning rate, an optimizer, or what updates the weights.
    """
    if isinstance(step, float):
        step = SGD(model.parameters(), lr=step, momentum=0.9)
    x, y = some(count, seed=1)
    losses = []
    for i in range(count):
        model.zero_grad()
        loss = cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        loss.backward()
        step.step() if isinstance(step, SGD) else step()
        losses.append(loss.item())
    mean = sum(losses[count // 2 :]) / (count - count // 2)
    return mean if math.isfinite(mean) else math.inf


@torch.no_grad()
def evaluated(model: nn.Module) -> float:
    """The loss in evaluation on digits that were not trained on."""
    model.eval()
    x, y = digits()
    loss = cross_entropy(model(x[1400:]), y[1400:]).item()
    model.train()
    return loss


# Nothing is disturbed


def test_training_goes_on_as_if_nothing_had_been(engine: str) -> None:
    """In the middle of an update, with gradients half accumulated: bit for bit, random numbers included."""
    models = network(), network()
    ends = []
    for diagnosed, model in zip((True, False), models):
        torch.manual_seed(5)
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        for i in range(12):
            x, y = some(4, seed=i)
            cross_entropy(model(x), y).backward()
            if diagnosed:
                before = [parameter.grad for parameter in model.parameters()]
                sn.diagnose(model, some(16, seed=100 + i), cross_entropy)
                assert all(a is b for a, b in zip(before, (parameter.grad for parameter in model.parameters())))
            if i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
        ends.append([*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)])
        ends[-1].append(torch.get_rng_state())
    for ours, theirs in zip(*ends, strict=True):
        assert ours.equal(theirs)


def test_the_scale_of_a_bound_scaler_has_no_part_in_it() -> None:
    """The loss that a diagnosis sends back is not scaled."""
    models = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    sn.bind(models[0], SGD(models[0].parameters(), lr=0.1), scaler=scaler)
    found = []
    for model in models:
        torch.manual_seed(3)
        found.append(sn.diagnose(model, some(16), cross_entropy).layers["1"].present)
    assert found[0] == pytest.approx(found[1])
    bound = models[0][1]
    assert isinstance(bound, sn.Norm)
    assert bound._ties.grad_scale is scaler._scale


def test_no_hook_and_no_listener_hears_of_it() -> None:
    model, heard = network(), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: heard.append(p))
    handle = updates.before_commit(lambda *_: heard.append(None))
    sn.diagnose(model, some(16), cross_entropy)
    handle.remove()
    assert heard == []
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_modes_are_restored() -> None:
    model = network().eval()
    model[3].train()
    before = [module.training for module in model.modules()]
    sn.diagnose(model, some(16), cross_entropy)
    assert [module.training for module in model.modules()] == before


def test_all_is_restored_after_an_error() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    model = network().append(Failing())
    model[1](torch.randn(4, 6, 5, 5))
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        sn.diagnose(model.eval(), some(16))
    for name, tensor in model.state_dict().items():
        assert tensor.equal(state[name]), name
    assert torch.get_rng_state().equal(random)
    assert not model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


# What it takes


def test_batches_and_losses() -> None:
    x, y = some(16)
    model = network()
    expected = sn.diagnose(model, (x, y), cross_entropy)
    assert expected.loss is not None
    assert expected.layers["1"].present > 0

    class WithLoss(nn.Module):
        def __init__(self, whole: bool) -> None:
            super().__init__()
            self.model, self.whole = model, whole

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            loss = cross_entropy(self.model(x), labels)
            return loss if self.whole else {"loss": loss}

    for whole in (True, False):
        torch.manual_seed(0)
        found = sn.diagnose(WithLoss(whole), {"x": x, "labels": y})
        assert found.loss is not None
        assert found.layers["model.1"].present > 0
    torch.manual_seed(0)
    assert sn.diagnose(model, [x, y], lambda out, y: cross_entropy(out, y)).loss is not None


def test_without_a_loss_gradients_stay_unknown() -> None:
    found = sn.diagnose(network(), some(16)[0])
    assert found.loss is None
    assert math.isnan(found.layers["1"].present)
    assert found.layers["1"].drift > 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Linear holds no streaming layer to diagnose"):
        sn.diagnose(nn.Linear(2, 2), torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"loss must give one number, as a tensor, got one of shape \(16,\)"):
        sn.diagnose(network(), some(16), lambda out, y: cross_entropy(out, y, reduction="none"))
    with pytest.raises(ValueError, match="got float"):
        sn.diagnose(network(), some(16), lambda out, y: 1.0)  # type: ignore[arg-type,return-value]
    unused = nn.Sequential(nn.Linear(2, 2))
    unused.other = sn.StreamingNorm1d(2)
    unused.forward = lambda x: unused[0](x)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="the batch reaches no streaming layer of this Sequential"):
        sn.diagnose(unused, torch.randn(4, 2))


def test_recurrent_layers() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = sn.GRU(8, 12)
            self.head = nn.Linear(12, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.network(x.squeeze(1).transpose(0, 1))[0][-1])

    found = sn.diagnose(Last(), some(16), cross_entropy)
    assert list(found.layers) == ["network.norm_ih_l0", "network.norm_hh_l0"]
    assert found.samples == 8 * 16
    for layer in found.layers.values():
        assert layer.drift > 0
        assert layer.present > 0
        assert math.isnan(layer.level)


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore::DeprecationWarning:torch.*")  # torch.compile's own
def test_a_compiled_model() -> None:
    model = network()
    compiled: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    assert list(sn.diagnose(compiled, some(16), cross_entropy).layers) == ["1", "7"]


def test_frozen_layers_are_left_alone() -> None:
    model = network()
    sn.freeze(model[1])
    found = sn.diagnose(model, some(16), cross_entropy).layers
    assert math.isnan(found["1"].drift)
    assert found["1"].advice == ""
    assert found["7"].drift > 0


# What it says


def test_the_present_batch_against_the_streamed_statistics() -> None:
    """A layer whose memory is exact, and a batch that lies one deviation to the side in two of four channels."""
    layer = sn.StreamingNorm1d(4, p=2, center="zero", window=1000)
    layer.long.copy_(torch.tensor([[0.0], [1.0]]).expand(2, 4))
    layer.seen.fill_(10_000)
    x = torch.randn(4096, 4) + torch.tensor([0.0, 2.0, 0.0, -1.0])
    found = sn.diagnose(layer, x).layers["(the model)"]
    distances = torch.tensor([0.0, math.hypot(2, 5**0.5 - 1), 0.0, math.hypot(1, 2**0.5 - 1)])
    assert found.drift == pytest.approx(distances.square().mean().sqrt().item(), rel=0.05)
    assert found.drift_worst == pytest.approx(distances.max().item(), rel=0.05)
    assert found.worst == 1
    assert found.memory == pytest.approx(1000, rel=0.01)
    assert found.channels == 4


def test_chance_is_what_the_same_distribution_gives() -> None:
    """Over many layers whose input has not changed, drift is what chance explains."""
    drifts, chances = [], []
    for seed in range(30):
        torch.manual_seed(seed)
        layer = sn.StreamingNorm1d(16, window=50)
        for x in torch.randn(400, 1, 16):
            layer(x)
            sn.commit(layer)
        found = sn.diagnose(layer, torch.randn(32, 16)).layers["(the model)"]
        drifts.append(found.drift**2)
        chances.append(found.chance**2)
    assert sum(chances) == pytest.approx(sum(drifts), rel=0.25)


def test_the_table() -> None:
    model = network()
    text = repr(sn.diagnose(model, some(16), cross_entropy))
    lines = text.splitlines()
    assert lines[0].startswith("16 samples, loss ")
    assert lines[1].split()[:3] == ["layer", "channels", "memory"]
    assert lines[2].split()[:3] == ["1", "6", "16"]
    assert lines[3].split()[:3] == ["7", "4", "7"]
    assert lines[4].startswith("1, 7: no statistics yet")


# Each advice, and that following it helps


def fully_connected(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for size in (64, 128):
        layers += [nn.Linear(size, 128), sn.StreamingNorm1d(128, **options), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def advice(model: nn.Module, count: int = 64) -> dict[str, str]:
    found = sn.diagnose(model, some(count), cross_entropy)
    return {name: layer.advice for name, layer in found.layers.items() if layer.advice}


def test_nothing_to_advise_where_training_goes_well() -> None:
    model = fully_connected()
    assert train(model, 0.001, 1500) < 0.4
    assert advice(model) == {}
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 16, 3), sn.StreamingNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), sn.StreamingNorm2d(32)]
    model = nn.Sequential(*parts, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    train(model, 0.003, 1000)
    assert advice(model) == {}


@pytest.mark.filterwarnings("ignore:.*no weight update was noticed")  # the layers say it, too
def test_never_committed() -> None:
    """A loop that updates the weights by hand, and tells no one."""

    def by_hand(model: nn.Module, commits: bool) -> Callable[[], None]:
        @torch.no_grad()
        def update() -> None:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(0.01 * parameter.grad)
            if commits:
                sn.commit(model)

        return update

    silent, told = fully_connected(), fully_connected()
    lost = train(silent, by_hand(silent, commits=False), 2000)
    found = advice(silent)
    assert set(found) == {"2", "5"}
    assert "2000 samples collected and never committed" in found["2"]
    assert "streamnorm.commit(model) after each weight update" in found["2"]
    assert train(told, by_hand(told, commits=True), 2000) < lost
    assert "committed" not in str(advice(told))
    assert evaluated(told) < 0.8 * evaluated(silent)


def test_bound_to_an_optimizer_that_does_not_step() -> None:
    model = fully_connected(window=20)
    train(model, 0.001, 100)
    other = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    sn.bind(model, other)
    train(model, 0.001, 450)
    assert "450 samples collected and not committed: name the optimizer" in advice(model)["2"]
    sn.bind(model, SGD(model.parameters(), lr=0.001))
    train(model, 0.001, 100)
    assert "committed" not in str(advice(model))


def test_no_statistics_yet() -> None:
    model = fully_connected()
    train(model, 0.001, 1500)
    good = evaluated(model)
    sn.reset_stats(model)
    assert advice(model)["2"] == "no statistics yet: train, or collect them with streamnorm.calibrate(model, batches)"
    bad = evaluated(model)
    sn.calibrate(model, some(400)[0].split(50))
    assert advice(model) == {}
    assert evaluated(model) < min(bad, 1.2 * good)


def test_rate_too_high_for_this_memory() -> None:
    model = fully_connected()
    optimizer = SGD(model.parameters(), lr=0.04, momentum=0.9)
    train(model, optimizer, 300)
    said = "rate too high for this memory: try a learning rate of 0.01"
    assert advice(model) == {"2": said, "5": said}
    assert train(fully_connected(), 0.01, 2000) < 0.6 * train(fully_connected(), 0.04, 2000)


def test_values_that_are_not_finite() -> None:
    """Without the bound, which would hold them up."""
    model = fully_connected()
    for layer in streaming_layers(model):
        layer.set_stream(sn.Stream(limit=math.inf))
    start = copy.deepcopy(model.state_dict())
    assert train(model, 0.2, 1000) == math.inf
    advised = "values that are not finite: go back to a checkpoint from before, and go on with a lower learning rate"
    assert advice(model)["5"] == advised
    model.load_state_dict(start)
    assert train(model, 0.2 / 40, 1000) < 2


def test_a_start_that_is_not_forgotten() -> None:
    """Inputs far from the prior: at first the statistics are on their way from there. Going on helps."""
    layer = sn.StreamingNorm1d(64, window=100)
    x = 50 + 20 * torch.randn(400, 64)
    for i, each in enumerate(x):
        layer(each[None])
        sn.commit(layer)
        if i == 30:
            said = sn.diagnose(layer, x[:64]).layers["(the model)"].advice
            assert said.endswith("unless fewer than about 160 samples were seen: the start is still there")
    assert sn.diagnose(layer, x[:64]).layers["(the model)"].advice == ""


@pytest.mark.parametrize("options", [{"kappa": 0.7}, {"window": 5}], ids=str)
def test_memory_too_short_for_evaluation(options: dict[str, Any]) -> None:
    model = fully_connected(**options)
    train(model, 0.001, 1500)
    found = advice(model)
    assert set(found) == {"2", "5"}
    assert "memory too short for evaluation" in found["2"]
    assert "streamnorm.calibrate" in found["2"]
    before = evaluated(model)
    sn.calibrate(model, some(600)[0].split(50))
    assert evaluated(model) < 0.9 * before


def test_samples_that_differ_in_level_and_contrast() -> None:
    """Where is the bright square? Each picture has a gain and an offset of its own, as scanners and exposures have."""

    def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(seed)
        x = 0.3 * torch.randn(count, 1, 8, 8, generator=random)
        target = torch.randint(0, 4, (count,), generator=random)
        for picture, corner in zip(x, target.tolist()):
            row, column = 4 * (corner // 2), 4 * (corner % 2)
            picture[:, row + 1 : row + 3, column + 1 : column + 3] += 1
        gain = (0.7 * torch.randn(count, 1, 1, 1, generator=random)).exp()
        return gain * (x + 2 * torch.randn(count, 1, 1, 1, generator=random)), target

    def trained(norm: Callable[[int], nn.Module]) -> tuple[nn.Module, float]:
        torch.manual_seed(0)
        parts = [nn.Conv2d(1, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), norm(8), nn.ReLU()]
        model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
        optimizer = SGD(model.parameters(), lr=0.005, momentum=0.9)
        for x, target in zip(*(each.split(1) for each in pictures(600, seed=0))):
            optimizer.zero_grad()
            cross_entropy(model(x), target).backward()
            optimizer.step()
        x, target = pictures(400, seed=1)
        return model, (model.eval()(x).argmax(1) == target).float().mean().item()

    streaming, accuracy = trained(sn.StreamingNorm2d)
    found = sn.diagnose(streaming, pictures(64, seed=2), cross_entropy).layers["1"]
    assert found.advice.startswith("samples differ in level")
    assert 'Sample Normalization fits better, such as streamnorm.SampleNorm(channels, "channel")' in found.advice
    _, followed = trained(lambda channels: sn.SampleNorm(channels, "channel"))
    assert followed > accuracy + 0.1
