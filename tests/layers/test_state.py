"""The streaming state: what it is called, when it moves, and when it must not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamnorm as sn

FORWARD = ("short", "count", "samples")
BACKWARD = ("short_grad", "grad_count", "grad_samples")
SHAPES = {1: (3, 4), 2: (3, 4, 5, 2), 3: (3, 4, 2, 3, 2)}
LAYERS: dict[int, Callable[..., sn.Norm]] = {1: sn.StreamingNorm1d, 2: sn.StreamingNorm2d, 3: sn.StreamingNorm3d}


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    """A copy of the state."""
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def changed(layer: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """The names of the buffers that are not bit for bit what they were."""
    return {name for name, buffer in layer.named_buffers() if not buffer.equal(before[name])}


def use(layer: sn.Norm, *shape: int, backward: bool = True) -> Tensor:
    """Run the layer on random data of its dtype, and back."""
    x = torch.randn(*shape, dtype=layer.state.long.dtype, requires_grad=True)
    y: Tensor = layer(x * 2 + 1)
    if backward:
        (y * torch.randn_like(y)).sum().backward()
    return y


# Names, shapes, dtypes


@pytest.mark.parametrize(("ref", "num_stats"), [("channel", 6), ("layer", 1), (("group", 2), 2)])
def test_names_and_shapes(ref: Any, num_stats: int) -> None:
    layer = sn.StreamingNorm2d(6, ref=ref)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {
        "weight": (6,),
        "bias": (6,),
        "long": (2, num_stats),
        "short": (2, num_stats),
        "long_grad": (2, num_stats),
        "short_grad": (2, num_stats),
        "count": (num_stats,),
        "grad_count": (num_stats,),
        "samples": (),
        "grad_samples": (),
        "seen": (),
        "lp_moment": (3,),
    }


def test_a_new_layer_starts_at_the_prior() -> None:
    layer = sn.StreamingNorm1d(3)
    assert layer.long.tolist() == [[0, 0, 0], [1, 1, 1]]
    others = layer.state[1:]
    assert len(others) == 8
    assert not any(buffer.any() for buffer in others)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("how", ["made", "moved"])
def test_dtype_of_the_state(how: str, dtype: torch.dtype, kept: torch.dtype) -> None:
    layer = sn.StreamingNorm1d(3, dtype=dtype) if how == "made" else sn.StreamingNorm1d(3).to(dtype)
    assert layer.weight is not None
    assert layer.weight.dtype == dtype
    assert {layer.long.dtype, layer.short.dtype, layer.long_grad.dtype, layer.short_grad.dtype} == {kept}
    assert {layer.count.dtype, layer.grad_count.dtype, layer.samples.dtype, layer.grad_samples.dtype} == {torch.int64}


def test_half_keeps_every_bit_of_the_statistics() -> None:
    layer = sn.StreamingNorm1d(4)
    use(layer, 5, 4)
    before = buffers(layer)
    assert not changed(layer.half(), before)
    assert not changed(layer.bfloat16(), before)
    assert not changed(layer.float(), before)


def test_double_and_back_keeps_the_statistics() -> None:
    layer = sn.StreamingNorm1d(4)
    use(layer, 5, 4)
    before = buffers(layer)
    assert layer.double().long.dtype == torch.float64
    assert layer.half().long.dtype == torch.float32
    assert not changed(layer, before)


def test_the_dtype_of_a_model_around_it_counts_too() -> None:
    layer = sn.StreamingNorm1d(3)
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(layer)).half()
    assert layer.long.dtype == torch.float32
    model.double()
    assert layer.long.dtype == torch.float64


def test_general_batch_norm_keeps_float32_too() -> None:
    layer = sn.GeneralBatchNorm(3).half()
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert layer.weight is not None
    assert layer.weight.dtype == torch.float16


def test_made_on_meta_and_filled_later() -> None:
    layer = sn.StreamingNorm1d(3, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    fresh = sn.StreamingNorm1d(3).state_dict()
    assert all(tensor.equal(fresh[name]) for name, tensor in layer.state_dict().items())


# When it moves


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_use_counts_elements_and_samples(engine: str, dims: int) -> None:
    layer = LAYERS[dims](4)
    use(layer, *SHAPES[dims])
    per_channel = math.prod(SHAPES[dims]) // 4
    assert layer.count.tolist() == layer.grad_count.tolist() == [per_channel] * 4
    assert (int(layer.samples), int(layer.grad_samples)) == (3, 3)
    assert layer.long.tolist() == [[0] * 4, [1] * 4]  # moves at a weight update only


@pytest.mark.parametrize("how", ["eval", "frozen"])
@pytest.mark.parametrize("masked", [False, True])
def test_evaluation_leaves_the_state_alone(engine: str, how: str, masked: bool) -> None:
    layer = sn.StreamingNorm2d(4)
    use(layer, 3, 4, 5, 2)
    before = buffers(layer)
    if how == "eval":
        layer.eval()
    else:
        sn.freeze(layer)
    x = torch.randn(3, 4, 5, 2, requires_grad=True)
    layer(x, torch.rand(3, 5, 2) < 0.5 if masked else None).square().sum().backward()
    assert not changed(layer, before)
    assert x.grad is not None


def test_without_grad_the_forward_part_alone_moves(engine: str) -> None:
    layer = sn.StreamingNorm1d(4)
    before = buffers(layer)
    with torch.no_grad():
        layer(torch.randn(3, 4))
    assert changed(layer, before) == set(FORWARD)


def test_inference_mode_is_like_no_grad(engine: str) -> None:
    layer = sn.StreamingNorm1d(4)
    before = buffers(layer)
    with torch.inference_mode():
        layer(torch.randn(3, 4))
    assert changed(layer, before) == set(FORWARD)
    use(layer, 2, 4)
    sn.commit(layer)
    assert torch.isfinite(layer.long).all()


def test_data_without_gradient_stream_none(engine: str) -> None:
    layer = sn.StreamingNorm1d(4)
    before = buffers(layer)
    layer(torch.randn(3, 4)).square().sum().backward()
    assert changed(layer, before) == set(FORWARD)
    assert layer.weight is not None
    assert layer.weight.grad is not None


def test_several_uses_in_one_forward(engine: str) -> None:
    layer = sn.StreamingNorm1d(4)
    h = torch.randn(3, 4, requires_grad=True)
    for _ in range(5):
        h = torch.tanh(layer(h))
    h.sum().backward()
    assert layer.count.tolist() == layer.grad_count.tolist() == [15] * 4
    assert (int(layer.samples), int(layer.grad_samples)) == (15, 15)
    assert changed(layer, buffers(sn.StreamingNorm1d(4))) == {*FORWARD, *BACKWARD}


def test_the_short_term_average_is_weighted_by_elements(engine: str) -> None:
    layer = sn.StreamingNorm1d(1, center="zero", p=2).double()
    parts = [torch.randn(n, 1, 7, dtype=torch.float64) for n in (1, 5, 2)]
    for part in parts:
        layer(part)
    everything = torch.cat(parts)
    torch.testing.assert_close(layer.short[0, 0], everything.mean())
    torch.testing.assert_close(layer.short[1, 0], everything.square().mean())


def two_uses(order: str) -> tuple[sn.Norm, Tensor, Tensor]:
    """Two uses side by side, whose gradients are asked for in this order."""
    torch.manual_seed(3)
    layer = sn.StreamingNorm1d(4, center="zero").double()
    a, b = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (2, 5))
    losses = {"a": layer(a).pow(3).sum(), "b": layer(b).pow(3).sum()}
    for name in order:
        losses[name].backward()
    return layer, a, b


def test_gradients_arrive_in_any_order(engine: str) -> None:
    """About zero, the gradient of the location does not pass through that of the moment: averages have no order."""
    first, *_ = two_uses("ab")
    second, *_ = two_uses("ba")
    torch.testing.assert_close(first.short_grad, second.short_grad, rtol=1e-12, atol=1e-14)
    assert first.grad_count.equal(second.grad_count)


def test_each_gradient_sees_those_before_it(engine: str) -> None:
    _, a_first, _ = two_uses("ab")
    _, a_last, _ = two_uses("ba")
    assert a_first.grad is not None
    assert a_last.grad is not None
    assert (a_first.grad - a_last.grad).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["branch not taken", "exception"])
def test_a_forward_without_its_backward(engine: str, how: str) -> None:
    """Is one whose statistics count and whose gradient does not, as under ``no_grad``."""
    layer, plain = sn.StreamingNorm1d(4), sn.StreamingNorm1d(4)
    x, lost = torch.randn(3, 4), torch.randn(2, 4)

    def interrupted() -> None:
        layer(lost.clone().requires_grad_())
        if how == "exception":
            raise RuntimeError("out of memory")

    try:
        interrupted()
    except RuntimeError:
        assert how == "exception"
    with torch.no_grad():
        plain(lost)
    for each in (layer, plain):
        each(x.clone().requires_grad_()).square().sum().backward()
        sn.commit(each)
    assert not changed(layer, buffers(plain))
    assert torch.isfinite(layer.long).all()
    assert not layer.short.any()


def test_a_backward_after_the_commit_belongs_to_the_next_update(engine: str) -> None:
    layer = sn.StreamingNorm1d(4)
    loss = layer(torch.randn(3, 4, requires_grad=True)).square().sum()
    sn.commit(layer)
    long_grad = layer.long_grad.clone()
    loss.backward()
    assert layer.count.tolist() == [0] * 4
    assert layer.grad_count.tolist() == [3] * 4
    sn.commit(layer)
    assert not layer.long_grad.equal(long_grad)


# Few elements


EMPTY: list[tuple[Callable[..., sn.Norm], tuple[int, ...]]] = [
    (sn.StreamingNorm1d, (0, 4)),
    (sn.StreamingNorm1d, (3, 4, 0)),
    (sn.StreamingNorm2d, (0, 4, 2, 2)),
    (sn.StreamingNorm3d, (2, 4, 2, 0, 2)),
    (sn.GeneralBatchNorm, (0, 4, 2, 2)),
    (sn.SampleNorm, (0, 4, 2, 2)),
]


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize(("make", "shape"), EMPTY, ids=lambda value: getattr(value, "__name__", str(value)))
def test_an_empty_input(engine: str, make: Callable[..., sn.Norm], shape: tuple[int, ...], mode: str) -> None:
    layer = make(4)
    layer.train(mode != "eval")
    layer.frozen = mode == "frozen"
    before = buffers(layer)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x, torch.ones(shape[0], dtype=torch.bool))
    assert y.shape == shape
    assert y.dtype == x.dtype
    y.sum().backward()
    assert not changed(layer, before)
    assert layer.weight is not None
    assert layer.bias is not None
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    assert not layer.weight.grad.any()
    assert not layer.bias.grad.any()
    assert x.grad is not None


def test_an_empty_input_without_gain(engine: str) -> None:
    layer = sn.StreamingNorm1d(4, affine=False)
    y = layer(torch.randn(0, 4, requires_grad=True))
    assert y.requires_grad
    assert layer(torch.randn(0, 4)).shape == (0, 4)
    assert not changed(layer, buffers(sn.StreamingNorm1d(4, affine=False)))


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize("center", ["mean", "zero"])
@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1, 1), (2, 4, 1, 1)], ids=str)
def test_one_element_for_each_statistic(engine: str, shape: tuple[int, ...], center: str, p: float) -> None:
    layer = LAYERS[1 if len(shape) == 2 else 2](4, p=p, center=center)
    for _ in range(3):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        assert torch.isfinite(y).all()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        sn.commit(layer)
    assert all(torch.isfinite(buffer).all() for buffer in layer.buffers())


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer_dtype", ["reduced", "float32"])
@pytest.mark.parametrize("ref", ["channel", ("group", 2)])
def test_reduced_precision_follows_float32(engine: str, dtype: torch.dtype, layer_dtype: str, ref: Any) -> None:
    """The same numbers, rounded, through a float32 layer: statistics agree to float32's rounding."""
    layer, wide = sn.StreamingNorm1d(4, ref=ref), sn.StreamingNorm1d(4, ref=ref)
    if layer_dtype == "reduced":
        layer.to(dtype)
    step = torch.finfo(dtype).eps
    for training in (True, True, False):
        layer.train(training)
        wide.train(training)
        x = (torch.randn(6, 4) * 2 + 1).to(dtype)
        ours, theirs = x.clone().requires_grad_(), x.float().requires_grad_()
        dy = torch.randn(6, 4).to(dtype)
        y, expected = layer(ours), wide(theirs)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=step, atol=step)
        y.backward(dy)
        expected.backward(dy.float())
        assert ours.grad is not None
        assert ours.grad.dtype == dtype
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=2 * step, atol=2 * step)
        torch.testing.assert_close(layer.short, wide.short, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.short_grad, wide.short_grad, rtol=1e-5, atol=1e-6)
        if training:
            sn.commit(layer)
            sn.commit(wide)


