"""The Triton engine: its kernels against the reference, on a GPU where there is one, else in Triton's interpreter.

The interpreter runs the kernels' text on CPU tensors, one program after the other. It does not see what the compiler
refuses; ``test_every_kernel_compiles`` does.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.beside import Beside
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

import streamnorm as sn
from streamnorm import ops
from streamnorm.ops import Call
from streamnorm.ops.gpu import ENGINE, commit, cut, device, passes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(ENGINE.status().startswith("not available"), reason=ENGINE.status()),
    # NumPy, by which the interpreter computes, warns of what is not finite.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    *([pytest.mark.cuda] if DEVICE == "cuda" else []),
]

LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "rows": lambda t: t.flatten(2).transpose(1, 2).flatten(0, 1),
    "every other sample": lambda t: t.repeat_interleave(2, 0)[::2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}
STREAMS: dict[str, dict[str, Any]] = {
    "window": {},
    "paper": {"kappa": 0.7},
    "present": {"alpha": (0, 0, 1), "beta": (0, 0, 1)},
    "one pass": {"alpha": (1, 0, 0), "beta": (1, 0, 0)},
    "no gradient": {"alpha": (0.5, 0.2, 0.3), "beta": (0, 0, 0), "kappa": (0.9, 0.2, 0.8, 0.1)},
}


@pytest.fixture(params=["whole", "split"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Small inputs take the whole way by themselves. For the split way, tiles so small that there are several parts."""
    yield from _way(request.param, monkeypatch)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from _way("split", monkeypatch)


