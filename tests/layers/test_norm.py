"""The layers: how they are made, what they share with torch.nn's, and what they do beside their state."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamnorm as sn

DROP_INS: dict[Callable[..., sn.Norm], tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    sn.StreamingNorm1d: (nn.BatchNorm1d, (5, 4)),
    sn.StreamingNorm2d: (nn.BatchNorm2d, (5, 4, 3, 2)),
    sn.StreamingNorm3d: (nn.BatchNorm3d, (5, 4, 3, 2, 2)),
}


# As torch.nn's


@pytest.mark.parametrize("cls", DROP_INS, ids=lambda cls: cls.__name__)
def test_a_drop_in_is_made_like_its_model(cls: Callable[..., sn.Norm]) -> None:
    theirs, shape = DROP_INS[cls]
    ours = list(inspect.signature(cls).parameters)
    assert ours[:2] == list(inspect.signature(theirs).parameters)[:2] == ["num_features", "eps"]
    layer, model = cls(4, 1e-3), theirs(4, 1e-3)
    assert [(name, tuple(p.shape)) for name, p in layer.named_parameters()] == [
        (name, tuple(p.shape)) for name, p in model.named_parameters()
    ]
    x = torch.randn(shape)
    assert layer(x).shape == model(x).shape == shape
    for arguments in ({"affine": False}, {"bias": False}, {"device": "meta"}, {"dtype": torch.float64}):
        kinds = {
            (name, p.device.type, p.dtype)
            for each in (cls(4, **arguments), theirs(4, **arguments))
            for name, p in each.named_parameters()
        }
        assert len(kinds) == len(list(theirs(4, **arguments).parameters()))


def test_one_dimension_takes_vectors_and_sequences() -> None:
    layer = sn.StreamingNorm1d(4)
    assert layer(torch.randn(3, 4)).shape == (3, 4)
    assert layer(torch.randn(3, 4, 7)).shape == (3, 4, 7)


@pytest.mark.parametrize("make", [sn.SampleNorm, sn.GeneralBatchNorm], ids=lambda make: make.__name__)
def test_the_others_take_any_rank(make: Callable[..., sn.Norm]) -> None:
    for rank in range(5):
        shape = (3, 4, *(2,) * rank)
        assert make(4)(torch.randn(shape)).shape == shape


def test_the_default_dtype_and_device_are_used() -> None:
    torch.set_default_dtype(torch.float64)
    layer = sn.StreamingNorm1d(3)
    assert layer.long.dtype == torch.float64
    assert layer.weight is not None
    assert layer.weight.dtype == torch.float64
    with torch.device("meta"):
        layer = sn.StreamingNorm1d(3)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}


def test_parameters_start_at_one_and_zero() -> None:
    layer = sn.StreamingNorm1d(3)
    assert layer.weight is not None
    assert layer.bias is not None
    assert layer.weight.tolist() == [1, 1, 1]
    assert layer.bias.tolist() == [0, 0, 0]


def test_repr_says_what_differs() -> None:
    assert repr(sn.StreamingNorm1d(8, ref=("group", 2), window=50, p=2)) == (
        "StreamingNorm1d(8, ref='n (g k) ... -> g', g=2, p=2, center='mean', scale='gaussian', window=50, eps=1e-05, "
        "affine=True)"
    )
    assert "alpha=(0.7, 0.3, 0.0)" in repr(sn.StreamingNorm1d(8, kappa=0.5))
    assert "momentum=0.1, ghosts=2" in repr(sn.GeneralBatchNorm(8, ghosts=2))


# Gain and bias


@pytest.mark.parametrize(("affine", "bias"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda **options: sn.StreamingNorm2d(4, ref=("group", 2), **options),
        lambda **options: sn.GeneralBatchNorm(4, **options),
        lambda **options: sn.SampleNorm(4, "position", **options),
    ],
    ids=["streaming", "batch", "sample"],
)
def test_gain_and_bias_are_per_channel(
    engine: str, make: Callable[..., sn.Norm], training: bool, affine: bool, bias: bool
) -> None:
    torch.manual_seed(1)
    layer, plain = make(affine=affine, bias=bias), make(affine=False)
    layer.train(training)
    plain.train(training)
    x, dy = torch.randn(3, 4, 5, 2), torch.randn(3, 4, 5, 2)
    gain, shift = torch.ones(4), torch.zeros(4)
    with torch.no_grad():
        if layer.weight is not None:
            gain = layer.weight.normal_().clone()
        if layer.bias is not None:
            shift = layer.bias.normal_().clone()
    x_hat = plain(x)
    y = layer(x)
    torch.testing.assert_close(y, x_hat * gain.view(4, 1, 1) + shift.view(4, 1, 1))
    if affine:
        y.backward(dy)
        assert layer.weight is not None
        torch.testing.assert_close(layer.weight.grad, (dy * x_hat).sum((0, 2, 3)), rtol=1e-4, atol=1e-5)
        if layer.bias is not None:
            torch.testing.assert_close(layer.bias.grad, dy.sum((0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_frozen_parameters_get_no_gradient(engine: str, frozen: str) -> None:
    layer, free = sn.StreamingNorm1d(4), sn.StreamingNorm1d(4)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(frozen not in (name, "both"))
    x, dy = torch.randn(3, 4), torch.randn(3, 4)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(ours).backward(dy)
    free(theirs).backward(dy)
    torch.testing.assert_close(ours.grad, theirs.grad)
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is None) == (frozen in (name, "both"))
    torch.testing.assert_close(layer.short_grad, free.short_grad)


# References of one's own


@pytest.mark.parametrize(
    ("ref", "shape"),
    [
        (sn.NormRef.of("n (k g) ... -> g", g=2), (5, 4)),
        (sn.NormRef.of("n (k g) ... -> g", g=2), (5, 4, 3, 2)),
        (sn.NormRef.of("n c h w -> c h", h=3), (5, 4, 3, 2)),
        (sn.NormRef.of("n c h w -> h", h=3), (5, 4, 3, 2)),
        (sn.NormRef.of("n (g k) h w -> g w", g=2, w=2), (5, 4, 3, 2)),
        (sn.NormRef.of("(a b) c l -> c", a=1), (5, 4, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_training_and_evaluation_use_the_same_index(ref: sn.NormRef, shape: tuple[int, ...], masked: bool) -> None:
    """With all that was seen as its long-term memory, a layer evaluates as it trained."""
    layer = sn.Norm(4, ref, sn.LpMoment(1), sn.Stream(alpha=(0, 1), kappa=(0, 1, 0, 1)))
    x = torch.randn(shape) * torch.rand(shape) + torch.arange(4.0).view(4, *(1,) * (len(shape) - 2))
    mask = torch.rand(shape[0], *shape[2:]) < 0.8 if masked else None
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    y = layer(x, mask)
    sn.commit(layer)
    torch.testing.assert_close(layer.eval()(x, mask), y)


def test_without_a_stream_a_norm_is_its_special_case(engine: str) -> None:
    x = torch.randn(5, 4, 3)
    batch = sn.Norm(4, sn.NormRef.batch("channel"), sn.LpMoment())
    torch.testing.assert_close(batch(x), nn.BatchNorm1d(4)(x))
    torch.testing.assert_close(batch.eval()(x), nn.BatchNorm1d(4)(x))  # it keeps nothing to evaluate with
    assert list(batch.state_dict()) == ["weight", "bias"]


# Sample Normalization


@pytest.mark.parametrize("ref", ["layer", "channel", "position", ("group", 2)], ids=str)
def test_a_sample_sees_no_other(engine: str, ref: Any) -> None:
    layer = sn.SampleNorm(4, ref, p=1.5)
    x = torch.randn(5, 4, 3, 2)
    torch.testing.assert_close(layer(x)[2:3], layer(x[2:3]))
    torch.testing.assert_close(layer.eval()(x)[2:3], layer.train()(x)[2:3], rtol=0, atol=0)
    assert not list(layer.buffers())


def test_the_mask_of_a_sample_norm_is_its_length(engine: str) -> None:
    layer = sn.SampleNorm(4, "layer")
    x = torch.randn(2, 4, 5)
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    y = layer(x, mask)
    torch.testing.assert_close(y[:1], layer(x[:1]))
    torch.testing.assert_close(y[1:, :, :3], layer(x[1:, :, :3]))
    assert not y[1:, :, 3:].any()


# General Batch Normalization


@pytest.mark.parametrize("ghosts", [2, 3, 5])
def test_a_ghost_batch_is_a_batch_of_its_own(engine: str, ghosts: int) -> None:
    """Sample i is normalized with those of its index modulo the number of ghosts, if that divides the batch."""
    layer, alone = sn.GeneralBatchNorm(4, ghosts=ghosts), sn.GeneralBatchNorm(4)
    parts = {2: 2, 3: 3, 5: 3}[ghosts]  # of 6 samples; 5 is lowered to 3
    x = torch.randn(6, 4, 5)
    y = layer(x)
    for part in range(parts):
        torch.testing.assert_close(y[part::parts], alone(x[part::parts]))
    means = torch.stack([x[part::parts].mean((0, 2)) for part in range(parts)])
    variances = torch.stack([x[part::parts].var((0, 2)) for part in range(parts)])
    torch.testing.assert_close(layer.running_mean, 0.1 * means.mean(0))
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * variances.mean(0))
    assert layer.eval()(x[:1]).shape == (1, 4, 5)


@pytest.mark.parametrize("ref", ["channel", "layer", ("group", 2)], ids=str)
def test_running_statistics_of_masked_batches_are_of_what_is_left(engine: str, ref: Any) -> None:
    layer, plain = (sn.GeneralBatchNorm(4, ref).double() for _ in range(2))
    for _ in range(3):
        x = torch.randn(6, 4, 5, dtype=torch.float64) + 1
        mask = torch.tensor([True, False, True, True, False, True])
        torch.testing.assert_close(layer(x, mask)[mask], plain(x[mask]))
    for ours, theirs in zip(layer.buffers(), plain.buffers()):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_that_is_all_masked_moves_nothing(engine: str, momentum: float | None) -> None:
    layer = sn.GeneralBatchNorm(4, momentum=momentum)
    layer(torch.randn(6, 4) + 1)
    before = copy.deepcopy(layer.state_dict())
    y = layer(torch.randn(6, 4), torch.zeros(6, dtype=torch.bool))
    assert not y.any()
    for name, tensor in layer.state_dict().items():
        assert tensor.equal(before[name]), name


def test_a_ghost_batch_that_is_all_masked_counts_for_nothing(engine: str) -> None:
    layer, plain = sn.GeneralBatchNorm(4, ghosts=2), sn.GeneralBatchNorm(4)
    x = torch.randn(6, 4) + 1
    layer(x, torch.tensor([True, False] * 3))
    plain(x[::2])
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_running_statistics_stay_finite(engine: str, bad: float) -> None:
    layer, clean = sn.GeneralBatchNorm(3), sn.GeneralBatchNorm(3)
    x = torch.randn(4, 3) + 1
    spoilt = x.clone()
    spoilt[0, 1] = bad
    layer(spoilt)
    clean(x)
    assert layer.running_mean.tolist()[1] == 0
    assert layer.running_var.tolist()[1] == 1
    good = torch.tensor([0, 2])
    assert layer.running_mean[good].equal(clean.running_mean[good])
    assert layer.running_var[good].equal(clean.running_var[good])


# Beside PyTorch's own machinery


def test_functional_call_changes_the_state_it_is_given(engine: str) -> None:
    layer = sn.StreamingNorm1d(3)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(4, 3)
    y = torch.func.functional_call(layer, state, (x,))
    assert int(state["samples"]) == 4
    assert int(layer.samples) == 0
    torch.testing.assert_close(y, layer(x))


def test_an_averaged_model_evaluates() -> None:
    model = nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(4))
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    model(torch.randn(5, 3))
    sn.commit(model)
    averaged.update_parameters(model)
    x = torch.randn(5, 3)
    torch.testing.assert_close(averaged.eval()(x), model.eval()(x))


def test_parameters_of_a_parent_cover_ours() -> None:
    """What most loops do to all parameters: freeze, clip, move, count."""
    model = nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(4)).requires_grad_(False)
    assert not model(torch.randn(5, 3)).requires_grad
    assert sum(parameter.numel() for parameter in model.parameters()) == 16 + 8
    assert model.to(torch.device("cpu"), torch.float64)(torch.randn(5, 3, dtype=torch.float64)).dtype == torch.float64


def test_a_forward_hook_sees_input_and_mask() -> None:
    layer = sn.StreamingNorm1d(3)
    seen: list[Any] = []
    layer.register_forward_hook(lambda module, args, y: seen.append((args, y)))
    x, mask = torch.randn(4, 3), torch.ones(4, dtype=torch.bool)
    y: Tensor = layer(x, mask)
    assert seen == [((x, mask), y)]


def test_evaluation_does_not_depend_on_the_batch() -> None:
    layer = sn.StreamingNorm2d(4)
    for _ in range(2):
        layer(torch.randn(5, 4, 3, 2))
        sn.commit(layer)
    x = torch.randn(5, 4, 3, 2)
    y = layer.eval()(x)
    for i in range(5):
        torch.testing.assert_close(layer(x[i : i + 1]), y[i : i + 1])


@pytest.mark.parametrize("p", [1, 2, 3])
def test_a_statistic_of_a_single_element(engine: str, p: int) -> None:
    """It is its own location, so nothing is left; and a sum over no axis must not be one over all."""
    layer = sn.SampleNorm(2, "channel", p=p, center="zero", eps=0.25)
    x = torch.randn(3, 2, requires_grad=True)
    y = layer(x)
    y.backward(torch.randn(3, 2))
    assert x.grad is not None
    assert y.abs().max() == 0
    assert x.grad.abs().max() < 1e-6


def test_gradients_in_another_layout_than_the_input_s(engine: str) -> None:
    """For a reference that cuts channels, where C++ leaves this layout to PyTorch."""
    ref = sn.NormRef.of("n (k g) ... -> n g", g=3)
    layer, x = sn.Norm(6, ref, sn.LpMoment(2)), torch.randn(8, 6, 5, 4, requires_grad=True)
    dy = torch.randn(4, 5, 6, 8).permute(3, 2, 1, 0)
    (ours,) = torch.autograd.grad(layer(x), x, dy)
    (theirs,) = torch.autograd.grad(layer(x), x, dy.contiguous())
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layer", [sn.StreamingNorm1d(4, ref=("group", 2)), sn.GeneralBatchNorm(4, ghosts=2)], ids=str)
def test_an_input_whose_elements_overlap(engine: str, layer: sn.Norm) -> None:
    """Its axes have no order in memory; the output may be changed in place all the same."""
    x = torch.randn(11, dtype=torch.float64).unfold(0, 4, 1)
    twin = copy.deepcopy(layer).double()
    y, expected = copy.deepcopy(layer).double()(x.requires_grad_()), twin(x.detach().contiguous())
    torch.testing.assert_close(y, expected)
    y.relu_().sum().backward()
