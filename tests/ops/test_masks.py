"""Masks on the C++ engine: each walk and layout beside the reference, the same bits on any threads, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import streamnorm as sn
from streamnorm import ops
from streamnorm.layers.inputs import full_mask
from streamnorm.ops import Call
from streamnorm.ops.native import ENGINE

pytestmark = pytest.mark.skipif(
    ops.engines()["native"].startswith("not available"), reason="the C++ extension was not built"
)

KINDS = ("samples", "lengths", "places", "one place", "nothing", "all")
REFS = {
    "channel": sn.NormRef.batch("channel"),
    "layer": sn.NormRef.batch("layer"),
    "groups": sn.NormRef.batch(("group", 2)),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}


def make_mask(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Of an input's shape; a mask over samples where ``kind`` says so, else over places."""
    places = (shape[0], *shape[2:])
    if kind == "samples":
        return torch.arange(shape[0]) % 3 != 1
    if kind == "lengths":
        each = torch.arange(places[-1]) < torch.randint(0, places[-1] + 1, (shape[0],))[:, None]
        return each.view(shape[0], *[1] * (len(places) - 2), -1).expand(places) if len(places) > 1 else each[:, 0]
    mask = torch.rand(places) < 0.6 if kind == "places" else torch.full(places, kind == "all")
    if kind == "one place":
        mask.view(-1)[places[-1] // 2] = True
    return mask


def outcome(engine: str, layer: Any, xs: list[Tensor], dys: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """All that comes out of uses under masks: outputs, gradients, and the buffers after each use and each update."""
    results: list[Tensor] = []
    with ops.force(engine):
        for i, (x, dy, mask) in enumerate(zip(xs, dys, masks)):
            leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            y = layer(leaf, mask)
            y.backward(dy.to(y.dtype))
            assert leaf.grad is not None
            results += [y.detach(), leaf.grad, *(buffer.clone() for buffer in layer.buffers())]
            if i % 2:
                sn.commit(layer)
                results += [buffer.clone() for buffer in layer.buffers()]
        results += [parameter.grad for parameter in layer.parameters()]
    return results


def is_taken(layer: sn.Norm, x: Tensor, mask: Tensor | None) -> bool:
    """Whether the engine normalizes x, which must change no state if it does not."""
    twin = copy.deepcopy(layer)
    state = None if layer.stream is None else twin.state
    full = None if mask is None else full_mask(mask, x)
    call = Call(x, twin.weight, twin.bias, full, layer.ref.view(tuple(x.shape)), twin.formula, state)
    y = ENGINE.normalize(call)
    if state is not None:
        samples = len(x) if mask is None else int(mask.reshape(len(mask), -1).any(1).sum())
        counted = 0 if y is NotImplemented else samples
        assert int(state.samples) == counted
    return y is not NotImplemented


def scattered(layer: Any) -> Any:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(len(parameter)))
    return layer


SHAPES = [(9, 20), (40, 6), (3, 4, 7), (4, 32, 50), (5, 6, 2, 2), (2, 18, 3, 9), (3, 4, 70, 90), (30, 70)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ref", [*REFS, "sample layer", "sample channel", "sample groups"])
def test_as_the_reference(ref: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    float64 = torch.float64
    for p in (1, 2, 3) if dtype == float64 else (1,):
        layer: Any
        if ref.startswith("sample"):
            layer = sn.SampleNorm(shape[1], ("group", 2) if ref == "sample groups" else ref.split()[1], p=p)
        else:
            layer = sn.Norm(shape[1], REFS[ref], sn.LpMoment(p=p), sn.Stream())
        layer = scattered(layer)
        xs: list[Tensor] = []
        dys: list[Tensor] = []
        masks: list[Tensor] = []
        for kind in KINDS:
            mask = make_mask(kind, shape)
            x, dy = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
            hidden = ~full_mask(mask, x).unsqueeze(1)
            x, dy = x.masked_fill(hidden, torch.nan), dy.masked_fill(hidden, torch.inf)
            if layout == "channels last":
                x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
            xs, dys, masks = [*xs, x], [*dys, dy], [*masks, mask.contiguous()]
        mine = copy.deepcopy(layer).to(float64 if dtype == float64 else torch.float32)
        if not is_taken(mine, xs[0], None):
            pytest.skip("the C++ engine does not take this layout, with or without a mask")
        assert all(is_taken(mine, x, mask) for x, mask in zip(xs, masks))
        ours = outcome("native", mine, xs, dys, masks)
        theirs = outcome("plain", layer.double(), [x.double() for x in xs], [dy.double() for dy in dys], masks)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.to(b.dtype), b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * _size(b))


def _size(t: Tensor) -> float:
    return max(1.0, float(t.abs().max())) if t.is_floating_point() else 0.0


@pytest.mark.parametrize("ref", ["channel", "layer"])
@pytest.mark.parametrize("shape", [(8, 16, 40, 40), (2, 3, 300, 200), (5000, 20), (40, 300, 2, 2)], ids=str)
def test_the_same_bits_on_any_number_of_threads(shape: tuple[int, ...], ref: str) -> None:
    xs, dys = ([torch.randn(shape) for _ in range(2)] for _ in range(2))
    masks = [make_mask(kind, shape) for kind in ("places", "lengths")]
    layer = scattered(sn.Norm(shape[1], REFS[ref], sn.LpMoment(p=1), sn.Stream()))
    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            outcomes.append(outcome("native", copy.deepcopy(layer), xs, dys, masks))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in outcomes[1:] for a, b in zip(outcomes[0], other))


def test_a_mask_that_keeps_all_is_no_mask() -> None:
    x = torch.randn(4, 6, 5, 5)
    with_mask, without = sn.StreamingNorm2d(6), sn.StreamingNorm2d(6)
    torch.testing.assert_close(with_mask(x, torch.ones(4, dtype=torch.bool)), without(x))
    for ours, theirs in zip(with_mask.state, without.state):
        torch.testing.assert_close(ours, theirs)


def test_a_layout_in_another_order_than_the_mask_goes_to_pytorch() -> None:
    x = torch.randn(3, 6, 4, 5).permute(0, 3, 2, 1)
    layer = sn.StreamingNorm2d(5)
    mask = torch.rand(3, 4, 6) < 0.5
    assert is_taken(layer, x, None)
    assert not is_taken(layer, x, mask)
    twin = copy.deepcopy(layer)
    with ops.force("plain"):
        expected = twin(x, mask)
    torch.testing.assert_close(layer(x, mask), expected)


def test_a_mask_that_changed_before_the_backward_pass_is_refused() -> None:
    layer, mask = sn.StreamingNorm1d(4), torch.tensor([[True, False], [True, True]])
    x = torch.randn(2, 4, 2, requires_grad=True)
    y = layer(x, mask)
    mask.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert int(layer.grad_samples) == 0


def test_a_mask_whose_memory_is_gone_is_refused() -> None:
    layer, mask = sn.StreamingNorm1d(4), torch.ones(3, 50, dtype=torch.bool)
    x = torch.randn(3, 4, 50)
    mask.untyped_storage().resize_(10)
    assert not is_taken_quietly(layer, x, mask)
    assert int(layer.samples) == 0


def is_taken_quietly(layer: sn.Norm, x: Tensor, mask: Tensor) -> bool:
    call = Call(x, layer.weight, layer.bias, mask, layer.ref.view(tuple(x.shape)), layer.formula, layer.state)
    return ENGINE.normalize(call) is not NotImplemented


@pytest.mark.parametrize("order", ["second derivative", "two passes", "output gradient of another kind"])
def test_ways_back_that_python_goes(order: str) -> None:
    """They start from what C++ saved, the mask among it."""
    found = []
    for engine in ("native", "plain"):
        torch.manual_seed(0)
        layer: Any = sn.StreamingNorm1d(4) if order != "second derivative" else sn.SampleNorm(4)
        layer = layer.double()
        x = torch.randn(3, 4, 6, dtype=torch.float64).requires_grad_()
        mask = torch.arange(6) < torch.tensor([6, 3, 0])[:, None]
        with ops.force(engine):
            y = layer(x, mask)
            dy = torch.randn(3, 4, 6, dtype=torch.float64)
            if order == "two passes":
                y.backward(dy, retain_graph=True)
                y.backward(2 * dy)
            elif order == "second derivative":
                (grad,) = torch.autograd.grad(y, x, dy, create_graph=True)
                grad.square().sum().backward()
            else:
                y.backward(dy[:, :, :1].expand(3, 4, 6).as_subclass(_Special))
        assert x.grad is not None
        found.append([y.detach(), x.grad.as_subclass(Tensor), *layer.buffers()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


class _Special(Tensor):
    pass
