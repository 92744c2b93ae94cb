from __future__ import annotations

import pytest
import torch
from torch import nn

import streamnorm as sn
from streamnorm.experiments.errors import UserError
from streamnorm.experiments.methods import METHODS, rows, trainable
from streamnorm.experiments.models import fully_connected


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
@pytest.mark.parametrize(("axes", "shape"), [(0, (4, 6)), (2, (4, 6, 5, 5))])
def test_every_method_makes_a_layer_for_features_and_for_images(method, axes, shape):
    layer = method.make(6, axes)
    assert layer(torch.randn(shape)).shape == shape


@pytest.mark.parametrize(("name", "p"), [("streaming-l1", 1), ("streaming-l2", 2)])
def test_streaming_methods_are_the_layer_with_its_defaults(name, p):
    layer = METHODS[name].make(6, 0)
    assert isinstance(layer, sn.StreamingNorm1d)
    assert repr(layer) == repr(sn.StreamingNorm1d(6, p=p))


def test_colours_and_markers_are_distinct():
    for attribute in ("colour", "marker", "label"):
        assert len({getattr(method, attribute) for method in METHODS.values()}) == len(METHODS)


def test_recalibration_comes_with_batch_normalization():
    assert [method.name for method in rows("batch")] == ["batch", "batch-recalibrated"]
    with pytest.raises(UserError, match="comes by itself with 'batch'"):
        trainable(["batch-recalibrated"])


def test_architecture_a():
    model = fully_connected(12, 10, METHODS["layer"].make, width=7, depth=2)
    kinds = [type(layer) for layer in model]
    assert kinds == [nn.Flatten, nn.Linear, nn.LayerNorm, nn.ReLU, nn.Linear, nn.LayerNorm, nn.ReLU, nn.Linear]
    assert model(torch.randn(5, 3, 2, 2)).shape == (5, 10)
