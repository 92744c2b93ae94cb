"""Stream: how a layer's long memory, short memory and present are mixed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import arguments
from .spec import FIELDS, PRIOR_SAMPLES, Formula, Mix, State

WINDOW = 200.0
"""The default memory, in samples."""

IMAGE_WINDOW = 100.0
"""The default of layers for images and volumes: each sample brings many values for a statistic, so that fewer samples
are enough, and what is remembered for a shorter time is less stale (docs/mathematics.md)."""

TRAINED_WINDOW = 20_000.0
"""The default of layers that take over the statistics of a trained network (docs/mathematics.md)."""

GRAD_WINDOW = 32.0
"""The default memory of gradients, in samples."""

IMAGE_OWN = 8.0
"""The default of layers for images and volumes, where each sample brings many values for a statistic: half of the
gradient is a mini-batch's own from eight samples on (docs/mathematics.md)."""

LIMIT = 4.0
"""c, the default bound of the window rule."""

ESTABLISHED = 2**20
"""The value of ``seen`` where statistics come from elsewhere: more samples than any memory."""

PAPER_ALPHA = (0.7, 0.3)
PAPER_BETA = (0.7, 0.3, 0.0)
PAPER_KAPPA = 0.7


@arguments.explained
@dataclass(frozen=True)
class Stream:
    """The constants of Streaming Normalization (the paper's SN), or the window rule in their place.

    Statistics and their gradients are averaged over all uses since the last weight update (short), and these
    averages over all weight updates (long). A use of the layer sees ``α1·long + α2·short + α3·present``, its
    backward pass the same with β; at a weight update ``long ← κ1·long + κ2·short``, for gradients κ3 and κ4.

    The window rule needs one number W, the memory in samples, and weighs long and short by their evidence: with S
    samples seen since the last update, α = (E, S, 0)/(E + S), and an update keeps what the last use saw, κ1 = α1.
    E is W, or less in the beginning: the samples seen so far, and 16 for the prior. It is the default. If any of
    ``alpha``, ``beta``, ``kappa`` is given, the paper's constants stand for the rest: α = (0.7, 0.3),
    β = (0.7, 0.3, 0), κ = 0.7.

    Args:
        window: W > 0, in samples. Default: 200, if none of α, β, κ is given. (``StreamingNorm2d`` and ``3d`` give
            100.)
        grad_window: the same for gradients, under the window rule. Default: 32.
        own: P > 0, in samples, under the window rule: a mini-batch of S samples has a share of S/(S + P) of its own in
            the gradients that go through the statistics, β = (1 − β3)(G, S', 0)/(G + S') + (0, 0, β3) with G the
            ``grad_window`` and S' the samples since the last update. Default: infinity, no share.
            (``StreamingNorm2d`` and ``3d`` give 8.)
        limit: c > 1: the scale in use is at least 1/c of that of the call's own input, so that no input leaves the
            layer with a scale above c; ``math.inf`` for no bound. Default: 4 under the window rule, infinity beside
            the paper's constants.
        alpha: two or three numbers ≥ 0 that sum to 1; two mean α3 = 0.
        beta: two or three finite numbers; ``(0, 0, 0)`` lets no gradient through the statistics.
        kappa: four numbers in [0, 1], or one number k that means (k, 1−k, k, 1−k).
        prior: where long_mu and long_m start.

    Raises:
        ValueError: if a number is out of its range, or ``window``, ``grad_window`` or ``own`` is given together with
            α, β or κ.
        TypeError: if something else than a number stands for one.

    Example:
        >>> Stream().window
        200.0
        >>> Stream(kappa=0.5)
        Stream(alpha=(0.7, 0.3, 0.0), beta=(0.7, 0.3, 0.0), kappa=(0.5, 0.5, 0.5, 0.5))
    """

    window: float | None = None
    alpha: Sequence[float] | None = None
    beta: Sequence[float] | None = None
    kappa: float | Sequence[float] | None = None
    prior: tuple[float, float] = (0.0, 1.0)
    grad_window: float | None = None
    limit: float | None = None
    own: float | None = None

    def __post_init__(self) -> None:
        constants = {"alpha": self.alpha, "beta": self.beta, "kappa": self.kappa}
        given = [name for name, value in constants.items() if value is not None]
        for name, none in (("window", None), ("grad_window", None), ("own", math.inf)):
            if getattr(self, name) not in (None, none) and given:
                raise ValueError(
                    f"{name}={getattr(self, name)} and {given[0]}={constants[given[0]]} exclude each other: "
                    "give either the window or the constants alpha, beta, kappa"
                )
        object.__setattr__(self, "limit", _limit((math.inf if given else LIMIT) if self.limit is None else self.limit))
        object.__setattr__(self, "own", _own(math.inf if self.own is None else self.own))
        if not given:
            object.__setattr__(self, "window", _memory("window", WINDOW if self.window is None else self.window))
            memory = GRAD_WINDOW if self.grad_window is None else self.grad_window
            object.__setattr__(self, "grad_window", _memory("grad_window", memory))
        else:
            object.__setattr__(self, "alpha", _alpha(PAPER_ALPHA if self.alpha is None else self.alpha))
            object.__setattr__(self, "beta", _beta(PAPER_BETA if self.beta is None else self.beta))
            object.__setattr__(self, "kappa", _kappa(PAPER_KAPPA if self.kappa is None else self.kappa))
        object.__setattr__(self, "prior", _prior(self.prior))

    def __repr__(self) -> str:
        return f"Stream({self.describe()})"

    def describe(self) -> str:
        """The constants as they would be written in a call."""
        parts = [f"window={self.window:g}"] if self.window is not None else []
        parts += [
            f"{name}={getattr(self, name)}" for name in ("alpha", "beta", "kappa") if getattr(self, name) is not None
        ]
        if self.prior != (0.0, 1.0):
            parts.append(f"prior={self.prior}")
        if self.window is not None and self.grad_window != GRAD_WINDOW:
            parts.append(f"grad_window={self.grad_window:g}")
        if self.own != math.inf:
            parts.append(f"own={self.own:g}")
        if self.limit != (math.inf if self.window is None else LIMIT):
            parts.append(f"limit={self.limit:g}")
        return ", ".join(parts)

    def new_state(self, num_stats: int, device: torch.device | str | None, dtype: torch.dtype) -> State:
        """The state of a stream that has seen nothing: the prior, and zeros."""
        zeros = {
            name: torch.zeros(field.shape(num_stats), device=device, dtype=field.dtype(dtype))
            for name, field in FIELDS.items()
        }
        long = torch.tensor(self.prior, device=device, dtype=dtype)[:, None].repeat(1, num_stats)
        return State(**zeros)._replace(long=long)

    def evaluation(self, state: State) -> Tensor:
        """mu and m for evaluation, ``(2, G)``: long and short in the ratio α1 : α2, or long alone."""
        short_share = (state.count > 0).to(state.long.dtype)
        if self.window is not None:
            lasting = (state.seen + PRIOR_SAMPLES).clamp(max=self.window)
            short_share = short_share * state.samples / (lasting + state.samples)
        else:
            alpha1, alpha2, _ = self.alpha  # type: ignore[misc]
            short_share = short_share * (alpha2 / (alpha1 + alpha2) if alpha1 + alpha2 > 0 else 0.0)
        return torch.lerp(state.long, state.short, short_share)

    def formula(self, p: float, centered: bool, k: float, eps: float) -> Formula:
        """The constants of this stream and of the moment, in the form that engines take."""
        weights = self.alpha, self.beta, self.kappa, self.window, self.grad_window, self.limit, self.own
        return Formula(p, centered, k, eps, *weights)  # type: ignore[arg-type]


