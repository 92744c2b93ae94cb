from __future__ import annotations

import pytest
import torch
from torch import nn

import streamnorm as sn
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.methods.layers import METHODS
from streamnorm_lab.methods.method import rows, trainable
from streamnorm_lab.networks.images import fully_connected


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
@pytest.mark.parametrize(("axes", "shape"), [(0, (4, 6)), (1, (4, 6, 7)), (2, (4, 6, 5, 5)), (3, (4, 6, 3, 4, 2))])
def test_every_method_makes_a_layer_for_features_and_for_images(method, axes, shape):
    if (method.name, axes) == ("instance", 0):
        pytest.skip("Instance Normalization is for images")
    layer = method.make(6, axes)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert layer.eval()(x[:1]).shape == (1, *shape[1:])


@pytest.mark.parametrize(("name", "p"), [("streaming-l1", 1), ("streaming-l2", 2)])
def test_streaming_methods_are_the_layer_with_its_defaults(name, p):
    layer = METHODS[name].make(6, 0)
    assert isinstance(layer, sn.StreamingNorm1d)
    assert repr(layer) == repr(sn.StreamingNorm1d(6, p=p))


def test_a_variant_has_the_options_that_its_name_says():
    variant = METHODS["streaming-l2,beta=0.7+0.3+0,kappa=0.9,center=zero"]
    expected = sn.StreamingNorm1d(6, p=2, beta=(0.7, 0.3, 0.0), kappa=0.9, center="zero")
    assert repr(variant.make(6, 0)) == repr(expected)
    assert variant.trained_as == variant.name
    assert variant.label == "Streaming L2, beta=0.7+0.3+0, kappa=0.9, center=zero"
    assert METHODS["group,groups=2"].make(6, 2).num_groups == 2
    assert METHODS["online,guard=clamp"].make(6, 0).guard == "clamp"
    assert METHODS["mabn,clip=2"].finish is METHODS["mabn"].finish


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shoe-size,window=5", "unknown method 'shoe-size,window=5': choose from none, batch"),
        ("streaming-l1,window", "'window' is not of the form option=value"),
        ("streaming-l1,windw=5", "unknown option 'windw' (did you mean 'window'?)"),
        ("streaming-l1,window=-5", "a number above 0"),
        ("none,window=5", "it has no options"),
    ],
)
def test_a_variant_that_cannot_be_is_one_clear_line(name, message):
    with pytest.raises(UserError, match=r"^(unknown )?method '") as caught:
        trainable([name], METHODS)
    assert message in str(caught.value)


def test_colours_and_markers_are_distinct():
    for attribute in ("colour", "marker", "label"):
        assert len({getattr(method, attribute) for method in METHODS.values()}) == len(METHODS)


def test_recalibration_comes_with_batch_normalization():
    assert [method.name for method in rows("batch", METHODS)] == ["batch", "batch-recalibrated"]
    with pytest.raises(UserError, match="comes by itself with 'batch'"):
        trainable(["batch-recalibrated"], METHODS)


def test_architecture_a():
    model = fully_connected(12, 10, METHODS["layer"].make, width=7, depth=2)
    kinds = [type(layer) for layer in model]
    assert kinds == [nn.Flatten, nn.Linear, nn.LayerNorm, nn.ReLU, nn.Linear, nn.LayerNorm, nn.ReLU, nn.Linear]
    assert model(torch.randn(5, 3, 2, 2)).shape == (5, 10)
