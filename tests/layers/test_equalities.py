"""What must equal PyTorch's own layers, and where the streaming gradient must be the true one.

Two layers see the same input and the same incoming gradient at each of 50 steps; every value must be as near as
rounding allows: ‖a − b‖ ≤ 2e-6·‖b‖ in float32, 1e-12·‖b‖ in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamnorm as sn
from streamnorm import ops

STEPS = 50
NEAR = {torch.float32: 2e-6, torch.float64: 1e-12}
PRESENT: dict[str, Any] = {"alpha": (0, 0, 1), "beta": (0, 0, 1)}
SHAPES: list[tuple[int, ...]] = [(6, 4), (5, 4, 7), (3, 4, 5, 6), (2, 4, 3, 2, 5)]
BATCH_NORMS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
STREAMING: dict[int, Any] = {2: sn.StreamingNorm1d, 3: sn.StreamingNorm1d, 4: sn.StreamingNorm2d, 5: sn.StreamingNorm3d}

Function = Callable[[Tensor], Tensor]


@pytest.fixture(params=[engine.name for engine in ops.ENGINES], autouse=True)
def _engine(request: pytest.FixtureRequest) -> Iterator[None]:
    with ops.force(request.param):
        yield


def assert_near(a: Tensor | None, b: Tensor | None, what: str) -> None:
    assert a is not None
    assert b is not None
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    difference, size = (a - b).double().norm().item(), b.double().norm().item()
    assert size > 0, f"{what}: nothing to compare"
    assert difference <= NEAR[b.dtype] * size, f"{what}: off by {difference / size:.1e}"


def same_on_inputs(ours: Function, theirs: Function, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[None]:
    """Both on the same inputs, whose location, spread and batch size change; yields after each step."""
    parameters = [
        (mine, its)
        for a, b in [(ours, theirs)]
        if isinstance(a, nn.Module) and isinstance(b, nn.Module)
        for mine, its in zip(a.parameters(), b.parameters(), strict=True)
    ]
    for mine, its in parameters:
        with torch.no_grad():
            its.copy_(torch.randn_like(its))
            mine.copy_(its)
    for step in range(STEPS):
        n = shape[0] + step % 3
        # Well conditioned, or float32 itself is not as near as we ask: the spread is not below that of the locations.
        location = 1 + torch.randn(shape[1], *(1 for _ in shape[2:]), dtype=dtype)
        x = location + (1 + step / 10) * torch.randn(n, *shape[1:], dtype=dtype)
        dy = torch.randn_like(x)
        ends = []
        for function in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            y.backward(dy)
            ends.append((y.detach(), leaf.grad))
        assert_near(ends[0][0], ends[1][0], f"output at step {step}")
        assert_near(ends[0][1], ends[1][1], f"gradient of the input at step {step}")
        for mine, its in parameters:
            assert_near(mine.grad, its.grad, f"gradient of a parameter at step {step}")
            mine.grad = its.grad = None
        yield


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_streaming_norm_in_the_special_case_is_batch_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ours = STREAMING[len(shape)](4, p=2, **PRESENT, dtype=dtype)
    for _ in same_on_inputs(ours, BATCH_NORMS[len(shape)](4, dtype=dtype), shape, dtype):
        sn.commit(ours)
    assert not torch.equal(ours.long, torch.tensor([[0.0], [1.0]], dtype=dtype).expand(2, 4)), "the stream stood still"


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_general_batch_norm_is_batch_norm(shape: tuple[int, ...], momentum: float | None, dtype: torch.dtype) -> None:
    ours = sn.GeneralBatchNorm(4, momentum=momentum, dtype=dtype)
    theirs = BATCH_NORMS[len(shape)](4, momentum=momentum, dtype=dtype)
    for step, _ in enumerate(same_on_inputs(ours, theirs, shape, dtype)):
        for name in ("running_mean", "running_var"):
            assert_near(getattr(ours, name), getattr(theirs, name), name)
        assert torch.equal(ours.num_batches_tracked, theirs.num_batches_tracked)
        if step % 10 == 0:
            x = torch.randn(shape, dtype=dtype)
            assert_near(ours.eval()(x), theirs.eval()(x), "evaluation")
            ours.train()
            theirs.train()


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("partitions", [2, 3])
def test_ghost_batches_are_batch_norm_of_each(partitions: int, dtype: torch.dtype) -> None:
    theirs = nn.BatchNorm2d(4, affine=False, track_running_stats=False, dtype=dtype)
    ours = sn.GeneralBatchNorm(4, ghosts=partitions, affine=False, dtype=dtype)

    def by_parts(x: Tensor) -> Tensor:
        actual = next(p for p in range(partitions, 0, -1) if len(x) % p == 0)
        y = torch.empty_like(x)
        for part in range(actual):
            y[part::actual] = theirs(x[part::actual])
        return y

    for _ in same_on_inputs(ours.forward, by_parts, (6, 4, 3, 2), dtype):
        pass


def _merged(norm: nn.Module, channels: int) -> Function:
    """A BatchNorm1d over some channels and all places at once."""
    return lambda x: norm(x.reshape(len(x), channels, -1)).reshape(x.shape)


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize(("ref", "channels"), [("layer", 1), (("group", 2), 2)], ids=str)
@pytest.mark.parametrize("family", ["general", "streaming"])
def test_wider_batch_references_are_batch_norm_after_a_reshape(
    family: str, ref: Any, channels: int, dtype: torch.dtype
) -> None:
    plain = nn.BatchNorm1d(channels, affine=False, dtype=dtype)
    ours: Any = {
        "general": lambda: sn.GeneralBatchNorm(4, ref, affine=False, dtype=dtype),
        "streaming": lambda: sn.StreamingNorm2d(4, p=2, ref=ref, affine=False, dtype=dtype, **PRESENT),
    }[family]()
    for _ in same_on_inputs(ours.forward, _merged(plain, channels), (3, 4, 3, 2), dtype):
        if family == "general":
            assert_near(ours.running_mean, plain.running_mean, "running mean")
            assert_near(ours.running_var, plain.running_var, "running variance")


SAMPLE_CASES: dict[str, tuple[Any, Callable[[tuple[int, ...], torch.dtype], Any]]] = {
    "layer": ("layer", lambda shape, dtype: nn.LayerNorm(shape[1:], elementwise_affine=False, dtype=dtype)),
    "layer-as-group": ("layer", lambda shape, dtype: nn.GroupNorm(1, 4, dtype=dtype)),
    "channel": ("channel", lambda shape, dtype: nn.GroupNorm(4, 4, dtype=dtype)),
    "group": (("group", 2), lambda shape, dtype: nn.GroupNorm(2, 4, dtype=dtype)),
}
INSTANCE_NORMS: dict[int, Any] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("case", SAMPLE_CASES)
def test_sample_norm_is_layer_and_group_norm(case: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ref, make = SAMPLE_CASES[case]
    theirs = make(shape, dtype)
    ours = sn.SampleNorm(4, ref, affine=bool(list(theirs.parameters())), dtype=dtype)
    for _ in same_on_inputs(ours, theirs, shape, dtype):
        pass
    x = torch.randn(shape, dtype=dtype)
    assert_near(ours.eval()(x), theirs.eval()(x), "evaluation")


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_sample_norm_by_channel_is_instance_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    theirs = INSTANCE_NORMS[len(shape)](4, affine=True, dtype=dtype)
    for _ in same_on_inputs(sn.SampleNorm(4, "channel", dtype=dtype), theirs, shape, dtype):
        pass


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sample_norm_by_position_is_layer_norm_across_channels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain = nn.LayerNorm(16, elementwise_affine=False, dtype=dtype)
    ours = sn.SampleNorm(16, "position", affine=False, dtype=dtype)
    for _ in same_on_inputs(
        ours.forward, lambda x: plain(x.movedim(1, -1)).movedim(-1, 1), (shape[0], 16, *shape[2:]), dtype
    ):
        pass


@pytest.mark.parametrize("center", ["mean", "zero"])
@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize("kind", ["streaming", "general", "sample", "masked"])
def test_gradcheck_where_the_gradient_is_the_true_one(kind: str, p: float, center: str) -> None:
    options: dict[str, Any] = {"p": p, "center": center, "scale": "gaussian", "dtype": torch.float64}
    layer: sn.Norm = {
        "streaming": lambda: sn.StreamingNorm1d(4, **PRESENT, **options),
        "general": lambda: sn.GeneralBatchNorm(4, ("group", 2), **options),
        "sample": lambda: sn.SampleNorm(4, **options),
        "masked": lambda: sn.StreamingNorm1d(4, ref="layer", **PRESENT, **options),
    }[kind]()
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False], [False, False], [True, True]]) if kind == "masked" else None
    gain, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def call(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, {"weight": gain, "bias": bias}, (x, mask))
        return y

    assert torch.autograd.gradcheck(call, (x, gain, bias), eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("center", ["mean", "zero"])
@pytest.mark.parametrize("ref", ["channel", "layer"])
def test_short_statistics_over_mini_batches_are_those_of_their_union(center: str, ref: str) -> None:
    layer = sn.StreamingNorm1d(4, p=3, center=center, ref=ref, affine=False, dtype=torch.float64)
    parts = [torch.randn(n, 4, 3, dtype=torch.float64) * n for n in (1, 5, 2, 1, 3)]
    reduced = (0, 2) if ref == "channel" else (0, 1, 2)
    moments, counts = [], []
    for part in parts:
        layer(part)
        # Nothing is committed, so that mu is α2·short_mu with α2 = S/(16 + S).
        samples = int(layer.state.samples)
        mu = (layer.state.short[0] * samples / (16 + samples)).view(1, -1, 1) if center == "mean" else 0.0
        moments.append((part - mu).abs().pow(3).mean(reduced).flatten())
        counts.append(part.numel() / len(moments[-1]))
    union, weights = torch.cat(parts), torch.tensor(counts, dtype=torch.float64)
    assert_near(layer.state.short[0], union.mean(reduced).flatten(), "short_mu")
    weighted = (torch.stack(moments) * weights[:, None]).sum(0) / weights.sum()
    assert_near(
        layer.state.short[1], weighted, "short_m: the weighted mean of the deviations about the mu that each call used"
    )
    if center == "zero":
        assert_near(layer.state.short[1], union.abs().pow(3).mean(reduced).flatten(), "short_m")
    assert layer.state.count.tolist() == [int(weights.sum())] * len(layer.state.count)
