"""Random sequences of operations, carried out by every engine and by the reference in float64.

A seed determines everything: a layer or a recurrent layer, and a list of operations on it. Each engine starts from the
same layer and carries out the same list; what comes out of each operation (outputs, gradients, state, or that it was
refused) has to be what the reference makes of it. Some operations are mistakes, which have to be refused before
anything changes.

    python tests/support/fuzz.py layers 100           # seeds 0 to 99; also: recurrent
    python tests/support/fuzz.py layers 1 1234        # seed 1234
"""

from __future__ import annotations

import copy
import io
import pickle
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint

import streamnorm as sn
from streamnorm import ops
from streamnorm.core.spec import State
from streamnorm.layers import streaming_layers

ENGINES = [engine.name for engine in ops.ENGINES if engine.name != "plain"]
TOLERANCE = {torch.float64: (1e-8, 1e-11), torch.float32: (2e-3, 3e-5)}
"""Relative to the largest value of a tensor, and absolutely."""
STREAMS: list[dict[str, Any]] = [
    {},
    {"window": 5.0},
    {"window": 300.0},
    {"kappa": 0.7},
    {"alpha": (0.5, 0.3, 0.2), "beta": (0.6, 0.1, 0.3), "kappa": (0.7, 0.3, 0.6, 0.4)},
    {"alpha": (0, 0, 1), "beta": (0, 0, 1)},
    {"alpha": (1, 0, 0), "beta": (1, 0, 0)},
    {"beta": (0, 0, 0)},
    {"window": 20.0, "grad_window": 3.0, "limit": 1.1},
    {"window": 100.0, "own": 8.0},
    {"alpha": (1, 0, 0), "beta": (0.6, 0.1, 0.3), "limit": 1.2},
]
Results = list[tuple[str, Any]]


