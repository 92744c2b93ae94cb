"""A suggestion: a learning rate and a memory to begin with, found by short trainings of copies of a model."""

from __future__ import annotations

import copy
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from ..core import arguments
from ..layers import Norm
from ..training import updates as weight_updates
from ..training.accumulation import accumulate as groups_of
from ..training.accumulation import num_samples
from ..training.surroundings import optimizers_in
from ..training.ties import Sync
from .loss import loss_of

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 0.3, 1.0)
"""Learning rates to try."""

MOMENTUM = partial(SGD, momentum=0.9)

FACTOR = 4.0
"""By how much a memory that is tried is longer or shorter than the last one."""

FURTHEST = 2
"""So many times longer memories are tried as long as they help, and shorter ones."""

FEWEST, MOST = 20, 500
"""Weight updates of a training. Fewer do not show which rates diverge."""

USUAL = 0.7
"""As many of the trainings are usually made, as a share; the others would be at rates that are too high."""

HELD_OUT = 0.25
"""As many mini-batches to evaluate on, as a share of those that are trained on."""

CLEARLY = 2.0
"""Standard errors of the mean difference, beyond which one of two trainings is better."""


class Suggestion(NamedTuple):
    """The result of :func:`streamnorm.suggest`; ``print`` shows all that was tried.

    Attributes:
        rate: the learning rate.
        memory: by which number to multiply the memories that the layers have: 1 if others are not clearly better.
        windows: the memory of statistics, in samples, that this comes to, by the name of the layer.
        rates: the mean training loss of the second half at each rate; infinite where it was not finite at some time.
        memories: the same by memory, at the suggested rate.
        updates: weight updates of each training.
        samples: samples of each weight update, on average.
        seconds: how long it took.
    """

    rate: float
    memory: float
    windows: dict[str, float]
    rates: dict[float, float]
    memories: dict[float, float]
    updates: int
    samples: float
    seconds: float

    @property
    def window(self) -> float | None:
        """The memory of all layers; None where they have different ones, or none."""
        each = {*self.windows.values()}
        return each.pop() if len(each) == 1 else None

    def apply(self, model: nn.Module) -> None:
        """Give the streaming layers of the model, or of another one like it, the suggested memory.

        Statistics stay.
        """
        layers = _with_windows(_unwrapped(model))
        for name, window in self.windows.items():
            _set_window(layers[name], window)

    def __repr__(self) -> str:
        many = f"{self.updates} weight updates of {self.samples:.4g} samples"
        trials = len(self.rates) + max(0, len(self.memories) - 1)
        lines = [f"rate {self.rate:g}{self._of_memory()}: {trials} trainings of {many}, {self.seconds:.0f} s"]
        lines += [f"  rate {rate:<8g} loss {_show(loss)}" for rate, loss in self.rates.items()]
        lines += [f"  memory ×{memory:<6g} loss {_show(loss)}" for memory, loss in sorted(self.memories.items())]
        if self.rate in (min(self.rates), max(self.rates)) and len(self.rates) > 1:
            edge = "lowest" if self.rate == min(self.rates) else "highest"
            lines.append(f"It is the {edge} rate that was tried: give others with rates=")
        return "\n".join(lines)

    def _of_memory(self) -> str:
        if not self.windows:
            return ""
        return f", memory ×{self.memory:g}" if self.window is None else f", window {self.window:g}"


