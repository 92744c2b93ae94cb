"""segmentation-models-pytorch, in two dimensions."""

from __future__ import annotations

import pytest
import torch
from integrations.training import (
    NEW_TASK,
    assert_evaluates_as_before,
    assert_evaluates_better,
    assert_learns,
    converted,
    in_batches,
    with_statistics,
)
from torch import Tensor, nn

import streamnorm as sn

pytestmark = pytest.mark.integration("segmentation_models_pytorch")

SIZE = 32


def network(name: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.create_model(name, encoder_name="mobilenet_v2", encoder_weights=None, classes=2)


def images() -> tuple[Tensor, Tensor]:
    """Noise, brighter inside a box; the box."""
    inside = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    inside[0, 4:16, 4:24], inside[1, 12:28, 8:20] = True, True
    return torch.randn(2, 3, SIZE, SIZE) + 2 * inside[:, None], inside.long()


def segmentation(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, target = batch
    return nn.functional.cross_entropy(model(x), target)


@pytest.mark.shows("Unet, DeepLabV3Plus with a MobileNetV2", "`sn.convert(model)`")
@pytest.mark.parametrize("name", ["unet", "deeplabv3plus"])
def test_converted_it_evaluates_as_before(name: str) -> None:
    x, _ = images()
    model = with_statistics(network(name), lambda model: model(x)).double()
    new = converted(model)
    assert_evaluates_as_before(model, new, x)
    assert_evaluates_as_before(model, sn.to_batchnorm(new), x)


@pytest.mark.shows("Unet, DeepLabV3Plus with a MobileNetV2", "`sn.convert(model)`")
@pytest.mark.parametrize(("name", "batch_size"), [("unet", 1), ("unet", 2), ("deeplabv3plus", 1)])
def test_converted_it_fine_tunes(name: str, batch_size: int) -> None:
    data = images()
    model = with_statistics(network(name), lambda model: model(data[0]))
    new, before = converted(model, **NEW_TASK), converted(model)
    assert_learns(new, segmentation, in_batches(batch_size, *data), epochs=16)
    assert_evaluates_better(new, before, segmentation, data)