class Player:
    """Carries out operations on a model and writes down what comes out.

    Args:
        seed: of everything.
        model: to work on.
        dtype: of inputs. Their values are those of ``values_dtype``, which the engines under test have.
        values_dtype: see there.
    """

    operations: tuple[str, ...]
    goes_back_twice = 0.15

    def __init__(self, seed: int, model: Any, dtype: torch.dtype, values_dtype: torch.dtype) -> None:
        self.rng, self.model, self.dtype, self.values_dtype = random.Random(seed), model, dtype, values_dtype
        self.pending: list[tuple[list[Tensor], list[Tensor]]] = []
        self.recomputed: list[list[Tensor]] = []
        self.results: Results = []
        self.label = ""

    def play(self, count: int) -> Results:
        """So many operations, each with random numbers of its own: what one needs changes nothing for the next."""
        for number in range(count):
            name, seed = self.rng.choice(self.operations), self.rng.randrange(1 << 30)
            self.label = f"{number}. {name}"
            self.draw = random.Random(seed)
            torch.manual_seed(seed)
            getattr(self, name)()
            self.write("parameters' gradients", [parameter.grad for parameter in self.model.parameters()])
            self.write("buffers", list(self.model.buffers()))
        return self.results

    def write(self, what: str, values: list[Tensor | None]) -> None:
        for i, value in enumerate(values):
            self.results.append((f"{self.label}: {what} {i}", None if value is None else value.detach().clone()))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(self.values_dtype).to(self.dtype)

    def mistake(self, call: Callable[[], object]) -> None:
        """Something that has to be refused with nothing changed."""
        before = [t.detach().clone() for t in (*self.model.parameters(), *self.model.buffers())]
        try:
            call()
        except (RuntimeError, ValueError, TypeError):
            pass
        else:
            raise AssertionError(f"{self.label}: taken")
        after = [t.detach() for t in (*self.model.parameters(), *self.model.buffers())]
        assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, after)), f"{self.label}: changed"

    def without_memory(self, victim: Tensor, call: Callable[[], object]) -> None:
        """As ``mistake``, while the memory of a tensor is gone."""
        storage = victim.untyped_storage()
        if not storage.resizable():
            return
        whole = victim.detach().clone()
        left = self.draw.choice([0, max(0, whole.nbytes - 1), whole.nbytes // 2])
        others = [t for t in (*self.model.parameters(), *self.model.buffers()) if t is not victim]
        before = [t.detach().clone() for t in others]
        size = storage.nbytes()
        storage.resize_(left)
        try:
            call()
        except (RuntimeError, ValueError):
            pass
        else:
            raise AssertionError(f"{self.label}: taken")
        finally:
            storage.resize_(size)
            victim.data.copy_(whole)
        assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, others)), f"{self.label}: changed"

    # --- operations of all models

    def finish(self) -> None:
        """A backward pass from one of the forward passes that wait for theirs."""
        if not self.pending:
            return
        outputs, leaves = self.pending.pop(self.draw.randrange(len(self.pending)))
        chosen = [y for y in outputs if self.draw.random() < 0.7] or outputs[-1:]
        if (
            self.draw.random() < self.goes_back_twice
        ):  # with gradients of its own: autograd may put a sum into the memory of these
            torch.autograd.backward(chosen, [self.gradient(y) for y in chosen], retain_graph=True)
        torch.autograd.backward(chosen, [self.gradient(y) for y in chosen])
        self.write("gradients", [leaf.grad for leaf in leaves])

    def gradient(self, y: Tensor) -> Tensor:
        how = self.draw.choice(["plain", "plain", "expanded", "other sign", "last axis first"])
        dy = self.normal(*y.shape)
        if how == "expanded":
            return dy.flatten()[:1].expand(y.shape) if y.dim() == 0 else dy[:1].expand(y.shape)
        if how == "other sign":
            return torch._neg_view(dy)
        if how == "last axis first" and y.dim() > 1:
            return dy.movedim(-1, 0).contiguous().movedim(0, -1)
        return dy

    def forget(self) -> None:
        self.pending.clear()

    def commit(self) -> None:
        sn.commit(self.model)

    def step(self) -> None:
        self.pending.clear()  # autograd refuses to go back through weights that have changed
        for parameter in self.model.parameters():  # as a loss scaler does
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0, 0, 0).clamp_(-9, 9)
        parameters = [*self.model.parameters(), torch.zeros(1, requires_grad=True)]
        torch.optim.SGD(parameters, lr=1e-3).step()
        sn.commit(self.model)
        self.model.zero_grad()

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def train(self) -> None:
        self.model.train()

    def evaluate(self) -> None:
        self.model.eval()
        self._alone()
        self.model.train()

    def frozen(self) -> None:
        with sn.frozen(self.model):
            self._alone()

    def _alone(self) -> None:
        """Forward and backward with nothing in between, which could change running statistics."""
        self.pending.clear()
        self.begin()
        self.finish()

    def no_grad(self) -> None:
        with torch.no_grad():
            self.begin()

    def threads(self) -> None:
        torch.set_num_threads(self.draw.choice([1, 1, 2, 3]))

    def replace_buffers(self) -> None:
        """As a conversion does: what waits for its backward keeps those that it had."""
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()

    def load(self) -> None:
        state = {name: t.clone() for name, t in self.model.state_dict().items()}
        if self.draw.random() < 0.5:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        self.pending.clear()
        self.model.load_state_dict(state, assign=self.draw.random() < 0.3)

    def copy(self) -> None:
        self.pending.clear()
        self.model = copy.deepcopy(self.model) if self.draw.random() < 0.5 else pickle.loads(pickle.dumps(self.model))

    def reset(self) -> None:
        self.pending.clear()
        sn.reset_stats(self.model)

    def forget_recomputed(self) -> None:
        """Leave out what is to be computed again: PyTorch refuses to where what it depends on has changed."""
        self.pending = [item for item in self.pending if not any(item[0] is y for y in self.recomputed)]

    def requires_grad(self) -> None:
        self.forget_recomputed()
        for parameter in self.model.parameters():
            parameter.requires_grad_(self.draw.random() < 0.7)

    def new_parameter(self) -> None:
        """A parameter of the user's own, as it may lie in memory."""
        self.pending.clear()
        modules = [module for module in self.model.modules() if any(p is not None for p in module._parameters.values())]
        if not modules:
            return
        module = self.draw.choice(modules)
        name = self.draw.choice([name for name, p in module._parameters.items() if p is not None])
        old = module._parameters[name]
        assert old is not None
        value = 0.3 * self.normal(*old.shape)
        how = self.draw.choice(["plain", "gaps", "other sign"])
        if how == "gaps":
            value = torch.stack((value, value), -1)[..., 0]
        elif how == "other sign":
            value = torch._neg_view(value)
        setattr(module, name, nn.Parameter(value))

    def begin(self) -> None:
        """A forward pass that waits for its backward."""
        raise NotImplementedError

    def wait(self, outputs: list[Tensor], leaves: list[Tensor]) -> None:
        self.write("outputs", list(outputs))
        with_graph = [y for y in outputs if y.requires_grad]
        if with_graph:
            self.pending.append((with_graph, leaves))
            del self.pending[:-3]


