"""Group, Instance and RMS normalization against their papers, one sample at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from streamnorm_lab.methods.layers import METHODS
from streamnorm_lab.methods.peers.sample import InstanceNorm, RMSNorm, group_norm

EPS = 1e-5


def centred(values):
    return (values - values.mean()) / np.sqrt(values.var() + EPS)


def by_group(sample, groups):
    return np.concatenate([centred(part) for part in np.split(sample, groups)])


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layer", "places", "plain"),
    [
        (group_norm(16), (), lambda sample: by_group(sample, 8)),
        (group_norm(16, 4), (3, 2), lambda sample: by_group(sample, 4)),
        (InstanceNorm(16), (3, 2), lambda sample: by_group(sample, 16)),
        (RMSNorm(16), (), lambda sample: sample / np.sqrt((sample**2).mean() + EPS)),
        (RMSNorm(16), (3, 2), lambda sample: sample / np.sqrt((sample**2).mean() + EPS)),
    ],
)
def test_each_sample_by_itself(layer, places, plain, samples, training):
    torch.manual_seed(0)
    layer.train(training)
    layer.weight.data.uniform_(0.5, 2)
    x = torch.randn(samples, 16, *places) * 2 + 1
    gain = layer.weight.detach().numpy().reshape(16, *[1] * len(places))
    expected = [plain(sample.numpy()) * gain for sample in x]
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_rms_is_torchs_own():
    x = torch.randn(3, 8)
    torch.testing.assert_close(RMSNorm(8)(x), nn.RMSNorm(8, eps=EPS)(x))


@pytest.mark.parametrize(("features", "groups"), [(256, 8), (12, 6), (7, 1), (8, 4), (2, 1), (1, 1)])
def test_groups_are_equal_and_hold_at_least_two_channels(features, groups):
    assert group_norm(features).num_groups == groups


def test_instance_normalization_refuses_features_without_places():
    layer = METHODS["instance"].make(4, 0)
    with pytest.raises(ValueError, match="averages over the places of an image"):
        layer(torch.randn(5, 4))
