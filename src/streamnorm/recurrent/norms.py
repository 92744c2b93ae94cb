"""The choices of ``norm=`` in a recurrent layer, their defaults, and Batch Normalization step by step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core import arguments
from ..layers import GeneralBatchNorm, Norm, SampleNorm, StreamingNorm1d

if TYPE_CHECKING:
    from typing_extensions import TypedDict

    class NormOptions(TypedDict, total=False):
        """The keywords of a recurrent layer that shape its normalization; :class:`NormChoice` explains them."""

        p: float
        center: str
        scale: str
        eps: float
        window: float
        alpha: Sequence[float]
        beta: Sequence[float]
        kappa: float | Sequence[float]
        momentum: float | None
        max_steps: int
        gain: float


Factory = Callable[[int], nn.Module]
"""Makes the normalization of one path from its number of features."""

ALPHA = (0.7, 0.3)
BETA = (0.7, 0.0, 0.3)
KAPPA = 0.7
"""The paper's constants for recurrent networks. The present gradient has a share: without it they train badly."""

MOMENTUM = {"batch": 0.002, "batch-per-step": 0.1}
"""Per use. Statistics shared by all steps are used at each of them: 0.002 remembers ten sequences of 50 steps, as
0.1 remembers ten of those that are used once a sequence."""

GAIN = 1.0
"""The initial value of gains. Cooijmans et al. (2016) start those of the batch norms at 0.1, so that tanh does not
saturate and gradients do not vanish; docs/recurrent.md has the comparison, in which that gained nothing."""

_STREAM = ("window", "alpha", "beta", "kappa")
_ALLOWED = {
    "streaming": ("p", "center", "scale", "eps", "gain", *_STREAM),
    "batch": ("p", "center", "scale", "eps", "gain", "momentum"),
    "batch-per-step": ("p", "center", "scale", "eps", "gain", "momentum", "max_steps"),
    "layer": ("p", "center", "scale", "eps", "gain"),
}


_IN_A_FACTORY = "write norm=lambda features: StreamingNorm1d(features, ...), a function that makes each path's"
_ELSEWHERE = {
    "nonlinearity": "only RNN and RNNCell have it",
    "reset_after": "only GRU and GRUCell have it",
    "norm_cell": "only LSTM and LSTMCell have it",
    "affine": _IN_A_FACTORY,
    "ref": _IN_A_FACTORY,
}
"""Hints for keywords that only other networks and normalizations have."""


