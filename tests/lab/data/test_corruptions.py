"""What corruptions do to images."""

from __future__ import annotations

import pytest
import torch

from streamnorm_lab.data.corruptions import CORRUPTIONS, corrupt


def images():
    return torch.randint(60, 200, (20, 3, 32, 32), dtype=torch.uint8)


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (5, 1, 8, 8)])
def test_corrupted_images_are_images_again_and_follow_from_the_seed(kind, shape):
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    before = pixels.clone()
    changed = corrupt(pixels, kind, 3)
    assert changed.shape == shape
    assert changed.dtype == torch.uint8
    assert not torch.equal(changed, pixels)
    assert torch.equal(pixels, before)
    assert torch.equal(corrupt(pixels, kind, 3), changed)


@pytest.mark.parametrize("kind", ["noise", "fog"])
def test_chance_differs_from_seed_to_seed_and_from_image_to_image(kind):
    pixels = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)
    changed = corrupt(pixels, kind, 0)
    assert not torch.equal(changed[0], changed[1])
    assert not torch.equal(changed, corrupt(pixels, kind, 1))


def test_noise_has_its_deviation_and_no_bias():
    pixels = torch.full((20, 3, 32, 32), 128, dtype=torch.uint8)
    difference = corrupt(pixels, "noise", 0).float() - 128
    assert difference.mean().abs() < 1
    assert difference.std() == pytest.approx(255 / 6, rel=0.02)


def test_blur_spreads_a_point_and_keeps_the_brightness():
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[:, 1, 16, 16] = 255
    changed = CORRUPTIONS["blur"](pixels, torch.Generator())
    assert changed.sum() == pytest.approx(255, rel=1e-4)
    assert changed[0, [0, 2]].abs().sum() == 0
    assert changed[0, 1, 16, 16] < 30
    assert torch.allclose(changed[0, 1], changed[0, 1].T)
    places = torch.arange(32.0) - 16
    deviation = (changed[0, 1].sum(0) * places.square()).sum().div(255).sqrt()
    assert deviation == pytest.approx(32 / 24, rel=0.02)


def test_low_contrast_keeps_each_mean():
    pixels = images()
    changed = corrupt(pixels, "contrast", 0).float()
    assert torch.allclose(changed.mean((1, 2, 3)), pixels.float().mean((1, 2, 3)), atol=0.6)
    assert torch.allclose(changed.std((1, 2, 3)), 0.3 * pixels.float().std((1, 2, 3)), atol=0.6)


def test_fog_brightens_by_a_quarter_to_three_quarters():
    pixels = images().float()
    thickness = (CORRUPTIONS["fog"](pixels, torch.Generator().manual_seed(0)) - pixels) / (255 - pixels)
    assert thickness.min() >= 0.249
    assert thickness.max() <= 0.751
    assert thickness.std() > 0.05
    neighbours = (thickness[..., 1:] - thickness[..., :-1]).abs().mean()
    assert neighbours < 0.05