def suggest(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Callable[..., Tensor] | None = None,
    optimizer: Callable[..., Any] = MOMENTUM,
    *,
    accumulate: int = 1,
    rates: Sequence[float] = RATES,
    updates: int | None = None,
    seconds: float = 75.0,
) -> Suggestion:
    """Find a learning rate and a memory to begin with: a range test.

    Copies of the model are trained for a while, from the same weights on the same mini-batches, at rates from the
    lowest up to where training gets worse. Suggested is the smallest rate whose training loss is not clearly above the
    best one: a rate that is too high often diverges later. At this rate shorter and longer memories of the streaming
    layers are tried. Another memory is suggested only if its training loss is clearly lower and its loss in evaluation
    is no higher.

    The model, its statistics, gradients, hooks, training modes, and all random numbers stay as they are, those of the
    loader included. So does every optimizer. The mini-batches are read once and kept in memory meanwhile: as many as
    one training takes, and a quarter more. What forward hooks of the model write elsewhere, they write here too.

    It is a beginning and not the end: a short training likes higher rates than a long one, and a rate that falls later
    on may begin higher. Use the same samples per weight update as in training: the best rate is about proportional to
    their number. Of several processes each looks by itself: ask one of them.

    Args:
        model: what is to be trained, with or without streaming layers.
        loader: mini-batches as the model takes them, such as a DataLoader. A generator is used up.
        loss: called with the model's output and the other items of the mini-batch, as
            ``torch.nn.functional.cross_entropy`` is with ``(x, target)``. None takes the output's own ``loss``, or the
            output if it is one number.
        optimizer: ``optimizer(parameters, lr=rate)`` makes one, such as ``torch.optim.AdamW``. Default: SGD with a
            momentum of 0.9.
        accumulate: mini-batches for each weight update, ≥ 1.
        rates: learning rates to try, above 0.
        updates: weight updates of each training, ≥ 1. Default: as many as fit into ``seconds``, at most 500.
        seconds: about how long it may take.

    Returns:
        What was found.

    Raises:
        ValueError: if there is no mini-batch, no parameter to train, or no loss; if ``seconds`` are too few for twenty
            weight updates at each rate; or if training is not finite at any rate.
        TypeError: if ``optimizer`` makes no optimizer.

    Example:
        >>> import streamnorm as sn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(2, 8), sn.StreamingNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(400, 2)
        >>> target = (x[:, 0] * x[:, 1] > 0).long()
        >>> found = sn.suggest(
        ...     model, zip(x.split(4), target.split(4)), nn.functional.cross_entropy, rates=(1e-4, 1e-2), updates=75
        ... )
        >>> found.rate
        0.01
        >>> found.apply(model)
        >>> trained = torch.optim.SGD(model.parameters(), lr=found.rate, momentum=0.9)
    """
    began = time.perf_counter()
    model = _unwrapped(model)
    rates = _rates(rates)
    seconds = _positive(seconds, "seconds is how long it may take, a number above 0")
    if updates is not None:
        updates = arguments.whole(updates, "updates is the number of weight updates of each training, an integer ≥ 1")
    per_update = arguments.whole(accumulate, "accumulate is the number of mini-batches per update, an integer ≥ 1")
    batches = _Batches(loader)
    with _random_numbers_kept(model, loader):
        course = _Course(model, batches, loss, optimizer, per_update)
        windows = _with_windows(model)
        most = len(rates) + 2 * FURTHEST * bool(windows)
        course.updates = updates or _fitting(course, rates, math.ceil(USUAL * most), seconds)
        by_rate = _climb(course, rates)
        rate = _smallest_of_the_best(by_rate)
        by_memory = _memories(course, rate, by_rate[rate]) if windows else {}
    memory = _best_memory(by_memory)
    return Suggestion(
        rate,
        memory,
        {name: memory * _window(layer) for name, layer in windows.items()},
        {tried: trial.loss for tried, trial in by_rate.items()},
        {tried: trial.loss for tried, trial in by_memory.items()},
        course.updates,
        sum(map(num_samples, batches.first(course.updates * per_update))) / course.updates,
        time.perf_counter() - began,
    )