OF_ANY = (
    *("begin",) * 9,
    *("finish",) * 9,
    *("commit",) * 2,
    *("step",) * 2,
    *("zero_grad", "forget", "evaluate", "frozen", "no_grad", "threads", "replace_buffers", "load", "copy", "reset"),
)
"""Operations on layers of any kind, each as often as it is to be drawn."""


class LayerPlayer(Player):
    """Operations on a layer of any family."""

    operations = (
        *OF_ANY,
        *("requires_grad", "new_parameter", "several_uses", "checkpointed", "scale", "constants"),
        *("wrong_input", "wrong_mask", "wrong_tensor", "gone_before_forward", "gone_before_backward"),
    )

    def begin(self) -> None:
        x, mask = self.input(), None
        kind = self.draw.choice(["none"] * 5 + ["samples", "places", "lengths"])
        if kind == "samples":
            mask = torch.rand(len(x)) < 0.7
        elif kind == "places":
            mask = torch.rand(len(x), *x.shape[2:]) < 0.7
        elif kind == "lengths":
            lengths = torch.randint(0, x[0, 0].numel() + 1, (len(x),))
            mask = (torch.arange(x[0, 0].numel()) < lengths[:, None]).view(len(x), *x.shape[2:])
        leaf = x.requires_grad_(self.draw.random() < 0.85)
        try:
            y = self.model(leaf, mask) if mask is not None else self.model(leaf)
        except ValueError:  # one value per statistic, and no memory
            self.write("refused", [])
            return
        self.wait([y], [leaf])

    def input(self) -> Tensor:
        shape = [self.draw.choice([1, 1, 2, 3, 4, 7]), self.model.num_features, *self.model.places]
        if self.model.places and self.draw.random() < 0.1:
            shape[0] = 40
        x = self.normal(*shape)
        kind = self.draw.choice(["normal"] * 8 + ["relu", "offset", "bad", "huge", "sparse"])
        if kind == "relu":
            x = x.relu()
        elif kind == "offset":
            x = x + 30
        elif kind == "sparse":
            x = x * (torch.rand(x.shape) < 0.3)
        elif kind in ("bad", "huge"):
            value = self.draw.choice([torch.nan, torch.inf, -torch.inf])
            if kind == "huge" and self.values_dtype == torch.float64:
                value = self.draw.choice([1e300, -1e300, 1e30])
            x.view(-1)[self.draw.randrange(x.numel())] = value
        layout = self.draw.choice(
            ["contiguous"] * 4 + ["channels last"] * 3 + ["gaps", "batch last", "other sign", "part"]
        )
        if layout == "channels last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        elif layout == "gaps":
            x = torch.stack((x, x), -1)[..., 0]
        elif layout == "batch last":
            x = x.movedim(0, -1).contiguous().movedim(-1, 0)
        elif layout == "other sign":
            x = torch._neg_view(-x)
        elif layout == "part":
            x = torch.cat((x, x))[len(x) :]
        return x.detach()

    def several_uses(self) -> None:
        x = self.input().requires_grad_()
        try:
            y = self.model(0.5 * self.model(x) + 0.1 * x.detach().nan_to_num(0, 1, -1))
        except ValueError:
            return
        self.wait([y], [x])

    def checkpointed(self) -> None:
        x = self.input().requires_grad_()
        try:
            y = checkpoint(self.model, x, use_reentrant=False, context_fn=sn.checkpoint_context_fn)
        except ValueError:
            return
        self.wait([y], [x])
        self.recomputed += [self.pending[-1][0]] if self.pending else []
        self.finish()

    def scale(self) -> None:
        if self.model.stream is not None:
            self.model._grad_scale = torch.tensor(self.draw.choice([0.5, 8.0]))

    def constants(self) -> None:
        self.forget_recomputed()
        if self.model.stream is not None:
            self.model.set_stream(sn.Stream(**self.draw.choice(STREAMS)))

    def wrong_input(self) -> None:
        shape = (3, self.model.num_features + 1, *self.model.places)
        self.mistake(lambda: self.model(self.normal(*shape)))

    def wrong_mask(self) -> None:
        self.mistake(lambda: self.model(self.input(), torch.ones(99, dtype=torch.bool)))

    def wrong_tensor(self) -> None:
        """A gain, a bias or a buffer of another size."""
        used = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", *State._fields)
        names = [name for name in self.model.state_dict() if name in used]
        if not names:
            return
        name = self.draw.choice(names)
        where = self.model._buffers if name in self.model._buffers else self.model._parameters
        right = where[name]
        assert right is not None
        wrong = self.draw.choice([right.detach()[None], torch.cat((right.detach().reshape(-1),) * 2)])
        where[name] = wrong if where is self.model._buffers else nn.Parameter(wrong)
        try:
            self.mistake(lambda: self.model(self.input()))
        finally:
            where[name] = right

    def gone_before_forward(self) -> None:
        x = self.normal(3, self.model.num_features, *self.model.places)
        streams = () if self.model.stream is None else self.model.state
        victim = self.draw.choice([x, *self.model.parameters(), *streams])
        self.without_memory(victim, lambda: self.model(x))

    def gone_before_backward(self) -> None:
        x = self.normal(3, self.model.num_features, *self.model.places).requires_grad_()
        try:
            y = self.model(x)
        except ValueError:  # one value per statistic, and no memory
            return
        self.write("outputs", [y])
        self.without_memory(x, lambda: y.backward(self.normal(*y.shape)))


