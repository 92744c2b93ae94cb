"""MONAI: networks in three dimensions, for medical images that fit into memory one at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integrations.training import (
    NEW_TASK,
    assert_evaluates_as_before,
    assert_evaluates_better,
    assert_learns,
    assert_same_state,
    converted,
    from_the_prior,
    in_batches,
    layers,
    with_statistics,
)
from torch import Tensor, nn

import streamnorm as sn

pytestmark = pytest.mark.integration("monai")

SIZE = 16


def unet(norm: Any = "BATCH") -> nn.Module:
    from monai.networks.nets import UNet

    return UNet(
        spatial_dims=3, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1, norm=norm
    )


def segresnet() -> nn.Module:
    from monai.networks.nets import SegResNet

    return SegResNet(init_filters=8, in_channels=1, out_channels=2, blocks_down=(1, 1), blocks_up=(1,), norm="BATCH")


def volumes() -> tuple[Tensor, Tensor]:
    """Noise, brighter inside a box; the box."""
    inside = torch.zeros(2, SIZE, SIZE, SIZE, dtype=torch.bool)
    inside[0, 2:8, 2:12, 4:12], inside[1, 6:14, 4:10, 2:8] = True, True
    return torch.randn(2, 1, SIZE, SIZE, SIZE) + 2 * inside[:, None], inside.long()


def segmentation(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, target = batch
    return nn.functional.cross_entropy(model(x), target)


@pytest.mark.shows("3-D: UNet, SegResNet", "`sn.convert(model)`")
@pytest.mark.parametrize("make", [unet, segresnet], ids=lambda make: make.__name__)
def test_converted_it_evaluates_as_before(make: Any) -> None:
    x, _ = volumes()
    model = with_statistics(make(), lambda model: model(x)).double()
    new = converted(model)
    assert {type(layer) for layer in layers(new)} == {sn.StreamingNorm3d}
    assert_evaluates_as_before(model, new, x)
    assert_evaluates_as_before(model, sn.to_batchnorm(new), x)


@pytest.mark.shows("3-D: UNet, SegResNet", "`sn.convert(model)`")
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("make", [unet, segresnet], ids=lambda make: make.__name__)
def test_converted_it_fine_tunes(make: Any, batch_size: int) -> None:
    data = volumes()
    model = with_statistics(make(), lambda model: model(data[0]))
    new, before = converted(model, **NEW_TASK), converted(model)
    assert_learns(new, segmentation, in_batches(batch_size, *data), epochs=30, lr=3e-3)
    assert_evaluates_better(new, before, segmentation, data)


@pytest.mark.shows("3-D: UNet", '`Norm.add_factory_class("streaming", sn.StreamingNorm3d)`, then `norm="streaming"`')
def test_by_name() -> None:
    from monai.networks.layers.factories import Norm

    if "STREAMING" not in Norm.names:
        Norm.add_factory_class("streaming", sn.StreamingNorm3d)
    torch.manual_seed(0)
    model = unet(("streaming", {"window": 50}))
    torch.manual_seed(0)
    twin = from_the_prior(unet(), window=50)
    assert [layer.stream for layer in layers(model)] == [layer.stream for layer in layers(twin)]
    for each in (model, twin):
        segmentation(each, volumes_of_seed(1)).backward()
        torch.optim.SGD(each.parameters(), lr=0.01).step()
    assert_same_state(model, twin)


def volumes_of_seed(seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return volumes()


@pytest.mark.shows("3-D: UNet with InstanceNorm", "`sn.convert(model, also=(nn.InstanceNorm3d,))`, then `sn.calibrate`")
def test_instance_normalization() -> None:
    data = volumes()
    new, before = (converted(unet("INSTANCE"), also=(nn.InstanceNorm3d,)) for _ in range(2))
    for model in (new, before):
        sn.calibrate(model, [data[0]])
    assert_learns(new, segmentation, in_batches(1, *data), epochs=30, lr=3e-3)
    assert_evaluates_better(new, before, segmentation, data)