def _memory(name: str, value: float) -> float:
    meaning = f"{name} is a memory in samples, a number above 0"
    memory = arguments.real(value, meaning)
    if not (math.isfinite(memory) and memory > 0):
        raise ValueError(f"{meaning}, got {value}")
    return memory


def _own(value: float) -> float:
    meaning = "own is how many samples give a mini-batch's own gradient half of the weight, a number above 0"
    return _above(0, value, meaning, "no weight")


def _limit(value: float) -> float:
    meaning = "limit is the largest scale with which an input may leave the layer, a number above 1, such as 4"
    return _above(1, value, meaning, "none")


def _above(low: float, value: float, meaning: str, at_infinity: str) -> float:
    number = arguments.real(value, meaning)
    if not number > low:
        raise ValueError(f"{meaning}, or math.inf for {at_infinity}, got {value}")
    return number


def _alpha(alpha: Sequence[float]) -> Mix:
    mix = _three("alpha", alpha)
    if min(mix) < 0 or not math.isclose(sum(mix), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"alpha must be numbers of at least 0 that sum to 1, such as (0.7, 0.3), got {tuple(alpha)}, "
            f"which sum to {sum(mix):g}"
        )
    return mix


def _beta(beta: Sequence[float]) -> Mix:
    mix = _three("beta", beta)
    if not all(map(math.isfinite, mix)):
        raise ValueError(f"beta must be finite numbers, such as (0.7, 0.3, 0), got {tuple(beta)}")
    return mix


def _three(name: str, values: Sequence[float]) -> Mix:
    meaning = f"{name} takes two or three numbers (long, short, present), such as (0.7, 0.3)"
    if isinstance(values, (int, float)):
        raise ValueError(f"{meaning}, got {values}")
    numbers = arguments.reals(values, meaning)
    if len(numbers) not in (2, 3):
        raise ValueError(f"{meaning}, got {values}")
    first, second, *rest = numbers
    return first, second, rest[0] if rest else 0.0


def _kappa(kappa: float | Sequence[float]) -> tuple[float, float, float, float]:
    meaning = "kappa must be one number in [0, 1], such as 0.7, or four of them"
    if arguments.is_vector(kappa):
        four = arguments.reals(kappa, meaning)
    else:
        one = arguments.real(kappa, meaning)
        four = (one, 1 - one) * 2
    if len(four) != 4 or not all(0 <= value <= 1 for value in four):
        raise ValueError(f"{meaning}, got {kappa}")
    return four[0], four[1], four[2], four[3]


def _prior(prior: Sequence[float]) -> tuple[float, float]:
    meaning = "prior is a location and a moment above 0, such as (0, 1)"
    values = arguments.reals(prior, meaning)
    if len(values) != 2 or not math.isfinite(values[0]) or not 0 < values[1] < math.inf:
        raise ValueError(f"{meaning}, got {prior}")
    return values[0], values[1]