def test_reduced_precision_counts_exactly(engine: str) -> None:
    """More elements than float16 can count or add."""
    layer = sn.StreamingNorm1d(1, center="zero", p=1).half()
    x = torch.ones(300, 1, 300, dtype=torch.float16)
    for _ in range(3):
        layer(x)
    assert layer.count.tolist() == [270_000]
    torch.testing.assert_close(layer.short, torch.ones(2, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast(engine: str, dtype: torch.dtype) -> None:
    layer = sn.StreamingNorm1d(4)
    model = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2))
    for training in (True, False):
        model.train(training)
        with torch.autocast("cpu", dtype):
            y = model(torch.randn(5, 3))
        y.float().sum().backward()
        assert y.dtype == dtype
    assert layer.short.dtype == torch.float32
    assert layer.weight is not None
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert layer.grad_count.tolist() == [5] * 4


# Layouts


Part = tuple[slice, ...]
ALL, PART = slice(None), slice(1, None, 2)


def cut(x: Tensor, part: Part, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """The numbers of x as a part of a larger tensor."""
    larger = torch.zeros([2 * size + 1 if s == PART else size + 3 * (s != ALL) for size, s in zip(x.shape, part)])
    larger = larger.contiguous(memory_format=memory_format)
    view = larger[part]
    view = view[tuple(slice(size) for size in x.shape)]
    view.copy_(x)
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    "batch inside": lambda x: x.movedim(0, 3).contiguous().movedim(3, 0),
    "every other sample": lambda x: cut(x, (PART, ALL, ALL, ALL)),
    "every other channel": lambda x: cut(x, (ALL, PART, ALL, ALL)),
    "every other of all": lambda x: cut(x, (PART, PART, PART, PART)),
    "some channels": lambda x: cut(x, (ALL, slice(2, None), ALL, ALL)),
    "some channels_last channels": lambda x: cut(x, (ALL, slice(2, None), ALL, ALL), torch.channels_last),
    "every other channels_last sample": lambda x: cut(x, (PART, ALL, ALL, ALL), torch.channels_last),
    "a crop": lambda x: cut(x, (ALL, ALL, slice(1, None), slice(1, None))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ref", ["channel", "layer", ("group", 2)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_any_layout(engine: str, layout: str, ref: Any, masked: bool) -> None:
    layer, plain = (sn.StreamingNorm2d(4, ref=ref) for _ in range(2))
    mask = torch.rand(3, 5, 2) < 0.7 if masked else None
    for _ in range(2):
        x, dy = torch.randn(3, 4, 5, 2), torch.randn(3, 4, 5, 2)
        ours, theirs = LAYOUTS[layout](x).detach().requires_grad_(), x.clone().requires_grad_()
        assert not ours.is_contiguous()
        y, expected = layer(ours, mask), plain(theirs, mask)
        y.backward(LAYOUTS[layout](dy))
        expected.backward(dy)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(ours.grad, theirs.grad)
        sn.commit(layer)
        sn.commit(plain)
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name))


