"""timm: networks of plain BatchNorm, and of layers that carry a dropout and an activation inside."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from integrations.training import (
    NEW_TASK,
    assert_evaluates_as_before,
    assert_fine_tunes,
    assert_trains_alike,
    classification,
    converted,
    from_the_prior,
    images,
    in_batches,
    layers,
    with_statistics,
)
from torch import nn

import streamnorm as sn

pytestmark = pytest.mark.integration("timm")

NETWORKS = ["resnet18", "efficientnet_b0", "regnety_002", "mobilenetv3_small_050"]
TRAINED = ["resnet10t", "efficientnet_b0", "regnety_002", "mobilenetv3_small_050"]
CONVERTED = pytest.mark.shows("ResNet, EfficientNet, RegNet, MobileNetV3", "`sn.convert(model)`")


def network(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=4, **options)


def pretrained(name: str) -> nn.Module:
    """As pretrained weights would be: with statistics that are not those of the start."""
    return with_statistics(network(name), lambda model: model(images(4)[0]))


@CONVERTED
@pytest.mark.parametrize("name", NETWORKS)
def test_converted_it_evaluates_as_before(name: str) -> None:
    model = pretrained(name).double()
    assert_evaluates_as_before(model, converted(model), images(3)[0])


@CONVERTED
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("name", TRAINED)
def test_converted_it_fine_tunes(name: str, batch_size: int) -> None:
    assert_fine_tunes(converted(pretrained(name), **NEW_TASK), images(4), batch_size)


@pytest.mark.shows("ResNet, EfficientNet, RegNet, MobileNetV3, back to timm's own layers", "`sn.to_batchnorm(model)`")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_way_back_gives_a_checkpoint_that_timm_loads(name: str) -> None:
    model = converted(pretrained(name).double())
    plain = network(name).double()
    plain.load_state_dict(sn.to_batchnorm(copy.deepcopy(model)).state_dict())
    assert_evaluates_as_before(model, plain, images(3)[0])


@pytest.mark.shows("ResNet, EfficientNet, RegNet, MobileNetV3, for inference", "`sn.fold(model)`")
@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_folds_away(name: str) -> None:
    model = converted(pretrained(name).double())
    folded = sn.fold(model)
    assert not layers(folded)
    assert_evaluates_as_before(model, folded, images(3)[0])


# norm_layer=


@pytest.mark.shows("ResNet", "`norm_layer=sn.StreamingNorm2d`")
@pytest.mark.parametrize("batch_size", [1, 2])
def test_norm_layer_of_a_resnet(batch_size: int) -> None:
    model = network("resnet10t", norm_layer=sn.StreamingNorm2d)
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert_fine_tunes(model, images(4), batch_size, epochs=16, lr=1e-3)


def norm_act(channels: int, apply_act: bool = True, act_layer: Any = nn.ReLU, **_: Any) -> nn.Module:
    """What timm calls where a normalization brings its activation along."""
    return sn.StreamingNormAct2d(channels, act=act_layer() if apply_act else None)


@pytest.mark.shows(
    "EfficientNet, RegNet",
    "`norm_layer=` a function that makes `sn.StreamingNormAct2d` ([Models of other libraries](models.md))",
)
@pytest.mark.parametrize(("name", "act_layer"), [("efficientnet_b0", nn.SiLU), ("regnety_002", nn.ReLU)])
def test_norm_layer_where_it_brings_its_activation(name: str, act_layer: type[nn.Module]) -> None:
    """The same network as one that is converted after it was built, and starts from the prior."""
    torch.manual_seed(3)
    model = network(name, norm_layer=partial(norm_act, act_layer=act_layer))
    torch.manual_seed(3)
    twin = from_the_prior(network(name))
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert list(model.state_dict()) == list(twin.state_dict())
    assert_trains_alike(model, twin)


# Layers


@pytest.mark.parametrize("act", [nn.SiLU, nn.ReLU, None])
def test_dropout_and_activation_stay(act: type[nn.Module] | None) -> None:
    from timm.layers import BatchNormAct2d

    old = BatchNormAct2d(8, act_layer=act, drop_layer=partial(nn.Dropout, 0.5))
    old = with_statistics(old, lambda layer: layer(torch.randn(4, 8, 3, 3))).double()
    new = converted(old)
    assert isinstance(new, sn.StreamingNormAct2d)
    x = torch.randn(4, 8, 3, 3, dtype=torch.float64)
    assert_evaluates_as_before(old, new, x)
    assert new.stream is not None
    alone = sn.StreamingNorm2d(8, window=new.stream.window).double()
    alone.load_state_dict(new.state_dict())
    torch.manual_seed(1)
    expected = alone(x)
    torch.manual_seed(1)
    expected = nn.functional.dropout(expected, 0.5)
    torch.manual_seed(1)
    assert new.train()(x).equal(expected if act is None else act()(expected))


def test_synchronized_layers_keep_their_activation() -> None:
    from timm.layers import convert_sync_batchnorm

    model = pretrained("regnety_002").double()
    new = converted(convert_sync_batchnorm(copy.deepcopy(model)))
    assert_evaluates_as_before(model, new, images(3)[0])


@pytest.mark.shows("FrozenBatchNormAct2d, FrozenBatchNorm2d", "`sn.convert(model, also=(FrozenBatchNormAct2d, …))`")
@pytest.mark.parametrize("name", ["resnet10t", "efficientnet_b0"])
def test_frozen_layers_are_converted_when_asked_for(name: str) -> None:
    from timm.layers import FrozenBatchNormAct2d, freeze_batch_norm_2d
    from torchvision.ops import FrozenBatchNorm2d

    model = freeze_batch_norm_2d(pretrained(name)).double()
    assert not layers(sn.convert(copy.deepcopy(model)))
    new = converted(model, also=(FrozenBatchNormAct2d, FrozenBatchNorm2d), **NEW_TASK)
    assert_evaluates_as_before(model, new, images(3)[0])
    assert all(layer.weight is not None and layer.weight.requires_grad for layer in layers(new))
    assert_fine_tunes(new.float(), images(4), batch_size=1)


@pytest.mark.shows("ResNetV2 with GroupNormAct", "`sn.convert(model, also=(nn.GroupNorm,))`, then `sn.calibrate`")
@pytest.mark.parametrize("batch_size", [1, 2])
def test_group_normalization_with_an_activation(batch_size: int) -> None:
    from timm.layers import GroupNormAct
    from timm.models.resnetv2 import ResNetV2

    model = ResNetV2(
        layers=(1, 1, 1, 1),
        channels=(16, 32, 64, 64),
        stem_chs=16,
        num_classes=4,
        norm_layer=partial(GroupNormAct, num_groups=8),
    )
    new = converted(model, also=(nn.GroupNorm,))
    assert all(isinstance(layer, sn.StreamingNormAct2d) for layer in layers(new))
    data = images(4)
    sn.calibrate(new, [data[0]])
    assert_fine_tunes(new, data, batch_size, epochs=20, lr=1e-3)  # with Group Normalization the loss falls as fast


# Averages


@pytest.mark.shows("ModelEmaV3", "as it is")
def test_an_exponential_average_of_weights_and_statistics() -> None:
    from timm.utils import ModelEmaV3

    torch.manual_seed(0)
    model = converted(pretrained("resnet10t")).train()
    average = ModelEmaV3(model, decay=0.9)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in in_batches(2, *images(6)):
        optimizer.zero_grad()
        classification(model, batch).backward()
        optimizer.step()
        average.update(model)
        for name, tensor in model.state_dict().items():
            expected[name] = torch.lerp(expected[name], tensor, 1 - 0.9) if tensor.is_floating_point() else tensor
    for name, tensor in average.module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.shows("GraphExtractNet, FeatureGraphNet of a converted network", "as it is")
@pytest.mark.parametrize("training", [True, False])
def test_features_by_a_graph(training: bool) -> None:
    """A layer with its activation is one node, in training too: the output and the statistics are the model's."""
    from timm.models import FeatureGraphNet, GraphExtractNet

    model = converted(pretrained("efficientnet_b0")).train(training)
    twin = copy.deepcopy(model)
    features: Any = GraphExtractNet(model, return_nodes=["blocks.0.0.bn1", "bn2"]).train(training)
    seen: list[torch.Tensor] = []
    for layer in (twin.blocks[0][0].bn1, twin.bn2):
        layer.register_forward_hook(lambda module, inputs, y: seen.append(y))
    x = images(2)[0]
    torch.manual_seed(0)
    found = features(x)
    torch.manual_seed(0)
    twin(x)
    torch.testing.assert_close(found, seen)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    pyramid = FeatureGraphNet(converted(pretrained("resnet18")), out_indices=(1, 2, 3))
    assert [y.shape[1] for y in pyramid(x)] == [64, 128, 256]
