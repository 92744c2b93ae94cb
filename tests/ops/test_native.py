"""What only the C++ engine promises: its layouts and dtypes, its digits, and the same bits on any number of threads."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor, nn

import streamnorm as sn
from streamnorm import ops
from streamnorm.ops import Call
from streamnorm.ops.native import ENGINE

pytestmark = pytest.mark.skipif(
    ops.engines()["native"].startswith("not available"), reason="the C++ extension was not built"
)

LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every other sample": lambda t: t.repeat_interleave(2, 0)[::2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}
STREAMS = {
    "window": {},
    "paper": {"kappa": 0.7},
    "present": {"alpha": (0, 0, 1), "beta": (0, 0, 1)},
    "one pass": {"alpha": (1, 0, 0), "beta": (1, 0, 0)},
    "no gradient": {"alpha": (0.5, 0.2, 0.3), "beta": (0, 0, 0), "kappa": (0.9, 0.2, 0.8, 0.1)},
}


def near(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    ours, theirs = ours.double(), theirs.double()
    return bool((ours - theirs).norm() <= tolerance * theirs.norm() + 1e-6 * tolerance)


def sequence(engine: str, layer: sn.Norm, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """All that comes out of three updates of two uses each: outputs, gradients, state."""
    results: list[Tensor] = []
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with ops.force(engine):
        for i, (x, dy) in enumerate(zip(inputs, grads)):
            x = x.detach().requires_grad_()
            y = layer(x)
            y.backward(dy)
            assert x.grad is not None
            results += [y.detach(), x.grad]
            if i % 2:
                results += [p.grad.clone() for p in layer.parameters() if p.grad is not None]
                optimizer.step()
                optimizer.zero_grad()
            results += [buffer.clone() for buffer in layer.state]
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stream", STREAMS)
def test_as_the_reference(stream: str, layout: str, dtype: torch.dtype) -> None:
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    refs = ("channel", "layer", ("group", 3))
    for p, center, ref in itertools.product((1, 1.5, 2, 3), ("mean", "zero"), refs):
        shapes = [(n, 6, 5, 4) for n in (2, 3, 1, 4, 2, 2)]
        inputs = [LAYOUTS[layout](torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]
        grads = [torch.randn_like(x) for x in inputs]
        results = []
        for engine in ("native", "plain"):
            layer = sn.StreamingNorm2d(6, p=p, center=center, ref=ref, dtype=dtype, **STREAMS[stream])  # type: ignore[arg-type]
            results.append(sequence(engine, layer, inputs, grads))
        for i, (ours, theirs) in enumerate(zip(*results)):
            assert near(ours, theirs, 8 * tolerance), f"p={p} {center} {ref}: result {i}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("p", [1, 2])
def test_half_precision_counts_in_float32(dtype: torch.dtype, tolerance: float, p: float) -> None:
    inputs = [torch.randn(4, 6, 5, 4).to(dtype) for _ in range(4)]
    grads = [torch.randn_like(x) for x in inputs]
    ours = sequence("native", sn.StreamingNorm2d(6, p=p), inputs, grads)
    theirs = sequence("plain", sn.StreamingNorm2d(6, p=p), inputs, grads)
    assert ours[0].dtype == dtype
    for mine, expected in zip(ours, theirs):
        assert near(mine, expected, tolerance)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("stream", ["window", "one pass"])
@pytest.mark.parametrize("p", [1, 2])
def test_the_same_bits_on_any_number_of_threads(layout: str, stream: str, p: float) -> None:
    inputs = [LAYOUTS[layout](torch.randn(shape)) for shape in ((48, 64, 24, 24), (5, 64, 24, 24))]
    grads = [torch.randn_like(x) for x in inputs]
    runs = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        runs.append(sequence("native", sn.StreamingNorm2d(64, p=p, **STREAMS[stream]), inputs, grads))  # type: ignore[arg-type]
    for results in zip(*runs):
        assert all(result.equal(results[0]) for result in results)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_digits_of_ten_million_elements_with_a_large_offset(p: float, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(10, 2, 1000, 1000) + 1e4)
    layer = sn.StreamingNorm2d(2, p=p, alpha=(0, 0, 1), beta=(0, 0, 1))
    with ops.force("native"), torch.no_grad():
        layer(x)
    wide = x.double().transpose(0, 1).flatten(1)
    mu = wide.mean(1)
    m = (wide - layer.short[0].double()[:, None]).abs().pow(p).mean(1)
    assert near(layer.short[0], mu, 1e-7)
    assert near(layer.short[1], m, 1e-6)


@pytest.mark.parametrize("center", ["mean", "zero"])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_digits_where_the_level_changes_from_row_to_row(layout: str, p: float, center: str) -> None:
    """Statistics that are put together from those of parts are as good as if the whole had been seen at once."""
    level = torch.tensor([0.0, 1e4, -3e3, 1e4 + 1]).repeat_interleave(500)[:, None, None, None]
    x = LAYOUTS[layout](torch.randn(2000, 70, 3, 1) + level)
    layer = sn.StreamingNorm2d(70, p=p, center=center, alpha=(0, 0, 1), beta=(0, 0, 1))
    with ops.force("native"), torch.no_grad():
        layer(x)
    wide = x.double().transpose(0, 1).flatten(1)
    mu = wide.mean(1)
    m = (wide - (layer.short[0].double()[:, None] if center == "mean" else 0)).abs().pow(p).mean(1)
    assert near(layer.short[0], mu, 2e-7)
    assert near(layer.short[1], m, 2e-7)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_constant_channel_passes_finite_gradients(layout: str, p: float) -> None:
    layer = sn.StreamingNorm2d(3, p=p, alpha=(0, 0, 1), beta=(0, 0, 1))
    x = LAYOUTS[layout](torch.full((4, 3, 5, 5), 7.0)).requires_grad_()
    with ops.force("native"):
        y = layer(x)
        y.backward(torch.randn_like(y))
    assert y.detach().abs().max() == 0
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_two_threads_train_two_models() -> None:
    def train(layer: sn.Norm, x: Tensor) -> None:
        for _ in range(20):
            layer(x).square().sum().backward()
            sn.commit(layer)

    x = torch.randn(16, 32, 24, 24)
    alone, first, second = (sn.StreamingNorm2d(32) for _ in range(3))
    train(alone, x)
    threads = [threading.Thread(target=train, args=(layer, x)) for layer in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for layer in (first, second):
        assert all(a.equal(b) for a, b in zip(layer.state, alone.state))


def takes(x: Tensor, layer: sn.Norm) -> bool:
    """Whether the engine normalizes x, which must change no state if it does not."""
    twin = copy.deepcopy(layer)
    view = layer.ref.view(tuple(x.shape))
    y = ENGINE.normalize(Call(x, twin.weight, twin.bias, None, view, twin.formula, twin.state))
    assert int(twin.samples) == (0 if y is NotImplemented else len(x))
    return y is not NotImplemented


def test_what_is_not_a_plain_tensor_goes_to_pytorch() -> None:
    class Special(Tensor):
        pass

    layer = sn.StreamingNorm1d(4)
    x = torch.randn(3, 4)
    assert takes(x, layer)
    assert not takes(x.as_subclass(Special), layer)
    assert not takes(x.to("meta"), layer)
    layer(x.as_subclass(Special)).sum().backward()
    assert int(layer.samples) == 3


def test_a_gain_that_cpp_does_not_take_still_works() -> None:
    layer = sn.StreamingNorm1d(4)
    layer.weight = nn.Parameter(torch.ones(8)[::2])
    layer(torch.randn(3, 4)).sum().backward()
    assert int(layer.samples) == 3
    assert int(layer.grad_samples) == 0  # the input asked for no gradient


def test_values_that_memory_holds_with_the_other_sign() -> None:
    """The imaginary part of a conjugate has such memory; these are contiguous, and C++ would read them."""
    x, dy, gain = (torch._neg_view(torch.randn(shape)) for shape in ((8, 4), (8, 4), (4,)))
    for chosen in itertools.product((False, True), repeat=3):
        a, b, c = (t if keep else t.resolve_neg() for t, keep in zip((x, dy, gain), chosen))
        results = []
        for engine in ("native", "plain"):
            layer = sn.StreamingNorm1d(4)
            layer.weight = nn.Parameter(c)
            results.append(sequence(engine, layer, [a], [b]))
        assert all(near(ours, theirs, 2e-6) for ours, theirs in zip(*results)), chosen
    layer = sn.StreamingNorm1d(4)
    assert not takes(x, layer)
    part = torch.randn(8, 4, dtype=torch.complex64).conj().imag
    with ops.force("native"):
        assert near(layer(part), sn.StreamingNorm1d(4)(part.resolve_neg()), 2e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("width", [64, 62])
def test_outputs_too_large_for_the_cache(layout: str, width: int) -> None:
    """They are written another way where whole packs fit, which 62 is not made of."""
    x, dy = (LAYOUTS[layout](torch.randn(18, width, 62, width)) for _ in range(2))
    ours = sequence("native", sn.StreamingNorm2d(width), [x], [dy])
    theirs = sequence("torch", sn.StreamingNorm2d(width), [x], [dy])
    assert x.numel() * 4 >= 1 << 24
    assert all(near(mine, expected, 8e-6) for mine, expected in zip(ours, theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [16, 64, 256, 512, 4096, 40])
def test_elements_at_the_centre_have_no_sign(channels: int, dtype: torch.dtype) -> None:
    """Of p = 1, where signs are kept from one look at x to the next; 4096 and 40 channels are walked without them."""
    xs, dys = (
        [LAYOUTS["channels_last"](torch.randn(3, channels, 5, 7, dtype=dtype)) for _ in range(2)] for _ in range(2)
    )
    xs = [x.relu() for x in xs]
    layer = sn.StreamingNorm2d(channels, p=1, center="zero", dtype=dtype)
    ours = sequence("native", copy.deepcopy(layer), xs, dys)
    theirs = sequence("torch", layer, xs, dys)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12}[dtype]
    assert all(near(mine, expected, tolerance) for mine, expected in zip(ours, theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 64, 32, 32), (3, 100, 50, 41), (9000, 33)], ids=str)
@pytest.mark.parametrize(("p", "center"), [(1, "mean"), (1, "zero"), (2, "mean"), (2, "zero")])
def test_rows_too_many_for_the_cache(p: float, center: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """They are walked in parts, some of them whole cache lines and some not; a bad value stays in its channel."""
    keep = {"memory_format": torch.channels_last} if len(shape) == 4 else {}
    xs, dys = ([torch.randn(shape, dtype=dtype).contiguous(**keep) for _ in range(2)] for _ in range(2))
    xs[1].select(1, 7).view(-1)[:3] = torch.inf
    layer = sn.Norm(shape[1], sn.NormRef.batch("channel"), sn.LpMoment(p=p, center=center), sn.Stream())
    layer = layer.double() if dtype == torch.float64 else layer
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    outcomes = []
    for threads in (1, 3, 8):
        torch.set_num_threads(threads)
        outcomes.append([result.nan_to_num(-99) for result in sequence("native", copy.deepcopy(layer), xs, dys)])
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in outcomes[1:] for a, b in zip(outcomes[0], other))
    tolerance = {torch.float32: 8e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    theirs = [result.nan_to_num(-99) for result in sequence("torch", layer, xs, dys)]
    assert all(near(mine, expected, tolerance) for mine, expected in zip(outcomes[0], theirs))
    bad = outcomes[0][2 + len(layer.state)]  # the second y
    assert bool((bad.select(1, 7) == -99).all())
    assert int((bad == -99).sum()) == bad.select(1, 7).numel()


def test_more_axes_than_cpp_knows_go_to_pytorch() -> None:
    x = torch.randn(3, 2, *[1] * 16)
    sn.Norm(2, sn.NormRef.batch("channel"), sn.LpMoment(p=1), sn.Stream())(x).sum().backward()


_OUT_OF_MEMORY = """
import resource, torch, streamnorm as sn
torch.set_num_threads(2)
layer, x = sn.StreamingNorm1d(2), torch.randn(4_000_000, 2, 3)
layer(x[:300_000])  # threads and their stacks are there
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 150 * 2**20,) * 2)
try:
    layer(x)