@pytest.mark.parametrize(
    "part", [(PART, ALL), (ALL, PART), (PART, PART), (ALL, slice(2, None)), (slice(1, None), ALL)], ids=str
)
@pytest.mark.parametrize("ref", ["channel", ("group", 2)], ids=str)
def test_any_layout_of_vectors(engine: str, part: Part, ref: Any) -> None:
    layer, plain = (sn.StreamingNorm1d(4, ref=ref) for _ in range(2))
    x, dy = torch.randn(3, 4), torch.randn(3, 4)
    ours, theirs = cut(x, part).detach().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(ours), plain(theirs)
    y.backward(cut(dy, part))
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name))


@pytest.mark.parametrize("ref", ["channel", "layer", ("group", 2)], ids=str)
def test_channels_last_comes_out_as_it_went_in(engine: str, ref: Any) -> None:
    layer = sn.StreamingNorm2d(4, ref=ref)
    x = torch.randn(3, 4, 5, 2).contiguous(memory_format=torch.channels_last)
    for training in (True, False):
        assert layer.train(training)(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("ref", ["channel", "layer", ("group", 2)], ids=str)
def test_expanded_inputs_and_gradients(engine: str, ref: Any) -> None:
    """Many elements in one place of memory: stride 0. The gradient of a sum is such a tensor too."""
    layer, plain = (sn.StreamingNorm2d(4, ref=ref) for _ in range(2))
    small = torch.randn(3, 1, 5, 1)
    ours, theirs = small.clone().requires_grad_(), small.clone().requires_grad_()
    layer(ours.expand(3, 4, 5, 2)).sum().backward()
    plain(theirs.repeat(1, 4, 1, 2)).backward(torch.ones(3, 4, 5, 2))
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(layer.short, plain.short)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("ref", ["channel", ("group", 2)], ids=str)
def test_an_in_place_activation_may_follow(engine: str, ref: Any, affine: bool) -> None:
    layers: list[sn.Norm] = [
        sn.StreamingNorm1d(4, ref=ref, affine=affine),
        sn.GeneralBatchNorm(4, ref, affine=affine),
        sn.SampleNorm(4, ("group", 2), affine=affine),
    ]
    for layer in layers:
        x, dy = torch.randn(3, 4), torch.randn(3, 4)
        gradients = []
        for inplace in (False, True):
            leaf = x.clone().requires_grad_()
            nn.Sequential(copy.deepcopy(layer), nn.ReLU(inplace))(leaf).backward(dy)
            gradients.append(leaf.grad)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_the_input_is_left_alone(engine: str) -> None:
    layer = sn.StreamingNorm1d(4)
    x = torch.randn(3, 4)
    before = x.clone()
    layer(x)
    assert x.equal(before)


# Masks


@pytest.mark.parametrize("ref", ["channel", "layer", ("group", 2)], ids=str)
def test_masked_samples_are_as_good_as_absent(engine: str, ref: Any) -> None:
    layer, plain = (sn.StreamingNorm1d(4, ref=ref).double() for _ in range(2))
    for _ in range(3):
        x, dy = torch.randn(6, 4, 5, dtype=torch.float64), torch.randn(6, 4, 5, dtype=torch.float64)
        mask = torch.tensor([True, False, True, True, False, True])
        ours, theirs = x.clone().requires_grad_(), x[mask].clone().requires_grad_()
        y, expected = layer(ours, mask), plain(theirs)
        y.backward(dy)
        expected.backward(dy[mask])
        torch.testing.assert_close(y[mask], expected)
        assert not y[~mask].any()
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad[mask], theirs.grad)
        assert not ours.grad[~mask].any()
        for name, buffer in layer.named_buffers():
            torch.testing.assert_close(buffer, plain.get_buffer(name))
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)
        sn.commit(layer)
        sn.commit(plain)


