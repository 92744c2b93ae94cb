"""The whole-sequence engines against the plain loop over the steps: outputs, gradients and all state."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import streamnorm as sn
from streamnorm import ops
from streamnorm.recurrent.engines import cpu, loop

RNN: Callable[..., Any] = sn.RNN
GRU: Callable[..., Any] = sn.GRU
LSTM: Callable[..., Any] = sn.LSTM
NETWORKS: dict[str, Callable[..., Any]] = {
    "RNN": RNN,
    "RNN, relu": partial(RNN, nonlinearity="relu"),
    "GRU": GRU,
    "GRU, reset before": partial(GRU, reset_after=False),
    "LSTM": LSTM,
    "LSTM, cell": partial(LSTM, norm_cell=True),
    "LSTM, projected": partial(LSTM, proj_size=3, norm_cell=True),
}
NORMS: dict[str, dict[str, Any]] = {
    "streaming": {"alpha": (0.5, 0.3, 0.2), "beta": (0.6, 0.1, 0.3), "kappa": (0.7, 0.3, 0.6, 0.4)},
    "streaming, default": {},
    "streaming, window": {"window": 30},
    "streaming, zero": {"center": "zero", "scale": "gaussian"},
    "batch": {"norm": "batch"},
    "batch-per-step": {"norm": "batch-per-step", "max_steps": 4},
    "layer": {"norm": "layer"},
}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
# Triton's engine, which is interpreted here, has its recurrent tests in tests/ops/test_triton.py.
ENGINES = [engine.name for engine in ops.ENGINES if engine.name not in ("plain", "triton")]


@pytest.fixture(autouse=True)
def _only_the_reference_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine must not leave its work to the loop."""
    run = loop.run

    def checked(*args: Any) -> Any:
        assert not ops.is_active("torch"), "this ran on the loop"
        return run(*args)

    monkeypatch.setattr(loop, "run", checked)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def train(
    model: Any, batches: list[list[Any]], engine: str, hidden: Any = None, use_final: bool = True
) -> dict[str, Tensor]:
    """Updates of several mini-batches each: everything that comes out of it, by name."""
    found: dict[str, Any] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
    with ops.force(engine):
        for update, group in enumerate(batches):
            for number, batch in enumerate(group):
                torch.manual_seed(update)
                x = _leaf(batch)
                h = None if hidden is None else _map(hidden, lambda t: t.clone().requires_grad_())
                output, final = model(x, h)
                parts = [_data(output), *(_list(final) if use_final else [])]
                loss = torch.stack([(part * torch.randn_like(part)).sum() for part in parts]).sum()
                loss.backward()
                leaves = {"x": _data(x), **{f"h{i}": t for i, t in enumerate(_list(h))}}
                values: dict[str, Any] = {f"output{i}": part for i, part in enumerate(parts)}
                values.update({f"gradient of {name}": t.grad for name, t in leaves.items()})
                found.update({f"{name} {update}.{number}": value.detach() for name, value in values.items()})
            for name, parameter in model.named_parameters():
                found[f"gradient of {name} {update}"] = parameter.grad.clone()
            found.update({f"{name} {update}": value.clone() for name, value in model.state_dict().items()})
            optimizer.step()
            optimizer.zero_grad()
    return found


def assert_same(model: Any, batches: list[list[Any]], **options: Any) -> None:
    """‖a − b‖ ≤ tolerance·‖b‖ for everything, on every engine."""
    loops = train(copy.deepcopy(model), batches, "plain", **options)
    for engine in ENGINES:
        ours = train(copy.deepcopy(model), batches, engine, **options)
        assert ours.keys() == loops.keys()
        for name, expected in loops.items():
            off, size = (ours[name] - expected).double().norm(), expected.double().norm()
            tolerance = TOLERANCE.get(expected.dtype, 0.0)
            assert size.isfinite(), name
            assert off <= tolerance * (size + 1e-3), f"{engine}: {name}: off by {off:.1e} of {size:.1e}"


def batches_of(dtype: torch.dtype, *shapes: tuple[int, int]) -> list[list[Tensor]]:
    """Three updates of two mini-batches."""
    return [[torch.randn(steps, rows, 3, dtype=dtype) for steps, rows in shapes] for _ in range(3)]


def _leaf(batch: Any) -> Any:
    if isinstance(batch, PackedSequence):
        return batch._replace(data=batch.data.clone().requires_grad_())
    return batch.clone().requires_grad_()


def _data(x: Any) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


def _list(hidden: Any) -> list[Tensor]:
    return [] if hidden is None else list(hidden) if isinstance(hidden, tuple) else [hidden]