def _way(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if name == "split":
        constants = {"WHOLE_ELEMENTS": 0, "WHOLE_ELEMENTS_OF_MANY": 0, "TILE": 32, "PROGRAMS_PER_PROCESSOR": 6}
        for constant, value in constants.items():
            monkeypatch.setattr(cut, constant, value)
    _forget_cuts()
    yield name
    _forget_cuts()


def _forget_cuts() -> None:
    for cached in (cut.cut_whole, cut.cut_split, passes.plan):
        cached.cache_clear()


def near(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    ours, theirs = ours.double(), theirs.double()
    return bool((ours - theirs).norm() <= tolerance * theirs.norm() + 1e-6 * tolerance)


def run(engine: str, layer: sn.Norm, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """All that comes out of updates of two uses each: outputs, gradients, state."""
    results: list[Tensor] = []
    layer = layer.to(DEVICE)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with ops.force(engine):
        for i, (x, dy) in enumerate(zip(inputs, grads)):
            x = x.detach().to(DEVICE).requires_grad_()
            y = layer(x)
            y.backward(dy.to(DEVICE))
            assert x.grad is not None
            results += [y.detach(), x.grad]
            if i % 2:
                results += [p.grad.clone() for p in layer.parameters() if p.grad is not None]
                optimizer.step()
                optimizer.zero_grad()
            results += [buffer.clone() for buffer in layer.state]
    return results


def batches(layout: str, channels: int, dtype: torch.dtype, sizes: tuple[int, ...] = (2, 3, 1)) -> list[Tensor]:
    """Mini-batches of changing size."""
    wide = [torch.randn(n, channels, 5, 4, dtype=torch.float64) * 2 + 1 for n in sizes]
    return [LAYOUTS[layout](x.to(dtype)) for x in wide]


def check(
    layout: str, stream: str, p: float, center: str, ref: Any = "channel", dtype: torch.dtype = torch.float64
) -> None:
    """The Triton engine beside the reference."""
    channels = 4 if ref != "channel" else 2 if layout == "contiguous" else 3  # one program for each, or for all
    inputs = batches(layout, channels, dtype)
    grads = [torch.randn_like(x) for x in inputs]
    kind = sn.StreamingNorm1d if layout == "rows" else sn.StreamingNorm2d
    ours, theirs = (
        run(engine, kind(channels, p=p, center=center, ref=ref, dtype=dtype, **STREAMS[stream]), inputs, grads)
        for engine in ("triton", "plain")
    )
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for i, (mine, expected) in enumerate(zip(ours, theirs)):
        assert mine.dtype == expected.dtype
        assert near(mine, expected, tolerance), f"result {i}: {mine} is not {expected}"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched."""
    names: list[str] = []
    launch = device.launch

    def noted(name: str, *arguments: Any) -> None:
        names.append(name)
        launch(name, *arguments)

    monkeypatch.setattr(device, "launch", noted)
    return names


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("layout", "p", "stream"),
    [
        *[("contiguous", 1, stream) for stream in STREAMS],
        *[("channels_last", 2, stream) for stream in STREAMS],
        ("contiguous", 2, "window"),
        ("channels_last", 1, "window"),
    ],
)
def test_as_the_reference(layout: str, p: float, stream: str) -> None:
    check(layout, stream, p, "mean")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("p", "stream"), [(1, "paper"), (2, "one pass"), (3, "window"), (1.5, "present")])
def test_moments_about_zero(p: float, stream: str) -> None:
    check("channels_last", stream, p, "zero")


@pytest.mark.parametrize(("way", "p"), [("whole", 1.2), ("split", 1.5), ("split", 3), ("whole", 4)], indirect=["way"])
def test_any_order(way: str, p: float) -> None:
    check("rows", "paper", p, "mean")


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize(
    ("ref", "stream", "layout", "p"),
    [
        ("layer", "window", "channels_last", 1),
        ("layer", "paper", "contiguous", 2),
        (("group", 2), "one pass", "channels_last", 2),
        (("group", 2), "window", "contiguous", 1),
    ],
)
def test_statistics_of_several_channels(ref: Any, stream: str, layout: str, p: float) -> None:
    check(layout, stream, p, "mean", ref)


@pytest.mark.parametrize("layout", ["every other sample", "transposed"])
def test_inputs_with_gaps(layout: str) -> None:
    check(layout, "window", 1, "mean")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_float32(p: float) -> None:
    check("channels_last", "window", p, "mean", dtype=torch.float32)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("p", [1, 2])
def test_half_precision_counts_in_float32(dtype: torch.dtype, tolerance: float, p: float) -> None:
    """Against the reference on the same numbers in float64: what is left is the rounding of the outputs."""
    inputs = batches("channels_last", 3, dtype)
    grads = [torch.randn_like(x) for x in inputs]
    ours = run("triton", sn.StreamingNorm2d(3, p=p), inputs, grads)
    wide = [[t.detach().double() for t in tensors] for tensors in (inputs, grads)]
    theirs = run("plain", sn.StreamingNorm2d(3, p=p, dtype=torch.float64), *wide)
    assert ours[0].dtype == ours[1].dtype == dtype
    for mine, expected in zip(ours, theirs):
        assert near(mine, expected, tolerance if mine.dtype == dtype else 1e-5)


@pytest.mark.usefixtures("way")
def test_beside_the_oracle() -> None:
    """Two mini-batches per update, three updates; the oracle is on the CPU."""
    layer = sn.StreamingNorm1d(5, p=1).double()
    if DEVICE == "cuda":
        pytest.skip("the oracle reads CPU tensors")
    beside = Beside(layer, "channel", window=200.0, grad_window=32.0, limit=4.0, scale="gaussian", p=1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with ops.force("triton"):
        for samples in ((3, 1), (2, 2), (1, 4)):
            for n in samples:
                x = torch.randn(n, 5, dtype=torch.float64, requires_grad=True)
                (beside(x) ** 2).sum().backward()
                beside.check_state()
            beside.check_parameter_gradients()
            optimizer.step()
            optimizer.zero_grad()
            beside.zero_expected_gradients()
            beside.oracle.commit()
            beside.check_state()


@pytest.mark.parametrize("stream", ["present", "one pass"])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_digits_of_many_elements_with_a_large_offset(layout: str, p: float, stream: str) -> None:
    """Sums about a shift lose nothing to an offset. With long-term statistics too, where these are near the data."""
    x = LAYOUTS[layout](torch.randn(6, 2, 300, 200) + 1e4).to(DEVICE)
    layer = sn.StreamingNorm2d(2, p=p, **STREAMS[stream]).to(DEVICE)
    if stream == "one pass":
        layer.long[0].fill_(1e4)
    with ops.force("triton"), torch.no_grad():
        layer(x)
    wide = x.double().transpose(0, 1).flatten(1)
    used = layer.long[0] if stream == "one pass" else layer.short[0]
    assert near(layer.short[0], wide.mean(1), 1e-7)
    assert near(layer.short[1], (wide - used.double()[:, None]).abs().pow(p).mean(1), 1e-6)


@pytest.mark.usefixtures("split")
def test_second_moments_survive_a_first_tile_that_is_not_like_the_rest() -> None:
    """A part's shift is the mean of its first tile. Where that says little, few digits are lost, not all."""
    x = torch.randn(64, 3).to(DEVICE) + 1e4
    x[:16] = 0.0
    layer = sn.StreamingNorm1d(3, p=2, **STREAMS["present"]).to(DEVICE)
    with ops.force("triton"), torch.no_grad():
        layer(x)
    wide = x.double()
    assert near(layer.short[1], (wide - layer.short[0].double()).square().mean(0), 2e-6)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("center", ["mean", "zero"])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_what_is_not_finite_stays_out_of_the_stream(p: float, center: str) -> None:
    inputs = [torch.randn(6, 3) for _ in range(2)]
    grads = [torch.randn(6, 3) for _ in range(2)]
    inputs[0][2, 0] = math.inf
    inputs[0][4, 1] = math.nan if p == 1 else 1e20
    grads[1][0, 2] = math.nan
    layer = sn.StreamingNorm1d(3, p=p, center=center)
    ours, theirs = (run(engine, copy.deepcopy(layer), inputs, grads) for engine in ("triton", "plain"))
    for i, (mine, expected) in enumerate(zip(ours, theirs)):
        assert torch.allclose(mine, expected, rtol=1e-5, atol=1e-6, equal_nan=True), f"result {i}: {mine}, {expected}"
    count = ours[2 + sn.StreamingNorm1d(3).state._fields.index("count")]
    assert count.tolist() == [0, 0, 6]


@pytest.mark.usefixtures("way")
def test_a_constant_channel_passes_finite_gradients() -> None:
    layer = sn.StreamingNorm1d(3, **STREAMS["present"]).to(DEVICE)
    x = torch.full((4, 3), 7.0, device=DEVICE, requires_grad=True)
    with ops.force("triton"):
        y = layer(x)
        y.backward(torch.randn_like(y))
    assert y.detach().abs().max() == 0
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}, {}])
def test_without_a_stream_it_is_batch_normalization(options: dict[str, bool]) -> None:
    affine, bias = options.get("affine", True), options.get("bias", True)
    ours = sn.Norm(3, sn.NormRef.batch("channel"), sn.LpMoment(2), affine=affine, bias=bias).double().to(DEVICE)
    x = torch.randn(4, 3, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    dy = torch.randn_like(x)
    with ops.force("triton"):
        y = ours(x)
    expected = torch.batch_norm(x, ours.weight, ours.bias, None, None, True, 0.1, 1e-5, False)
    assert near(y, expected, 1e-12)
    wanted = [x, *ours.parameters()]
    for mine, theirs in zip(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy)):
        assert near(mine, theirs, 1e-11)


