"""A diagnosis: one forward and backward pass, what it says of each streaming layer, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.spec import PRIOR_SAMPLES, State
from ..core.stream import WINDOW
from ..layers import Norm
from ..recurrent.base import Normalized
from ..training import updates
from ..training.ties import Sync
from .loss import loss_of
from .readings import Reader, Reading

FEWEST_SAMPLES = 8
"""Fewer samples say too little of how samples differ."""

FEWEST_PLACES = 16
"""With fewer places in each sample, its level cannot be told from what it shows."""

RUNS_AWAY = 0.5
"""Deviations of drift, beyond chance. Small networks on digits, one sample an update: 0.2 to 0.9 at rates that train
well, 1.1 to 1.8 at rates that train badly or diverge later on."""

UNSURE = 0.15
"""Deviations of chance in the long-term statistics, from where on evaluation suffers."""

LEVEL, CONTRAST = 1.0, 0.5
"""Limits on the differences between samples: standard deviation of their levels, in deviations inside a sample, and of
the logarithm of their contrasts. Photographs (CIFAR-10) have 0.6 to 0.8 and 0.3 to 0.4."""


class LayerDiagnosis(NamedTuple):
    """The diagnosis of one layer. A number that cannot be known is nan.

    Attributes:
        channels: number of statistics.
        memory: samples that the long-term statistics stand for.
        drift: distance of the present batch's statistics to the long-term ones, √(Δμ² + Δσ²)/s, in deviations of the
            layer; root mean square over channels.
        chance: as much of it as the size of the batch and of the memory explains.
        worst: index of the channel whose drift is largest.
        drift_worst: its drift.
        streamed: what reaches an input through the statistics, root mean square over channels.
        present: the same if the present batch's gradients were all.
        level: how much samples differ in their level, in deviations inside a sample: standard deviation over samples.
        contrast: the same of the logarithm of their deviations.
        waiting: samples that were collected before and are not committed.
        dead: how many channels are constant, or nearly so.
        nonfinite: how many channels met values that are not finite.
        advice: one sentence, or "".
    """

    channels: int
    memory: float
    drift: float
    chance: float
    worst: float
    drift_worst: float
    streamed: float
    present: float
    level: float
    contrast: float
    waiting: int
    dead: float
    nonfinite: float
    advice: str = ""


class Diagnosis:
    """The result of :func:`streamnorm.diagnose`; ``print`` shows it as a table, with the advice below.

    Args:
        layers: by name, from the input to the output.
        samples: how many the batch gave the first layer.
        loss: of the present batch, or None if nothing went back.
    """

    def __init__(self, layers: dict[str, LayerDiagnosis], samples: int, loss: float | None) -> None:
        self.layers, self.samples, self.loss = layers, samples, loss

    @property
    def advice(self) -> dict[str, list[str]]:
        """Each sentence, and the names of the layers that it is for."""
        found: dict[str, list[str]] = {}
        for name, layer in self.layers.items():
            if layer.advice:
                found.setdefault(layer.advice, []).append(name)
        return found

    def __repr__(self) -> str:
        head = ("layer", "channels", "memory", "drift", "chance", "worst channel", "streamed/present gradient")
        rows = [head]
        for name, layer in self.layers.items():
            worst = "–" if math.isnan(layer.worst) else f"{_show(layer.drift_worst)} ({layer.worst:.0f})"
            gradient = _show(layer.streamed / layer.present) if layer.present else "–"
            numbers = (f"{layer.channels}", f"{layer.memory:.0f}", _show(layer.drift), _show(layer.chance))
            rows.append((name, *numbers, worst, gradient))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
        about = f"{self.samples} samples" + ("" if self.loss is None else f", loss {self.loss:.4g}")
        lines.insert(0, f"{about}; drift and chance in deviations, memory in samples")
        lines += [f"{', '.join(names)}: {text}" for text, names in self.advice.items()]
        return "\n".join(lines if self.advice else [*lines, "Nothing to advise."])


def diagnose(model: nn.Module, batch: Any, loss: Callable[..., Tensor] | None = None) -> Diagnosis:
    """Look at the streaming layers of a model with one forward and backward pass.

    The pass is one of training: its statistics and gradients are compared with those that the layers carry. Then all is
    as it was before: statistics of all layers, gradients of parameters, training modes, random numbers. No optimizer
    and no hook of a parameter sees the backward pass; of several processes each looks by itself. Give it a few dozen
    samples, also where training sees one at a time: a single sample says little of where samples come from.

    Args:
        model: holds the layers.
        batch: as for :func:`streamnorm.calibrate`: of a tuple or list the first item goes to the model; of a dict, all
            items as keywords.
        loss: called with the model's output and the other items of the batch, as
            ``torch.nn.functional.cross_entropy`` is with a batch ``(x, target)``. None takes the output's own ``loss``,
            or the output if it is one number; otherwise nothing goes back and the gradients stay unknown.

    Returns:
        What was found; ``print`` shows it as a table.

    Raises:
        ValueError: if the model holds no streaming layer, ``loss`` gives more than one number, or the batch reaches no
            streaming layer.

    Example:
        >>> import streamnorm as sn
        >>> model = nn.Sequential(nn.Linear(3, 8), sn.StreamingNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = sn.diagnose(model, torch.randn(32, 3), lambda y: y.square().mean())
        >>> found.layers["1"].memory
        16
        >>> int(model[1].samples)
        0
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile: hooks would have it compile again
    if isinstance(model, DistributedDataParallel):  # it waits for the backward pass of parameters in all processes
        model = model.module
    named = {n: m for n, m in model.named_modules() if isinstance(m, Norm) and m.stream is not None}
    if not named:
        raise ValueError(
            f"{type(model).__name__} holds no streaming layer to diagnose; call streamnorm.convert(model) first"
        )
    layers = list(named.values())
    found = [_copy(layer.state) for layer in layers]
    with _undisturbed(model), _as_in_training(model, layers), _caught(model) as inputs:
        value = _pass(model, batch, loss)
        present = [_copy(layer.state) for layer in layers]
        reader = Reader(layers)
        reader.take(range(len(layers)), 1, [0] * len(layers), commits_now=True)
        ((_, readings),) = reader.read()
    if not any(int(state.samples) for state in present) and not all(layer.frozen for layer in layers):
        raise ValueError(f"the batch reaches no streaming layer of this {type(model).__name__} that is not frozen")
    rate = _rate(model)
    described = {}
    for i, (name, layer) in enumerate(named.items()):
        evidence = _Evidence(layer, found[i], present[i], readings[i], _between(layer, inputs.get(layer, [])), rate)
        described[name or "(the model)"] = evidence.layer()
    return Diagnosis(described, max(int(state.samples) for state in present), value)


def _copy(state: State) -> State:
    return State(*(tensor.clone() for tensor in state))


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore buffers, training modes and random numbers, whatever happens in between."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in (*model.parameters(), *model.buffers()) if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(device.index or 0 for device in devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for module, mode in modes:
                module.training = mode


@contextmanager
def _as_in_training(model: nn.Module, layers: Sequence[Norm]) -> Iterator[None]:
    """Training mode, and layers that have seen nothing since their last commit.

    They are in this process alone, and the loss has no scale.
    """
    if not model.training:
        model.train()
    ties = [(norm._ties, norm._ties.sync, norm._ties.grad_scale) for norm in model.modules() if isinstance(norm, Norm)]
    try:
        for tie, _, _ in ties:
            tie.sync, tie.grad_scale = Sync("never"), None
        for layer in layers:
            for tensor in layer.state[1:]:
                if tensor is not layer.state.long_grad:
                    tensor.zero_()
        yield
    finally:
        for tie, sync, grad_scale in ties:
            tie.sync, tie.grad_scale = sync, grad_scale


@contextmanager
def _caught(model: nn.Module) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """The inputs of streaming layers, use by use; not those of recurrent ones, whose fast engines would not run."""
    inputs: dict[nn.Module, list[Tensor]] = {}

    def catch(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) == 1 and not kwargs:  # with a mask, samples have elements that do not count
            inputs.setdefault(layer, []).append(args[0].detach())

    recurrent = {norm for module in model.modules() if isinstance(module, Normalized) for norm in module.children()}
    handles = [
        module.register_forward_pre_hook(catch, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, Norm) and module.stream is not None and module not in recurrent
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _pass(model: nn.Module, batch: Any, loss: Callable[..., Tensor] | None) -> float | None:
    """Forward and backward; the loss, if there is one. ``autograd.grad`` leaves the parameters' hooks alone."""
    value = loss_of(model, batch, loss)
    if value is None:
        return None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trained and value.requires_grad:
        torch.autograd.grad(value, trained, allow_unused=True)
    return float(value.detach())


def _rate(model: nn.Module) -> float:
    """The largest learning rate at which parameters of the model were trained last, or nan."""
    groups = [group for optimizer in updates.optimizers_of(model) for group in optimizer.param_groups]
    return max((float(group["lr"]) for group in groups if "lr" in group), default=math.nan)


class _Between(NamedTuple):
    """The differences between the samples of a batch, seen at one layer."""

    samples: int
    variance: Tensor
    """``(G,)``: of the samples' own locations and scales, together; in the units of the input, squared."""
    level: float
    contrast: float


def _between(layer: Norm, inputs: list[Tensor]) -> _Between | None:
    """None where that cannot be said: few samples, or inputs that were not caught."""
    if not inputs or sum(map(len, inputs)) < FEWEST_SAMPLES:
        return None
    formula = layer.formula
    locations, scales, deviations = [], [], []
    for x in inputs:
        view = layer.ref.view(x.shape)
        if view.axes[0] != 0 or 0 in view.axes[1:]:  # the samples fall into parts
            return None
        rest = [axis for axis in view.reduced if axis != 0]
        v = x.double().view(view.split)
        center = layer.state.long[0].double().view(view.stats_shape) if formula.centered else torch.zeros(())
        mean = v.mean(rest) if rest else v
        moment = ((v - center).abs() ** formula.p).mean(rest) if rest else (v - center).abs() ** formula.p
        locations.append(mean.reshape(len(x), -1))
        scales.append(formula.k * moment.reshape(len(x), -1) ** (1 / formula.p))
        places = v[0].numel() // mean[0].numel()
        if places >= FEWEST_PLACES:
            deviations.append(v.std(rest).reshape(len(x), -1))
    location, scale = torch.cat(locations), torch.cat(scales)
    level = contrast = math.nan
    if deviations:
        inside = torch.cat(deviations)
        level = float((location.var(0).mean() / inside.square().mean()).sqrt())
        contrast = float((inside + 1e-3 * inside.mean(0) + 1e-12).log().mean(1).std())
    return _Between(len(location), location.var(0) + scale.var(0), level, contrast)


class _Evidence:
    """The evidence about one layer, and the conclusions from it."""

    def __init__(
        self, layer: Norm, found: State, present: State, reading: Reading, between: _Between | None, rate: float
    ) -> None:
        self.own, self.found, self.present, self.reading, self.between = layer, found, present, reading, between
        self.rate, self.formula = rate, layer.formula
        self.waiting = int(found.samples)
        # Of a weight update, as far as can be known. Under the window rule that hardly matters below the window.
        self.samples = float(self.waiting or (int(present.samples) if self.formula.window is None else 1))
        self.seen = int(found.seen)
        weights = self.formula.weights(self.samples, self.samples, self.seen)
        self.kept = weights.kappa[0]
        windowed = self.formula.window is not None
        self.memory = self.formula.lasting(self.seen) if windowed else weights.memory(self.samples)
        self.s = (self._sigma(found.long[1]).square() + self.formula.eps).sqrt()

    def _sigma(self, m: Tensor) -> Tensor:
        return self.formula.k * m.double() ** (1 / self.formula.p)

    def layer(self) -> LayerDiagnosis:
        """All of it."""
        reading, between = self.reading, self.between
        return LayerDiagnosis(
            channels=self.found.count.numel(),
            memory=self.memory,
            drift=reading.drift,
            chance=self.chance(),
            worst=reading.worst if math.isfinite(reading.drift_worst) else math.nan,
            drift_worst=reading.drift_worst,
            streamed=reading.streamed,
            present=reading.present,
            level=math.nan if between is None else between.level,
            contrast=math.nan if between is None else between.contrast,
            waiting=self.waiting,
            dead=reading.dead,
            nonfinite=reading.nonfinite,
            advice=self.advice() if not self.own.frozen else "",
        )

    def chance(self) -> float:
        """Deviations that the sizes of the batch and of the memory explain."""
        batch = float(self.present.samples) if self.between is None else self.between.samples
        return math.sqrt(self._variance() * (1 / max(1.0, batch)) + self.unsure(self.samples) ** 2)

    def unsure(self, samples: float) -> float:
        """Deviations of chance in the long-term statistics, where every weight update sees this many samples.

        An average that keeps a share κ of itself has (1 − κ)/(1 + κ) of the variance of what it averages.
        """
        kept = self.formula.weights(samples, samples, self.seen).kappa[0]
        return math.sqrt(self._variance() * (1 - kept) / (1 + kept) / max(1.0, samples))

    def _variance(self) -> float:
        """Between samples, in squared deviations; without samples to compare that of normal numbers."""
        if self.between is None:
            return 1.5
        return float((self.between.variance / self.s.square()).mean())

    def advice(self) -> str:
        """The first sentence that fits, or an empty one."""
        first = (
            self._uncommitted(),
            self._unfounded(),
            self._not_finite(),
            self._differs(),
            self._runaway(),
            self._short(),
        )
        return next(filter(None, first), "")

    def _window(self) -> float:
        return WINDOW if self.formula.window is None else self.formula.window

    def _starts(self) -> Tensor:
        """The prior, as the first statistics."""
        assert self.own.stream is not None
        return torch.tensor(self.own.stream.prior, dtype=self.found.long.dtype).unsqueeze(1)

    def _uncommitted(self) -> str:
        never = bool((self.found.long.cpu() == self._starts()).all())
        if self.waiting <= (2 if never else 20) * self._window():
            return ""
        return (
            f"{self.waiting} samples collected and {'never' if never else 'not'} committed: name the optimizer with "
            "streamnorm.bind(model, optimizer), or call streamnorm.commit(model) after each weight update"
        )

    def _unfounded(self) -> str:
        if self.waiting or not bool((self.found.long.cpu() == self._starts()).all()):
            return ""
        return "no statistics yet: train, or collect them with streamnorm.calibrate(model, batches)"

    def _not_finite(self) -> str:
        if self.reading.nonfinite == 0 or math.isnan(self.reading.nonfinite):
            return ""
        lower = "a lower learning rate" if math.isnan(self.rate) else f"a learning rate of {self.rate / 4:.3g}"
        return f"values that are not finite: go back to a checkpoint from before, and go on with {lower}"

    def _runaway(self) -> str:
        beyond = math.sqrt(max(0.0, self.reading.drift**2 - self.chance() ** 2))
        if beyond <= RUNS_AWAY or self._is_short(beyond):
            return ""
        rate = "a quarter of the learning rate" if math.isnan(self.rate) else f"a learning rate of {self.rate / 4:.3g}"
        trial = f"rate too high for this memory: try {rate}"
        if self._remembers_start():
            fading = 3 * self.memory if self.formula.window is None else 10 * PRIOR_SAMPLES
            return f"{trial}, unless fewer than about {fading:.0f} samples were seen: the start is still there"
        return trial

    def _remembers_start(self) -> bool:
        """Whether the long-term statistics lie on the way from the prior to the present ones."""

        def deviations(state: Tensor) -> Tensor:
            return torch.stack((state[0].double(), self._sigma(state[1]))).cpu() / self.s.cpu()

        start = deviations(self._starts().expand_as(self.found.long))
        gone, way = deviations(self.found.long) - start, deviations(self.present.short) - start
        share = float((gone * way).sum() / way.square().sum())
        left = float((gone - share * way).square().sum() / (way - gone).square().sum())
        return 0 <= share < 0.9 and left < 0.4

    def _differs(self) -> str:
        if self.between is None or not (self.between.level > LEVEL or self.between.contrast > CONTRAST):
            return ""
        return (
            f"samples differ in level (by {_show(self.between.level)} deviations) and contrast (by a factor of "
            f"{_show(math.exp(self.between.contrast))}): Sample Normalization fits better, such as "
            'streamnorm.SampleNorm(channels, "channel")'
        )

    def _short(self) -> str:
        beyond = math.sqrt(max(0.0, self.reading.drift**2 - self.chance() ** 2))
        if self.unsure(self.samples) > UNSURE or self._is_short(beyond):
            return (
                f"memory too short for evaluation ({self._length()}): calibrate with streamnorm.calibrate(model, "
                "batches) before it"
            )
        return ""

    def _is_short(self, beyond: float) -> bool:
        """Whether drift is what statistics of a few updates of one sample would have: their number is not known."""
        if self.waiting or self.formula.window is not None:
            return False
        return beyond > 2 * UNSURE and beyond < 2 * self.unsure(1)

    def _length(self) -> str:
        if self.formula.window is None:
            return f"about {1 / (1 - self.kept):.2g} weight updates" if self.kept < 1 else "all weight updates"
        return f"{self.memory:.0f} samples"


def _show(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2g}" if abs(value) < 100 else f"{value:.3g}"