def new_layer(seed: int) -> tuple[Any, torch.dtype]:
    """A layer with random constants, and the dtype that engines under test have."""
    rng = random.Random(seed)
    dims = rng.choice([0, 0, 1, 2, 2, 3])
    channels = rng.choice([1, 2, 3, 4, 6, 12, 16, 17, 40, 64])
    most = {0: 1, 1: 70, 2: 11, 3: 4}[dims]
    places = tuple(rng.randint(1, most) for _ in range(dims))
    groups = rng.choice([g for g in (1, 2, 3, 4) if channels % g == 0])
    moment: dict[str, Any] = {"p": rng.choice([1, 1, 2, 2, 1.5, 3, 4])}
    moment |= {"center": rng.choice(["mean", "zero"]), "scale": rng.choice(["raw", "gaussian"])}
    options: dict[str, Any] = {"eps": rng.choice([1e-5, 1e-3]), "dtype": torch.float64}
    options |= {"affine": rng.random() < 0.8, "bias": rng.random() < 0.8}
    dtype, family = _some_dtype(rng), rng.choice(["streaming"] * 4 + ["sample", "general"])
    if family == "sample":
        ref: Any = rng.choice(["layer", "channel", "position", ("group", groups)])
        layer: Any = sn.SampleNorm(channels, ref, **options, **moment)
    elif family == "general":
        ref = rng.choice(["channel", "layer", ("group", groups)])
        layer = sn.GeneralBatchNorm(channels, ref, ghosts=rng.choice([1, 1, 2]), **options, **moment)
    else:
        references = [sn.NormRef.batch("channel")] * 3
        references += [sn.NormRef.batch("layer"), sn.NormRef.batch(("group", groups))]
        references.append(sn.NormRef.of("n (k g) ... -> g", g=groups))
        if dims == 2:
            references += [sn.NormRef.of("n c h w -> c h", h=places[0]), sn.NormRef.of("n c h w -> w", w=places[1])]
        reference, stream = rng.choice(references), sn.Stream(**rng.choice(STREAMS))
        layer = sn.Norm(channels, reference, sn.LpMoment(**moment), stream, **options)
    layer.places = places
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_((parameter + 0.3 * torch.randn(channels, generator=_generator(seed))).float())
    return layer, dtype


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class RecurrentPlayer(Player):
    """Operations on a recurrent layer.

    No second pass through one graph: a whole sequence is one use in it, and its steps are many (``another_pass``).
    """

    goes_back_twice = 0.0
    operations = (
        *OF_ANY,
        *("requires_grad", "new_parameter"),
        *("wrong_input", "wrong_state", "wrong_tensor", "gone_before_forward", "gone_before_backward"),
    )

    def begin(self) -> None:
        form = self.draw.choice(["batch"] * 4 + ["packed"] * 2 + ["lengths", "one sequence"])
        steps, rows = self.draw.choice([1, 1, 2, 3, 5, 8]), self.draw.choice([1, 2, 3, 4, 5, 9])
        if self.draw.random() < 0.1:
            steps, rows = 37, self.draw.choice([1, 2, 4])
        elif self.draw.random() < 0.05:
            rows = 70
        if self.model.choice.norm in ("batch", "batch-per-step"):
            rows = max(rows, 5)  # of fewer, batch statistics are hardly differentiable
        lengths = sorted((self.draw.randint(1, steps) for _ in range(rows)), reverse=True)
        lengths[: max(1, rows - 1)] = [steps] * max(1, rows - 1)
        if self.model.choice.norm in ("batch", "batch-per-step"):
            lengths = [steps] * rows
        data = self.normal(steps, rows, self.model.input_size)
        if self.draw.random() < 0.05:
            data[self.draw.randrange(steps), self.draw.randrange(rows), 0] = torch.nan
        leaf = data.requires_grad_(self.draw.random() < 0.8)
        states = self.states(rows)
        leaves = [leaf, *states]
        if form == "one sequence":
            if self.model.choice.norm in ("batch", "batch-per-step"):
                form = "batch"
            else:
                states = [h[:, 0] for h in states]
        hx = None if not states else states[0] if len(states) == 1 else tuple(states)
        if form == "packed":
            x: Any = pack_sequence([leaf[:length, row] for row, length in enumerate(lengths)])
        elif form == "one sequence":
            x = leaf[:, 0]
        else:
            x = leaf.transpose(0, 1) if self.model.batch_first else leaf
        try:
            outputs = self.model(x, hx, torch.tensor(lengths)) if form == "lengths" else self.model(x, hx)
        except ValueError:  # one hidden unit has no statistics of its own
            self.write("refused", [])
            return
        self.wait(_flat(outputs), leaves)

    def states(self, rows: int) -> list[Tensor]:
        """Where sequences start, or nothing."""
        if self.draw.random() < 0.4:
            return []
        model = self.model
        count = model.num_layers * (2 if model.bidirectional else 1)
        widths = [model.proj_size or model.hidden_size, model.hidden_size][: 2 if model.kind == "LSTM" else 1]
        return [self.normal(count, rows, width).requires_grad_(self.draw.random() < 0.7) for width in widths]

    def sequence(self) -> Tensor:
        return self.normal(5, 6, self.model.input_size).requires_grad_()

    def run(self, x: Tensor) -> list[Tensor]:
        return _flat(self.model(x.transpose(0, 1) if self.model.batch_first else x))

    def wrong_input(self) -> None:
        self.mistake(lambda: self.model(self.normal(5, 6, self.model.input_size + 1)))

    def wrong_state(self) -> None:
        model = self.model
        states = [self.normal(1, 6, model.hidden_size + 1)] * (2 if model.kind == "LSTM" else 1)
        self.mistake(lambda: model(self.sequence(), states[0] if len(states) == 1 else tuple(states)))

    def wrong_tensor(self) -> None:
        modules = [module for module in self.model.modules() if module._parameters]
        module = self.draw.choice(modules)
        name = self.draw.choice([name for name, p in module._parameters.items() if p is not None])
        right = module._parameters[name]
        assert right is not None
        wrong = self.draw.choice([right.detach()[None], torch.cat((right.detach(),) * 2), right.detach()[:-1].clone()])
        module._parameters[name] = nn.Parameter(wrong)
        try:
            self.mistake(lambda: self.run(self.sequence()))
        finally:
            module._parameters[name] = right

    def gone_before_forward(self) -> None:
        x = self.sequence()
        victim = self.draw.choice([x, *self.model.parameters()])
        self.without_memory(victim, lambda: self.run(x))

    def gone_before_backward(self) -> None:
        if self.model.num_layers > 1 or self.model.bidirectional:  # another layer or direction has gone back by then
            return
        x = self.sequence()
        try:
            output = self.run(x)[0]
        except ValueError:
            return
        self.write("outputs", [output])
        self.without_memory(x, lambda: output.backward(self.normal(*output.shape)))