def _map(hidden: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    return tuple(map(fn, hidden)) if isinstance(hidden, tuple) else fn(hidden)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", ["RNN", "GRU", "GRU, reset before", "LSTM", "LSTM, cell"])
def test_everything_at_once(network: str, norm: str, p: int, dtype: torch.dtype) -> None:
    """Two layers, both directions, dropout between them, B/U = 2, three updates."""
    options = {"num_layers": 2, "bidirectional": True, "dropout": 0.3, "p": p, "dtype": dtype, **NORMS[norm]}
    assert_same(NETWORKS[network](3, 8, gain=0.2, **options), batches_of(dtype, (3, 12), (2, 10)))


@pytest.mark.parametrize("norm", ["streaming", "streaming, window", "batch", "batch-per-step", "layer"])
@pytest.mark.parametrize("network", NETWORKS)
def test_packed_sequences_and_initial_states(network: str, norm: str) -> None:
    model = NETWORKS[network](3, 5, gain=0.2, bidirectional=True, dtype=torch.float64, **NORMS[norm])
    lengths = [(4, 2, 4, 4, 3, 4), (1, 3, 3, 3, 2, 3)]  # batch statistics of fewer than four are hardly differentiable
    batches = [
        [pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in ns], enforce_sorted=False) for ns in lengths]
        for _ in range(3)
    ]
    width = 3 if "projected" in network else 5
    hidden: Any = torch.randn(2, 6, width, dtype=torch.float64)
    if "LSTM" in network:
        hidden = (hidden, torch.randn(2, 6, 5, dtype=torch.float64))
    assert_same(model, batches, hidden=hidden)


@pytest.mark.parametrize("norm", ["streaming", "streaming, window", "layer"])
@pytest.mark.parametrize("network", NETWORKS)
def test_one_sequence(network: str, norm: str) -> None:
    model = NETWORKS[network](3, 5, dtype=torch.float64, **NORMS[norm])
    assert_same(model, batches_of(torch.float64, (6, 1), (1, 1)))


@pytest.mark.parametrize("norm", ["streaming", "streaming, window", "streaming, zero", "batch", "layer"])
@pytest.mark.parametrize("p", [1, 2])
def test_many_steps_of_few_sequences(p: int, norm: str) -> None:
    """What is not kept of the statistics is found again in the backward: 2 whole blocks of steps, and some more."""
    options: dict[str, Any] = {"p": p, "gain": 0.2, "dtype": torch.float64, **NORMS[norm]}
    batches: list[list[Any]] = [[torch.randn(37, 4, 3, dtype=torch.float64) for _ in range(2)]]
    for model in (sn.GRU(3, 9, **options), sn.RNN(3, 9, **options)):
        assert_same(model, batches)
    lengths = (37, 37, 37, 20) if norm == "batch" else (37, 36, 33, 20)
    packed = pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in lengths])
    assert_same(sn.LSTM(3, 9, **options), [[packed]])