@pytest.mark.usefixtures("way")
def test_a_loss_scale_changes_nothing_but_the_gradients() -> None:
    grads = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(3)
        layer = sn.StreamingNorm1d(3).double().to(DEVICE)
        layer._ties.grad_scale = torch.tensor(scale, device=DEVICE)
        with ops.force("triton"):
            for _ in range(2):
                x = torch.randn(4, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
                layer(x).backward(torch.randn(4, 3, dtype=torch.float64).to(DEVICE) * scale)
                assert x.grad is not None
                grads.append(x.grad / scale)
        grads.append(layer.short_grad.clone())
    for one, other in zip(grads[:3], grads[3:]):
        assert near(one, other, 1e-12)


def test_an_input_that_needs_no_gradient() -> None:
    results = []
    for engine in ("triton", "plain"):
        torch.manual_seed(0)
        layer = sn.StreamingNorm1d(3).to(DEVICE)
        with ops.force(engine):
            layer(torch.randn(4, 3).to(DEVICE)).sum().backward()
        assert layer.weight is not None
        assert layer.weight.grad is not None
        results.append([layer.weight.grad, *layer.state])
    for mine, theirs in zip(*results):
        assert near(mine, theirs, 1e-5)


def test_gains_of_other_kinds() -> None:
    """In another dtype, and with gaps."""
    layer = sn.StreamingNorm1d(4).to(DEVICE)
    layer.weight = nn.Parameter(torch.arange(1.0, 9.0, device=DEVICE)[::2].double())
    x = torch.randn(6, 4).to(DEVICE).requires_grad_()
    results = []
    for engine in ("triton", "plain"):
        layer.reset_stats()
        with ops.force(engine):
            y = layer(x)
            results.append([y, *torch.autograd.grad(y, [x, layer.weight], torch.ones_like(y))])
    for mine, theirs in zip(*results):
        assert mine.dtype == theirs.dtype
        assert near(mine, theirs, 1e-5)


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    with ops.force("triton"):
        y = sn.StreamingNorm1d(3).to(DEVICE)(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()


def test_which_inputs_it_takes() -> None:
    layer = sn.StreamingNorm2d(4)
    x = torch.randn(2, 4, 3, 3, device=DEVICE)

    def takes(x: Tensor, ref: sn.NormRef = layer.ref, mask: Tensor | None = None) -> bool:
        view = ref.view(tuple(x.shape))
        return ENGINE.takes(Call(x, None, None, mask, view, layer.formula, layer.to(DEVICE).state))

    class Special(Tensor):
        pass

    assert takes(x)
    assert takes(x, sn.NormRef.batch("layer"))
    assert not takes(x, sn.NormRef.batch("channel").ghosts(2))
    assert not takes(x, sn.NormRef.sample("layer"))
    assert not takes(x, sn.NormRef.sample("position"))
    assert not takes(x, sn.NormRef.of("n (k g) ... -> g", g=2))
    assert not takes(x, mask=torch.ones(2, dtype=torch.bool))
    assert not takes(x.as_subclass(Special))
    assert not takes(x.to("meta"))
    with torch.device(DEVICE):  # a mode, as torch.set_default_device leaves one
        assert takes(x)
        with BaseTorchFunctionMode():
            assert not takes(x)


def test_a_layer_on_another_device_is_refused() -> None:
    """Before anything changes. A kernel would read addresses of the other device."""
    layer = sn.StreamingNorm1d(3).to(DEVICE)
    layer.weight = nn.Parameter(torch.ones(3, device="meta"))
    with ops.force("triton"), pytest.raises(RuntimeError, match=r"move the layer with .to\('(cpu|cuda:0)'\)"):
        layer(torch.randn(4, 3).to(DEVICE))
    assert layer.samples == 0


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_saved_tensors_may_come_back_in_another_layout(layout: str) -> None:
    """Hooks such as torch's save_on_cpu do not keep the strides of what autograd saves."""
    x, dy = (LAYOUTS[layout](torch.randn(4, 3, 5, 2)).to(DEVICE) for _ in range(2))
    other = LAYOUTS["channels_last" if layout == "contiguous" else "contiguous"]
    results = []
    for pack in (lambda t: t, lambda t: other(t) if t.dim() == 4 else t):
        layer, own = sn.StreamingNorm2d(3).to(DEVICE), x.clone().requires_grad_()
        with ops.force("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(own)
        results.append([*torch.autograd.grad(y, [own, *layer.parameters()], dy), *layer.state])
    for one, another in zip(*results):
        assert near(another, one, 1e-5)


def test_how_many_kernels_a_step_takes(split: str, launched: list[str]) -> None:
    def kernels(p: float, stream: str) -> list[str]:
        launched.clear()
        layer = sn.StreamingNorm1d(3, p=p, **STREAMS[stream]).to(DEVICE)
        with ops.force("triton"):
            layer(torch.randn(9, 3).to(DEVICE).requires_grad_()).sum().backward()
        return list(launched)

    back = ["collect_gradients", "combine_gradients", "input_gradient"]
    assert kernels(2, "window") == ["collect_location", "combine_statistics", "output", *back]
    assert kernels(1, "window") == [
        *("collect_location", "combine_statistics", "collect_moment", "combine_statistics", "output"),
        *back,
    ]
    assert kernels(1, "one pass") == ["output", "combine_statistics", "collect_gradients", "combine_gradients"]


def test_a_small_step_takes_one_kernel_each_way(launched: list[str]) -> None:
    layer = sn.StreamingNorm1d(3).to(DEVICE)
    with ops.force("triton"):
        layer(torch.randn(9, 3).to(DEVICE).requires_grad_()).sum().backward()
    assert launched == ["forward_whole", "backward_whole"]


def test_one_kernel_commits_all_layers(launched: list[str]) -> None:
    models = []
    for engine in ("triton", "plain"):
        torch.manual_seed(0)
        kinds: list[dict[str, Any]] = [{}, {"window": 7}, {"kappa": (0.9, 0.2, 0.8, 0.1)}]
        layers = [sn.StreamingNorm1d(size, **options) for size, options in zip((3, 1, 70), kinds)]
        layers.append(sn.StreamingNorm1d(2, dtype=torch.float64))
        model = nn.ModuleList([*layers, sn.StreamingNorm1d(5)]).to(DEVICE)
        with ops.force("plain"):
            for layer in layers:  # the last one of the model is not used
                x = torch.randn(4, layer.num_features, dtype=layer.long.dtype).to(DEVICE).requires_grad_()
                (layer(x) ** 3).sum().backward()
        layers[0].count[1] = 0
        with ops.force(engine):
            sn.commit(model)
        models.append(model)
    assert launched == ["commit_streams", "commit_streams"]  # one for each dtype
    for mine, theirs in zip(models[0].buffers(), models[1].buffers()):
        assert near(mine, theirs, 1e-12 if mine.dtype == torch.float64 else 1e-6)


def test_a_graph_keeps_what_its_commit_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of layers on the device, which would be freed else when many others have committed since."""
    layer, other = sn.StreamingNorm1d(3).to(DEVICE), sn.StreamingNorm1d(2).to(DEVICE)
    with ops.force("triton"):
        ops.commit([(layer.state, layer.formula)])
        table = weakref.ref(commit._table((commit._row((layer.state, layer.formula)),), layer.long.device)[0])
        monkeypatch.setattr(commit, "_captured", {})
        monkeypatch.setattr(device, "is_capturing", lambda: True)
        ops.commit([(layer.state, layer.formula)])
        with pytest.raises(RuntimeError, match="run a few whole training steps first"):
            ops.commit([(other.state, other.formula)])
    commit._table.cache_clear()
    assert table() is not None
    commit._captured.clear()
    assert table() is None


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_is_read_back_from_the_device(nothing_is_read_back: Callable[[Callable[[], None]], None]) -> None:
    """Reading a value would wait for the device. On the CPU: nobody asks a tensor for one."""
    layers: list[nn.Module] = [sn.StreamingNorm1d(3, p=1), sn.StreamingNorm1d(3, p=2, **STREAMS["one pass"])]
    network = sn.GRU(3, 2).to(DEVICE)
    for layer in layers:
        layer.to(DEVICE)

    def step() -> None:
        for layer in layers:
            x = torch.randn(4, 3, device=DEVICE, requires_grad=True)
            layer(x).sum().backward()
        network(torch.randn(2, 2, 3, device=DEVICE))[0].sum().backward()
        for module in (*layers, network):
            sn.commit(module)

    with ops.force("triton"):
        step()
        nothing_is_read_back(step)


def test_the_pytorch_engine_reads_nothing_back_either() -> None:
    """Tensors without values stand in for those of a device: whoever reads one raises."""
    for options in (*STREAMS.values(), {"ref": "layer", "p": 3}):
        layer = sn.StreamingNorm2d(4, device="meta", **options)
        mask = torch.ones(2, dtype=torch.bool, device="meta")
        for m in (None, mask):
            x = torch.randn(2, 4, 3, 3, device="meta", requires_grad=True)
            layer(x, m).sum().backward()
        sn.commit(layer)


def test_statistics_of_a_call_are_given_out() -> None:
    layer = sn.StreamingNorm1d(3).to(DEVICE)
    x = torch.randn(5, 3).to(DEVICE)
    stats = torch.empty(2, 3, device=DEVICE)
    view = layer.ref.view((5, 3))
    formula = layer.formula._replace(alpha=(0.0, 0.0, 1.0), window=None)
    ENGINE.normalize(Call(x, None, None, None, view, formula, layer.state, stats=stats))
    assert near(stats, torch.stack((x.mean(0), (x - x.mean(0)).abs().mean(0))), 1e-6)


def test_why_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    device.missing.cache_clear()
    monkeypatch.setattr(device, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    try:
        assert "finds no CUDA device; GPU tensors take the PyTorch engine" in ENGINE.status()
        device.missing.cache_clear()
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "Triton is not installed" in ops.engines()["triton"]
        view, formula = sn.NormRef.batch("channel").view((2, 3)), sn.StreamingNorm1d(3).formula
        assert not ENGINE.takes(Call(torch.randn(2, 3), None, None, None, view, formula))
    finally:
        device.missing.cache_clear()


def test_every_kernel_compiles() -> None:
    """For a Hopper GPU, which need not be here, with the arguments of real launches."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = {line.split()[0] for line in done.stdout.splitlines()}
    assert {"forward_whole", "backward_whole", "output", "input_gradient", "commit_streams"} <= kernels
    assert {"forward_step", "backward_step"} <= kernels


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("engine", ["triton", "torch"])
@pytest.mark.parametrize("stream", ["window", "one pass"])
def test_a_captured_training_step_gives_what_eager_gives(
    engine: str, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole step is in the graph, the commit after the optimizer's step included."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        options = STREAMS[stream]
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), sn.StreamingNorm2d(8, **options), nn.ReLU(), nn.Conv2d(8, 4, 3), sn.StreamingNorm2d(4)
        ).to(DEVICE)
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        optimizer.zero_grad(set_to_none=False)
        for part in x.chunk(2):  # two mini-batches for an update
            model(part).square().mean().backward()
        optimizer.step()

    inputs = [torch.randn(8, 3, 12, 12, device=DEVICE) for _ in range(6)]
    results = []
    # What is compared are the layers: convolutions that add in any order differ by themselves.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with ops.force(engine):
        for captured in (False, True):
            model, optimizer = build()
            static = inputs[0].clone()
            stream_of_warm_up = torch.cuda.Stream()
            stream_of_warm_up.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream_of_warm_up):
                for x in inputs[:3]:  # compiles the kernels, and uploads what the commit reads
                    static.copy_(x)
                    step(model, optimizer, static)
            torch.cuda.current_stream().wait_stream(stream_of_warm_up)
            if captured:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step(model, optimizer, static)
                for x in inputs[3:]:
                    static.copy_(x)
                    graph.replay()
            else:
                for x in inputs[3:]:
                    step(model, optimizer, x)
            results.append([t.clone() for t in (*model.parameters(), *model.buffers())])
    for mine, theirs in zip(*results):
        assert near(mine, theirs, 1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.usefixtures("way")
def test_a_device_that_is_not_the_current_one() -> None:
    """Kernels run where the tensors are: forward, backward on autograd's thread, and the commit."""
    results = []
    x, dy = torch.randn(2, 6, 3)
    for place in ("cuda:0", "cuda:1"):
        layer, own = sn.StreamingNorm1d(3).to(place), x.to(place).requires_grad_()
        with ops.force("triton"):
            layer(own).backward(dy.to(place))
            before = [buffer.clone() for buffer in layer.state]
            sn.commit(layer)
        assert own.grad is not None
        results.append([t.cpu() for t in (own.grad, *before, *layer.state)])
    for one, other in zip(*results):
        assert near(other, one, 1e-6)


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_more_elements_than_32_bits_count() -> None:
    """The last channel, which ends behind element 2^31, beside that channel alone. One test: it takes much memory."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free memory")
    shapes: list[tuple[int, ...]] = [(2, 64, (1 << 24) + 64), ((1 << 25) + 3, 64), (1, 1, (1 << 31) + 8)]
    for shape in shapes:
        for stream in ("present", "one pass"):
            x, dy = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
            whole = _last_channel(x, dy, stream)
            # A single channel has as many elements: its places become those of two samples.
            x, dy = (t.view(2, 1, -1) if shape[1] == 1 else t[:, -1:].contiguous() for t in (x, dy))
            for one, other in zip(whole, _last_channel(x, dy, stream)):
                assert near(one, other, 1e-2 if one.dtype == torch.bfloat16 else 1e-4), (shape, stream)


def _last_channel(x: Tensor, dy: Tensor, stream: str) -> list[Tensor]:
    """The last 30 values of output and input gradient, and the state."""
    layer = sn.StreamingNorm1d(x.shape[1], p=2, **STREAMS[stream]).to(DEVICE)
    x = x.detach().requires_grad_()
    with ops.force("triton"):
        y = layer(x)
        y.backward(dy)
    assert x.grad is not None
    ends = [t.detach()[-1, -1].flatten()[-30:].clone() for t in (y, x.grad)]
    return [*ends, *(buffer[..., -1] for buffer in (layer.short, layer.short_grad, layer.count))]


def test_recurrent_layers_take_these_kernels(launched: list[str]) -> None:
    """Those that the engine for whole sequences leaves alone (``tests/recurrent/engines/test_gpu.py``)."""
    results = []
    for engine in ("triton", "torch"):
        torch.manual_seed(0)
        network = sn.LSTM(3, 4, norm_cell=True).double().to(DEVICE)
        x = torch.randn(2, 3, 3, dtype=torch.float64).to(DEVICE).requires_grad_()
        with ops.force(engine):
            output = network(x)[0]
            gradients = torch.autograd.grad(output.square().sum(), [x, *network.parameters()])
        results.append([output, *gradients, *network.buffers()])
    assert launched == ["forward_whole"] * 6 + ["backward_whole"] * 6  # two paths and the cell, two steps
    for mine, theirs in zip(*results):
        assert near(mine, theirs, 1e-11)