def test_masked_places_are_not_counted(engine: str) -> None:
    layer = sn.StreamingNorm1d(4, ref=("group", 2))
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, :2] = mask[2, :3] = True
    layer(torch.randn(3, 4, 5, requires_grad=True), mask).sum().backward()
    assert layer.count.tolist() == layer.grad_count.tolist() == [10, 10]  # 5 places, 2 channels to a group
    assert int(layer.samples) == int(layer.grad_samples) == 2  # one sample has none left


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("padding", [math.nan, math.inf, 1e30])
def test_padding_may_hold_anything(engine: str, padding: float, mode: str) -> None:
    results = []
    for value in (0.0, padding):
        layer = sn.StreamingNorm1d(4)
        layer.train(mode != "eval")
        layer.frozen = mode == "frozen"
        torch.manual_seed(1)
        x = torch.randn(5, 4, 3)
        mask = torch.rand(5, 3) < 0.6
        x = x.masked_fill(~mask.unsqueeze(1), value).requires_grad_()
        y = layer(x, mask)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for clean, padded in zip(*results):
        assert isinstance(clean, Tensor)
        assert isinstance(padded, Tensor)
        assert padded.equal(clean)


def test_a_mask_that_hides_all(engine: str) -> None:
    layer = sn.StreamingNorm1d(4)
    use(layer, 3, 4)
    before = buffers(layer)
    x = torch.randn(3, 4, requires_grad=True)
    y = layer(x, torch.zeros(3, dtype=torch.bool))
    y.sum().backward()
    assert not y.any()
    assert x.grad is not None
    assert not x.grad.any()
    assert not changed(layer, before)