class _Trial(NamedTuple):
    """A training: the loss of each weight update, before it was made, and that of evaluation at its end."""

    losses: list[float]
    evaluated: float

    @property
    def second_half(self) -> Tensor:
        return torch.tensor(self.losses[len(self.losses) // 2 :], dtype=torch.float64)

    @property
    def loss(self) -> float:
        mean = float(self.second_half.mean())
        return mean if math.isfinite(mean) else math.inf

    def is_clearly_better_than(self, other: _Trial) -> bool:
        """Whether its loss is lower, beyond chance; both have seen the same samples at the same time."""
        if not (math.isfinite(self.loss) and math.isfinite(other.loss)):
            return math.isfinite(self.loss)
        gain = other.second_half - self.second_half
        if len(gain) == 1:
            return bool(gain > 0)
        return bool(gain.mean() > CLEARLY * gain.std() / math.sqrt(len(gain)))


class _Batches:
    """The mini-batches of a loader: read when they are first needed, and kept."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._source = iter(_later(loader))
        self._kept: list[Any] = []

    def first(self, count: int) -> list[Any]:
        """Give so many mini-batches to train on."""
        return self.parts(count)[0]

    def parts(self, count: int) -> tuple[list[Any], list[Any]]:
        """Give so many mini-batches to train on, and others to evaluate on.

        A loader that has too few is trained on several times, but for its last mini-batches.
        """
        held = math.ceil(HELD_OUT * count)
        self._kept += islice(self._source, max(0, count + held - len(self._kept)))
        if not self._kept:
            raise ValueError("there are no mini-batches in loader; a generator that was used up must be made again")
        cut = min(count, math.ceil(len(self._kept) / (1 + HELD_OUT)))
        held_out = self._kept[cut : cut + held]
        return [self._kept[i % cut] for i in range(count)], held_out or self._kept


def _later(loader: Iterable[Any]) -> Iterator[Any]:
    """A loader's mini-batches; nothing is asked of it, random numbers among it, before the first is."""
    yield from arguments.iterator(loader, "loader")


class _Course:
    """The setup of all trainings: the model that they start from, the mini-batches, the loss and the optimizer."""

    def __init__(
        self,
        model: nn.Module,
        batches: _Batches,
        loss: Callable[..., Tensor] | None,
        optimizer: Callable[..., Any],
        per_update: int,
    ) -> None:
        self.model, self.batches, self.loss, self.optimizer = model, batches, loss, optimizer
        self.per_update = per_update
        self.updates = FEWEST

    def train(self, rate: float, memory: float = 1.0, updates: int | None = None) -> _Trial:
        """Train a copy from the start; one that diverges ends there."""
        model = self._copy(memory)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = self.optimizer(trained, lr=rate)
        _set_aside(model, optimizer)
        count = self.per_update * (updates or self.updates)
        batches, held_out = self.batches.parts(count)
        losses: list[float] = []
        with torch.random.fork_rng(_devices(model)), _quiet():
            for group in groups_of(batches, self.per_update):
                optimizer.zero_grad()
                losses.append(self._accumulate(model, group))
                if not math.isfinite(losses[-1]):
                    return _Trial([math.inf], math.inf)
                optimizer.step()
            return _Trial(losses, self._evaluate(model, held_out))

    def _copy(self, memory: float) -> nn.Module:
        try:
            model = copy.deepcopy(self.model)
        except RuntimeError as error:
            raise ValueError(f"{type(self.model).__name__} cannot be copied, and copies are trained: {error}") from None
        if not model.training:
            model.train()
        for layer in model.modules():
            if isinstance(layer, Norm):
                layer._ties.sync = Sync("never")
        for layer in _with_windows(model).values():
            _set_window(layer, memory * _window(layer))
        return model

    def _accumulate(self, model: nn.Module, group: Sequence[tuple[Any, float]]) -> float:
        total = 0.0
        for batch, weight in group:
            value = self._loss(model, batch)
            (weight * value).backward()
            total += weight * value.item()
        return total

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        value = loss_of(model, batch, self.loss)
        if value is None:
            raise ValueError(
                "there is no loss: give one that is called with the model's output and the rest of a mini-batch, such "
                "as loss=torch.nn.functional.cross_entropy"
            )
        return value

    @torch.no_grad()
    def _evaluate(self, model: nn.Module, batches: Sequence[Any]) -> float:
        """The mean loss in evaluation; nan where there is none."""
        model.eval()
        values = [loss_of(model, batch, self.loss) for batch in batches]
        return sum(math.nan if value is None else value.item() for value in values) / len(values)


def _climb(course: _Course, rates: Sequence[float]) -> dict[float, _Trial]:
    """Trainings from the lowest rate up, to the second in a row that is clearly worse than the best one."""
    trials: dict[float, _Trial] = {}
    worse = 0
    for rate in rates:
        trials[rate] = course.train(rate)
        worse = worse + 1 if _best(trials).is_clearly_better_than(trials[rate]) else 0
        if worse == 2:
            break
    if not math.isfinite(_best(trials).loss):
        raise ValueError(f"training is not finite at any rate from {rates[0]:g} on: look at the loss and the data")
    return trials


def _best(trials: dict[float, _Trial]) -> _Trial:
    return min(trials.values(), key=lambda trial: trial.loss)


def _smallest_of_the_best(trials: dict[float, _Trial]) -> float:
    """The smallest rate whose training is not clearly worse than the best one."""
    best = _best(trials)
    return next(rate for rate, trial in trials.items() if not best.is_clearly_better_than(trial))


def _memories(course: _Course, rate: float, usual: _Trial) -> dict[float, _Trial]:
    """Trainings with memories that get shorter, and longer, as long as that helps."""
    trials = {1.0: usual}
    for factor in (1 / FACTOR, FACTOR):
        last = usual
        for step in range(1, FURTHEST + 1):
            trials[factor**step] = course.train(rate, factor**step)
            if not _improves(trials[factor**step], last):
                break
            last = trials[factor**step]
    return trials


def _improves(trial: _Trial, usual: _Trial) -> bool:
    """Whether training is clearly better, and evaluation no worse."""
    return trial.is_clearly_better_than(usual) and not trial.evaluated > usual.evaluated


def _best_memory(trials: dict[float, _Trial]) -> float:
    better = [memory for memory, trial in trials.items() if memory == 1 or _improves(trial, trials[1.0])]
    return min(better, key=lambda memory: trials[memory].loss, default=1.0)


def _fitting(course: _Course, rates: Sequence[float], trainings: int, seconds: float) -> int:
    """The number of weight updates that fit into the time."""
    course.train(rates[0], updates=1)  # what happens once, such as compiling, is not counted
    few = 3
    began = time.perf_counter()
    course.train(rates[0], updates=few)
    each = (time.perf_counter() - began) / few
    fitting = int(0.9 * seconds / trainings / each)
    if fitting < FEWEST:
        raise ValueError(
            f"seconds={seconds:g} are enough for {fitting} weight updates in each of about {trainings} trainings, and "
            f"fewer than {FEWEST} say little: give seconds={math.ceil(1.2 * FEWEST * trainings * each)}, or fewer rates"
        )
    return min(fitting, MOST)


def _unwrapped(model: nn.Module) -> nn.Module:
    model = getattr(model, "_orig_mod", model)  # of torch.compile: each copy would be compiled
    if isinstance(model, DistributedDataParallel):
        model = model.module
    arguments.check_model(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient: there is nothing to train")
    return model


def _rates(rates: Any) -> tuple[float, ...]:
    meaning = "rates are the learning rates to try, numbers above 0"
    found = arguments.reals(rates, meaning)
    if not found or not all(0 < rate < math.inf for rate in found):
        raise ValueError(f"{meaning}, got {rates!r}")
    return tuple(sorted(set(found)))


def _positive(value: Any, meaning: str) -> float:
    number = arguments.real(value, meaning)
    if not 0 < number < math.inf:
        raise ValueError(f"{meaning}, got {value!r}")
    return number


def _with_windows(model: nn.Module) -> dict[str, Norm]:
    """The streaming layers whose memory is a window, by name."""
    streaming = ((name, module) for name, module in model.named_modules() if isinstance(module, Norm))
    return {name: layer for name, layer in streaming if layer.stream is not None and layer.stream.window is not None}


def _window(layer: Norm) -> float:
    assert layer.formula.window is not None
    return layer.formula.window


def _set_window(layer: Norm, window: float) -> None:
    assert layer.stream is not None
    layer.set_stream(replace(layer.stream, window=window))


def _set_aside(model: nn.Module, optimizer: Any) -> None:
    found = optimizers_in(optimizer)
    if not found:
        raise TypeError(
            "optimizer is a function optimizer(parameters, lr=rate) that makes one, such as torch.optim.AdamW; in the "
            f"{type(optimizer).__name__} that it made there is no torch.optim.Optimizer"
        )
    weight_updates.set_aside(model, found)


def _devices(model: nn.Module) -> list[int]:
    devices = {tensor.device for tensor in chain(model.parameters(), model.buffers()) if tensor.device.type == "cuda"}
    return sorted(device.index or 0 for device in devices)


@contextmanager
def _quiet() -> Iterator[None]:
    """Rates at which training runs away are tried on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* runs away: ")
        yield


@contextmanager
def _random_numbers_kept(model: nn.Module, loader: Any) -> Iterator[None]:
    """Restore random numbers: of PyTorch, Python and NumPy, and of generators that a DataLoader was given."""
    owners = (
        loader,
        getattr(loader, "sampler", None),
        getattr(getattr(loader, "batch_sampler", None), "sampler", None),
    )
    found = (getattr(owner, "generator", None) for owner in owners)
    generators = [generator for generator in found if isinstance(generator, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    numpy = sys.modules.get("numpy")
    state, of_numpy = random.getstate(), None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(_devices(model)):
        try:
            yield
        finally:
            random.setstate(state)
            if numpy is not None:
                numpy.random.set_state(of_numpy)
            for generator, before in zip(generators, states):
                generator.set_state(before)


def _show(loss: float) -> str:
    return f"{loss:.4g}" if math.isfinite(loss) else "not finite"
