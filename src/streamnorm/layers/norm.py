"""Norm: a reference, a moment and a stream, joined in a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, compiler, nn
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn.parallel import DistributedDataParallel

from .. import ops
from ..core import arguments
from ..core.compiler import as_constant, as_leaf, is_symbolic
from ..core.moment import LpMoment
from ..core.reference import NormRef
from ..core.spec import Call, View
from ..core.stream import Stream
from ..ops import graph, processes
from ..training import agreement, checkpoint, updates
from ..training.streaming import streaming_modules
from ..training.ties import Ties
from . import compiled, inputs
from .construction import check_eps, check_features, check_kinds, check_switches, state_dtype
from .evaluation import Adapting, adapt, affine_map
from .state import Stateful

_passes, _backward_pass = checkpoint.passes.get, torch._C._current_graph_task_id
_jit_trace, _short_way = torch._C._get_tracing_state, ops.short_way


@arguments.explained
class Norm(Stateful):
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

    _adapting: Adapting | None = None

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
        eps, num_features = check_eps(eps), check_features(num_features)
        check_switches(affine, bias)
        check_kinds(ref, moment, stream, dtype)
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
                stream.new_state(ref.num_stats(num_features), device, state_dtype(dtype))._asdict().items()
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

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize x."""
        if is_dynamo_compiling() or compiler._is_compiling_flag:  # is_compiling(), without a call of its own
            if self._ties.sync.every == "batch" and self.training and not self.frozen:
                _make_boundary()
                return _outside_the_graph(self, x, mask)
            return compiled.forward(self, x, mask)
        if type(x) is not Tensor and is_symbolic(x):
            return as_leaf(self, Norm.forward, x, mask)
        if self._repeats and mask is None and self.training and not self.frozen:
            y = self._train_again(x)
            if y is not NotImplemented:
                return y
        view = self._look_at(x)
        if x.numel() == 0 and not self._joins_batches:
            return self._pass_empty(x)
        if mask is not None:
            mask = inputs.full_mask(mask, x)
        if not self.training or self.frozen:
            return self._evaluate(x, mask, view)
        if _passes() or _backward_pass() != -1:  # as checkpoint.concerns, without a call of its own
            with checkpoint.use((self,)):
                return self._train(x, mask, view)
        return self._train(x, mask, view)

    def _look_at(self, x: Tensor) -> View:
        """Check an input and find its view; both are remembered for more inputs of the same kind."""
        kind = (x.shape, x.dtype, x.device, self.training)
        if kind != self._accepted or _jit_trace() is not None:
            self._check_input(x)
            # The sizes that torch.jit.trace sees are those of its graph, which each pass has to find for itself.
            self._accepted = kind if _jit_trace() is None else None
            self._accepted_view = self._view(x)
        return self._accepted_view

    @as_constant
    def _meet_while_tracing(self) -> bool:
        """Runs when a graph is made; a guard on ``met`` lets it run for the next layer that takes the graph."""
        if not self._ties.met:
            updates.meet(self)
        return True

    def _pass_empty(self, x: Tensor) -> Tensor:
        if self.training and self.stream is not None:  # without data too, a process takes part in weight updates
            graph.take_part(self.state) if is_compiling() else updates.notice(self)
        return inputs.empty(self, x)

    def _view(self, x: Tensor) -> View:
        return self.ref.view(x.shape)

    def _train(self, x: Tensor, mask: Tensor | None, view: View) -> Tensor:
        ties = self._ties
        if ties.sync.every == "batch" and self._joins_batches:
            return self._normalize_jointly(x, mask, view)[0]
        if self.stream is None:
            return self._normalize_alone(x, mask, view)
        is_due = next(ties.lease, None) is None
        if is_due or (DistributedDataParallel._active_ddp_module is not None and agreement.is_new(self)):
            updates.notice(self, x)
        return self._stream(x, mask, view)

    def _stream(self, x: Tensor, mask: Tensor | None, view: View) -> Tensor:
        """Normalize by streamed statistics."""
        weight, bias = self.weight, self.bias
        if mask is None:
            y = self._try_short_way(x, weight, bias, view)
            if y is not NotImplemented:
                return y
        return ops.normalize(Call(x, weight, bias, mask, view, self.formula, self.state, self._ties.grad_scale))

    def _try_short_way(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, view: View) -> Any:
        """Normalize by a plan for inputs like this one, or return NotImplemented."""
        plan, ties, shape = self._plan, self._ties, x.shape
        if plan is None or plan.view is not view or plan.formula is not self.formula:
            plan = self._plan = ops.prepare(view, self.formula)
        if plan is None:
            return NotImplemented
        y = _short_way.attempt(x, weight, bias, (plan, self._buffers, ties.grad_scale, None, None))
        taken = y is not NotImplemented
        self._repeats = taken and shape == self._last_shape and ties.sync.every != "batch"
        self._last_shape = shape if taken else None
        return y

    def _train_again(self, x: Tensor) -> Any:
        """Fast path for a third input of a shape: for small layers, Python overhead dominates the step.

        Returns NotImplemented, with nothing done, where there is more to be looked at. The engine itself refuses inputs
        (of another shape, too) and states that do not fit the plan or each other.
        """
        ties = self._ties
        if (
            next(ties.lease, None) is None
            or _passes()
            or _backward_pass() != -1
            or DistributedDataParallel._active_ddp_module is not None
        ):
            return NotImplemented
        try:  # past the search of nn.Module.__getattr__
            weight, bias = self._parameters[self._gain], self._parameters["bias"]
        except KeyError:  # parametrized: computed when they are asked for
            return NotImplemented
        return _short_way.attempt(x, weight, bias, (self._plan, self._buffers, ties.grad_scale, None, None))

    def _normalize_alone(self, x: Tensor, mask: Tensor | None, view: View, stats: Tensor | None = None) -> Tensor:
        """Normalize by the statistics of this input."""
        formula = self._formula_in_graph()
        if self.training and formula.centered and view.num_elements == 1:
            raise ValueError(
                f"{type(self).__name__} has one value per statistic for an input of shape {tuple(x.shape)}, and a "
                "value less its own mean is 0. Use StreamingNorm, which remembers earlier samples, or a wider reference"
            )
        return ops.normalize(Call(x, self.weight, self.bias, mask, view, formula, stats=stats))

    @property
    def _joins_batches(self) -> bool:
        """Whether this training step sees the mini-batches of several processes as one."""
        return (
            self.training
            and not self.frozen
            and self._ties.sync.every == "batch"
            and agreement.group_of(self) is not None
        )

    def _normalize_jointly(
        self, x: Tensor, mask: Tensor | None, view: View, stats: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalize by the statistics of all processes' mini-batches; also their number of elements per statistic."""
        if self.stream is not None:
            updates.notice(self)
        state = None if self.stream is None else self.state
        call = Call(x, self.weight, self.bias, mask, view, self.formula, state, self._ties.grad_scale, stats)
        return processes.normalize(call, agreement.group_of(self))

    def _evaluate(self, x: Tensor, mask: Tensor | None, view: View) -> Tensor:
        if self.stream is None:
            return self._normalize_alone(x, mask, view)
        if self._adapting is not None and not self.frozen:
            return adapt(self, x, mask, view, self._adapting)
        return affine_map(x, *self.eval_stats(), self, mask, view)

    def _check_input(self, x: Tensor) -> None:
        self._check_rank(x)
        inputs.check(self, x, self.num_features)

    def _check_rank(self, x: Tensor) -> None:
        inputs.check_rank(x)

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
    "leave fullgraph=True out, and what lies between these layers is compiled"
)


def streaming_layers(model: nn.Module) -> list[Norm]:
    """The layers of a model that carry a stream."""
    return [layer for layer in streaming_modules(model) if isinstance(layer, Norm)]
