"""The whole-sequence engine on GPUs against the plain loop over the steps, in Triton's interpreter where there is none.

``tests/ops/test_triton.py`` compiles these kernels too, for a GPU that need not be there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint

import streamnorm as sn
from streamnorm import ops
from streamnorm.ops.gpu import ENGINE, device
from streamnorm.recurrent.engines import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(ENGINE.status().startswith("not available"), reason=ENGINE.status()),
    # NumPy, by which the interpreter computes, warns of what is not finite.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    *([pytest.mark.cuda] if DEVICE == "cuda" else []),
]

NETWORKS: dict[str, Callable[..., Any]] = {
    "RNN": sn.RNN,
    "RNN, relu": partial(sn.RNN, nonlinearity="relu"),
    "GRU": sn.GRU,
    "LSTM": sn.LSTM,
}
STREAMS: dict[str, dict[str, Any]] = {
    "paper": {},
    "window": {"window": 30},
    "all three": {"alpha": (0.5, 0.3, 0.2), "beta": (0.6, 0.1, 0.3), "kappa": (0.7, 0.3, 0.6, 0.4)},
}
WIDE = torch.float64


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched, those of the other layers among them."""
    names: list[str] = []
    for module, function in ((gpu, "_launch"), (device, "launch")):
        monkeypatch.setattr(module, function, partial(_noted, names, getattr(module, function)))
    return names


def _noted(names: list[str], launch: Callable[..., None], name: str, *arguments: Any) -> None:
    names.append(name)
    launch(name, *arguments)