@dataclass(frozen=True)
class NormChoice:
    """The normalization of the paths of a recurrent layer.

    Args:
        norm: ``"streaming"``, ``"batch"``, ``"batch-per-step"``, ``"layer"``, None, or a factory: a function that
            makes a module from a number of features.
        p: order of the moment. Default: 1 for streaming, 2 for the others.
        center: ``"mean"`` or ``"zero"``, see LpMoment.
        scale: ``"raw"`` or ``"gaussian"``, see LpMoment. Default: "raw", also for streaming.
        eps: added to sigma².
        window: streaming: memory in samples; a time step of N sequences counts N. See Stream.
        alpha: streaming: weights of long-term, short-term and present statistics.
        beta: streaming: the same for their gradients.
        kappa: streaming: what a weight update keeps of the long-term and takes of the short-term average.
        momentum: batch: share of the present step in the running statistics; None for the default.
        max_steps: batch-per-step: how many time steps have statistics of their own; later steps share the last ones.
        gain: where the gains start.

    Raises:
        ValueError: for an unknown norm, or an option that the norm does not have.
        TypeError: for a norm that is neither a name nor a function.
    """

    norm: str | Factory | None
    p: float | None = None
    center: str | None = None
    scale: str | None = None
    eps: float | None = None
    window: float | None = None
    alpha: Sequence[float] | None = None
    beta: Sequence[float] | None = None
    kappa: float | Sequence[float] | None = None
    momentum: float | None = None
    max_steps: int | None = None
    gain: float | None = None

    def __post_init__(self) -> None:
        names = ", ".join(repr(name) for name in _ALLOWED)
        meaning = f"norm must be {names}, None, or a function that makes a module from a number of features"
        if isinstance(self.norm, str) and self.norm not in _ALLOWED:
            raise ValueError(f"{meaning}, got {self.norm!r}{arguments.nearest(self.norm, _ALLOWED)}")
        if isinstance(self.norm, nn.Module):
            raise TypeError(f"{meaning}, got a module: write norm=lambda features: {type(self.norm).__name__}(...)")
        if not isinstance(self.norm, str) and self.norm is not None and not callable(self.norm):
            raise TypeError(f"{meaning}, got {self.norm!r}")
        allowed = _ALLOWED[self.norm] if isinstance(self.norm, str) else ()
        for name, value in self._given().items():
            if name not in allowed:
                fitting = [repr(norm) for norm, options in _ALLOWED.items() if name in options]
                raise ValueError(
                    f"{name}={value} is an option of norm={' or '.join(fitting)}, got norm={self.norm!r}; "
                    "leave it out, or give it to the module that a factory makes"
                )
        if self.norm == "batch-per-step":
            meaning = (
                "norm='batch-per-step' keeps statistics for each time step: say for how many with max_steps, such as "
                "the length of your training sequences"
            )
            if self.max_steps is None:
                raise ValueError(f"{meaning}, got max_steps=None")
            object.__setattr__(self, "max_steps", arguments.whole(self.max_steps, meaning))
        if self.gain is not None:
            meaning = "gain is where gains start, a finite number such as 0.1"
            if not math.isfinite(arguments.real(self.gain, meaning)):
                raise ValueError(f"{meaning}, got {self.gain}")

    @classmethod
    def of(cls, network: type[nn.Module], norm: Any, options: dict[str, Any]) -> NormChoice:
        """The choice that the keywords of a network make.

        Raises:
            TypeError: for a keyword that the network does not have.
            ValueError: as the class, and as torch.nn for a ``proj_size`` where there is none.
        """
        names = [field.name for field in fields(cls)[1:]]
        for keyword, value in options.items():
            if keyword == "proj_size" and issubclass(network, nn.RNNBase):
                raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
            if keyword not in names:
                known = [name for name in inspect.signature(network).parameters if name != "options"]
                raise arguments.unexpected(network.__name__, keyword, value, [*known, *names], _ELSEWHERE)
        return cls(norm, **options)

    def __str__(self) -> str:
        norm = self.norm if isinstance(self.norm, str) or self.norm is None else "factory"
        return ", ".join([f"norm={norm!r}", *(f"{name}={value}" for name, value in self._given().items())])

    def _given(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return {name: value for name, value in values.items() if value is not None}

    def make(self, num_features: int, bias: bool = False, **factory_kwargs: Any) -> nn.Module | None:
        """The normalization of one path. Its bias is the layer's own (``bias_ih``, ``bias_hh``) unless asked for."""
        if self.norm is None:
            return None
        if not isinstance(self.norm, str):
            made = self.norm(num_features)
            if made is not None and not isinstance(made, nn.Module):
                raise TypeError(f"norm= makes a module from a number of features, and made {made!r} of {num_features}")
            if isinstance(made, Norm) and made.num_features != num_features:
                raise ValueError(f"norm= was asked for a layer of {num_features} features, and made {made}")
            return made
        options = {**self._given(), **factory_kwargs, "bias": bias}
        options.pop("gain", None)
        if self.norm == "streaming":
            return RecurrentStreamingNorm(num_features, **_stream_defaults(options))
        if self.norm == "layer":
            return RecurrentSampleNorm(num_features, "layer", **options)
        options.setdefault("momentum", MOMENTUM[self.norm])
        cls = RecurrentBatchNorm if self.norm == "batch" else PerStepBatchNorm
        return cls(num_features, **options)

    @torch.no_grad()
    def reset(self, norm: nn.Module) -> None:
        """Set a norm that was made here back to its start."""
        reset: Any = getattr(norm, "reset_parameters", None)
        if reset is not None:
            reset()
        if isinstance(norm, Norm) and norm.weight is not None and isinstance(self.norm, str):
            norm.weight.fill_(GAIN if self.gain is None else self.gain)


def _stream_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """The raw scale, and the recurrent constants for those of α, β, κ that are not given; none beside a window."""
    constants = {} if "window" in options else {"alpha": ALPHA, "beta": BETA, "kappa": KAPPA}
    return {"scale": "raw", **constants, **options}


class When(NamedTuple):
    """The position in a sequence at which a normalization is used.

    ``step`` is the number of the time step, None if nobody said; ``alone`` says that one sequence is left at this
    step out of several that have ended.
    """

    step: int | None = None
    alone: bool = False


class PathNorm(Norm):
    """The base of the normalizations of recurrent paths: their gain is the parameter ``gain``.

    In a recurrent layer, as in torch.nn's, "weight" in the name of a parameter means a matrix: a loop that makes all of
    these orthogonal leaves gains alone. ``weight`` stays another name of the gain, and a state that has it loads.
    """

    _gain = "gain"

    @property
    def weight(self) -> nn.Parameter | None:  # type: ignore[override]
        """The gain."""
        try:
            return self._parameters["gain"]
        except KeyError:  # parametrized: computed when it is asked for
            return self.gain

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):  # torch.func.functional_call does it
            self._parameters["gain"] = value  # type: ignore[assignment]
        else:
            super().__setattr__("gain", value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module, under the gain's own name."""
        super().register_parameter("gain" if name == "weight" else name, param)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """States from before have the gain under its other name."""
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}gain"] = state_dict.pop(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickle in which the gain is called ``weight``, too."""
        super().__setstate__(state)
        named = {"gain" if name == "weight" else name: parameter for name, parameter in self._parameters.items()}
        self.__dict__["_parameters"] = named


