"""torchvision: networks that take their normalization as an argument, and networks that are converted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from integrations.training import (
    NEW_TASK,
    assert_evaluates_as_before,
    assert_evaluates_better,
    assert_fine_tunes,
    assert_learns,
    assert_trains_alike,
    converted,
    from_the_prior,
    images,
    in_batches,
    layers,
    with_statistics,
)
from torch import Tensor, nn

import streamnorm as sn

pytestmark = pytest.mark.integration("torchvision")

NETWORKS = ["resnet18", "mobilenet_v2", "efficientnet_b0", "regnet_y_400mf", "densenet121"]


def network(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=4, **options)


def pretrained(name: str) -> nn.Module:
    return with_statistics(network(name), lambda model: model(images(4)[0]))


@pytest.mark.shows("ResNet, MobileNetV2, EfficientNet, RegNet", "`norm_layer=sn.StreamingNorm2d`")
@pytest.mark.parametrize("name", NETWORKS[:4])
def test_norm_layer(name: str) -> None:
    """The same as a conversion before training that starts from the prior."""
    torch.manual_seed(3)
    model = network(name, norm_layer=sn.StreamingNorm2d)
    torch.manual_seed(3)
    twin = from_the_prior(network(name))
    assert [type(layer) for layer in layers(model)] == [type(layer) for layer in layers(twin)]
    assert_trains_alike(model, twin)


@pytest.mark.shows("ResNet, MobileNetV2, EfficientNet, RegNet", "`norm_layer=sn.StreamingNorm2d`")
@pytest.mark.parametrize("batch_size", [1, 2])
def test_norm_layer_trains(batch_size: int) -> None:
    from torchvision.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4, norm_layer=sn.StreamingNorm2d)
    assert_fine_tunes(model, images(4), batch_size)


@pytest.mark.shows("ResNet, MobileNetV2, EfficientNet, RegNet, DenseNet", "`sn.convert(model)`")
@pytest.mark.parametrize("name", NETWORKS)
def test_converted_it_evaluates_as_before(name: str) -> None:
    model, x = pretrained(name).double(), images(3)[0]
    new = converted(model)
    assert_evaluates_as_before(model, new, x)
    assert_evaluates_as_before(model, sn.to_batchnorm(new), x)


@pytest.mark.shows("ResNet, MobileNetV2, EfficientNet, RegNet, DenseNet", "`sn.convert(model)`")
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("name", ["mobilenet_v2", "regnet_y_400mf"])
def test_converted_it_fine_tunes(name: str, batch_size: int) -> None:
    assert_fine_tunes(converted(pretrained(name), **NEW_TASK), images(4), batch_size)


# Video


@pytest.mark.shows("3-D: video ResNet", "`sn.convert(model)`")
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_network_in_three_dimensions(batch_size: int) -> None:
    from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet

    clips, target = torch.randn(4, 3, 2, 8, 8), torch.arange(4)
    shallow = VideoResNet(BasicBlock, [Conv3DSimple] * 4, [1, 1, 1, 1], BasicStem, num_classes=4)
    model = with_statistics(shallow, lambda model: model(clips)).double()
    new = converted(model)
    assert {type(layer) for layer in layers(new)} == {sn.StreamingNorm3d}
    assert_evaluates_as_before(model, new, clips)
    assert_fine_tunes(new.float(), (clips, target), batch_size)


# Segmentation and detection


def segmentation(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, target = batch
    return nn.functional.cross_entropy(model(x)["out"], target)


@pytest.mark.shows("segmentation: DeepLabV3", "`sn.convert(model)`")
def test_a_segmentation_network() -> None:
    """With a global pooling branch, whose one value per channel Batch Normalization cannot train on alone."""
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    inside = torch.zeros(2, 32, 32, dtype=torch.bool)
    inside[0, :, :16] = inside[1, :16] = True  # coarse, as what the network gives at a sixteenth of the resolution
    x = torch.randn(2, 3, 32, 32) + 2 * inside[:, None]
    data = x, inside.long()
    model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2)
    model = with_statistics(model, lambda model: model(x))
    new, before = converted(model, **NEW_TASK), converted(model)
    assert_evaluates_as_before(model.double(), converted(model), x)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        segmentation(model.float().train(), in_batches(1, *data)[0])
    assert_learns(new, segmentation, in_batches(1, *data))
    assert_evaluates_better(new, before, segmentation, data)


def detection(model: nn.Module, batch: tuple[list[Tensor], list[dict[str, Tensor]]]) -> Tensor:
    losses: dict[str, Tensor] = model(*batch)
    return torch.stack(list(losses.values())).sum()


@pytest.mark.shows("detection: RetinaNet with FrozenBatchNorm2d", "`sn.convert(model, also=(FrozenBatchNorm2d,))`")
def test_a_detector_with_frozen_normalization() -> None:
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d

    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5
    )
    model = RetinaNet(backbone, num_classes=2, min_size=64, max_size=64).eval()
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    new = converted(model.double(), also=(FrozenBatchNorm2d,))
    x = torch.randn(2, 3, 64, 64)
    assert_evaluates_as_before(model.backbone, new.backbone, x)
    box = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    sn.calibrate(new.float(), [x], forward=new.backbone)  # the statistics above were made up
    # At the rate of the other tests the loss of the first epochs leaps, with frozen normalization too.
    assert_learns(new, detection, [([image], [box]) for image in x], lr=3e-5)


def test_frozen_normalization_stays_unless_asked_for() -> None:
    from torchvision.ops import FrozenBatchNorm2d

    model = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4), nn.BatchNorm2d(4))
    sn.convert(model)
    assert [type(module) for module in model] == [nn.Conv2d, FrozenBatchNorm2d, sn.StreamingNorm2d]


@pytest.mark.shows("`create_feature_extractor`", "as it is")
@pytest.mark.parametrize("training", [True, False])
def test_features_by_a_graph(training: bool) -> None:
    """A layer of ours is one node of the graph; three steps are those of the model."""
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model = torchvision.models.resnet18(norm_layer=sn.StreamingNorm2d, num_classes=4).train(training)
    twin, names = copy.deepcopy(model), get_graph_node_names(model)
    assert names[0][:4] == ["x", "conv1", "bn1", "relu"]
    assert names[1][:4] == ["x", "conv1", "bn1", "relu"]
    extractor = create_feature_extractor(model, {"layer1.0.bn1": "norm", "fc": "scores"}).train(training)
    seen: list[Tensor] = []
    twin.layer1[0].bn1.register_forward_hook(lambda module, inputs, y: seen.append(y))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (extractor, twin)]
    for _ in range(3):
        x = torch.randn(2, 3, 32, 32)
        features, scores = extractor(x), twin(x)
        torch.testing.assert_close(features["norm"], seen.pop())
        torch.testing.assert_close(features["scores"], scores)
        for y, optimizer in zip((features["scores"], scores), optimizers, strict=True):
            y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