def _flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in _flat(part)]


def new_recurrent(seed: int) -> tuple[Any, torch.dtype]:
    """A recurrent layer with random constants, and the dtype that engines under test have."""
    rng = random.Random(seed)
    kind = rng.choice(
        ["RNN", "RNN, relu", "GRU", "GRU", "GRU, reset before", "LSTM", "LSTM", "LSTM, cell", "LSTM, projected"]
    )
    norm = rng.choice(["streaming"] * 4 + ["batch", "batch-per-step", "layer", "layer"])
    options: dict[str, Any] = {"norm": norm, "p": rng.choice([1, 1, 2, 2, 3]), "gain": 0.3, "dtype": torch.float64}
    options |= {"center": rng.choice(["mean", "mean", "zero"]), "scale": rng.choice(["raw", "gaussian"])}
    if norm == "batch-per-step":
        options["max_steps"] = rng.choice([1, 4])
    options |= {"bias": rng.random() < 0.8, "bidirectional": rng.random() < 0.25, "batch_first": rng.random() < 0.25}
    options |= {"num_layers": rng.choice([1, 1, 1, 2])}
    inputs, hidden = rng.choice([1, 3, 8]), rng.choice([1, 2, 4, 5, 8, 16, 19])
    torch.manual_seed(seed)
    model: Any
    if kind.startswith("RNN"):
        model = sn.RNN(inputs, hidden, nonlinearity="relu" if "relu" in kind else "tanh", **options)
    elif kind.startswith("GRU"):
        model = sn.GRU(inputs, hidden, reset_after="before" not in kind, **options)
    else:
        if "projected" in kind and hidden > 1:
            options["proj_size"] = rng.randint(1, hidden - 1)
        model = sn.LSTM(inputs, hidden, norm_cell="cell" in kind, **options)
    stream = sn.Stream(**rng.choice(STREAMS))
    for each in streaming_layers(model):
        each.set_stream(stream)
    return model, _some_dtype(rng)


