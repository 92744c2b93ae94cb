"""What becomes of a trained network before it is trained on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import streamnorm as sn
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.methods.finetuning import FINETUNE_METHODS, to_group
from streamnorm_lab.methods.method import rows, trainable


def trained() -> tuple[nn.Sequential, Tensor]:
    """A network with statistics of its data, and gains and biases that are not 1 and 0."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.Flatten()
    )
    images = torch.randn(64, 3, 6, 6) * 2 + 1
    for layer in (model[1], model[4]):
        assert isinstance(layer, nn.BatchNorm2d)
        nn.init.normal_(layer.weight, 1, 0.3)
        nn.init.normal_(layer.bias)
        layer.momentum = None
    for _ in range(3):
        model(images)
    return model, images


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    y: Tensor = model.eval()(images)
    model.train()
    return y.detach()


def test_held_still_it_is_the_same_network_in_training() -> None:
    model, images = trained()
    expected = outputs(model, images)
    held = FINETUNE_METHODS["batch-frozen"].prepare(model, images)
    for _ in range(2):
        held.train()
        assert held.training
        torch.testing.assert_close(held(images[:1] + 5), outputs(held, images[:1] + 5))
    assert torch.equal(held(images), expected)


@pytest.mark.parametrize("name", ["batch", "batch-recalibrated", "streaming-l1", "streaming-l2"])
def test_the_others_evaluate_as_before(name: str) -> None:
    model, images = trained()
    expected = outputs(model, images)
    torch.testing.assert_close(outputs(FINETUNE_METHODS[name].prepare(model, images), images), expected)


def test_streaming_layers_are_those_of_convert() -> None:
    model, images = trained()
    assert repr(FINETUNE_METHODS["streaming-l1"].prepare(model, images)) == repr(sn.convert(trained()[0]))
    variant = FINETUNE_METHODS["streaming-l2,window=70"].prepare(trained()[0], images)
    assert repr(variant) == repr(sn.convert(trained()[0], p=2, window=70))


def test_group_normalization_is_calibrated_layer_by_layer() -> None:
    """Each channel has the mean and deviation that Batch Normalization gives it, after every layer."""
    model, images = trained()
    batch = [layer for layer in model if isinstance(layer, nn.BatchNorm2d)]
    new = to_group(model, images, groups=2)
    groups = [layer for layer in new.modules() if isinstance(layer, nn.GroupNorm)]
    assert [layer.num_groups for layer in groups] == [2, 2]
    seen: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda _, __, y: seen.append(y)) for layer in groups]
    new(images)
    for y, before in zip(seen, batch, strict=True):
        deviation, mean = torch.std_mean(y, (0, 2, 3), correction=0)
        torch.testing.assert_close(mean, before.bias.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(deviation, before.weight.detach().abs(), rtol=1e-4, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert not any(layer._forward_hooks for layer in groups)


def test_layers_with_an_activation_inside_keep_it() -> None:
    class Activated(nn.BatchNorm2d):
        """As timm's."""

        def __init__(self, features: int) -> None:
            super().__init__(features)
            self.drop, self.act = nn.Identity(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.act(self.drop(super().forward(x)))
            return y

    model = to_group(nn.Sequential(nn.Conv2d(1, 4, 1), Activated(4)), torch.randn(20, 1, 3, 3))
    y = model(torch.randn(20, 1, 3, 3))
    assert (y >= 0).all()
    assert (y > 0).any()


def test_rows_and_variants() -> None:
    assert [method.name for method in rows("batch", FINETUNE_METHODS)] == ["batch", "batch-recalibrated"]
    assert trainable(["group,groups=2"], FINETUNE_METHODS)[0].label == "Group, groups=2"
    for name, message in (
        ("streaming-l1,windw=3", "did you mean 'window'"),
        ("streaming-l1,window=-3", "a number above 0"),
        ("batch-frozen,eps=3", "it has no options"),
        ("batch-recalibrated", "comes by itself with 'batch'"),
        ("layer", "choose from batch-frozen, batch, group"),
    ):
        with pytest.raises(UserError, match=message):
            trainable([name], FINETUNE_METHODS)
