"""Readings of the state of streaming layers, as plain numbers; nothing here touches a layer's forward pass.

All layers are read together: their buffers become one vector, which is copied to the host once, and layers with
equally many statistics are computed as the rows of one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.spec import State
from ..layers import Norm

QUANTILES = (0.05, 0.5, 0.95)

GROWTH = 10.0
"""A scale that has grown by this factor between two readings explodes."""


class Reading(NamedTuple):
    """One layer at one weight update. A number that cannot be known there is nan.

    A *channel* is a statistic of the layer, which with a reference other than ``"channel"`` covers more or less than
    one channel of its input. Distances are measured in *deviations*, the layer's own long-term s = √(σ² + ε).

    Attributes:
        location_low: 5% quantile, over channels, of the long-term location μ after the update; in units of the input.
        location: the median.
        location_high: the 95% quantile.
        scale_low: 5% quantile, over channels, of the long-term scale σ after the update; in units of the input.
        scale: the median.
        scale_high: the 95% quantile.
        drift: distance of the short-term statistics to the long-term ones, √(Δμ² + Δσ²)/s, root mean square over
            channels. Short-term are all those since the reading before; :class:`Reader` says how.
        drift_worst: the same of the channel where it is largest.
        worst: index of that channel.
        replaced: share of the memory that the update replaced, in [0, 1]; mean over channels.
        streamed: what reaches an element of the input through the statistics, ĝ of ``docs/mathematics.md``: root mean
            square over channels.
        present: the same if the update's own gradients were all.
        dead: how many channels have σ² below ε: they are constant, or nearly so.
        exploding: how many channels have a σ that grew tenfold since the reading before, or is not finite.
        nonfinite: how many channels met values, or gradients, that are not finite during the update.
        samples: how many the layer was used with during the update.
        idle: weight updates since the layer last committed, as far as readings tell.
    """

    location_low: float
    location: float
    location_high: float
    scale_low: float
    scale: float
    scale_high: float
    drift: float
    drift_worst: float
    worst: float
    replaced: float
    streamed: float
    present: float
    dead: float
    exploding: float
    nonfinite: float
    samples: float
    idle: float


class Reader:
    """Takes snapshots of layers, and evaluates them.

    Drift compares short-term with long-term statistics. Those of one update are few samples, one in pure online
    learning, and their distance is mostly chance. Readings that lie several updates apart tell more: if the long-term
    statistics went from L to L′ while a share K of the memory was replaced, what came in was L + (L′ − L)/K on average.
    For two updates in a row that is the short-term statistic itself. K supposes that the updates in between saw as
    many samples as the larger of the two that were read.

    Args:
        layers: streaming layers, known by their index here.
    """

    def __init__(self, layers: Sequence[Norm]) -> None:
        self._layers = layers
        self._kinds: dict[_Kind, list[int]] = {}
        for i, layer in enumerate(layers):
            self._kinds.setdefault(_Kind.of(layer), []).append(i)
        self._taken: list[_Snapshot] = []
        self.waiting = 0
        """The number of values in the snapshots that are not evaluated yet."""
        self._last = [_Last(None, 0.0, 0) for _ in layers]

    def take(self, which: Sequence[int], update: int, commits: Sequence[int], commits_now: bool) -> None:
        """Take a snapshot of some layers.

        Args:
            which: their indices.
            update: the number of this weight update.
            commits: of every layer, how often it committed since its last snapshot, the coming commit left out.
            commits_now: whether these layers are about to commit; otherwise they are between two commits.
        """
        members = list(self._kinds.values())
        if len(which) < len(self._layers):
            members = [[i for i in everyone if i in which] for everyone in members]
        averages: list[Tensor] = []
        counts: list[Tensor] = []
        samples: list[Tensor] = []
        for some in filter(None, members):
            of = dict(zip(State._fields, zip(*(self._layers[i].state for i in some))))
            averages += (*of["long"], *of["short"], *of["long_grad"], *of["short_grad"])
            counts += (*of["count"], *of["grad_count"])
            samples += (*of["samples"], *of["grad_samples"], *of["seen"])
        numbers = _fetched(averages, counts, samples)
        self._taken.append(_Snapshot(update, members, list(commits), commits_now, *numbers))
        self.waiting += numbers[0].numel()

    def read(self) -> list[tuple[int, dict[int, Reading]]]:
        """Evaluate all snapshots: for each the number of its update, and the readings of its layers."""
        taken, self._taken, self.waiting = self._taken, [], 0
        readings: list[dict[int, Reading]] = [{} for _ in taken]
        alike = [list(run) for _, run in groupby(enumerate(taken), lambda each: each[1].members)]
        rest = [_Block.of([snapshot for _, snapshot in run]) for run in alike]
        for number, kind in enumerate(self._kinds):
            rows: list[_Row] = []
            blocks: list[_Block] = []
            for place, run in enumerate(alike):
                members = run[0][1].members[number]
                block, rest[place] = rest[place].split(len(members), kind.channels)
                blocks.append(block)
                for (when, snapshot), samples in zip(run, block.samples.tolist()):
                    rows += (self._row(when, i, snapshot, *of_i) for i, *of_i in zip(members, *samples))
            if rows:
                averages = torch.cat([block.averages.permute(2, 1, 0, 3, 4).flatten(2, 3) for block in blocks], 2)
                counts = torch.cat([block.counts.transpose(0, 1).flatten(1, 2) for block in blocks], 1)
                for row, numbers in zip(rows, self._evaluate(kind, rows, averages.double(), counts)):
                    readings[row.when][row.layer] = Reading._make((*numbers, row.samples, row.idle))
        return [(snapshot.update, reading) for snapshot, reading in zip(taken, readings)]

    def _row(self, when: int, i: int, snapshot: _Snapshot, samples: float, grad_samples: float, seen: float) -> _Row:
        formula, last = self._layers[i].formula, self._last[i]
        weights = formula.weights(samples, grad_samples, seen)
        commits_now = snapshot.commits_now and samples > 0
        commits = snapshot.commits[i] + commits_now
        most = max(samples, last.samples)
        typical = weights if most == samples or not commits else formula.weights(most, most, seen)
        seen_to_commit = commits_now or (commits > 0 and last.samples > 0)
        committed = snapshot.update if seen_to_commit else last.committed
        self._last[i] = _Last(last.long, samples, committed)
        keep, take, _, _ = weights.kappa
        beta_long, beta_short, beta_present = weights.beta
        return _Row(
            when=when,
            layer=i,
            samples=samples,
            idle=snapshot.update - committed,
            keep=keep,
            take=take,
            share=(1 - typical.kappa[0] ** max(commits, 1)) or math.nan,
            replaced=1 - keep if commits_now else math.nan if commits else 0.0,
            beta_long=beta_long,
            beta_short=beta_short + beta_present,
            commits=commits_now,
            looks_ahead=commits_now or not commits,
            used=samples > 0,
            gets_gradients=grad_samples > 0,
        )

    def _before(self, rows: list[_Row], long: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """For each row the long-term statistics that its layer had when it was read before, and whether it was."""
        start = [self._last[row.layer].long for row in rows]
        latest: dict[int, int] = {}
        index, fresh = [], []
        for number, row in enumerate(rows):
            index.append(latest.get(row.layer, len(rows) + number))
            fresh.append(row.layer not in latest and start[number] is None)
            latest[row.layer] = number
        earlier = torch.stack([long[:, n] if tensor is None else tensor for n, tensor in enumerate(start)], 1)
        before = torch.cat((after, earlier), 1)[:, index]
        for i, number in latest.items():
            self._last[i] = self._last[i]._replace(long=after[:, number].clone())
        return before, torch.tensor(fresh).unsqueeze(1)

    def _evaluate(self, kind: _Kind, rows: list[_Row], averages: Tensor, counts: Tensor) -> list[list[float]]:
        """The fields of each row's reading, the last two left out.

        Args:
            kind: of the layers.
            rows: R of them.
            averages: ``(4, 2, R, G)``: long, short, long_grad and short_grad; mu, then the moment.
            counts: ``(2, R, G)``: count and grad_count.
        """
        columns = torch.tensor([row[4:] for row in rows], dtype=torch.float64).t().unsqueeze(-1)
        keep, take, share, replaced, beta_long, beta_short, *flags = columns
        commits, looks_ahead, used, gets_gradients = (flag > 0 for flag in flags)
        long, short, long_grad, short_grad = averages
        counted, grad_counted = counts > 0

        following = torch.where(counted, keep * long + take * short, long)
        after = torch.where(commits, following, long)
        before, fresh = self._before(rows, long, after)
        came_in = before + (torch.where(looks_ahead, following, long) - before) / share

        sigma_before, sigma, sigma_in = kind.sigma(torch.stack((before[1], after[1], came_in[1])))
        s = (sigma_before.square() + kind.eps).sqrt()
        drift = torch.hypot(came_in[0] - before[0], sigma_in - sigma_before) / s
        known = counted | ~looks_ahead  # a channel whose values were not finite says nothing
        drift_worst, worst = drift.masked_fill(~known, -1).max(1)

        both = torch.stack((beta_long * long_grad + beta_short * short_grad, short_grad))
        if kind.windowed:  # the streams of gradients are in units of 1/s and 1/s^p
            s_now = (kind.sigma(long[1]).square() + kind.eps).sqrt()
            both = both / torch.stack((s_now, s_now**kind.p))
        streamed, present = torch.hypot(both[:, 0], both[:, 1] * kind.slope(long[1]))

        expected = torch.stack((used, gets_gradients))
        lost = ((counts < counts.amax(-1, keepdim=True)) | ((counts == 0) & expected)).any(0)
        exploding = ~(sigma <= GROWTH * s) & ~fresh

        ranks = [round(q * (kind.channels - 1)) for q in QUANTILES]
        location, scale = torch.stack((after[0], sigma)).sort(-1).values[..., ranks]
        squares = torch.stack((drift, streamed, present)).square()
        valid = torch.stack((known, grad_counted, grad_counted))
        means = (squares.masked_fill(~valid, 0).sum(-1) / valid.sum(-1)).sqrt()
        masks = torch.stack((counted, sigma.square() < kind.eps, exploding, lost))
        counted_share, dead, exploding, nonfinite = masks.sum(-1, dtype=torch.float64)
        drift_worst = torch.where(drift_worst < 0, math.nan, drift_worst)
        replaced = replaced.squeeze(1) * counted_share / kind.channels
        if not kind.even:
            nonfinite = nonfinite * math.nan
        others = (means[0], drift_worst, worst, replaced, means[1], means[2], dead, exploding, nonfinite)
        return torch.cat((location, scale, torch.stack(others, 1)), 1).tolist()


class _Kind(NamedTuple):
    """The properties shared by layers whose readings are computed together."""

    channels: int
    p: float
    k: float
    eps: float
    windowed: bool
    even: bool
    """Whether all statistics have equally many elements, also under a mask: none belongs to a place of its own."""

    @classmethod
    def of(cls, layer: Norm) -> _Kind:
        """The kind of a layer."""
        view, formula = layer.ref.least_view(layer.num_features), layer.formula
        even = all(view.axes[axis] == 1 for axis in view.kept)
        constants = formula.p, formula.k, formula.eps, formula.window is not None
        return cls(layer.ref.num_stats(layer.num_features), *constants, even)

    def sigma(self, m: Tensor) -> Tensor:
        """The scale of a moment; what is estimated may be a little below 0."""
        root = m.clamp(min=0) if self.p == 1 else m.clamp(min=0) ** (1 / self.p)
        return root if self.k == 1 else self.k * root

    def slope(self, m: Tensor) -> Tensor | float:
        """p times the root mean square of u, roughly: of p·|d|^(p−1), where the moment of the deviations d is m."""
        return 1.0 if self.p == 1 else self.p * m.clamp(min=0) ** ((self.p - 1) / self.p)


class _Snapshot(NamedTuple):
    """The state of layers at one weight update, on the host; tensors as in a :class:`_Block`, kind after kind."""

    update: int
    members: list[list[int]]
    """For each kind the layers, in their order."""
    commits: list[int]
    commits_now: bool
    averages: Tensor
    counts: Tensor
    samples: Tensor


class _Block(NamedTuple):
    """The state of L layers with G statistics each, in W snapshots.

    Before they are split off, other layers follow, and all is flat but W and the second axis of ``averages``.
    """

    averages: Tensor
    """``(W, 2, 4, L, G)``: mu and the moment; long, short, long_grad, short_grad."""
    counts: Tensor
    """``(W, 2, L, G)``: count, grad_count."""
    samples: Tensor
    """``(W, 3, L)``: samples, grad_samples, seen."""

    @classmethod
    def of(cls, snapshots: Sequence[_Snapshot]) -> _Block:
        """Snapshots of the same layers."""
        each = zip(*((snapshot.averages, snapshot.counts, snapshot.samples) for snapshot in snapshots))
        return cls(*(torch.stack(tensors) for tensors in each))

    def split(self, layers: int, channels: int) -> tuple[_Block, _Block]:
        """Those of the first layers, which are of one kind, and the rest."""
        size, times = layers * channels, len(self.samples)
        own = _Block(
            self.averages[..., : 4 * size].reshape(times, 2, 4, layers, channels),
            self.counts[:, : 2 * size].reshape(times, 2, layers, channels),
            self.samples[:, : 3 * layers].reshape(times, 3, layers),
        )
        return own, _Block(self.averages[..., 4 * size :], self.counts[:, 2 * size :], self.samples[:, 3 * layers :])


def _fetched(averages: list[Tensor], counts: list[Tensor], samples: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Joined, and copied to the host: at once, where all are on one device."""
    if len({tensor.device for tensor in counts}) > 1:
        averages, counts, samples = ([tensor.cpu() for tensor in each] for each in (averages, counts, samples))
    joined = torch.cat(averages, 1), torch.cat(counts), torch.stack(samples)
    if joined[0].is_cpu:
        return joined
    numbers = torch.cat([tensor.flatten() for tensor in joined]).cpu()
    flat, counted, seen = numbers.split([tensor.numel() for tensor in joined])
    return flat.view(2, -1), counted, seen


class _Last(NamedTuple):
    """The memory of a layer: long-term statistics and samples of its last reading, and its last commit's update."""

    long: Tensor | None
    samples: float
    committed: int


class _Row(NamedTuple):
    """A layer in a snapshot. From ``keep`` on these are numbers that its readings are computed with."""

    when: int
    layer: int
    samples: float
    idle: int
    keep: float
    take: float
    share: float
    """Of the memory, replaced since the reading before; nan for none."""
    replaced: float
    beta_long: float
    beta_short: float
    commits: bool
    looks_ahead: bool
    """Whether drift is measured as if the layer committed now: it does, or it has not since it was read before."""
    used: bool
    gets_gradients: bool