def test_statistics_that_move_before_the_backward(engine: str) -> None:
    """Backward belongs to the statistics of its forward, whatever happened in between."""
    results = []
    model: Any = sn.GRU(3, 5, dtype=torch.float64, window=30)
    first, second = torch.randn(2, 40, 1, 3, dtype=torch.float64)
    for name in (engine, "plain"):
        twin = copy.deepcopy(model)
        x = first.clone().requires_grad_()
        with ops.force(name):
            loss = twin(x)[0].square().sum()
            twin(second)
            sn.commit(twin)
            loss.backward()  # once: in a second pass the loop hands nothing on between steps (test_another_pass.py)
        results.append([x.grad, *(parameter.grad for parameter in twin.parameters()), *twin.state_dict().values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [2, 3, 5, 13, 70])
@pytest.mark.parametrize("hidden", [1, 37])
def test_all_sizes_of_matrix_products(hidden: int, rows: int, dtype: torch.dtype) -> None:
    """Few rows, packed weights, a product for each step; whole registers of hidden units, some more, and one."""
    for model in (sn.GRU(3, hidden, gain=0.2, dtype=dtype), sn.LSTM(40, hidden, gain=0.2, dtype=dtype)):
        batches = [[torch.randn(5, rows, model.input_size, dtype=dtype)]]
        assert_same(model, batches)


@pytest.mark.parametrize("norm", ["streaming", "streaming, window", "batch", "layer"])
@pytest.mark.parametrize("network", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("hidden", [37, 300])
def test_the_same_bits_on_any_number_of_threads(
    hidden: int, network: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads share the hidden units, and the rows of large products; none of them is too small for it here.

    PyTorch's own products are left out: their last bits do depend on it.
    """
    monkeypatch.setattr(cpu, "_GRAIN", 1)
    monkeypatch.setattr(cpu, "_outruns_torch", True)
    model = NETWORKS[network](40, hidden, **NORMS[norm])
    batches = [[torch.randn(7, 50, 40), torch.randn(40, 3, 40)] for _ in range(3)]
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(train(copy.deepcopy(model), batches, "native"))
    for name, result in runs[0].items():
        assert all(result.equal(other[name]) for other in runs[1:]), name


@pytest.mark.parametrize("network", NETWORKS)
def test_without_bias(network: str) -> None:
    model = NETWORKS[network](3, 5, bias=False, dtype=torch.float64)
    assert_same(model, batches_of(torch.float64, (4, 3)), use_final=False)


@pytest.mark.parametrize("p", [1.5, 3])
def test_any_order(p: float) -> None:
    model = sn.GRU(3, 5, p=p, dtype=torch.float64)
    assert_same(model, batches_of(torch.float64, (4, 3)))


def test_a_path_without_norm() -> None:
    """Modules may be taken out."""
    model = sn.GRU(3, 5, dtype=torch.float64)
    del model.norm_ih_l0
    assert_same(model, batches_of(torch.float64, (4, 3)))


def test_layers_that_share_weights_and_norms() -> None:
    model: Any = sn.GRU(3, 3, num_layers=2, dtype=torch.float64, window=30)
    model.weight_hh_l1, model.norm_hh_l1 = model.weight_hh_l0, model.norm_hh_l0
    assert_same(model, batches_of(torch.float64, (36, 2)))


@pytest.mark.parametrize("wanted", ["all", "final", "first output", "cell"])
@pytest.mark.parametrize("norm", ["streaming", "batch", "layer"])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("network", NETWORKS)
def test_where_the_gradient_comes_from(network: str, steps: int, norm: str, wanted: str, engine: str) -> None:
    """Uses whose gradient is zero count, and those that no gradient reaches do not."""
    results = []
    model = NETWORKS[network](3, 5, norm=norm, gain=0.2, dtype=torch.float64)
    x = torch.randn(steps, 5, 3, dtype=torch.float64)
    for name in (engine, "plain"):
        twin = copy.deepcopy(model)
        with ops.force(name):
            output, final = twin(x)
            h, c = final if isinstance(final, tuple) else (final, final)
            parts = {"all": output.sum() + h.sum(), "final": h.sum(), "first output": output[0].sum(), "cell": c.sum()}
            parts[wanted].backward()
        results.append([*(parameter.grad for parameter in twin.parameters()), *twin.state_dict().values()])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("network", ["RNN", "GRU", "GRU, reset before", "LSTM, projected"])
def test_what_wants_a_gradient(network: str, steps: int, engine: str) -> None:
    """With one tensor that wants a gradient: it gets its own, and streams advance where gradients pass."""
    model = NETWORKS[network](3, 5, dtype=torch.float64)
    x = torch.randn(steps, 2, 3, dtype=torch.float64)
    for wanted in [*dict(model.named_parameters()), "x", "h"]:
        results = []
        for name in (engine, "plain"):
            twin = copy.deepcopy(model)
            for parameter_name, parameter in twin.named_parameters():
                parameter.requires_grad_(parameter_name == wanted)
            own_x = x.clone().requires_grad_(wanted == "x")
            h: Any = torch.ones(
                1, 2, 3 if "projected" in network else 5, dtype=torch.float64, requires_grad=wanted == "h"
            )
            start = (h, torch.ones(1, 2, 5, dtype=torch.float64)) if "LSTM" in network else h
            with ops.force(name):
                twin(own_x, start)[0].square().sum().backward()
            leaves = [own_x, h, *twin.parameters()]
            results.append([*(leaf.grad for leaf in leaves), *twin.state_dict().values()])
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None), wanted
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=wanted)


def test_without_a_gradient(engine: str) -> None:
    """A training forward under no_grad moves the forward part of the state only."""
    model: Any = sn.LSTM(3, 5)
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, 3)
    with torch.no_grad():
        with ops.force(engine):
            model(x)
        with ops.force("plain"):
            twin(x)
    for a, b in zip(model.state_dict().values(), twin.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert (int(model.norm_hh_l0.samples), int(model.norm_hh_l0.grad_samples)) == (12, 0)


def test_backward_twice_and_second_derivatives(engine: str) -> None:
    model: Any = sn.GRU(3, 5, dtype=torch.float64)
    x = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    with ops.force(engine):
        loss = model(x)[0].square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        assert int(model.norm_ih_l0.grad_samples) == 12  # once for each use in a graph
        (gradient,) = torch.autograd.grad(model(x)[0].square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            gradient.sum().backward()


def test_a_loss_scale_changes_nothing(engine: str) -> None:
    results = []
    model = sn.GRU(3, 5, dtype=torch.float64)
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    for scale in (1.0, 1024.0):
        twin = copy.deepcopy(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        sn.bind(twin, torch.optim.SGD(twin.parameters(), lr=0.1), scaler=scaler)
        with ops.force(engine):
            scaler.scale(twin(x)[0].square().sum()).backward()
        results.append(
            [*twin.state_dict().values(), *(p.grad / scale for p in twin.parameters() if p.grad is not None)]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_the_graph_is_freed_with_its_output(engine: str) -> None:
    """Nothing that a sequence keeps for its backward refers back to the graph."""
    model: Any = sn.LSTM(3, 5, norm_cell=True)
    with ops.force(engine):
        output, final = model(torch.randn(4, 2, 3))
    kept = weakref.ref(_steps(output))
    gc.disable()
    try:
        del output, final
        assert kept() is None
    finally:
        gc.enable()


def _steps(output: Tensor) -> Any:
    """What the whole-sequence Function keeps, found from the output of a layer."""
    node: Any = output.grad_fn
    while not hasattr(node, "steps"):
        node = node.next_functions[0][0]
    return node.steps