def _some_dtype(rng: random.Random) -> torch.dtype:
    return rng.choice([torch.float64, torch.float64, torch.float64, torch.float32])


KINDS: dict[str, tuple[type[Player], Callable[[int], tuple[Any, torch.dtype]]]] = {
    "layers": (LayerPlayer, new_layer),
    "recurrent": (RecurrentPlayer, new_recurrent),
}


def check(kind: str, seed: int, engines: list[str] | None = None) -> None:
    """Let every engine carry out the sequence of a seed, and compare with the reference in float64.

    What is float32 may also be what the reference gives in float32, or about as near to float64 as that.

    Raises:
        AssertionError: where they differ.
    """
    _, dtype = KINDS[kind][1](seed)
    expected = _play(kind, seed, "plain", torch.float64)
    for engine in engines or engines_to_run():
        results = _play(kind, seed, engine, dtype)
        try:
            _compare(f"{kind} {seed}, {engine}", results, expected)
        except AssertionError:
            if dtype == torch.float64:
                raise
            rounded = _play(kind, seed, "plain", dtype)
            try:
                # A deviation of nearly 0 may round to the other sign, of which for p = 1 a gradient is made.
                _compare(f"{kind} {seed}, {engine}", results, rounded)
            except AssertionError:
                # Where rounding grows from step to step, the reference is as far from itself in float64.
                _compare(f"{kind} {seed}, {engine}", results, expected, rounded)


