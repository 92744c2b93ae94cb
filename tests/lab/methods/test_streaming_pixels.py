"""A memory in pixels is a window that goes by the size of the maps."""

from __future__ import annotations

import math

import pytest
import torch

import streamnorm as sn
from streamnorm_lab.methods.layers import METHODS
from streamnorm_lab.methods.streaming_pixels import StreamingPixels


def test_it_weighs_pixels_as_the_window_rule_weighs_samples():
    """One channel: α = κ = (P, S·B)/(P + S·B), with S·B pixels since the last update, once the memory is full."""
    pixels, layer = 40.0, StreamingPixels(1, pixels=40).double()
    layer.seen.fill_(100)
    torch.manual_seed(0)
    long_mu, long_m = 0.0, 1.0
    for samples, side in ((2, 3), (1, 3), (3, 2)):
        x = torch.randn(samples, 1, side, side, dtype=torch.float64)
        seen = x.numel()
        mu = (pixels * long_mu + seen * x.mean().item()) / (pixels + seen)
        b_m = (x - mu).abs().mean().item()
        m = (pixels * long_m + seen * b_m) / (pixels + seen)
        expected = (x - mu) / math.sqrt(layer.formula.k**2 * m**2 + layer.eps)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
        sn.commit(layer)
        keep = pixels / (pixels + seen)
        long_mu, long_m = keep * long_mu + (1 - keep) * x.mean().item(), keep * long_m + (1 - keep) * b_m
    torch.testing.assert_close(layer.long[:, 0], torch.tensor([long_mu, long_m], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 8, 8)])
def test_it_is_the_library_s_layer_with_that_window(shape):
    torch.manual_seed(0)
    places = math.prod(shape[2:])
    layer = METHODS["streaming-pixels,pixels=640"].make(3, len(shape) - 2)
    library = (sn.StreamingNorm1d if len(shape) == 2 else sn.StreamingNorm2d)(3, p=1, scale="raw", window=640 / places)
    for _ in range(3):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), library(x), rtol=0, atol=0)
        sn.commit(layer)
        sn.commit(library)
    torch.testing.assert_close(layer.long, library.long, rtol=0, atol=0)