@pytest.fixture
def small_programs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Several programs for a layer, and several tiles for the sequences of a step."""
    monkeypatch.setattr(gpu, "MOST_UNITS", 2)
    monkeypatch.setattr(gpu, "MOST_ROWS", 2)
    gpu._cut.cache_clear()
    yield
    gpu._cut.cache_clear()


def train(name: str, model: Any, batches: list[list[Any]], hidden: Any = None) -> dict[str, Tensor]:
    """Updates of several mini-batches each: everything that comes out of it, by name."""
    model = copy.deepcopy(model).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    found: dict[str, Tensor] = {}
    with ops.force(name):
        for update, group in enumerate(batches):
            for number, batch in enumerate(group):
                x = _to_leaf(batch)
                h = None if hidden is None else _each(hidden, _leaf)
                output, final = model(x, h)
                parts = [_data(output), *_list(final)]
                torch.stack([(part.sin() * (1 + part)).sum() for part in parts]).sum().backward()
                values: list[Any] = [*parts, *(t.grad for t in (_data(x), *_list(h)))]
                found.update({f"{update}.{number}.{i}": value.detach() for i, value in enumerate(values)})
            for key, parameter in model.named_parameters():
                found[f"{update} gradient of {key}"] = parameter.grad.clone()
            found.update({f"{update} {key}": value.clone() for key, value in model.state_dict().items()})
            optimizer.step()
            optimizer.zero_grad()
        found.update({key: value.clone() for key, value in model.state_dict().items()})
    return found


def _leaf(t: Tensor) -> Tensor:
    return t.detach().clone().to(DEVICE).requires_grad_()


def _to_leaf(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return _leaf(batch)
    moved = batch.to(DEVICE)
    return moved._replace(data=_leaf(moved.data))


def _data(x: Any) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


def _list(hidden: Any) -> list[Tensor]:
    return [] if hidden is None else list(hidden) if isinstance(hidden, tuple) else [hidden]


def _each(hidden: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    return tuple(map(fn, hidden)) if isinstance(hidden, tuple) else fn(hidden)


def assert_same(model: Any, batches: list[list[Any]], hidden: Any = None, tolerance: float = 1e-11) -> None:
    """‖a − b‖ ≤ tolerance·‖b‖ for everything."""
    ours, theirs = (train(name, model, batches, hidden) for name in ("triton", "plain"))
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        off, size = (ours[key] - expected).double().norm(), expected.double().norm()
        assert size.isfinite(), key
        assert off <= tolerance * (size + 1e-3), f"{key}: off by {off:.1e} of {size:.1e}"


def updates(*shapes: tuple[int, int], dtype: torch.dtype = WIDE) -> list[list[Tensor]]:
    """Two updates of a mini-batch of each shape."""
    return [[torch.randn(*shape, 3, dtype=dtype) for shape in shapes] for _ in range(2)]


@pytest.mark.parametrize(
    ("network", "stream", "options"),
    [
        ("GRU", "paper", {"p": 1}),
        ("GRU", "window", {"p": 2}),
        ("LSTM", "window", {"p": 1}),
        ("LSTM", "all three", {"p": 3, "center": "zero", "scale": "gaussian"}),
        ("RNN", "window", {"p": 1.5, "scale": "gaussian"}),
        ("RNN, relu", "all three", {"p": 2}),
    ],
)
def test_as_the_loop(network: str, stream: str, options: dict[str, Any], launched: list[str]) -> None:
    """B/U = 2, two updates, mini-batches of changing size; one kernel for each step and direction."""
    model = NETWORKS[network](3, 5, gain=0.5, dtype=WIDE, **STREAMS[stream], **options)
    assert_same(model, updates((3, 3), (2, 4)))
    assert set(launched) == {"forward_step", "backward_step", "commit_streams"}
    assert launched.count("forward_step") == launched.count("backward_step") == 10


@pytest.mark.usefixtures("small_programs")
@pytest.mark.parametrize(
    ("network", "stream", "options"),
    [("GRU", "window", {"p": 1}), ("LSTM", "paper", {"p": 2, "center": "zero"}), ("RNN", "all three", {"p": 1})],
)
def test_several_programs_and_tiles(network: str, stream: str, options: dict[str, Any]) -> None:
    """Three units are two programs, five rows three tiles, of which the last one is not full."""
    model = NETWORKS[network](3, 3, gain=0.5, dtype=WIDE, **STREAMS[stream], **options)
    assert_same(model, [[torch.randn(2, 5, 3, dtype=WIDE), torch.randn(2, 2, 3, dtype=WIDE)]])


@pytest.mark.parametrize("network", ["GRU", "LSTM"])
def test_float32(network: str) -> None:
    assert_same(NETWORKS[network](3, 5, window=30), [[torch.randn(3, 4, 3)]], tolerance=1e-5)


@pytest.mark.parametrize(("network", "stream"), [("GRU", "window"), ("LSTM", "paper"), ("RNN", "window")])
def test_packed_sequences_and_initial_states(network: str, stream: str) -> None:
    """Both directions; sequences end one after the other, out of order."""
    model = NETWORKS[network](3, 4, bidirectional=True, dtype=WIDE, **STREAMS[stream])
    packed = pack_sequence([torch.randn(n, 3, dtype=WIDE) for n in (2, 3, 1, 3)], enforce_sorted=False)
    hidden: Any = torch.randn(2, 4, 4, dtype=WIDE)
    assert_same(model, [[packed]], (hidden, torch.randn(2, 4, 4, dtype=WIDE)) if network == "LSTM" else hidden)


def test_layers_on_top_of_each_other_without_bias() -> None:
    assert_same(sn.GRU(3, 3, num_layers=2, bias=False, dtype=WIDE), [[torch.randn(2, 3, 3, dtype=WIDE)]])


@pytest.mark.parametrize("path", ["ih", "hh"])
def test_a_path_without_norm(path: str, launched: list[str]) -> None:
    model = sn.GRU(3, 4, dtype=WIDE, window=30)
    delattr(model, f"norm_{path}_l0")
    assert_same(model, [[torch.randn(3, 3, 3, dtype=WIDE)]])
    assert "forward_step" in launched


def test_one_sequence_of_one_unit() -> None:
    assert_same(sn.LSTM(3, 1, dtype=WIDE, window=30), [[torch.randn(3, 1, 3, dtype=WIDE)]])


def test_gains_are_left_out() -> None:
    """A factory's norms without a gain."""
    factory = partial(sn.StreamingNorm1d, affine=False, dtype=WIDE)
    assert_same(sn.GRU(3, 4, norm=factory, dtype=WIDE), [[torch.randn(2, 3, 3, dtype=WIDE)]])