def _play(kind: str, seed: int, engine: str, dtype: torch.dtype) -> Results:
    """The sequence of a seed on one engine."""
    player, make = KINDS[kind]
    model, values_dtype = make(seed)
    threads = torch.get_num_threads()
    with ops.force(engine):
        try:
            return player(seed, model.to(dtype), dtype, values_dtype).play(random.Random(seed).randint(4, 16))
        finally:
            torch.set_num_threads(threads)


def engines_to_run() -> list[str]:
    """Those that run here; Triton's only where it is fast."""
    return [name for name in ENGINES if not ops.engines()[name].startswith("not available") and name != "triton"]


def _compare(where: str, results: Results, expected: Results, rounded: Results | None = None) -> None:
    """Compare; with ``rounded``, differences may be four times as large as its own."""
    assert len(results) == len(expected), f"{where}: {len(results)} results, not {len(expected)}"
    for (label, ours), (_, theirs), (_, other) in zip(results, expected, rounded or expected):
        _compare_tensors(f"{where}, {label}", ours, theirs, other)


def _compare_tensors(where: str, ours: Tensor | None, theirs: Tensor | None, rounded: Tensor | None) -> None:
    assert (ours is None) == (theirs is None), f"{where}: {ours} is not {theirs}"
    if ours is None or theirs is None:
        return
    assert ours.shape == theirs.shape, f"{where}: {ours.shape} is not {theirs.shape}"
    if not ours.is_floating_point():
        assert torch.equal(ours, theirs), f"{where}: {ours} is not {theirs}"
        return
    (relative, floor), a, b = TOLERANCE[ours.dtype], ours.double(), theirs.double()
    assert torch.equal(a.isnan(), b.isnan()), f"{where}: NaN in other places\n{a}\n{b}"
    assert torch.equal(a.isinf(), b.isinf()), f"{where}: inf in other places\n{a}\n{b}"
    a, b = (t[t.isfinite()] for t in (a, b))
    largest, off = (t.abs().max() if len(b) else 0 for t in (b, a - b))
    assert rounded is not None
    margin = 4 * (rounded.double() - theirs.double()).nan_to_num(0, 0, 0).abs().max() if len(b) else 0
    assert off <= relative * largest + floor + margin, f"{where}: off by {off:.1e} of {largest:.1e}\n{ours}\n{theirs}"


def main() -> None:
    """The command line, as above."""
    kind, count = sys.argv[1], int(sys.argv[2])
    first = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    torch.set_printoptions(threshold=12, edgeitems=2, linewidth=200)
    wrong = []
    for seed in range(first, first + count):
        try:
            check(kind, seed)
        except Exception as error:
            wrong.append(seed)
            print(f"seed {seed}: {type(error).__name__}: {str(error)[:1000]}", flush=True)
    print(
        f"{kind}: {count} sequences from seed {first} on, on {', '.join(engines_to_run())}: {len(wrong)} wrong {wrong}"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