class RecurrentStreamingNorm(PathNorm, StreamingNorm1d):
    """Streaming Normalization of a path (RSN)."""


class RecurrentSampleNorm(PathNorm, SampleNorm):
    """Layer Normalization of a path."""


class RecurrentBatchNorm(PathNorm, GeneralBatchNorm):
    """Batch Normalization of a path, step by step, with one set of running statistics for all steps (RGBN).

    At a step that only the longest sequence of a mini-batch reaches there is no batch: the running statistics
    normalize it, as in evaluation.
    """

    def at(self, x: Tensor, when: When) -> Tensor:
        """Normalize x, the values of one time step."""
        if when.alone and self.training:
            self._check_input(x)
            return self._evaluate(x, None, self._view(x))
        y: Tensor = self(x)
        return y


class PerStepBatchNorm(RecurrentBatchNorm):
    """Batch Normalization of a path with running statistics of each time step (Cooijmans et al., 2016).

    Gain and bias are the same at all steps. Steps from ``max_steps`` on use the statistics of the last one.

    Args:
        num_features: C.
        max_steps: how many steps have statistics of their own.
        **options: as for GeneralBatchNorm.
    """

    def __init__(self, num_features: int, max_steps: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.max_steps = max_steps
        self._row = 0
        steps, like = (max_steps, 1), self.running_mean
        self.register_buffer("running_mean", torch.zeros_like(like).repeat(steps))
        self.register_buffer("running_var", torch.ones_like(like).repeat(steps))
        self.register_buffer("num_batches_tracked", torch.zeros(max_steps, device=like.device, dtype=torch.int64))

    @property
    def _steps(self) -> tuple[int, ...]:
        return (self.max_steps,)

    def at(self, x: Tensor, when: When) -> Tensor:
        """Normalize x, the values of time step ``when.step``."""
        meaning = "norm='batch-per-step' has to know the time step: write cell(x, h, step=t), from 0 on"
        if when.step is None:
            raise ValueError(meaning)
        self.select(arguments.whole(when.step, meaning, 0))
        return super().at(x, when)

    def select(self, step: int) -> None:
        """Say which time step comes next."""
        self._row = min(step, self.max_steps - 1)

    def eval_stats(self) -> tuple[Tensor, Tensor]:
        """mu and sigma² of the time step that was used last."""
        return self.running_mean[self._row], self.running_var[self._row]

    @torch.no_grad()
    def _track(self, stats: Tensor, n: int | Tensor) -> None:
        whole = self.running_mean, self.running_var, self.num_batches_tracked
        self.running_mean, self.running_var, self.num_batches_tracked = (buffer[self._row] for buffer in whole)
        try:
            super()._track(stats, n)
        finally:
            self.running_mean, self.running_var, self.num_batches_tracked = whole

    def extra_repr(self) -> str:
        """The arguments that differ from layer to layer."""
        return f"{super().extra_repr()}, max_steps={self.max_steps}"
