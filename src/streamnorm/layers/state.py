"""Stateful: the state and the formula of a layer; how they are set, read, copied, pickled and loaded."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import ops
from ..core import saved_state
from ..core.compiler import as_constant, guard_on
from ..core.moment import LpMoment
from ..core.spec import GRADIENTS, Formula, View
from ..core.stream import ESTABLISHED, Stream
from ..training import runaway, updates
from ..training.streaming import Streaming
from ..training.surroundings import is_collecting
from ..training.ties import Ties
from .construction import INSTEAD

_REDUCED = (torch.float16, torch.bfloat16)

_REMEMBERED = ("_accepted", "_plan", "_repeats", "_last_shape")
"""Caches for the last kind of input. A copy starts without them."""

_BEFORE_TIES = frozenset(("_name", "_per_batch", "_sync"))
"""Attributes of version 0.1 that are in the ties now."""


class Stateful(Streaming):
    """A layer with state. Copies and pickles are without its ties to this process."""

    _version = saved_state.VERSION

    moment: LpMoment

    # The kind of input that was checked last, and its view: the same kind is not checked again.
    _accepted: tuple[torch.Size, torch.dtype, torch.device, bool] | None = None
    _accepted_view: View
    # The plan of the C++ engine for the last shape; and whether two inputs in a row had that shape, of which it took
    # the second with this formula.
    _plan: ops.Plan | None = None
    _last_shape: torch.Size | None = None
    _repeats: bool = False

    @torch.no_grad()
    def reset_stats(self) -> None:
        """Set the stream back to its prior."""
        if self.stream is not None:
            runaway.forget(self)
            for buffer, fresh in zip(self.state, self.stream.new_state(1, None, torch.float64)):
                buffer.copy_(fresh.expand_as(buffer))
            self.lp_moment.copy_(saved_state.as_tensor(self.moment))  # after to_empty

    def set_stream(self, stream: Stream) -> None:
        """Change the constants of a streaming layer; its statistics stay.

        A change between the window rule and the paper's constants resets the streams of gradients, whose units differ.
        """
        if self.stream is None:
            raise ValueError(f"{type(self).__name__} carries no stream; make the layer with one")
        if not isinstance(stream, Stream):
            raise TypeError(f"stream is a Stream, such as Stream(window=200), got {stream!r}")
        if (stream.window is None) != (self.stream.window is None):
            self._forget_gradients()  # which are in other units under the window rule
        self.stream = stream
        self._set_formula()

    @torch.no_grad()
    def _forget_gradients(self) -> None:
        for name in GRADIENTS:
            self.get_buffer(name).zero_()

    def _set_formula(self) -> None:
        constants = (float(self.moment.p), self.moment.center == "mean", self.moment.k, self.eps)
        self.formula = Formula(*constants) if self.stream is None else self.stream.formula(*constants)
        self._formula_text = repr(self.formula)
        self._repeats = False

    def _formula_in_graph(self) -> Formula:
        """The formula, as constants where a graph is being made.

        A compiler that has met other constants would make numbers of the graph's inputs out of them, which it then
        cannot bring into a function with a backward pass of its own. It does not do so with a text, and a graph that
        depends on the text is made again for another formula.
        """
        if not is_compiling():
            return self.formula
        guard_on(self._formula_text)
        return self._formula_while_tracing()

    @as_constant
    def _formula_while_tracing(self) -> Formula:
        return self.formula

    @torch.no_grad()
    def eval_stats(self) -> tuple[Tensor, Tensor]:
        """mu and sigma² that evaluation uses, each of shape ``(G,)``; sigma² without eps.

        Raises:
            ValueError: if the layer carries no statistics from call to call.

        Example:
            >>> import streamnorm as sn
            >>> mu, variance = sn.StreamingNorm1d(3, p=2).eval_stats()
            >>> mu.tolist(), variance.tolist()
            ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
        """
        if self.stream is None:
            raise ValueError(f"{type(self).__name__} takes its statistics from each input and keeps none")
        mu, m = self.stream.evaluation(self.state)
        formula = self._formula_in_graph()
        return mu, formula.k**2 * m ** (2 / formula.p)

    def __getattr__(self, name: str) -> Any:
        """As ``nn.Module``, with an error that names the counterpart of a BatchNorm's attribute."""
        if name in INSTEAD and self.__dict__.get("stream") is not None and name not in self._buffers:
            raise AttributeError(f"{type(self).__name__} has no {name}: {INSTEAD[name]}", name=name, obj=self)
        return super().__getattr__(name)

    def _register_moment(self) -> None:
        if self.stream is not None:
            like = self.long
            self.register_buffer(saved_state.MOMENT, saved_state.as_tensor(self.moment, like.device, like.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stateful:
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
        """The attributes that a copy starts with, without the ties to this process's optimizers."""
        kept = {name: value for name, value in self.__dict__.items() if name not in _REMEMBERED}
        return {**kept, "_ties": self._ties.of_a_copy()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Stateful:
        """Copy by ``__getstate__``; without this method parametrized modules would inherit another one."""
        new = self.__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(Stateful.__getstate__(self), memo))
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set up a copy, which may have been made in the middle of an update: the next step commits it.

        A pickle of version 0.1 holds no moment among its buffers, no number of samples seen, and no ties.
        """
        if "_ties" not in state:
            ties = Ties(state.get("_name", ""), state.get("_sync", Ties.sync))
            state = {"_ties": ties, **{name: value for name, value in state.items() if name not in _BEFORE_TIES}}
        super().__setstate__(state)
        if saved_state.MOMENT not in self._buffers:
            self._register_moment()
        if self.stream is not None and "seen" not in self._buffers:
            self.register_buffer("seen", torch.full_like(self.samples, ESTABLISHED))
            self._forget_gradients()
            self.stream = dataclasses.replace(self.stream)  # with what a stream says since then
            self._set_formula()
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
