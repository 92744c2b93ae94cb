"""The monitor: every so many weight updates it reads what the streaming layers of a model do."""

from __future__ import annotations

import atexit
import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ..layers import Norm
from ..training import updates
from ..training.streaming import Streaming
from . import page
from .output import Output
from .readings import Reader, Reading
from .record import Event, LayerFacts, Record, Sample

PATIENCE = 1.0
"""Seconds between two evaluations of snapshots."""

MOST_WAITING = 4_000_000
"""Numbers in snapshots that wait for their evaluation, at most."""

MOST_GROUPS = 64
"""Different sets of layers that commit together, at most, before counting them starts again."""

LONG_IDLE = 1000
"""Weight updates after which a layer that collects and does not commit is worth a warning: a GAN may train its critic
a hundred times before its generator."""

Sink = Callable[[Sample], Any]


def monitor(
    model: nn.Module,
    every: int = 50,
    out: str | Path | None = None,
    sinks: Iterable[Sink] = (),
    name: str | None = None,
) -> Monitor:
    """Watch the streaming layers of a model while it trains.

    Every ``every`` weight updates it reads the statistics of each layer: location and scale, drift, the share of the
    memory that the update replaced, streamed and present gradients, channels that are dead or explode, values that
    are not finite (:class:`streamnorm.insight.Reading`). They are read off the layers' state, just before the layers
    commit: nothing is added to a forward or backward pass, and training is the same with and without it.

    It is a context manager, and has ``start`` and ``stop``. With ``out`` it writes, while training runs, a log
    ``monitor.jsonl`` and ``monitor.html``, a page that refreshes itself in a browser and stays as the record. Both are
    bounded in size: on long training their resolution is halved again and again, and where there are no sinks, samples
    that would not be kept are not taken. Of several processes the first one watches.

    Args:
        model: holds the layers.
        every: weight updates from one sample to the next, ≥ 1.
        out: a folder for the log and the page, or None for neither.
        sinks: functions that are called with each :class:`streamnorm.insight.Sample`, about a second after its update
            at the latest. One that has a method ``close`` is closed by ``stop``.
            :func:`streamnorm.insight.tensorboard` and :func:`streamnorm.insight.wandb` make some.
        name: what is trained, for the page. Default: the name of the model's class.

    Returns:
        The monitor, which does not run yet.

    Raises:
        ValueError: if the model holds no streaming layer, or ``every`` is not a whole number above 0.

    Example:
        >>> import streamnorm as sn
        >>> model = nn.Sequential(nn.Linear(3, 8), sn.StreamingNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with sn.monitor(model, every=10) as watching:
        ...     for _ in range(30):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(4, 3)).square().mean().backward()
        ...         optimizer.step()
        >>> [sample.update for sample in watching.record.samples]
        [1, 10, 20, 30]
        >>> watching.record.samples[-1].layers["1"].samples
        4
    """
    return Monitor(model, every, out, sinks, name)