# Values that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_an_index_that_is_not_finite_is_left_out(engine: str, bad: float, p: float) -> None:
    """The others go on as if nothing had happened."""
    layer, clean = (sn.StreamingNorm1d(3, p=p) for _ in range(2))
    x = torch.randn(4, 3)
    spoilt = x.clone()
    spoilt[1:3, 1] = bad  # two of 3e38 overflow any sum
    good = torch.tensor([0, 2])
    y, expected = layer(spoilt.requires_grad_()), clean(x.requires_grad_())
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(y[:, good], expected[:, good], rtol=0, atol=0)
    assert x.grad is not None
    assert spoilt.grad is not None
    torch.testing.assert_close(spoilt.grad[:, good], x.grad[:, good], rtol=0, atol=0)
    for name in ("short", "short_grad"):
        ours, theirs = layer.get_buffer(name), clean.get_buffer(name)
        assert ours[:, good].equal(theirs[:, good])
        assert not ours[:, 1].any()
    assert layer.count.tolist() == layer.grad_count.tolist() == [4, 0, 4]
    assert not torch.isfinite(y[:, 1]).all() or bad == 3e38


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_left_out(engine: str, bad: float) -> None:
    layer = sn.StreamingNorm1d(3)
    x = torch.randn(4, 3, requires_grad=True)
    dy = torch.randn(4, 3)
    dy[0, 2] = bad
    layer(x).backward(dy)
    assert layer.count.tolist() == [4, 4, 4]
    assert layer.grad_count.tolist() == [4, 4, 0]
    assert not layer.short_grad[:, 2].any()
    assert torch.isfinite(layer.short_grad).all()
    assert x.grad is not None
    assert not torch.isfinite(x.grad[:, 2]).all()  # a loss scaler has to see it
    assert torch.isfinite(x.grad[:, :2]).all()


# Saved and loaded


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    """Two mini-batches to an update; a list that ends between them leaves its gradients."""
    for number, x in enumerate(batches, 1):
        model(x).square().mean().backward()
        if number % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()