except MemoryError:
    print("refused")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory can be limited so on Linux only")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer reserves more than any limit")
def test_without_memory_for_its_threads_it_raises() -> None:
    """An exception must not leave a thread of the OpenMP runtime, which would end the process."""
    run = subprocess.run([sys.executable, "-c", _OUT_OF_MEMORY], capture_output=True, text=True, timeout=120)
    assert run.stdout == "refused\n", run.stderr


_ALL_THAT_COMES_OUT = """
import hashlib, torch, streamnorm as sn
torch.manual_seed(0)
torch.set_num_threads(1)
found = hashlib.sha256()
for p in (1, 2, 3, 2.5):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for shape in ((9, 70), (3, 64, 9, 9), (3, 21, 9, 9)):
            for channels_last in (False, True)[: len(shape) // 2]:
                layer = sn.Norm(shape[1], sn.NormRef.batch("channel"), sn.LpMoment(p=p), sn.Stream())
                layer = layer.double() if dtype == torch.float64 else layer
                for mask in (None, None, torch.rand(shape[0], *shape[2:]) < 0.6):
                    x, dy = torch.randn(shape).relu().to(dtype), torch.randn(shape).to(dtype)
                    if channels_last:
                        x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
                    y = layer(x.requires_grad_(), mask)
                    y.backward(dy)
                    sn.commit(layer)
                    for t in (y, x.grad, *(p.grad for p in layer.parameters()), *layer.state):
                        found.update(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
print(sn.engines()["native"], found.hexdigest())
"""


