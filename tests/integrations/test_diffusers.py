"""diffusers: networks of Group Normalization, which keeps no statistics."""

from __future__ import annotations

import pytest
import torch
from integrations.training import assert_learns, converted, in_batches, layers
from torch import Tensor, nn

import streamnorm as sn

pytestmark = pytest.mark.integration("diffusers")

HOW = "`sn.convert(model, also=(nn.GroupNorm,))`, then `sn.calibrate`"


def unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def noisy_images() -> tuple[Tensor, Tensor, Tensor]:
    """Images with noise, how much of it, and the noise."""
    from diffusers import DDPMScheduler

    clean, noise, timestep = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([10, 300, 600, 900])
    return DDPMScheduler().add_noise(clean, noise, timestep), timestep, noise


def calibrated(model: nn.Module, noisy: Tensor, timestep: Tensor) -> nn.Module:
    new: nn.Module = converted(model, also=(nn.GroupNorm,))
    sn.calibrate(new, [(noisy, timestep)], forward=lambda batch: new(*batch))
    return new


def denoising(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    noisy, timestep, noise = batch
    return (model(noisy, timestep).sample - noise).square().mean()


@pytest.mark.shows("UNet2DModel (GroupNorm)", HOW)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_denoiser(batch_size: int) -> None:
    noisy, timestep, noise = noisy_images()
    new = calibrated(unet(), noisy, timestep)
    assert_learns(new, denoising, in_batches(batch_size, noisy, timestep, noise), epochs=20)


@pytest.mark.shows("UNet2DModel (GroupNorm)", HOW)
def test_in_evaluation_it_is_a_fixed_map() -> None:
    """Group Normalization is not: it takes its statistics from the sample that it normalizes."""
    noisy, timestep, _ = noisy_images()
    new = calibrated(unet(), noisy, timestep).eval()
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    together = new(noisy, timestep).sample
    alone = torch.cat([new(*pair).sample for pair in zip(noisy.split(1), timestep.split(1))])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert all(tensor.equal(before[name]) for name, tensor in new.state_dict().items())
    plain = sn.to_batchnorm(new, dims=2)
    assert not layers(plain)


@pytest.mark.shows("AutoencoderKL (GroupNorm)", HOW)
def test_an_autoencoder() -> None:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        layers_per_block=1,
    )
    new = converted(model, also=(nn.GroupNorm,))
    x = torch.randn(2, 3, 8, 8)
    sn.calibrate(new, [x])

    def loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return (model(batch[0]).sample - batch[0]).square().mean()

    assert_learns(new, loss, in_batches(1, x), epochs=40, lr=1e-3)