def small_model() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.parametrize("pause", [4, 5], ids=["after an update", "between mini-batches"])
def test_a_resumed_run_is_the_same_bit_for_bit(engine: str, pause: int, tmp_path: Any) -> None:
    batches = [torch.randn(n, 3) for n in (1, 4, 2, 3, 5, 1, 2, 2)]
    whole = small_model()
    optimizer = torch.optim.SGD(whole.parameters(), 0.1, momentum=0.9)
    train(whole, optimizer, batches)

    first = small_model()
    optimizer = torch.optim.SGD(first.parameters(), 0.1, momentum=0.9)
    train(first, optimizer, batches[:pause])
    torch.save(
        {
            "model": first.state_dict(),
            "optimizer": optimizer.state_dict(),
            "grads": [parameter.grad for parameter in first.parameters()],
        },
        tmp_path / "checkpoint.pt",
    )

    second = small_model()
    nn.init.zeros_(second.get_parameter("0.weight"))
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second.load_state_dict(checkpoint["model"])
    optimizer = torch.optim.SGD(second.parameters(), 0.1, momentum=0.9)
    optimizer.load_state_dict(checkpoint["optimizer"])
    for parameter, grad in zip(second.parameters(), checkpoint["grads"]):
        parameter.grad = grad
    if pause % 2:
        second(batches[pause]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    train(second, optimizer, batches[pause + pause % 2 :])
    for name, tensor in whole.state_dict().items():
        assert tensor.equal(second.state_dict()[name]), name


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign: bool) -> None:
    layer, other = sn.StreamingNorm1d(4), sn.StreamingNorm1d(4)
    use(layer, 5, 4)
    other.load_state_dict(copy.deepcopy(layer.state_dict()), assign=assign)
    assert not changed(other, buffers(layer))
    use(other, 2, 4)
    assert int(other.samples) == 7
    assert int(layer.samples) == 5


def test_load_state_dict_across_dtypes() -> None:
    layer, other = sn.StreamingNorm1d(4), sn.StreamingNorm1d(4).double()
    use(layer, 5, 4)
    other.load_state_dict(layer.state_dict())
    assert other.short.dtype == torch.float64
    assert other.short.equal(layer.short.double())


def test_general_batch_norm_exchanges_state_dicts_with_batch_norm() -> None:
    ours, theirs = sn.GeneralBatchNorm(4), nn.BatchNorm1d(4)
    theirs(torch.randn(6, 4) * 2 + 1)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 4)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=0)


# What a state says of its moment, and what is refused


def filled(layer: Any, *shape: int) -> Any:
    """The layer with statistics, and an unfinished update."""
    for _ in range(3):
        use(layer, *shape)
        sn.commit(layer)
    use(layer, *shape)
    return layer


Change = Callable[[dict[str, Tensor]], object]


def refused(layer: nn.Module, state: Any, message: str, **how: Any) -> None:
    """Loading raises this, and leaves every number as it was."""
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state, **how)
    for name, tensor in layer.state_dict().items():
        assert tensor.equal(before[name]), name


MOMENTS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"p": 1}, {"p": 2}, r"collected with p=1, center='mean', scale='gaussian', and this layer has p=2, center='mean'"),
    ({"p": 1.5}, {"p": 1.6}, r"p=1\.5.*and this layer has p=1\.6.*Make the layer with p=1\.5"),
    ({}, {"center": "zero"}, r"center='mean', scale='gaussian', and this layer has p=1, center='zero'"),
    ({}, {"scale": "raw"}, r"scale='gaussian', and this layer has .*scale='raw'\. Make .*scale='gaussian'"),
]


@pytest.mark.parametrize(("saved", "own", "message"), MOMENTS, ids=str)
@pytest.mark.parametrize("how", [{}, {"strict": False}, {"assign": True}], ids=str)
def test_statistics_of_another_moment(how: Any, saved: Any, own: Any, message: str) -> None:
    for one, other in ((saved, own), (own, saved)):
        model = nn.Sequential(nn.Linear(3, 4), filled(sn.StreamingNorm1d(4, **one), 5, 4))
        layer = filled(sn.StreamingNorm1d(4, **other), 5, 4)
        state = {name.removeprefix("1."): tensor for name, tensor in model.state_dict().items() if "1." in name}
        refused(layer, state, message if one is saved else "lp_moment: these statistics were collected with", **how)
    with pytest.raises(RuntimeError, match=r"1\.lp_moment: these statistics"):
        nn.Sequential(nn.Linear(3, 4), layer).load_state_dict(model.state_dict())


@pytest.mark.parametrize("make", [sn.RNN, sn.GRU, sn.LSTM, sn.GRUCell, sn.LSTMCell])
def test_recurrent_statistics_of_another_moment(make: Any) -> None:
    name = "norm_hh" if "Cell" in make.__name__ else "norm_hh_l0"
    with pytest.raises(RuntimeError, match=rf"{name}\.lp_moment: these statistics .* p=2, .*and this layer has p=1"):
        make(3, 4).load_state_dict(make(3, 4, p=2).state_dict())
    make(3, 4, p=2).load_state_dict(make(3, 4, p=2).state_dict())


def test_for_p_2_both_scales_are_the_same() -> None:
    raw, gaussian = filled(sn.StreamingNorm1d(4, p=2), 5, 4), sn.StreamingNorm1d(4, p=2, scale="gaussian")
    gaussian.load_state_dict(raw.state_dict())
    x = torch.randn(5, 4)
    assert gaussian.eval()(x).equal(raw.eval()(x))
    assert gaussian.lp_moment.tolist() == [2, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [1, 1.3, 2.7])