class Monitor:
    """A monitor of the streaming layers of a model; :func:`streamnorm.monitor` makes it and explains the arguments."""

    def __init__(
        self, model: nn.Module, every: int, out: str | Path | None, sinks: Iterable[Sink], name: str | None
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every is a number of weight updates, a whole number above 0, got {every!r}")
        streaming = [(n, m) for n, m in model.named_modules() if isinstance(m, Norm) and m.stream is not None]
        if not streaming:
            raise ValueError(
                f"{type(model).__name__} holds no streaming layer to monitor; call streamnorm.convert(model) first"
            )
        self.model, self.every = model, every
        self._layers = [layer for _, layer in streaming]
        self._facts = [_facts(where, layer) for where, layer in streaming]
        self._name = type(model).__name__ if name is None else name
        self._sinks = list(sinks)
        self._folder = None if out is None else Path(out).expanduser()
        self._run: _Run | None = None
        self._record = self._fresh_record()

    def start(self, update: int = 0) -> Monitor:
        """Begin to watch.

        Args:
            update: the number of weight updates made before. If above 0 and there is a log of the same layers in the
                folder, the log goes on from there; what it says of later updates is dropped.

        Raises:
            RuntimeError: if it runs already.
        """
        if self._run is not None:
            raise RuntimeError("this monitor runs already: stop() it first")
        self._record = self._fresh_record()
        output = None
        if not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:
            if self._folder is not None:
                output = Output(self._folder)
                self._record = output.begin(self._record, update)
            self._record.updates = update
            self._run = _Run(self.model, self._layers, self._record, output, self._sinks)
        return self

    def stop(self, status: str = "finished") -> None:
        """Take a last sample, finish log and page, and close the sinks. A second call does nothing."""
        run, self._run = self._run, None
        if run is not None:
            run.end(status)

    @property
    def running(self) -> bool:
        """Whether it watches now."""
        return self._run is not None

    @property
    def record(self) -> Record:
        """The samples and events of the run that goes on, or of the last one."""
        if self._run is not None:
            self._run.evaluate()
        return self._record

    def note(self, kind: str, text: str) -> None:
        """Add an event of your own to the record, such as ``note("checkpoint", "epoch 3")``.

        Args:
            kind: ``"update"``, ``"checkpoint"``, ``"rate"`` or ``"warning"``, which the page shows in their colours, or
                a word of your own.
            text: one line.
        """
        if self._run is not None:
            self._run.note(kind, text)

    def __enter__(self) -> Monitor:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop("finished" if kind is None else f"stopped by {kind.__name__}")

    def _repr_html_(self) -> str:
        """The page, where a notebook shows this object."""
        return page.embedded(self.record)

    def _fresh_record(self) -> Record:
        return Record(self._name, self.every, self._facts, time.time())


class _Run:
    """From start to stop: counts weight updates, takes snapshots where they are due, and passes on what they say."""

    def __init__(
        self, model: nn.Module, layers: list[Norm], record: Record, output: Output | None, sinks: list[Sink]
    ) -> None:
        self._layers, self._record, self._output, self._sinks = layers, record, output, sinks
        self._index = {id(layer): i for i, layer in enumerate(layers)}
        self._parameters = {id(parameter) for parameter in model.parameters()}
        self._first = record.updates + 1
        self._began = time.perf_counter() - record.seconds
        self._evaluated = -math.inf
        self._reader = Reader(layers)
        self._groups: dict[tuple[int, ...], _Group] = {}
        self._commits = [0] * len(layers)  # since each layer's last snapshot, without those that groups still hold
        self._backward = -1
        self._open: _Tick | None = None
        self._ticks: list[_Tick] = []
        self._rates: dict[int, tuple[float, float]] = {}  # of an optimizer: the last rate, and the last that was noted
        self._warned: set[tuple[str, str]] = set()
        self._failure: str | None = None
        self._handles = [
            updates.before_commit(self._notice),
            model.register_state_dict_post_hook(_Tell(self, "state_dict was read")),
            model.register_load_state_dict_post_hook(_Tell(self, "state_dict was loaded")),
        ]
        atexit.register(self.end, "stopped by the end of the program")

    def note(self, kind: str, text: str, ahead: int = 0) -> None:
        """Record an event."""
        event = Event(self._record.updates + ahead, round(self._seconds(), 3), kind, text)
        if self._record.note(event) and self._output is not None:
            self._output.write(event)

    def _seconds(self) -> float:
        self._record.seconds = time.perf_counter() - self._began
        return self._record.seconds

    def _notice(self, layers: Sequence[Streaming], optimizer: Optimizer | None) -> None:
        """Listen to a weight update. This is called in every step of training; most calls only count."""
        key = (id(optimizer), *map(id, layers))
        group = self._groups.get(key) or self._meet(key, optimizer)
        if not group.ours:
            return
        record, backward = self._record, torch._C._current_graph_task_id()
        due = False
        if backward == -1 or backward != self._backward:  # one optimizer per parameter: a backward pass is one update
            record.updates += 1
            due = record.updates == self._first
            if record.updates % record.every == 0:  # without sinks, no sample that nobody would keep
                due = due or bool(self._sinks) or record.updates % record.distance == 0
        self._backward = backward
        if not due and self._open is None:
            group.commits += 1
            return
        try:
            self._sample(group, optimizer, due)
        except Exception as error:  # what goes wrong here must not end the training
            self._failure = type(error).__name__
            self._release()
            warnings.warn(
                f"streamnorm.monitor stopped at weight update {record.updates}, and training goes on: {error!r}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _meet(self, key: tuple[int, ...], optimizer: Optimizer | None) -> _Group:
        """A set of layers that commit together at the steps of an optimizer, when it is seen for the first time."""
        if len(self._groups) >= MOST_GROUPS:
            self._collect_counts()
            self._groups.clear()
        members = [self._index[layer] for layer in key[1:] if layer in self._index]
        trained = [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
        group = _Group(members, bool(members) or any(id(parameter) in self._parameters for parameter in trained))
        self._groups[key] = group
        if group.ours:
            who = "streamnorm.commit" if optimizer is None else type(optimizer).__name__
            self.note("update", f"{who}: {len(members)} of {len(self._layers)} layers commit", ahead=1)
        return group

    def _sample(self, group: _Group, optimizer: Optimizer | None, due: bool) -> None:
        """Take snapshots of layers that commit now. A sample is open until all that usually commit have done so."""
        self._collect_counts()
        if due:
            self._close()
            rate = self._rate(optimizer)
            usual = {i for i, commits in enumerate(self._commits) if commits}
            self._open = _Tick(self._record.updates, self._seconds(), rate, usual.union(group.members))
        assert self._open is not None
        ready = [i for i in group.members if i not in self._open.seen]
        for i in group.members:
            self._commits[i] += i in self._open.seen
        self._take(ready, commits_now=True)
        if self._open.expected <= self._open.seen:
            self._close()

    def _collect_counts(self) -> None:
        for group in self._groups.values():
            if group.commits:
                for i in group.members:
                    self._commits[i] += group.commits
                group.commits = 0

    def _take(self, which: list[int], commits_now: bool) -> None:
        assert self._open is not None
        if which:
            self._open.snapshots += 1
            self._open.seen.update(which)
            self._reader.take(which, self._record.updates, self._commits, commits_now)
            for i in which:
                self._commits[i] = 0

    def _close(self) -> None:
        """End the open sample: layers that did not commit are read as they are."""
        if self._open is not None:
            self._take([i for i in range(len(self._layers)) if i not in self._open.seen], commits_now=False)
            self._ticks.append(self._open)
            self._open = None
            if time.perf_counter() - self._evaluated > PATIENCE or self._reader.waiting > MOST_WAITING:
                self.evaluate()

    def evaluate(self) -> None:
        """Turn the snapshots of closed samples into numbers, and hand these on."""
        if self._ticks and self._open is None:
            ticks, self._ticks = self._ticks, []
            readings = iter(self._reader.read())
            for tick in ticks:
                found: dict[int, Reading] = {}
                for _, some in islice(readings, tick.snapshots):
                    found.update(some)
                named = {layer.name: found[i] for i, layer in enumerate(self._record.layers)}
                self._pass_on(Sample(tick.update, tick.seconds, tick.rate, named))
        if self._output is not None:
            self._output.refresh(self._record)
        self._evaluated = time.perf_counter()

    def _pass_on(self, sample: Sample) -> None:
        self._record.add(sample)
        if self._output is not None and self._record.keeps(sample):
            self._output.write(sample)
        self._warn(sample)
        for sink in tuple(self._sinks):
            self._tell(sink, partial(sink, sample))

    def _warn(self, sample: Sample) -> None:
        """Note what is wrong with layers, once for each, and in one event where several are concerned at once."""
        news: dict[str, list[tuple[str, str]]] = {}
        for name, reading in sample.layers.items():
            for subject, text in _concerns(reading, self._record.every):
                if (name, subject) not in self._warned:
                    self._warned.add((name, subject))
                    news.setdefault(subject, []).append((name, text))
        for concerned in news.values():
            name, text = concerned[0]
            others = len(concerned) - 1
            likewise = f"; {others} other {'layer' if others == 1 else 'layers'} likewise" if others else ""
            self.note("warning", f"{name}: {text}{likewise}", ahead=sample.update - self._record.updates)

    def _tell(self, sink: Sink, what: Callable[[], Any]) -> None:
        try:
            what()
        except Exception as error:  # such as a logger without a network
            self._sinks.remove(sink)
            warnings.warn(
                f"streamnorm.monitor hands no more samples to {sink!r}, and training goes on: {error!r}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _rate(self, optimizer: Optimizer | None) -> float:
        """The largest learning rate of an optimizer. A jump of it is an event, a slow change each time it doubles."""
        rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group] if optimizer else []
        rate = max(rates, default=math.nan)
        if rates:
            last, noted = self._rates.get(id(optimizer), (rate, rate))
            if not _near(rate, last, 1.25) or not _near(rate, noted, 2):
                self.note("rate", f"learning rate {noted:.3g} to {rate:.3g}")
                noted = rate
            self._rates[id(optimizer)] = rate, noted
        return rate

    def end(self, status: str) -> None:
        """Take a last sample, and finish."""
        self._release()
        if self._failure is None:
            self._sample_the_end()
        self._record.status = status if self._failure is None else f"stopped by {self._failure}"
        self._seconds()
        if self._output is not None:
            for sample in self._record.samples[-1:]:
                if not self._record.keeps(sample):
                    self._output.write(sample)
            self._output.end(self._record)
        for sink in tuple(self._sinks):
            close = getattr(sink, "close", None)
            if close is not None:
                self._tell(sink, close)
        if self._record.updates < self._first and any(layer.state.samples > 0 for layer in self._layers):
            warnings.warn(_NO_UPDATE, RuntimeWarning, stacklevel=3)

    def _sample_the_end(self) -> None:
        self._collect_counts()
        self._close()
        self.evaluate()
        if self._record.updates >= self._first and self._record.samples[-1].update < self._record.updates:
            self._open = _Tick(self._record.updates, self._seconds(), math.nan, set())
            self._close()
            self.evaluate()

    def _release(self) -> None:
        atexit.unregister(self.end)
        for handle in self._handles:
            handle.remove()
        self._handles = []


_NO_UPDATE = (
    "no weight update was noticed while streamnorm.monitor watched, and the layers have collected samples. Does the "
    "training call the step() of a torch.optim optimizer that holds the parameters of this model? Otherwise call "
    "streamnorm.commit(model) after each update"
)


@dataclass
class _Group:
    """Layers that commit together at the steps of one optimizer, and how often they did since this was last asked."""

    members: list[int]
    ours: bool
    commits: int = 0


@dataclass
class _Tick:
    """A sample that is being taken."""

    update: int
    seconds: float
    rate: float
    expected: set[int]
    seen: set[int] = field(default_factory=set)
    snapshots: int = 0


class _Tell:
    """A hook on a model that tells a run of checkpoints. It stays behind when the model is copied or pickled."""

    def __init__(self, run: _Run | None = None, text: str = "") -> None:
        self._run = (lambda: None) if run is None else weakref.ref(run)
        self._text = text

    def __call__(self, *_: object) -> None:
        run = self._run()
        if run is not None:
            run.note("checkpoint", self._text)

    def __reduce__(self) -> tuple[type[_Tell], tuple[()]]:
        return _Tell, ()


def _facts(name: str, layer: Norm) -> LayerFacts:
    name = name.replace("_orig_mod.", "").removeprefix("module.") or "(the model)"
    assert layer.stream is not None
    return LayerFacts(name, type(layer).__name__, layer.state.count.numel(), layer.stream.describe())


def _near(a: float, b: float, factor: float) -> bool:
    return a == b or (min(a, b) > 0 and max(a, b) <= factor * min(a, b))


def _concerns(reading: Reading, every: int) -> Iterator[tuple[str, str]]:
    """The warnings that a reading gives rise to, each as a word and a sentence."""
    if reading.nonfinite > 0:
        yield "nonfinite", f"{_channels(reading.nonfinite)} met values that are not finite"
    if reading.exploding > 0:
        yield "exploding", f"the scale of {_channels(reading.exploding)} grew tenfold within {every} updates"
    if reading.dead > 0:
        yield "dead", f"{_channels(reading.dead)} without variance"
    if reading.samples > 0 and reading.idle >= max(LONG_IDLE, 4 * every):
        yield "idle", f"{reading.idle:.0f} updates since its last commit: name its optimizer with streamnorm.bind"


def _channels(number: float) -> str:
    return "1 channel" if number == 1 else f"{number:.0f} channels"
