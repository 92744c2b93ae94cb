"""Norm, which joins a reference, a moment and a stream, and the layers that are made of it."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting
from torch.nn.parallel import DistributedDataParallel

from .. import ops
from ..core import arguments, saved_state
from ..core.compiler import as_constant, as_leaf, is_symbolic
from ..core.moment import LpMoment
from ..core.reference import NormRef, RefName
from ..core.spec import Formula, State, View
from ..core.stream import IMAGE_WINDOW, WINDOW, Stream
from ..ops import checks, joined
from ..training import agreement, checkpoint, runaway, updates
from ..training.agreement import Sync
from ..training.ties import Ties, is_collecting

_state_buffers = itemgetter(*State._fields)
_passes, _backward_pass = checkpoint.passes.get, torch._C._current_graph_task_id
_jit_trace = torch._C._get_tracing_state
_GRADIENT_STATE = ("long_grad", "short_grad", "grad_count", "grad_samples")
_REDUCED = (torch.float16, torch.bfloat16)
_FEATURES = "num_features is the number of channels, an integer of at least 1"
_DTYPES = (torch.float32, torch.float64, *_REDUCED)
_OVER: Iterator[bool] = iter(())
_OF_THIS_PROCESS = frozenset(("_accepted", "_plan", "_planned_shape", "_watched", "_lease", "_grad_scale", "_ddp"))
"""Attributes that a copy starts without."""

_TO_BATCHNORM = "streamnorm.to_batchnorm(model) writes a BatchNorm that has it"
_INSTEAD = {
    "running_mean": f"layer.eval_stats()[0] is the mean that evaluation uses, and {_TO_BATCHNORM}",
    "running_var": f"layer.eval_stats()[1] is the variance that evaluation uses, and {_TO_BATCHNORM}",
    "num_batches_tracked": "layer.samples is the number of samples since the last weight update",
    "momentum": "its memory in samples is layer.stream.window",
    "track_running_stats": "it always does; streamnorm.freeze(model) holds its statistics",
    "reset_running_stats": "write layer.reset_stats(), or streamnorm.reset_stats(model)",
}
"""What to write for what a BatchNorm has and a streaming layer does not."""


@arguments.explained
class Norm(nn.Module):
    """Normalization over any reference, with any moment, with or without a stream (the paper's general framework).

    Without a stream, training and evaluation are the same: statistics are those of the input (Sample and General
    Batch Normalization). With a stream, training mixes them with their past, and evaluation is a fixed affine map.

    Args:
        num_features: C, the channels of the input.
        ref: which elements share a statistic.
        moment: how the scale is measured.
        stream: how the past is mixed in, or None for none.
        eps: added to sigma², ≥ 0.
        affine: whether to learn a gain (``weight``) and a bias per channel.
        bias: with ``affine``, whether to learn the bias too.
        device: of parameters and state.
        dtype: of parameters; the state is float64 for float64 and float32 for all others.

    Shape:
        - Input: ``(N, C)`` or ``(N, C, ...)``, any rank.
        - mask: ``(N,)`` or ``(N, ...)`` without the channel axis, bool; True where an element counts.
        - Output: as the input; zero where the mask is False.

    Raises:
        ValueError: for an eps below 0, a group count that does not divide C, or a stream on a reference inside
            the sample.
        TypeError: for an argument of another type than said above, or of a name that the layer does not have.

    Example:
        >>> layer = Norm(6, NormRef.of("n (g k) ... -> g", g=2), LpMoment(p=1), Stream(window=50))
        >>> layer(torch.randn(4, 6, 8, 8)).shape
        torch.Size([4, 6, 8, 8])
    """

    _version = saved_state.VERSION
    _watched = False
    _lease: Iterator[bool] = _OVER  # so many uses until `updates` looks at the layer
    _grad_scale: Tensor | None = None
    _ddp: weakref.ref[DistributedDataParallel] | None = None
    _sync = Sync()
    _per_batch = False
    _name = ""
    _adapting: Formula | None = None

    # The kind of input that was looked at last, and its view: the same kind is not looked at again.
    _accepted: tuple[torch.Size, torch.dtype, torch.device, bool] | None = None
    _accepted_view: View
    # What the C++ engine knows of inputs of the shape that it took last, if it took the last one with this formula.
    _plan: ops.Plan | None = None
    _planned_shape: torch.Size | None = None

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    # With a stream only.
    long: Tensor
    short: Tensor
    long_grad: Tensor
    short_grad: Tensor
    count: Tensor
    grad_count: Tensor
    samples: Tensor
    grad_samples: Tensor
    lp_moment: Tensor

    def __init__(
        self,
        num_features: int,
        ref: NormRef,
        moment: LpMoment,
        stream: Stream | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        meaning = "eps is added to sigma² and must be at least 0, such as 1e-5"
        eps = arguments.real(eps, meaning)
        if not 0 <= eps < math.inf:
            raise ValueError(f"{meaning}, got {eps}")
        num_features = arguments.whole(num_features, _FEATURES)
        if not isinstance(affine, bool):
            raise TypeError(
                f"affine is True or False, got {affine!r}; where BatchNorm has its momentum, streaming layers take "
                "window=, a memory in samples"
            )
        arguments.flag("bias", bias)
        _check_kinds(ref, moment, stream)
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            raise TypeError(f"dtype is a floating point one, such as torch.float32, got {dtype}")
        self.num_features = num_features
        self.ref, self.moment, self.stream = ref, moment, stream
        self.eps, self.affine = eps, affine
        self.frozen = False
        self._ties = Ties()
        for name, wanted in (("weight", affine), ("bias", affine and bias)):
            self.register_parameter(
                name, nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if wanted else None
            )
        if stream is not None:
            for name, tensor in (
                stream.new_state(ref.num_stats(num_features), device, _state_dtype(dtype))._asdict().items()
            ):
                self.register_buffer(name, tensor)
        self._set_formula()
        self._register_moment()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set gain to 1 and bias to 0, and forget all statistics."""
        self.reset_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def reset_stats(self) -> None:
        """Set the stream back to its prior."""
        if self.stream is not None:
            runaway.forget(self)
            for buffer, fresh in zip(self.state, self.stream.new_state(1, None, torch.float64)):
                buffer.copy_(fresh.expand_as(buffer))
            self.lp_moment.copy_(saved_state.as_tensor(self.moment))  # after to_empty

    def set_stream(self, stream: Stream) -> None:
        """Change the constants of a streaming layer; its state stays."""
        if self.stream is None:
            raise ValueError(f"{type(self).__name__} carries no stream; make the layer with one")
        if not isinstance(stream, Stream):
            raise TypeError(f"stream is a Stream, such as Stream(window=200), got {stream!r}")
        self.stream = stream
        self._set_formula()

    def _set_formula(self) -> None:
        constants = (float(self.moment.p), self.moment.center == "mean", self.moment.k, self.eps)
        self.formula = Formula(*constants) if self.stream is None else self.stream.formula(*constants)
        self._formula_text = repr(self.formula)
        self._planned_shape = None

    def _register_moment(self) -> None:
        if self.stream is not None:
            like = self.long
            self.register_buffer(saved_state.MOMENT, saved_state.as_tensor(self.moment, like.device, like.dtype))

    def _formula_in_graph(self) -> Formula:
        """The formula, as constants where a graph is being made.

        A compiler that has met other constants would make numbers of the graph's inputs out of them, which it then
        cannot bring into a function with a backward pass of its own. It does not do so with a text, and a graph that
        depends on the text is made anew for another formula.
        """
        if not is_compiling():
            return self.formula
        if not self._formula_text:
            raise AssertionError("a layer has a formula")
        return self._formula_while_tracing()

    @as_constant
    def _formula_while_tracing(self) -> Formula:
        return self.formula

    @property
    def state(self) -> State:
        """The stream's buffers, as an engine takes them."""
        if is_compiling():
            return State(*[getattr(self, name) for name in State._fields])
        try:
            return State._make(_state_buffers(self._buffers))
        except KeyError:
            raise AttributeError(f"{type(self).__name__} carries no stream") from None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize x."""
        if is_compiling():
            return self._forward_traced(x, mask)
        if type(x) is not Tensor and is_symbolic(x):
            return as_leaf(self, Norm.forward, x, mask)
        if x.shape == self._planned_shape and mask is None and self.training and not self.frozen:
            y = self._train_again(x)
            if y is not NotImplemented:
                return y
        kind = (x.shape, x.dtype, x.device, self.training)
        if kind != self._accepted or _jit_trace() is not None:
            self._check_input(x)
            if x.numel() == 0 and not self._joins_batches:
                return self._pass_empty(x)
            # The sizes that torch.jit.trace sees are those of its graph, which each pass has to find for itself.
            self._accepted = kind if _jit_trace() is None else None
            self._accepted_view = self._view(x)
        if mask is not None:
            mask = _full_mask(mask, x)
        if self.training and not self.frozen:
            if _passes() or _backward_pass() != -1:  # as checkpoint.concerns, without a call of its own
                with checkpoint.use((self,)):
                    return self._train(x, mask, self._accepted_view)
            return self._train(x, mask, self._accepted_view)
        return self._evaluate(x, mask, self._accepted_view)

    def _forward_traced(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """As forward, in a graph that is being compiled: nothing is kept from call to call but the state."""
        if self._per_batch and self.training and not self.frozen:
            _make_boundary()
            return _outside_the_graph(self, x, mask)
        self._check_input(x)
        if self.stream is not None and self.training:
            if is_exporting() and not self.frozen:
                raise RuntimeError(_NOT_EXPORTED.format(type(self).__name__))
            self._watch_while_tracing()
            if not self._watched:
                raise AssertionError("a layer that trains notices weight updates")
        if x.numel() == 0:
            return self._pass_empty(x)
        mask = None if mask is None else _full_mask(mask, x)
        view = self._view(x)
        if not self.training or self.frozen:
            return self._evaluate(x, mask, view)
        if self.stream is None:
            return self._train(x, mask, view)
        formula = self._formula_in_graph()
        return ops.normalize(x, self.weight, self.bias, mask, view, formula, self.state, self._grad_scale)

    @as_constant
    def _watch_while_tracing(self) -> bool:
        """Runs when a graph is made; a guard on ``_watched`` lets it run for the next layer that takes the graph."""
        if not self._watched:
            updates.meet(self)
        return True

    def _pass_empty(self, x: Tensor) -> Tensor:
        """An empty output that still leads back to gain and bias, so that their gradients are zero and not missing."""
        if self.training and self.stream is not None:  # without data too, a process takes part in weight updates
            ops.traced.take_part(self.state) if is_compiling() else updates.notice(self)
        for parameter in self.parameters(recurse=False):
            x = x * parameter.sum().to(x.dtype)
        return x * 1

    def _view(self, x: Tensor) -> View:
        return self.ref.view(x.shape)

    def _train(self, x: Tensor, mask: Tensor | None, view: View) -> Tensor:
        if self._per_batch and self._joins_batches:
            return self._normalize_jointly(x, mask, view)[0]
        if self.stream is None:
            return self._normalize_alone(x, mask, view)
        is_due = next(self._lease, None) is None
        if is_due or (DistributedDataParallel._active_ddp_module is not None and agreement.is_new(self)):
            updates.notice(self, x)
        weight, bias = self.weight, self.bias
        if mask is None:
            plan = self._plan
            if plan is None or plan.view is not view or plan.formula is not self.formula:
                plan = self._plan = ops.prepare(view, self.formula)
            y = ops.attempt(x, weight, bias, plan, self._buffers, self._grad_scale)
            self._planned_shape = None if y is NotImplemented or self._per_batch else x.shape
            if y is not NotImplemented:
                return y
        return ops.normalize(x, weight, bias, mask, view, self.formula, self.state, self._grad_scale)

    def _train_again(self, x: Tensor) -> Any:
        """The short way for one more input of a shape: of a small layer's step, the Python around it is the most.

        Returns NotImplemented, with nothing done, where there is more to be looked at. The engine itself refuses inputs
        and states that do not fit the plan or each other.
        """
        if (
            next(self._lease, None) is None
            or _passes()
            or _backward_pass() != -1
            or DistributedDataParallel._active_ddp_module is not None
        ):
            return NotImplemented
        try:  # past the search of nn.Module.__getattr__
            weight, bias = self._parameters["weight"], self._parameters["bias"]
        except KeyError:  # parametrized: computed when they are asked for
            return NotImplemented
        return ops.attempt(x, weight, bias, self._plan, self._buffers, self._grad_scale)

    def _normalize_alone(self, x: Tensor, mask: Tensor | None, view: View, stats: Tensor | None = None) -> Tensor:
        """Normalize by the statistics of this input."""
        formula = self._formula_in_graph()
        if self.training and formula.centered and view.num_elements == 1:
            raise ValueError(
                f"{type(self).__name__} has one value per statistic for an input of shape {tuple(x.shape)}, and a "
                "value less its own mean is 0. Use StreamingNorm, which remembers earlier samples, or a wider reference"
            )
        return ops.normalize(x, self.weight, self.bias, mask, view, formula, stats=stats)

    @property
    def _joins_batches(self) -> bool:
        """Whether this training step sees the mini-batches of several processes as one."""
        return self._per_batch and self.training and not self.frozen and agreement.group_of(self) is not None

    def _normalize_jointly(
        self, x: Tensor, mask: Tensor | None, view: View, stats: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalize by the statistics of all processes' mini-batches; also their number of elements per statistic."""
        if self.stream is not None:
            updates.notice(self)
        state = None if self.stream is None else self.state
        group = agreement.group_of(self)
        return joined.normalize(
            x, self.weight, self.bias, mask, view, self.formula, state, self._grad_scale, stats, group
        )

    def _evaluate(self, x: Tensor, mask: Tensor | None, view: View) -> Tensor:
        if self.stream is None:
            return self._normalize_alone(x, mask, view)
        if self._adapting is not None and not self.frozen:
            return self._adapt(x, mask, view, self._adapting)
        mu, variance = self.eval_stats()
        return _affine_map(x, mu, variance, self, mask, view)

    def _adapt(self, x: Tensor, mask: Tensor | None, view: View, formula: Formula) -> Tensor:
        """Evaluate by the statistics with this input among them, and let them become the long-term ones."""
        if is_compiling():
            raise RuntimeError(
                "streamnorm.adapt changes statistics in evaluation, in eager mode: call the model itself"
            )
        state = self.state
        with torch.no_grad():
            used = state.long.new_empty(2, view.num_stats)
            ops.normalize(x.detach(), None, None, mask, view, formula, state, stats=used)
            nothing = {name: torch.zeros_like(getattr(state, name)) for name in _GRADIENT_STATE}
            ops.commit([(state._replace(**nothing), formula)])
            variance = formula.k**2 * used[1] ** (2 / formula.p)
        return _affine_map(x, used[0], variance, self, mask, view)

    @torch.no_grad()
    def eval_stats(self) -> tuple[Tensor, Tensor]:
        """mu and sigma² that evaluation uses, each of shape ``(G,)``; sigma² without eps.

        Raises:
            ValueError: if the layer carries no statistics from call to call.

        Example:
            >>> mu, variance = StreamingNorm1d(3).eval_stats()
            >>> mu.tolist(), variance.tolist()
            ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
        """
        if self.stream is None:
            raise ValueError(f"{type(self).__name__} takes its statistics from each input and keeps none")
        mu, m = self.stream.evaluation(self.state)
        formula = self._formula_in_graph()
        return mu, formula.k**2 * m ** (2 / formula.p)

    def _check_input(self, x: Tensor) -> None:
        self._check_rank(x)
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels in axis 1, got an input of shape {tuple(x.shape)}; "
                f"write {type(self).__name__}({x.shape[1]}) for it, or move the channels to axis 1"
            )
        if x.dtype not in _DTYPES:
            raise TypeError(f"expected a floating point input, got {x.dtype}; write x.float()")
        kept = self._buffers.get("long", self._buffers.get("running_mean"))
        if kept is not None and (x.dtype == torch.float64) != (kept.dtype == torch.float64):
            raise TypeError(
                f"the input is {x.dtype} and the layer's state {kept.dtype}: convert one of them with .double() or "
                ".float()"
            )
        # Found out in the middle of a step, it would leave half of one.
        if kept is not None and x.device != kept.device:
            raise RuntimeError(
                f"the input is on {x.device} and the layer's state on {kept.device}: move one of them, such as with "
                f"model.to({str(x.device)!r})"
            )

    def _check_rank(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(
                f"expected an input of shape (N, C, ...), got {x.dim()}D of shape {tuple(x.shape)}; "
                "a batch of one is x[None]"
            )

    def __getattr__(self, name: str) -> Any:
        """As nn.Module's, and what to ask for instead of a BatchNorm's attribute that a stream does not have."""
        if name in _INSTEAD and self.__dict__.get("stream") is not None and name not in self._buffers:
            raise AttributeError(f"{type(self).__name__} has no {name}: {_INSTEAD[name]}", name=name, obj=self)
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Norm:
        """As nn.Module: ``.double()`` converts the statistics, ``.half()`` and ``.bfloat16()`` leave them float32."""
        self._accepted = None
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype in _REDUCED:
                self._buffers[name] = old.to(buffer.device, torch.float32)
        if any(self._buffers[name] is not old for name, old in before.items()):
            # A backward still to come moves the averages that its forward had: the counts that belong to them, too.
            for name, old in before.items():
                if old is not None and self._buffers[name] is old:
                    self._buffers[name] = old.clone()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: not the ties to this process's optimizers."""
        kept = {name: value for name, value in self.__dict__.items() if name not in _OF_THIS_PROCESS}
        return {**kept, "_ties": self._ties.of_a_copy()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Norm:
        """As without this method, which parametrized modules would have another in place of."""
        new = self.__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(Norm.__getstate__(self), memo))
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, which may have been made in the middle of an update: the next step commits it.

        A pickle of version 1 holds no moment among its buffers.
        """
        super().__setstate__({"_ties": Ties(), **state})
        if saved_state.MOMENT not in self._buffers:
            self._register_moment()
        self._ties.used = self._resume() and self._ties.used

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        *_, error_msgs = args
        moment = None if self.stream is None else self.moment
        faults = saved_state.prepare(self, moment, state_dict, prefix, local_metadata.get("version"))
        if faults:
            error_msgs.extend(faults)
            return
        self._accepted = None  # assign=True may bring another precision
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if self._resume():
            self._ties.used = True

    def _resume(self) -> bool:
        """Commit at the next step, if these are the statistics of an unfinished update; whether they are."""
        unfinished = self.stream is not None and is_collecting(self)
        if unfinished:
            updates.register(self)
        return unfinished

    def extra_repr(self) -> str:
        """The arguments that differ from layer to layer."""
        parts = [f"{self.num_features}", f"ref={self.ref.pattern!r}", *(f"{k}={v}" for k, v in self.ref.sizes)]
        parts += [f"p={self.moment.p:g}", f"center={self.moment.center!r}", f"scale={self.moment.scale!r}"]
        if self.stream is not None:
            parts.append(self.stream.describe())
        modes = ["frozen"] * self.frozen + ["adapting"] * (self._adapting is not None)
        return ", ".join([*parts, f"eps={self.eps}", f"affine={self.affine}", *modes])


_outside_the_graph: Any = None
"""``Norm.forward``, once ``torch.compile`` has met a layer with ``every="batch"``: there it breaks the graph."""


@as_constant
def _make_boundary() -> bool:
    """While a graph is made. Before, it would import the compiler, which takes seconds."""
    global _outside_the_graph
    if _outside_the_graph is None:
        _outside_the_graph = torch.compiler.disable(Norm.forward, reason=_WAITS)
    return True


_WAITS = (
    'streamnorm.synchronize(model, "batch") waits for other processes inside the layer, which is no part of a graph: '
    "leave fullgraph=True away, and what lies between these layers is compiled"
)


_NOT_EXPORTED = (
    "torch.export takes {} in evaluation, not in training: a graph of PyTorch's operations has another gradient than "
    "the layer, whose statistics are averages over calls, and does not notice weight updates. Write model.eval() or "
    "`with streamnorm.frozen(model):` before it; torch.compile takes a training step. For training behind an export, "
    "such as quantization-aware training, export streamnorm.to_batchnorm(model)"
)


@arguments.explained
class SampleNorm(Norm):
    """Sample Normalization: statistics from inside each sample (the paper's SP).

    With the defaults it is Layer Normalization over channels and places with a gain and a bias per channel;
    ``"channel"`` is Instance Normalization, ``("group", g)`` Group Normalization, ``"position"`` normalizes across the
    channels at each place. Training and evaluation are the same.

    Args:
        num_features: C, the number of channels.
        ref: ``"layer"``, ``"channel"``, ``"position"``, ``("group", g)``, or a NormRef inside the sample.
        eps: added to sigma², ≥ 0.
        affine: whether to learn a gain and a bias per channel.
        p: order of the moment, ≥ 1.
        center: ``"mean"`` or ``"zero"``, see LpMoment.
        scale: ``"raw"`` or ``"gaussian"``, see LpMoment.
        bias: with ``affine``, whether to learn the bias too.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        - Input: ``(N, C)`` or ``(N, C, ...)``.
        - Output: the same.

    Example:
        >>> x = torch.randn(2, 6, 4, 4)
        >>> torch.allclose(SampleNorm(6, ("group", 3))(x), nn.GroupNorm(3, 6)(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        num_features: int,
        ref: RefName | NormRef = "layer",
        eps: float = 1e-5,
        affine: bool = True,
        *,
        p: float = 2,
        center: str = "mean",
        scale: str = "raw",
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        reference = ref if isinstance(ref, NormRef) else NormRef.sample(ref)
        _check_groups(ref, num_features)
        super().__init__(
            num_features,
            reference,
            LpMoment(p, center, scale),
            None,
            eps,
            affine,
            bias=bias,
            device=device,
            dtype=dtype,
        )


@arguments.explained
class GeneralBatchNorm(Norm):
    """General Batch Normalization: statistics of the mini-batch, over any reference and moment (the paper's GBN).

    With the defaults it is Batch Normalization, state names included: ``running_mean`` and ``running_var`` follow the
    mini-batches and serve evaluation. For other p ``running_var`` holds sigma², with the same correction n/(n−1),
    which is exact for normal data.

    Args:
        num_features: C, the number of channels.
        ref: ``"channel"``, ``"layer"``, ``("group", g)``, or a NormRef that spans the samples.
        momentum: share of the present mini-batch in the running statistics, in [0, 1]; None averages over all.
        ghosts: number of ghost batches: sample i is normalized with the samples of its index modulo ``ghosts``
            (lowered to a divisor of N). Evaluation is as without.
        eps: added to sigma², ≥ 0.
        affine: whether to learn a gain and a bias per channel.
        p: order of the moment, ≥ 1.
        center: ``"mean"`` or ``"zero"``, see LpMoment.
        scale: ``"raw"`` or ``"gaussian"``, see LpMoment.
        bias: with ``affine``, whether to learn the bias too.
        device: of parameters and state.
        dtype: of parameters; the state is float64 for float64 and float32 for all others.

    Shape:
        - Input: ``(N, C)`` or ``(N, C, ...)``.
        - Output: the same.

    Example:
        >>> ours, theirs, x = GeneralBatchNorm(3), nn.BatchNorm1d(3), torch.randn(8, 3)
        >>> torch.allclose(ours(x), theirs(x), atol=1e-5)
        True
        >>> torch.allclose(ours.running_var, theirs.running_var)
        True
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        ref: RefName | NormRef = "channel",
        momentum: float | None = 0.1,
        ghosts: int = 1,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        p: float = 2,
        center: str = "mean",
        scale: str = "raw",
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        meaning = "momentum is the share of the present mini-batch, in [0, 1] or None"
        if momentum is not None:
            momentum = arguments.real(momentum, meaning)
            if not 0 <= momentum <= 1:
                raise ValueError(f"{meaning}, got {momentum}")
        ghosts = arguments.whole(ghosts, "ghosts is a number of partitions of the batch, an integer of at least 1")
        reference = ref if isinstance(ref, NormRef) else NormRef.batch(ref)
        _check_groups(ref, num_features)
        super().__init__(
            num_features,
            reference,
            LpMoment(p, center, scale),
            None,
            eps,
            affine,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.momentum, self.ghosts = momentum, ghosts
        num_stats = reference.num_stats(num_features)
        self.register_buffer("running_mean", torch.zeros(num_stats, device=device, dtype=_state_dtype(dtype)))
        self.register_buffer("running_var", torch.ones(num_stats, device=device, dtype=_state_dtype(dtype)))
        self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.int64))

    def reset_stats(self) -> None:
        """Set the running statistics back to mean 0 and variance 1."""
        if "running_mean" in self._buffers:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def eval_stats(self) -> tuple[Tensor, Tensor]:
        """mu and sigma² that evaluation uses, each of shape ``(G,)``."""
        return self.running_mean, self.running_var

    def _view(self, x: Tensor) -> View:
        if self.ghosts == 1 or not self.training:
            return self.ref.view(x.shape)
        partitions = next(p for p in range(min(self.ghosts, len(x)), 0, -1) if len(x) % p == 0)
        return self.ref.ghosts(partitions).view(x.shape)

    @property
    def _steps(self) -> tuple[int, ...]:
        """(T,), where each of T time steps has running statistics of its own."""
        return ()

    def _check_running(self, num_stats: int) -> None:
        checks.check_running(self.running_mean, self.running_var, self.num_batches_tracked, self._steps, num_stats)

    def _train(self, x: Tensor, mask: Tensor | None, view: View) -> Tensor:
        if not is_compiling():
            self._check_running(self.ref.view(x.shape).num_stats)
        stats = self.running_mean.new_empty(2, view.num_stats)
        n: int | Tensor
        if self._joins_batches:
            y, n = self._normalize_jointly(x, mask, view, stats)
        else:
            y = self._normalize_alone(x, mask, view, stats)
            n = ops.plain.elements(view, None if mask is None else mask.view(view.mask_shape))
        self._track(stats, n)
        return y

    @torch.no_grad()
    def _track(self, stats: Tensor, n: int | Tensor) -> None:
        """Move the running statistics towards those of a call; an index without finite ones stays where it is."""
        formula = self._formula_in_graph()
        mean, variance = stats[0], formula.k**2 * stats[1] ** (2 / formula.p)
        if formula.centered:
            variance = variance * ((n.to(variance.dtype) / (n - 1)).flatten() if isinstance(n, Tensor) else n / (n - 1))
        known = mean.isfinite() & variance.isfinite()
        if isinstance(n, Tensor):
            known &= n.flatten() > 0
        self.num_batches_tracked.add_(known.any())  # in place: a checkpointed region in a graph sets no attributes
        share = 1 / self.num_batches_tracked.to(mean.dtype) if self.momentum is None else self.momentum
        for running, value in ((self.running_mean, mean), (self.running_var, variance)):
            value = value.masked_fill(~known, torch.nan).view(-1, len(running)).nanmean(0)  # over ghost batches
            running.copy_(torch.where(value.isnan(), running, running + share * (value - running)))

    def _evaluate(self, x: Tensor, mask: Tensor | None, view: View) -> Tensor:
        return _affine_map(x, *self.eval_stats(), self, mask, self.ref.view(x.shape))

    def extra_repr(self) -> str:
        """The arguments that differ from layer to layer."""
        return f"{super().extra_repr()}, momentum={self.momentum}, ghosts={self.ghosts}"


@arguments.explained
class _StreamingNorm(Norm):
    """What StreamingNorm1d, 2d and 3d share: the arguments, and the ranks that each accepts."""

    _ranks: tuple[int, ...]
    _window: float  # the default
    _hints: ClassVar[dict[str, str]] = {
        "momentum": "it has a memory in samples. Leave it out for the default window; a BatchNorm's momentum of 0.1 at "
        "N samples a batch is about window=N/0.1",
        "track_running_stats": "it always keeps statistics. Leave it out, or use SampleNorm for those of each sample",
    }

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        p: float = 1,
        center: str = "mean",
        scale: str = "raw",
        ref: RefName | NormRef = "channel",
        window: float | None = None,
        alpha: Sequence[float] | None = None,
        beta: Sequence[float] | None = None,
        kappa: float | Sequence[float] | None = None,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if ref == "position":
            raise ValueError(
                "ref='position' takes its statistics from inside a sample; a stream spans samples: use SampleNorm"
            )
        reference = ref if isinstance(ref, NormRef) else NormRef.batch(ref)
        _check_groups(ref, num_features)
        if window is None and alpha is None and beta is None and kappa is None:
            window = self._window
        super().__init__(
            num_features,
            reference,
            LpMoment(p, center, scale),
            Stream(window, alpha, beta, kappa),
            eps,
            affine,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def _check_rank(self, x: Tensor) -> None:
        if x.dim() not in self._ranks:
            ranks = " or ".join(f"{rank}D" for rank in self._ranks)
            fitting = {2: "StreamingNorm1d", 3: "StreamingNorm1d", 4: "StreamingNorm2d", 5: "StreamingNorm3d"}.get(
                x.dim()
            )
            hint = f"; {fitting} takes it" if fitting else ""
            hint += "; a batch of one is x[None]" if x.dim() + 1 in self._ranks else ""
            raise ValueError(f"expected {ranks} input, got {x.dim()}D input of shape {tuple(x.shape)}{hint}")


_STREAMING_DOC = """Streaming Normalization (the paper's SN): a drop-in for ``nn.BatchNorm{d}d``.

    Statistics and their gradients are averaged over the samples seen so far, so that one sample at a time is
    enough. The training loop stays as it is: the layer notices ``optimizer.step()`` by itself.

    Args:
        num_features: C, the number of channels.
        eps: added to sigma², ≥ 0.
        affine: whether to learn a gain and a bias per channel.
        p: order of the moment, ≥ 1; 1 is recommended.
        center: ``"mean"`` or ``"zero"``, see LpMoment.
        scale: ``"raw"`` or ``"gaussian"``, see LpMoment.
        ref: ``"channel"``, ``"layer"``, ``("group", g)``, or a NormRef that spans the samples.
        window: memory in samples, > 0; {window:g} if none of the four is given. See Stream.
        alpha: weights of long-term, short-term and present statistics, in place of the window.
        beta: the same for their gradients.
        kappa: what a weight update keeps of the long-term and takes of the short-term average.
        bias: with ``affine``, whether to learn the bias too.
        device: of parameters and state.
        dtype: of parameters; the state is float64 for float64 and float32 for all others.

    Shape:
        - Input: {shape}.
        - mask: ``(N,)`` or ``(N, ...)`` without the channel axis, bool; True where an element counts.
        - Output: as the input.

    Raises:
        ValueError: if a constant is out of its range, ``window`` meets α, β or κ, or the reference is inside a sample.

    Example:
        >>> layer = StreamingNorm{d}d(8)
        >>> layer(torch.randn({example})).shape
        torch.Size([{example}])
    """


class StreamingNorm1d(_StreamingNorm):  # noqa: D101
    _ranks = (2, 3)
    _window = WINDOW
    __doc__ = _STREAMING_DOC.format(d=1, window=_window, shape="``(N, C)`` or ``(N, C, L)``", example="1, 8")


class StreamingNorm2d(_StreamingNorm):  # noqa: D101
    _ranks = (4,)
    _window = IMAGE_WINDOW
    __doc__ = _STREAMING_DOC.format(d=2, window=_window, shape="``(N, C, H, W)``", example="1, 8, 4, 4")


class StreamingNorm3d(_StreamingNorm):  # noqa: D101
    _ranks = (5,)
    _window = IMAGE_WINDOW
    __doc__ = _STREAMING_DOC.format(d=3, window=_window, shape="``(N, C, D, H, W)``", example="1, 8, 2, 4, 4")


def streaming_layers(model: nn.Module) -> list[Norm]:
    """The layers of a model that carry a stream."""
    arguments.check_model(model)
    return [module for module in model.modules() if isinstance(module, Norm) and module.stream is not None]


def _affine_map(x: Tensor, mu: Tensor, variance: Tensor, layer: Norm, mask: Tensor | None, view: View) -> Tensor:
    """Normalize by given statistics. Where they are the same all over a channel, PyTorch's own kernel does it."""
    if mask is not None:  # what is hidden may be infinite, and 0·inf is no gradient for the gain
        x = x.masked_fill(~mask.unsqueeze(1), 0)
    if all(view.axes[i] == 1 for i in view.kept):
        mu, variance = view.per_channel(mu), view.per_channel(variance)
        # Contiguous: the backward of batch_norm reads a gain with gaps as if it had none.
        weight, bias = (None if t is None else t.to(mu.dtype).contiguous() for t in (layer.weight, layer.bias))
        y = F.batch_norm(x, mu, variance, weight, bias, training=False, eps=layer.eps)
    else:
        shape = view.stats_shape
        y = (x.view(view.split) - mu.view(shape)) * (variance + layer.eps).rsqrt().view(shape)
        if layer.weight is not None:
            y = y * layer.weight.view(view.channel_shape)
        if layer.bias is not None:
            y = y + layer.bias.view(view.channel_shape)
        y = y.view(x.shape).to(x.dtype)
    return y if mask is None else y.masked_fill(~mask.unsqueeze(1), 0)


def _full_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The mask as ``(N, ...)``, one value per sample and place."""
    places = (x.shape[0], *x.shape[2:])
    shapes = f"{places[:1]} or {places}" if len(places) > 1 else f"{places}"
    if not isinstance(mask, Tensor):
        raise TypeError(f"a mask is a bool tensor of shape {shapes}, got a {type(mask).__name__}")
    if mask.device != x.device:
        raise RuntimeError(f"the input is on {x.device} and the mask on {mask.device}: write mask.to(x.device)")
    if mask.dtype != torch.bool or tuple(mask.shape) not in (places, places[:1]):
        raise ValueError(
            f"a mask is a bool tensor of shape {shapes} for an input of shape {tuple(x.shape)}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}; write mask.bool() for zeros and ones"
        )
    return mask.view(mask.shape + (1,) * (len(places) - mask.dim())).expand(places).contiguous()


def _check_groups(ref: RefName | NormRef, num_features: int) -> None:
    if isinstance(ref, tuple) and arguments.whole(num_features, _FEATURES) % ref[1]:
        raise ValueError(
            f"{num_features} channels do not fall into {ref[1]} equal groups; choose a divisor of {num_features}"
        )


def _check_kinds(ref: Any, moment: Any, stream: Any) -> None:
    if not isinstance(ref, NormRef):
        raise TypeError(f"ref is a NormRef, such as NormRef.batch('channel'), got {ref!r}")
    if not isinstance(moment, LpMoment):
        raise TypeError(f"moment is an LpMoment, such as LpMoment(p=1), got {moment!r}")
    if stream is not None and not isinstance(stream, Stream):
        raise TypeError(f"stream is a Stream, such as Stream(window=200), or None, got {stream!r}")


def _state_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of statistics beside parameters of this dtype."""
    return ops.plain.wide(dtype or torch.get_default_dtype())