def test_a_state_that_was_saved_in_another_precision(p: float, dtype: torch.dtype) -> None:
    layer, saved = sn.StreamingNorm1d(4, p=p), filled(sn.StreamingNorm1d(4, p=p), 5, 4).state_dict()
    layer.load_state_dict({name: t.to(dtype) if t.is_floating_point() else t for name, t in saved.items()})
    assert layer.lp_moment.tolist() == torch.tensor([p, 1.0, 1.0]).tolist()


def test_a_state_holds_tensors_of_their_own() -> None:
    """So that safetensors takes it: it refuses objects, and tensors that share memory."""
    state = nn.Sequential(sn.StreamingNorm1d(4), sn.StreamingNorm1d(4), sn.GRU(4, 3)).state_dict()
    assert {type(value) for value in state.values()} == {Tensor}
    assert len({value.data_ptr() for value in state.values()}) == len(state)


def test_the_ways_of_others_to_take_and_load_a_state() -> None:
    """PyTorch's distributed checkpoints ask for every name as an attribute, and functional calls swap all of them."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    def make(p: float) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(4, p=p))

    model, x = make(1.5), torch.randn(5, 3)
    model(x).sum().backward()
    again = make(1.5)
    set_model_state_dict(again, get_model_state_dict(model))
    assert again.eval()(x).equal(model.eval()(x))
    assert torch.func.functional_call(make(1.5).eval(), dict(model.state_dict()), (x,)).equal(model(x))
    with pytest.raises(RuntimeError, match=r"1\.lp_moment: these statistics were collected with p=1\.5"):
        set_model_state_dict(make(2), get_model_state_dict(model))


def test_states_from_before_the_moment_was_saved() -> None:
    """Of version 1, or of no known version, as files without metadata are."""
    saved = filled(sn.StreamingNorm1d(4, p=3, scale="raw"), 5, 4).state_dict()
    del saved["lp_moment"], saved["seen"]
    layer = sn.StreamingNorm1d(4, p=3, scale="raw")
    with pytest.raises(RuntimeError, match=r"Missing key.*lp_moment"):
        layer.load_state_dict(saved)
    saved._metadata[""]["version"] = 1
    for state in (saved, dict(saved)):
        layer = sn.StreamingNorm1d(4, p=3, scale="raw", device="meta").to_empty(device="cpu")
        layer.load_state_dict(state)
        assert layer.long.equal(saved["long"])
        assert layer.lp_moment.tolist() == [3, 1, 0]
        assert layer.seen > 1e6
        with pytest.warns(UserWarning, match=r"of streamnorm 0\.1.*with p=3 and no scale of its own.*scale='raw'"):
            sn.StreamingNorm1d(4, p=3).load_state_dict(state)
        sn.StreamingNorm1d(4, p=2).load_state_dict(state)


@pytest.mark.parametrize("make", [lambda: sn.StreamingNorm1d(4), lambda: sn.GRU(3, 4)], ids=["layer", "recurrent"])
def test_a_state_of_a_later_version(make: Callable[[], nn.Module]) -> None:
    state: Any = make().state_dict()
    for metadata in state._metadata.values():
        metadata["version"] = 9
    with pytest.raises(RuntimeError, match=r"long: this state is of version 9, and this release .* up to 2: install"):
        make().load_state_dict(state)


SPOILT: dict[str, tuple[Change, str]] = {
    "nan": (lambda s: s["long"][0, 1].fill_(math.nan), r"long: it holds nan at \[0, 1\]; statistics are finite"),
    "infinite": (lambda s: s["short"][1, 2].fill_(math.inf), r"short: it holds inf at \[1, 2\]"),
    "gradient": (lambda s: s["long_grad"][1].fill_(-math.inf), r"long_grad: it holds -inf at \[1, 0\]"),
    "short gradient": (lambda s: s["short_grad"].fill_(math.nan), r"short_grad: it holds nan at \[0, 0\]"),
    "moment": (lambda s: s["long"][1, 3].fill_(-0.5), r"long: it holds -0\.5 at \[1, 3\]; .* moments"),
    "short moment": (lambda s: s["short"][1].fill_(-2), r"short: it holds -2\.0 at \[1, 0\]"),
    "count": (lambda s: s["count"][2].fill_(-3), r"count: it holds -3 at \[2\]; .* counts at least 0"),
    "gradient count": (lambda s: s["grad_count"].fill_(-1), r"grad_count: it holds -1 at \[0\]"),
    "samples": (lambda s: s["samples"].fill_(-3), r"samples: it holds -3; .* strict=False .*streamnorm\.calibrate"),
    "gradient samples": (lambda s: s["grad_samples"].fill_(-3), "grad_samples: it holds -3"),
    "p": (lambda s: s["lp_moment"][0].fill_(0), r"lp_moment: it is \[0\.0, 1\.0, 1\.0\], and p is .* at least 1"),
    "size": (lambda s: s.update(short=torch.zeros(2, 3)), r"size mismatch for short: of shape \(2, 3\) in the check"),
    "gain": (lambda s: s.update(weight=torch.ones(3)), r"size mismatch for weight: of shape \(3,\)"),
}


@pytest.mark.parametrize("how", [{}, {"strict": False}, {"assign": True}], ids=str)
@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_state_is_refused_before_anything_changes(fault: str, how: Any) -> None:
    change, message = SPOILT[fault]
    layer, other = (filled(sn.StreamingNorm1d(4, p=1.5), 5, 4) for _ in range(2))
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    change(state)
    refused(layer, state, message, **how)


@pytest.mark.parametrize("fault", ["nan", "moment", "count", "samples"])
def test_a_spoilt_state_of_a_recurrent_layer(fault: str) -> None:
    change, message = SPOILT[fault]
    layer = sn.LSTM(3, 1)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    change({name.removeprefix("norm_ih_l0."): tensor for name, tensor in state.items() if "norm_ih_l0." in name})
    before = buffers(layer.norm_ih_l0)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=rf"norm_ih_l0\.{message}"):
        layer.load_state_dict(state)
    assert not changed(layer.norm_ih_l0, before)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [lambda: sn.GeneralBatchNorm(4), lambda: sn.GRU(3, 4, norm="batch").norm_ih_l0])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("running_mean", math.nan, "running_mean: it holds nan at"),
        ("running_var", math.inf, "running_var: it holds inf at"),
        ("running_var", -1, r"running_var: it holds -1\.0 at"),
        ("num_batches_tracked", -1, "num_batches_tracked: it holds -1; "),
    ],
)
def test_a_spoilt_state_of_batch_normalization(make: Any, name: str, value: float, message: str) -> None:
    state = {key: tensor.clone() for key, tensor in make().state_dict().items()}
    state[name].fill_(value)
    refused(make(), state, message)


def test_batch_normalization_loads_states_without_a_number_of_batches() -> None:
    """As ``nn.BatchNorm`` does: version 1 of it did not count."""
    state = with_mean = nn.BatchNorm1d(4).state_dict()
    with_mean["running_mean"].fill_(3)
    del state["num_batches_tracked"]
    layer = sn.GeneralBatchNorm(4)
    with pytest.raises(RuntimeError, match=r"Missing key.*num_batches_tracked"):
        layer.load_state_dict(state)
    layer.load_state_dict(dict(state))
    assert layer.running_mean.tolist() == [3] * 4
    assert int(layer.num_batches_tracked) == 0


def test_states_whose_numbers_cannot_be_read_load() -> None:
    layer = sn.StreamingNorm1d(4, device="meta")
    layer.load_state_dict(sn.StreamingNorm1d(4, device="meta").state_dict(), assign=True)
    saved = filled(sn.StreamingNorm1d(4), 5, 4).state_dict()
    layer.load_state_dict(saved, assign=True)
    assert not changed(layer, dict(saved))


# What a BatchNorm has


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("running_mean", r"StreamingNorm1d has no running_mean: layer\.eval_stats\(\)\[0\] .*to_batchnorm\(model\)"),
        ("running_var", r"no running_var: layer\.eval_stats\(\)\[1\] .*to_batchnorm\(model\)"),
        ("num_batches_tracked", r"no num_batches_tracked: layer\.samples"),
        ("momentum", r"no momentum: .* layer\.stream\.window"),
        ("track_running_stats", r"no track_running_stats: .*streamnorm\.freeze"),
        ("reset_running_stats", r"no reset_running_stats: .*layer\.reset_stats\(\)"),
    ],
)
def test_a_name_of_batch_normalization_says_what_to_write(name: str, message: str) -> None:
    layer = sn.StreamingNorm1d(4)
    with pytest.raises(AttributeError, match=message) as error:
        getattr(layer, name)
    assert error.value.name == name
    assert not hasattr(layer, name)
    assert getattr(layer, name, None) is None
    with pytest.raises(AttributeError, match=rf"^'SampleNorm' object has no attribute '{name}'"):
        getattr(sn.SampleNorm(4), name)


def test_fusing_code_is_told_so() -> None:
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    with pytest.raises(AttributeError, match=r"has no running_mean: layer\.eval_stats"):
        fuse_conv_bn_eval(nn.Conv2d(3, 4, 1).eval(), sn.StreamingNorm2d(4).eval())  # type: ignore[arg-type]


def test_the_names_that_a_layer_has_are_its_own() -> None:
    layer = sn.GeneralBatchNorm(4)
    assert layer.running_mean.tolist() == [0] * 4
    assert layer.momentum == 0.1
    streaming: Any = sn.StreamingNorm1d(4)
    streaming.momentum = 0.1  # what somebody sets is there
    assert streaming.momentum == 0.1
    with pytest.raises(AttributeError, match="'StreamingNorm1d' object has no attribute 'runing_mean'"):
        streaming.runing_mean  # noqa: B018