def test_instruction_sets_agree_to_the_last_bit() -> None:
    outcomes = {}
    for instructions in ("avx512", "avx2", "baseline"):
        run = subprocess.run(
            [sys.executable, "-c", _ALL_THAT_COMES_OUT],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"STREAMNORM_ISA": instructions},
        )
        if "has no instruction set" in run.stderr:
            continue
        assert run.returncode == 0, run.stderr
        assert instructions in run.stdout, run.stdout
        outcomes[instructions] = run.stdout.split()[-1]
    assert "baseline" in outcomes
    assert len(set(outcomes.values())) == 1, outcomes


def test_setup_wants_each_object_by_its_name() -> None:
    exchange = Tensor.__dlpack_c_exchange_api__
    with pytest.raises(TypeError, match=r"setup\(\) wants exchange"):
        ops.native.extension.setup({}, "", None)
    with pytest.raises(TypeError, match=r"setup\(\) wants Tensor"):
        ops.native.extension.setup({"exchange": exchange}, "", None)
    layer = sn.StreamingNorm1d(4)
    layer(torch.randn(2, 4)).sum().backward()  # what was there before is there still


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e300])
@pytest.mark.parametrize("alpha", [(1, 0, 0), (0.5, 0.3, 0.2)])
def test_a_value_without_a_finite_power_under_a_bound_of_the_moment(
    alpha: tuple[float, float, float], value: float, p: int
) -> None:
    """Where mu is known beforehand, one value of a column may be infinite, and the moment with it, while mu is not."""
    moment, stream = sn.LpMoment(p=p), sn.Stream(alpha=alpha, kappa=0.7, limit=1.2)
    layer = sn.Norm(20, sn.NormRef.batch("channel"), moment, stream, dtype=torch.float64)
    x = torch.randn(9, 20, dtype=torch.float64)
    x[4, 7] = value
    found = []
    for engine in ("native", "plain"):
        mine, leaf = copy.deepcopy(layer), x.clone().requires_grad_()
        with ops.force(engine):
            y = mine(leaf)
            y.backward(torch.ones_like(y).cumsum(0))
        found.append([y, leaf.grad, *mine.state])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
