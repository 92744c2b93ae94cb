"""What the norms of recurrent networks collect: every use against the oracle, padding, time steps, evaluation."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.beside import Beside
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import streamnorm as sn
from streamnorm import ops

LAYERS: dict[str, Callable[..., Any]] = {
    "RNN": sn.RNN,
    "GRU": sn.GRU,
    "GRU, reset before": lambda *args, **options: sn.GRU(*args, reset_after=False, **options),
    "LSTM": lambda *args, **options: sn.LSTM(*args, norm_cell=True, **options),
}
CELLS: dict[str, Callable[..., Any]] = {
    "RNN": sn.RNNCell,
    "GRU": sn.GRUCell,
    "GRU, reset before": lambda *args, **options: sn.GRUCell(*args, reset_after=False, **options),
    "LSTM": lambda *args, **options: sn.LSTMCell(*args, norm_cell=True, **options),
}
NORMS: list[dict[str, Any]] = [
    {"norm": "streaming"},
    {"norm": "batch"},
    {"norm": "batch-per-step", "max_steps": 4},
    {"norm": "layer"},
]


def hidden(result: Any) -> Tensor:
    """h of what a cell or a layer gives as the final state."""
    return result[0] if isinstance(result, tuple) else result


def norms(module: nn.Module) -> dict[str, Any]:
    return {name: child for name, child in module.named_modules() if isinstance(child, sn.Norm)}


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("network", LAYERS)
def test_every_use_agrees_with_the_oracle(network: str, p: int) -> None:
    """Forward in the order of the steps, backward in the reverse, over three updates of two sequences each."""
    constants: dict[str, Any] = {"alpha": (0.5, 0.3, 0.2), "beta": (0.6, 0.1, 0.3), "kappa": (0.7, 0.3, 0.6, 0.4)}

    def norm(num_features: int) -> Beside:
        layer = sn.StreamingNorm1d(num_features, bias=False, p=p, scale="raw", dtype=torch.float64, **constants)
        return Beside(layer, "channel", p=p, center="mean", scale="raw", **constants)

    model = LAYERS[network](3, 4, norm=norm, bidirectional=True, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    beside = [module for module in model.modules() if isinstance(module, Beside)]
    for update in range(3):
        for rows in (2, 1 + update):
            output, _ = model(torch.randn(5, rows, 3, dtype=torch.float64, requires_grad=True))
            (output * torch.randn_like(output)).sum().backward()
        for each in beside:
            assert (each.uses, each.gradients) == (10 * (update + 1),) * 2
            each.check_parameter_gradients()
            each.check_state()
            each.zero_expected_gradients()
        optimizer.step()
        optimizer.zero_grad()
        for each in beside:
            each.oracle.commit()


@pytest.mark.parametrize("network", LAYERS)
@pytest.mark.parametrize("options", NORMS, ids=lambda options: options["norm"])
def test_a_layer_is_a_loop_over_its_cell(network: str, options: dict[str, Any]) -> None:
    layer = LAYERS[network](3, 4, dtype=torch.float64, **options)
    cell = CELLS[network](3, 4, dtype=torch.float64, **options)
    cell.load_state_dict({name.replace("_l0", ""): value for name, value in layer.state_dict().items()})
    x = torch.randn(6, 3, 3, dtype=torch.float64)
    for mode in (True, True, False):
        layer.train(mode)
        cell.train(mode)
        output, final = layer(x)
        h, states = None, []
        for step, x_step in enumerate(x):
            h = cell(x_step, h, step=step)
            states.append(hidden(h))
        torch.testing.assert_close(output, torch.stack(states), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(hidden(final)[0], states[-1], rtol=1e-11, atol=1e-13)
    for a, b in zip(layer.state_dict().values(), cell.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("network", LAYERS)
@pytest.mark.parametrize("options", NORMS, ids=lambda options: options["norm"])
def test_padding_never_counts(network: str, options: dict[str, Any], bidirectional: bool) -> None:
    """Whatever stands in the padding, nothing changes; and a padded batch with lengths is a packed one."""
    lengths = [2, 5, 4, 4]
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    other = x.clone()
    for row, length in enumerate(lengths):
        other[row, length:] = 1e6 * torch.randn(6 - length, 3)
    layer = LAYERS[network](3, 4, batch_first=True, bidirectional=bidirectional, dtype=torch.float64, **options)
    results = []
    for kind in ("zeros", "noise", "packed"):
        model = copy.deepcopy(layer)
        if kind == "packed":
            packed, final = model(pack_sequence([row[:n] for row, n in zip(x, lengths)], enforce_sorted=False))
            output, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True, total_length=6)
        else:
            output, final = model(x if kind == "zeros" else other, lengths=torch.tensor(lengths))
        (output.square().sum() + hidden(final).sum()).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([output, hidden(final), *gradients, *model.state_dict().values()])
    for zeros, noise, packed_result in zip(*results, strict=True):
        assert torch.equal(zeros, noise)
        assert torch.equal(zeros, packed_result)
    assert results[0][0][0, 2:].abs().sum() == 0
    for norm in norms(model).values():
        if norm.stream is not None:
            assert int(norm.samples) == int(norm.grad_samples) == sum(lengths)
            assert norm.count.tolist() == [sum(lengths)] * norm.num_features


@pytest.mark.parametrize("network", CELLS)
@pytest.mark.parametrize("options", NORMS, ids=lambda options: options["norm"])
def test_masked_rows_of_a_cell(network: str, options: dict[str, Any]) -> None:
    """They keep their hidden state and count nowhere: the others come out as if they were alone."""
    cell = CELLS[network](3, 4, dtype=torch.float64, **options)
    alone = copy.deepcopy(cell)
    mask = torch.tensor([True, False, True, True, False])
    x = torch.randn(5, 3, dtype=torch.float64)
    start = cell(x, step=0)
    alone(x, step=0)
    after = cell(torch.where(mask[:, None], x, torch.nan), start, step=1, mask=mask)
    rows = tuple(h[mask] for h in start) if isinstance(start, tuple) else start[mask]
    expected = alone(x[mask], rows, step=1)
    assert torch.equal(hidden(after)[mask], hidden(expected))
    assert torch.equal(hidden(after)[~mask], hidden(start)[~mask])
    for a, b in zip(cell.state_dict().values(), alone.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    nothing = cell(x, start, step=2, mask=torch.zeros(5, dtype=torch.bool))
    assert torch.equal(hidden(nothing), hidden(start))


@pytest.mark.parametrize("network", LAYERS)
def test_the_present_alone_is_batch_normalization(network: str) -> None:
    """α = β = (0, 0, 1) and p = 2 give norm="batch", outputs and gradients."""
    streaming = LAYERS[network](
        3, 4, num_layers=2, p=2, alpha=(0, 0, 1), beta=(0, 0, 1), dtype=torch.float64, bidirectional=True
    )
    batch = LAYERS[network](3, 4, num_layers=2, norm="batch", dtype=torch.float64, bidirectional=True)
    batch.load_state_dict(streaming.state_dict(), strict=False)
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    results = []
    for model in (streaming, batch):
        output, final = model(x)
        loss = output.square().sum() + hidden(final).sum()
        results.append([output, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_layer_normalization_knows_one_sequence_only() -> None:
    """A mini-batch of padded sequences gives what each gives alone; and the equations are those of LayerNorm."""
    gru: Any = sn.GRU(3, 4, norm="layer", bidirectional=True, dtype=torch.float64)
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in (4, 2, 5)]
    output, h = gru(nn.utils.rnn.pad_sequence(sequences), lengths=torch.tensor([4, 2, 5]))
    for row, sequence in enumerate(sequences):
        alone, h_alone = gru(sequence)
        torch.testing.assert_close(output[: len(sequence), row], alone, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(h[:, row], h_alone, rtol=1e-11, atol=1e-13)

    gru = sn.GRU(3, 4, norm="layer", gain=0.5, dtype=torch.float64)
    h = torch.zeros(4, dtype=torch.float64)
    for x in sequences[0]:
        reset_x, update_x, new_x = (_layer_norm(gru.weight_ih_l0 @ x) * 0.5 + gru.bias_ih_l0).split(4)
        reset_h, update_h, new_h = (_layer_norm(gru.weight_hh_l0 @ h) * 0.5 + gru.bias_hh_l0).split(4)
        update = torch.sigmoid(update_x + update_h)
        h = (1 - update) * torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h) + update * h
    torch.testing.assert_close(gru(sequences[0])[0][-1], h, rtol=1e-10, atol=1e-12)


def _layer_norm(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape)


def test_the_paper_resets_before_the_product() -> None:
    gru: Any = sn.GRU(3, 4, norm=None, reset_after=False, dtype=torch.float64)
    sequence = torch.randn(5, 3, dtype=torch.float64)
    h = torch.zeros(4, dtype=torch.float64)
    for x in sequence:
        reset_x, update_x, new_x = (gru.weight_ih_l0 @ x + gru.bias_ih_l0).split(4)
        weights, biases = gru.weight_hh_l0.split(4), gru.bias_hh_l0.split(4)
        reset = torch.sigmoid(reset_x + weights[0] @ h + biases[0])
        update = torch.sigmoid(update_x + weights[1] @ h + biases[1])
        h = (1 - update) * torch.tanh(new_x + weights[2] @ (reset * h) + biases[2]) + update * h
    torch.testing.assert_close(gru(sequence)[0][-1], h, rtol=1e-11, atol=1e-13)


def test_statistics_per_step() -> None:
    """Each step moves its own running statistics; the steps after the last share its."""
    cell: Any = sn.RNNCell(3, 4, norm="batch-per-step", max_steps=2, momentum=1.0, dtype=torch.float64)
    norm: Any = cell.norm_ih
    xs = torch.randn(3, 5, 3, dtype=torch.float64)
    h = None
    for step, x in enumerate(xs):
        h = cell(x, h, step=step)
        products = x @ cell.weight_ih.T
        row = min(step, 1)
        torch.testing.assert_close(norm.running_mean[row], products.mean(0).detach())
        torch.testing.assert_close(norm.running_var[row], products.var(0).detach())
    assert norm.num_batches_tracked.tolist() == [1, 2]
    cell.eval()
    first = cell(xs[0], step=0)
    expected = (xs[0] @ cell.weight_ih.T - norm.running_mean[0]) / (norm.running_var[0] + norm.eps).sqrt()
    # The hidden state is zero at the first step, in training and now: its path gives its bias.
    pre_activation = expected * norm.weight + cell.bias_ih + cell.bias_hh
    torch.testing.assert_close(first, torch.tanh(pre_activation), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="step=t"):
        cell(xs[0])


@pytest.mark.parametrize("network", LAYERS)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("options", NORMS, ids=lambda options: options["norm"])
def test_a_constant_hidden_state_gives_no_nan(network: str, p: int, options: dict[str, Any]) -> None:
    model = LAYERS[network](3, 4, num_layers=2, p=p, **options)
    output, _ = model(torch.randn(5, 4, 3))
    output.sum().backward()
    model.eval()
    evaluated, _ = model(torch.randn(5, 4, 3))
    for tensor in (output, evaluated, *(parameter.grad for parameter in model.parameters())):
        assert tensor.isfinite().all()
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("options", NORMS[1:3], ids=lambda options: options["norm"])
def test_a_sequence_left_alone_is_normalized_by_running_statistics(options: dict[str, Any]) -> None:
    gru: Any = sn.GRU(3, 4, dtype=torch.float64, **options)
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    output, _ = gru(x, lengths=torch.tensor([3, 5, 3]))
    gru(x, lengths=torch.tensor([5, 3, 2]))
    tracked = gru.norm_ih_l0.num_batches_tracked
    assert tracked.tolist() == ([2, 2, 2, 0] if options["norm"] == "batch-per-step" else 6)
    assert output.isfinite().all()
    with pytest.raises(ValueError, match="one value per statistic"):
        gru(x[:, :1])
    gru.eval()
    assert gru(x[:, :1])[0].isfinite().all()


def test_online_learning() -> None:
    """One sequence, one time step per call, a weight update after each: a layer and a cell learn alike."""
    layer: Any = sn.GRU(3, 4, dtype=torch.float64)
    cell: Any = sn.GRUCell(3, 4, dtype=torch.float64)
    cell.load_state_dict({name.replace("_l0", ""): value for name, value in layer.state_dict().items()})
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (layer, cell)]
    h_layer: Any = None
    h_cell = torch.zeros(1, 4, dtype=torch.float64)
    losses = []
    for x in torch.randn(200, 1, 3, dtype=torch.float64):
        _, h_layer = layer(x[None], h_layer)
        h_cell = cell(x, h_cell)
        assert int(layer.norm_hh_l0.samples) == int(cell.norm_hh.samples) == 1
        for h, optimizer in zip((h_layer, h_cell), optimizers):
            loss = (h - 0.5).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert int(layer.norm_hh_l0.samples) == int(cell.norm_hh.samples) == 0
        losses.append(loss.item())
        h_layer, h_cell = h_layer.detach(), h_cell.detach()
    torch.testing.assert_close(h_layer[0], h_cell, rtol=1e-10, atol=1e-12)
    for a, b in zip(layer.state_dict().values(), cell.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert sum(losses[-50:]) < 0.5 * sum(losses[:50])


def test_carried_hidden_states() -> None:
    """A sequence in two pieces, the hidden state carried: the forward of one piece, and a stream that goes on."""
    whole = sn.LSTM(3, 4, num_layers=2, dtype=torch.float64)
    pieces = copy.deepcopy(whole)
    x = torch.randn(8, 2, 3, dtype=torch.float64)
    output, final = whole(x)
    first, carried = pieces(x[:3])
    second, last = pieces(x[3:], tuple(h.detach() for h in carried))
    torch.testing.assert_close(torch.cat((first, second)), output, rtol=1e-11, atol=1e-13)
    for a, b in zip((*final, *whole.state_dict().values()), (*last, *pieces.state_dict().values()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("network", LAYERS)
def test_evaluation_changes_nothing(network: str) -> None:
    """A layer in evaluation and one that is frozen: one affine map, per step and sequence, and no state moves."""
    model = LAYERS[network](3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    for _ in range(3):
        model(x)[0].sum().backward()
        sn.commit(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    evaluated, _ = model(x)
    one_by_one = torch.cat([model(x[:, row : row + 1])[0] for row in range(3)], 1)
    torch.testing.assert_close(one_by_one, evaluated, rtol=1e-10, atol=1e-12)
    model.train()
    with sn.frozen(model):
        frozen, _ = model(x)
        frozen.sum().backward()
    torch.testing.assert_close(frozen, evaluated, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", NORMS, ids=lambda options: options["norm"])
def test_copies_and_checkpoints(options: dict[str, Any]) -> None:
    model = sn.GRU(3, 4, num_layers=2, **options)
    x = torch.randn(5, 4, 3)
    model(x)[0].sum().backward()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    fresh = sn.GRU(3, 4, num_layers=2, **options)
    fresh.load_state_dict(model.state_dict())
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False), fresh]
    expected, _ = model(x)
    for other in copies:
        assert torch.equal(other(x)[0], expected)
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))


def test_calibration() -> None:
    gru: Any = sn.GRU(3, 4, dtype=torch.float64)
    batches = [torch.randn(5, 2, 3, dtype=torch.float64) for _ in range(4)]
    sn.calibrate(gru, batches)
    products = torch.cat(batches) @ gru.weight_ih_l0.T
    norm: Any = gru.norm_ih_l0
    torch.testing.assert_close(norm.long[0], products.mean((0, 1)).detach())


def test_float64_and_back() -> None:
    gru: Any = sn.GRU(3, 4).double()
    assert gru(torch.randn(5, 2, 3, dtype=torch.float64))[0].dtype == torch.float64
    assert gru.norm_ih_l0.long.dtype == torch.float64
    half: Any = sn.GRU(3, 4).bfloat16()
    assert half(torch.randn(5, 2, 3, dtype=torch.bfloat16))[0].dtype == torch.bfloat16
    assert half.norm_ih_l0.long.dtype == torch.float32


@pytest.mark.parametrize("network", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("options", NORMS[:2], ids=lambda options: options["norm"])
def test_with_fixed_statistics_it_is_a_layer_of_torchs(network: str, options: dict[str, Any]) -> None:
    """In evaluation and frozen: outputs and gradients as on the loop; and ``to_torch`` gives that layer."""
    kind, ours = getattr(nn, network), getattr(sn, network)
    model = ours(3, 4, num_layers=2, bidirectional=True, dtype=torch.float64, bias=network != "RNN", **options)
    x = torch.randn(5, 3, 3, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        model(x)[0].sum().backward()
        sn.commit(model)
    for train in (False, True):
        sn.freeze(model) if train else sn.unfreeze(model)
        model.train(train)
        for inputs in (x, pack_sequence([x[:n, 0] for n in (5, 3, 1)])):
            results = []
            for engine in (ops.ENGINES[0].name, "plain"):
                with ops.force(engine):
                    output, final = model(inputs)
                parts = [output if isinstance(output, Tensor) else output.data, hidden(final)]
                loss = parts[0].square().sum() + parts[1].sum()
                results.append([*parts, *torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True)])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    plain = model.to_torch()
    assert type(plain) is kind
    assert model.training
    torch.testing.assert_close(plain(x)[0], model.eval()(x)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_cell_becomes_one_of_torchs(kind: str, bias: bool) -> None:
    extra = {"nonlinearity": "relu"} if kind == "RNNCell" else {}
    cell: Any = getattr(sn, kind)(3, 4, bias=bias, dtype=torch.float64, **extra)
    for x in torch.randn(3, 5, 3, dtype=torch.float64):
        hidden(cell(x)).sum().backward()
        sn.commit(cell)
    plain = cell.to_torch()
    assert type(plain) is getattr(nn, kind)
    assert cell.training
    x, h = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    hx = (h, -h) if kind == "LSTMCell" else h
    torch.testing.assert_close(hidden(plain(x, hx)), hidden(cell.eval()(x, hx)), rtol=1e-12, atol=1e-12)


def test_what_torch_has_no_layer_for() -> None:
    for model in (
        sn.GRU(3, 4, norm="layer"),
        sn.GRU(3, 4, reset_after=False),
        sn.LSTM(3, 4, norm_cell=True),
        sn.RNN(3, 4, norm="batch-per-step", max_steps=2),
    ):
        with pytest.raises(ValueError, match=rf"nothing that evaluates as {type(model).__name__}\(3, 4"):
            model.to_torch()