def test_both_paths_have_constants_of_their_own() -> None:
    model: Any = sn.GRU(3, 4, dtype=WIDE)
    model.norm_hh_l0 = sn.StreamingNorm1d(12, p=2, center="zero", window=20, bias=False, dtype=WIDE)
    assert_same(model, updates((2, 3)))


@pytest.mark.parametrize("wanted", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0", "norm_ih_l0.gain", "x", "h"])
def test_what_wants_a_gradient(wanted: str) -> None:
    """It gets its own, and streams advance where gradients pass."""
    model, x = sn.GRU(3, 4, dtype=WIDE, window=30), torch.randn(2, 3, 3, dtype=WIDE)
    results = []
    for name in ("triton", "plain"):
        twin = copy.deepcopy(model).to(DEVICE)
        for key, parameter in twin.named_parameters():
            parameter.requires_grad_(key == wanted)
        own_x = x.to(DEVICE, copy=True).requires_grad_(wanted == "x")
        h = torch.ones(1, 3, 4, dtype=WIDE, device=DEVICE, requires_grad=wanted == "h")
        with ops.force(name):
            twin(own_x, h)[0].square().sum().backward()
        results.append([*(leaf.grad for leaf in (own_x, h, *twin.parameters())), *twin.state_dict().values()])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kept", [False, True])
def test_memory_of_the_last_backward(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It puts gradients where the products were; with ``retain_graph`` they get room, and another one can follow."""
    places: list[bool] = []
    launch = gpu._launch

    def seen(name: str, cut: gpu.Cut, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        if name == "backward_step":
            paths, into = arguments[:2], arguments[2:4]
            places.extend(i.dx.data_ptr() == p.products.data_ptr() for p, i in zip(paths, into))
        launch(name, cut, arguments, constants)

    monkeypatch.setattr(gpu, "_launch", seen)
    model = sn.GRU(3, 4, dtype=WIDE).to(DEVICE)
    twin = copy.deepcopy(model)
    x = torch.randn(3, 2, 3, dtype=WIDE, device=DEVICE)
    with ops.force("triton"):
        loss = model(x)[0].square().sum()
        for again in [True] * kept + [False]:
            loss.backward(retain_graph=again)
            assert places == [not again] * 6
            places.clear()
    with ops.force("plain"):
        loss = twin(x)[0].square().sum()
        for again in [True] * kept + [False]:
            loss.backward(retain_graph=again)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), twin.named_parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-13, msg=name)


@pytest.mark.parametrize("wanted", ["final", "cell"])
def test_where_the_gradient_comes_from(wanted: str) -> None:
    model, x = sn.LSTM(3, 4, dtype=WIDE), torch.randn(2, 3, 3, dtype=WIDE)
    results = []
    for name in ("triton", "plain"):
        twin = copy.deepcopy(model).to(DEVICE)
        with ops.force(name):
            _, (h, c) = twin(x.to(DEVICE))
            (h if wanted == "final" else c).sum().backward()
        results.append([*(parameter.grad for parameter in twin.parameters()), *twin.state_dict().values()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_what_is_not_finite_stays_out_of_the_streams() -> None:
    """At the last step; the gradients of all steps are not finite then."""
    model, x = sn.GRU(3, 4, p=3, window=30), torch.randn(3, 4, 3)
    x[2, 1] = torch.tensor([1e20, -1e20, 1e20])
    results = []
    for name in ("triton", "plain"):
        twin: Any = copy.deepcopy(model).to(DEVICE)
        with ops.force(name):
            own_x = _leaf(x)
            output = twin(own_x)[0]
            output.square().sum().backward()
        results.append([output, own_x.grad, *(p.grad for p in twin.parameters()), *twin.state_dict().values()])
        assert twin.norm_ih_l0.count.tolist() == [8] * 12
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_loss_scale_changes_nothing_but_the_gradients() -> None:
    model, x = sn.GRU(3, 4, dtype=WIDE), torch.randn(2, 3, 3, dtype=WIDE).to(DEVICE)
    results = []
    for scale in (1.0, 1024.0):
        twin: Any = copy.deepcopy(model).to(DEVICE)
        for norm in (twin.norm_ih_l0, twin.norm_hh_l0):
            norm._ties.grad_scale = torch.tensor(scale, device=DEVICE)
        with ops.force("triton"):
            (twin(x)[0].square().sum() * scale).backward()
        results.append([*(p.grad / scale for p in twin.parameters()), *twin.state_dict().values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_backward_twice_and_second_derivatives() -> None:
    model: Any = sn.GRU(3, 4, dtype=WIDE).to(DEVICE)
    x = torch.randn(2, 3, 3, dtype=WIDE).to(DEVICE).requires_grad_()
    with ops.force("triton"):
        loss = model(x)[0].square().sum()
        loss.backward(retain_graph=True)
        assert model.norm_hh_l0.grad_samples == 6
        loss.backward()
        assert model.norm_hh_l0.grad_samples == 6  # once for each use in a graph
        (gradient,) = torch.autograd.grad(model(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


def test_backward_belongs_to_its_forward() -> None:
    """Whatever happened in between: another use, a commit, other constants."""
    model: Any = sn.GRU(3, 4, dtype=WIDE, window=30)
    first, second = torch.randn(2, 2, 3, 3, dtype=WIDE).to(DEVICE)
    results = []
    for name in ("triton", "plain"):
        twin = copy.deepcopy(model).to(DEVICE)
        with ops.force(name):
            loss = twin(first)[0].square().sum()
            twin(second)
            sn.commit(twin)
            for norm in (twin.norm_ih_l0, twin.norm_hh_l0):
                norm.set_stream(sn.Stream(window=5))
            loss.backward()
        results.append([*(parameter.grad for parameter in twin.parameters()), *twin.state_dict().values()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_checkpointing_changes_nothing() -> None:
    model: Any = sn.GRU(3, 4, dtype=WIDE, window=30)
    x = torch.randn(2, 3, 3, dtype=WIDE)
    results = []
    for region in (False, True):
        twin, own_x = copy.deepcopy(model).to(DEVICE), _leaf(x)
        with ops.force("triton"):
            if region:
                output, _ = checkpoint(twin, own_x, use_reentrant=False, context_fn=sn.checkpoint_context_fn)
            else:
                output, _ = twin(own_x)
            output.square().sum().backward()
        results.append([own_x.grad, *(p.grad for p in twin.parameters()), *twin.state_dict().values()])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_without_a_gradient() -> None:
    """A training forward under no_grad moves the forward part of the state only."""
    results = []
    model = sn.LSTM(3, 4, dtype=WIDE)
    x = torch.randn(2, 3, 3, dtype=WIDE).to(DEVICE)
    for name in ("triton", "plain"):
        twin = copy.deepcopy(model).to(DEVICE)
        with ops.force(name), torch.no_grad():
            results.append([*twin(x)[1], *twin.state_dict().values()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "make",
    [
        partial(sn.GRU, reset_after=False),
        partial(sn.LSTM, norm_cell=True),
        partial(sn.LSTM, proj_size=2),
        partial(sn.GRU, norm="batch"),
        partial(sn.GRU, norm="layer"),
        partial(sn.GRU, norm=partial(sn.StreamingNorm1d, ref="layer", bias=False)),
    ],
)
def test_what_is_left_to_the_steps_in_pytorch(make: Callable[..., Any], launched: list[str]) -> None:
    with ops.force("triton"):
        make(3, 4).to(DEVICE)(torch.randn(1, 3, 3).to(DEVICE))
    assert "forward_step" not in launched


def test_other_engines_are_left_alone(launched: list[str]) -> None:
    """Interpreted kernels run where they are asked for; those of a GPU also where nobody forces an engine."""
    model, x = sn.GRU(3, 4).to(DEVICE), torch.randn(1, 3, 3).to(DEVICE)
    with ops.force("torch"):
        model(x)
    assert launched == []
    with ops.force("native"):
        model(x)
    assert launched == (["forward_step"] if DEVICE == "cuda" else [])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_is_read_back_from_the_device(nothing_is_read_back: Callable[[Callable[[], None]], None]) -> None:
    """Reading a value would wait for the device, which no graph can hold. On the CPU: nobody asks a tensor for one."""
    model = sn.GRU(3, 4, window=30).to(DEVICE)
    x = torch.randn(2, 3, 3, device=DEVICE)

    def step() -> None:
        model(x)[0].sum().backward()
        sn.commit(model)

    with ops.force("triton"):
        step()
        nothing_is_read_back(step)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_tanh_keeps_its_digits(dtype: torch.dtype, tolerance: float, launched: list[str]) -> None:
    """Relative to each value, small ones too. The hidden path brings nothing at the first step."""
    exponents = torch.linspace(-6, 1.5, 61, dtype=dtype)
    x = torch.cat((-(10**exponents), 10**exponents))
    model: Any = sn.RNN(1, len(x), bias=False, dtype=dtype)
    del model.norm_ih_l0
    with torch.no_grad():
        model.weight_ih_l0.copy_(x[:, None])
        model.to(DEVICE)
        with ops.force("triton"):
            y = model(torch.ones(1, 1, 1, dtype=dtype, device=DEVICE))[0]
    assert launched == ["forward_step"]
    torch.testing.assert_close(y.flatten().cpu(), x.double().tanh().to(dtype), rtol=tolerance, atol=0)


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("stream", ["paper", "window"])
@pytest.mark.parametrize("network", ["GRU", "LSTM"])
def test_a_captured_training_step_gives_what_eager_gives(network: str, stream: str) -> None:
    """The whole step is in the graph: two mini-batches, the update, and the commit that follows it."""

    def step(model: Any, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        optimizer.zero_grad(set_to_none=False)
        for part in x.chunk(2, 1):
            model(part)[0].square().mean().backward()
        optimizer.step()

    inputs = [torch.randn(7, 8, 3, device=DEVICE) for _ in range(6)]
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = NETWORKS[network](3, 20, bidirectional=True, **STREAMS[stream]).to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        static = inputs[0].clone()
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            for x in inputs[:3]:  # compiles the kernels, and uploads what the commit reads
                static.copy_(x)
                step(model, optimizer, static)
        torch.cuda.current_stream().wait_stream(warm_up)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step(model, optimizer, static)
        for x in inputs[3:]:
            if captured:
                static.copy_(x)
                graph.replay()
            else:
                step(model, optimizer, x)
        results.append([t.clone() for t in (*model.parameters(), *model.buffers())])
    for replayed, eager in zip(*reversed(results)):
        torch.testing.assert_close(replayed, eager, rtol=1e-5, atol=1e-6)
    assert all(math.isfinite(t.double().sum()) for t in results[0])


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE != "cuda", reason="the interpreter is slow")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 128), (32, 96), (150, 300)])
def test_sizes_of_real_layers(network: str, rows: int, hidden: int) -> None:
    """Several warps in a program, and every kind of tile."""
    model = NETWORKS[network](3, hidden, gain=0.5, window=1000, dtype=WIDE)
    assert_same(model, updates((6, rows)), tolerance=1e-9)
