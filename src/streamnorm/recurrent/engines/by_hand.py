"""The engine in PyTorch operations: each network's time steps forward and, by hand, backward.

The equations are those of ``steps``; a backward pass takes their derivatives from the last line to the first. The
normalizations go through the PyTorch or the GPU engine of ``streamnorm.ops``, call by call. The input's products of all
steps are one matrix product, and so are the weights' gradients.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...core.spec import Call, State, wide
from ...layers import GeneralBatchNorm, Norm
from ...ops.checks import check_state
from ..norms import PerStepBatchNorm
from ..steps import Hidden, Norms
from . import sequence
from .sequence import Gradient, Tensors, states_before

Gradients = tuple[Gradient, ...]


class _Use:
    """A record of one use of a norm for its backward; it stands where the engine expects autograd's context."""

    checked = True  # by those who go through all steps, before the first one
    function: Any
    view: Any
    state: State | None
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor | None, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


class Path:
    """N(x) + bias at each step, with the gradients of gain and bias summed over the steps."""

    def __init__(self, norm: nn.Module | None, gain: Tensor | None, bias: Tensor | None) -> None:
        assert norm is None or isinstance(norm, Norm)
        self.norm, self.gain, self.bias = norm, gain, bias
        self.uses: list[_Use] = []

    def forward(self, x: Tensor, number: int) -> Tensor:
        """Normalize the values of a step; the norm's statistics and stream advance."""
        norm = self.norm
        if norm is None:
            return x if self.bias is None else x + self.bias
        view, use = norm.ref.view(x.shape), _Use()
        tracks = isinstance(norm, GeneralBatchNorm)
        stats = x.new_empty(2, view.num_stats) if tracks else None
        state = None if norm.stream is None else norm.state
        call = Call(x, self.gain, self.bias, None, view, norm.formula, state, norm._ties.grad_scale, stats)
        use.function = ops.function(call)
        y: Tensor = use.function.forward(use, *call)
        self.uses.append(use)
        if isinstance(norm, PerStepBatchNorm):
            norm.select(number)
        if isinstance(norm, GeneralBatchNorm) and stats is not None:
            norm._track(stats, len(x))
        return y

    def start_backward(self, wants_gain: bool, wants_bias: bool) -> None:
        """Begin to sum."""
        for use in self.uses[-1:]:
            if use.state is not None:
                x = use.saved_tensors[0]
                assert x is not None
                check_state(use.state, use.view.num_stats, wide(x.dtype), x.get_device())
        self.wants_gain, self.wants_bias = wants_gain, wants_bias
        self.d_gain: Gradient = None
        self.d_bias: Gradient = None

    def backward(self, dy: Tensor, number: int, flows: bool) -> Gradient:
        """The gradient of x if it flows there, and then the norm's gradient stream advances."""
        if self.norm is None:
            if self.wants_bias:
                self.d_bias = plus(self.d_bias, dy.sum(0))
            return dy if flows else None
        use = self.uses[number]
        use.needs_input_grad = (flows, self.wants_gain, self.wants_bias)
        dx, d_gain, d_bias, *_ = use.function.backward(use, dy)
        self.d_gain, self.d_bias = plus(self.d_gain, d_gain), plus(self.d_bias, d_bias)
        return dx


class Product:
    """N(W·h) + bias at each step. The gradient of W is one product over all steps."""

    def __init__(self, weight: Tensor, path: Path) -> None:
        self.weight, self.path = weight, path

    def forward(self, h: Tensor, number: int) -> Tensor:
        """The values of a step."""
        return self.path.forward(h @ self.weight.t(), number)

    def start_backward(self, wants_weight: bool, wants_gain: bool, wants_bias: bool) -> None:
        """Begin to collect."""
        self.wants_weight = wants_weight
        self.d_products: list[Tensor] = []
        self.path.start_backward(wants_gain, wants_bias)

    def backward(self, dy: Tensor, number: int, flows: bool) -> Gradient:
        """The gradient of h, if it flows there."""
        d_product = self.path.backward(dy, number, flows or self.wants_weight)
        if d_product is None:
            return None
        self.d_products.append(d_product)
        return d_product @ self.weight if flows else None

    def d_weight(self, inputs: Tensor) -> Gradient:
        """The gradient of W, from the h of all steps."""
        return torch.cat(self.d_products[::-1]).t() @ inputs if self.wants_weight else None


class Steps:
    """The time steps of one layer in one direction.

    Args:
        tensors: weights and gains.
        norms: its normalizations.
    """

    def __init__(self, tensors: Tensors, norms: Norms) -> None:
        self.input = Path(norms.ih, tensors.gain_ih, tensors.b_ih)
        self.product = Product(tensors.w_hh, Path(norms.hh, tensors.gain_hh, tensors.b_hh))
        self.saved: list[tuple[Tensor, ...]] = []

    def forward(self, number: int, wx: Tensor, hidden: Hidden) -> Hidden:
        """Advance by one step."""
        raise NotImplementedError

    def start_backward(self, needs: Tensors) -> None:
        """Before the first step is retraced: which tensors want a gradient."""
        self.needs = needs
        self.input.start_backward(needs.gain_ih, needs.b_ih)
        self.product.start_backward(needs.w_hh, needs.gain_hh, needs.b_hh)
        self.d_wx: list[Tensor] = []

    def backward(self, number: int, h: Tensor, previous: Tensor, d_hidden: Gradients) -> Gradients:
        """Retrace the step that led from ``previous`` to ``h``: the gradients of the hidden tensors before it."""
        raise NotImplementedError

    def finish_backward(self, previous: Tensor) -> dict[str, Gradient]:
        """The gradients of weights and gains, given the hidden states before all steps."""
        path = self.product.path
        return {
            "w_hh": self.product.d_weight(previous),
            "b_ih": self.input.d_bias,
            "b_hh": path.d_bias,
            "gain_ih": self.input.d_gain,
            "gain_hh": path.d_gain,
        }

    def _flows_into_past(self, number: int) -> bool:
        """Whether the hidden state before this step wants a gradient: what it was computed from does, or it itself."""
        return number > 0 or self.needs.h

    def _input_backward(self, d_sum: Tensor, number: int) -> None:
        d_wx = self.input.backward(d_sum, number, self.needs.data or self.needs.w_ih)
        if d_wx is not None:
            self.d_wx.append(d_wx)


class _RNN(Steps):
    def forward(self, number: int, wx: Tensor, hidden: Hidden) -> Hidden:
        return (self._activation(self.input.forward(wx, number) + self.product.forward(hidden[0], number)),)

    def backward(self, number: int, h: Tensor, previous: Tensor, d_hidden: Gradients) -> Gradients:
        (d_h,) = d_hidden
        assert d_h is not None
        d_sum = self._through_activation(d_h, h)
        self._input_backward(d_sum, number)
        return (self.product.backward(d_sum, number, self._flows_into_past(number)),)

    def _activation(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _through_activation(self, d_h: Tensor, h: Tensor) -> Tensor:
        """The gradient before the activation, from that behind it and its value."""
        raise NotImplementedError


class _RNNTanh(_RNN):
    def _activation(self, x: Tensor) -> Tensor:
        return x.tanh()

    def _through_activation(self, d_h: Tensor, h: Tensor) -> Tensor:
        return d_h * (1 - h * h)


class _RNNRelu(_RNN):
    def _activation(self, x: Tensor) -> Tensor:
        return x.relu()

    def _through_activation(self, d_h: Tensor, h: Tensor) -> Tensor:
        return d_h.masked_fill(h <= 0, 0)  # as torch.relu: NaN lets its gradient through, a unit at rest no NaN


class _GRU(Steps):
    def forward(self, number: int, wx: Tensor, hidden: Hidden) -> Hidden:
        (h,) = hidden
        reset_x, update_x, new_x = self.input.forward(wx, number).chunk(3, 1)
        reset_h, update_h, new_h = self.product.forward(h, number).chunk(3, 1)
        reset, update = (reset_x + reset_h).sigmoid_(), (update_x + update_h).sigmoid_()
        new = torch.addcmul(new_x, reset, new_h).tanh_()
        self.saved.append((reset, update, new, new_h))
        return (new + update * (h - new),)

    def backward(self, number: int, h: Tensor, previous: Tensor, d_hidden: Gradients) -> Gradients:
        (d_h,) = d_hidden
        assert d_h is not None
        reset, update, new, new_h = self.saved[number]
        d_new = d_h * (1 - update) * (1 - new * new)
        d_update = d_h * (previous - new) * update * (1 - update)
        d_reset = d_new * new_h * reset * (1 - reset)
        self._input_backward(torch.cat((d_reset, d_update, d_new), 1), number)
        d_sum = torch.cat((d_reset, d_update, d_new * reset), 1)
        flows = self._flows_into_past(number)
        d_previous = self.product.backward(d_sum, number, flows)
        return (plus(d_previous, d_h * update) if flows else None,)


class _GRUResetBefore(Steps):
    def __init__(self, tensors: Tensors, norms: Norms) -> None:
        super().__init__(tensors, norms)
        gates = 2 * tensors.w_hh.shape[1]
        b_gates, b_new = (None, None) if tensors.b_hh is None else (tensors.b_hh[:gates], tensors.b_hh[gates:])
        self.product = Product(tensors.w_hh[:gates], Path(norms.hh, tensors.gain_hh, b_gates))
        self.new_product = Product(tensors.w_hh[gates:], Path(norms.hn, tensors.gain_hn, b_new))

    def forward(self, number: int, wx: Tensor, hidden: Hidden) -> Hidden:
        (h,) = hidden
        reset_x, update_x, new_x = self.input.forward(wx, number).chunk(3, 1)
        reset_h, update_h = self.product.forward(h, number).chunk(2, 1)
        reset, update = (reset_x + reset_h).sigmoid_(), (update_x + update_h).sigmoid_()
        new = (new_x + self.new_product.forward(reset * h, number)).tanh_()
        self.saved.append((reset, update, new))
        return (new + update * (h - new),)

    def start_backward(self, needs: Tensors) -> None:
        super().start_backward(needs)
        self.new_product.start_backward(needs.w_hh, needs.gain_hn, needs.b_hh)
        self.first_reset_flows = _any_but(needs, "gain_hn")

    def backward(self, number: int, h: Tensor, previous: Tensor, d_hidden: Gradients) -> Gradients:
        (d_h,) = d_hidden
        assert d_h is not None
        reset, update, new = self.saved[number]
        flows = self._flows_into_past(number)
        d_new = d_h * (1 - update) * (1 - new * new)
        d_update = d_h * (previous - new) * update * (1 - update)
        d_kept = self.new_product.backward(d_new, number, number > 0 or self.first_reset_flows)
        if d_kept is None:  # only the gain behind the product, at the first step
            return (None,)
        d_reset = d_kept * previous * reset * (1 - reset)
        self._input_backward(torch.cat((d_reset, d_update, d_new), 1), number)
        d_previous = self.product.backward(torch.cat((d_reset, d_update), 1), number, flows)
        return (plus(d_previous, d_h * update + d_kept * reset) if flows else None,)

    def finish_backward(self, previous: Tensor) -> dict[str, Gradient]:
        reset = torch.cat([saved[0] for saved in self.saved])
        gradients = super().finish_backward(previous)
        path = self.new_product.path
        gradients["gain_hn"] = path.d_gain
        gradients["w_hh"] = _stacked(gradients["w_hh"], self.new_product.d_weight(reset * previous))
        gradients["b_hh"] = _stacked(gradients["b_hh"], path.d_bias)
        return gradients


class _LSTM(Steps):
    def __init__(self, tensors: Tensors, norms: Norms) -> None:
        super().__init__(tensors, norms)
        self.w_hr = tensors.w_hr
        self.cell = Path(norms.cell, tensors.gain_cell, tensors.bias_cell)

    def forward(self, number: int, wx: Tensor, hidden: Hidden) -> Hidden:
        h, c = hidden
        size = c.shape[1]
        gates = self.input.forward(wx, number) + self.product.forward(h, number)
        gates[:, : 2 * size].sigmoid_()
        gates[:, 2 * size : 3 * size].tanh_()
        gates[:, 3 * size :].sigmoid_()
        input_, forget, candidate, output = gates.chunk(4, 1)
        next_c = torch.addcmul(forget * c, input_, candidate)
        squashed = self.cell.forward(next_c, number).tanh()
        self.saved.append((gates, c, squashed))
        h = output * squashed
        return (h if self.w_hr is None else h @ self.w_hr.t()), next_c

    def start_backward(self, needs: Tensors) -> None:
        super().start_backward(needs)
        self.cell.start_backward(needs.gain_cell, needs.bias_cell)
        self.d_projected: list[Tensor] = []
        self.first_cell_flows = _any_but(needs, "gain_cell", "bias_cell", "w_hr")

    def backward(self, number: int, h: Tensor, previous: Tensor, d_hidden: Gradients) -> Gradients:
        d_h, d_c = d_hidden
        gates, previous_c, squashed = self.saved[number]
        input_, forget, candidate, output = gates.chunk(4, 1)
        d_output = None
        if d_h is not None:
            if self.w_hr is not None:
                self.d_projected.append(d_h)
                d_h = d_h @ self.w_hr
            d_output = d_h * squashed * output * (1 - output)
            d_squashed = d_h * output * (1 - squashed * squashed)
            d_c = plus(d_c, self.cell.backward(d_squashed, number, number > 0 or self.first_cell_flows))
        if d_c is None:  # only the cell norm's own parameters, at the first step
            return None, None
        d_sum = torch.cat(
            (
                d_c * candidate * input_ * (1 - input_),
                d_c * previous_c * forget * (1 - forget),
                d_c * input_ * (1 - candidate * candidate),
                torch.zeros_like(d_c) if d_output is None else d_output,
            ),
            1,
        )
        self._input_backward(d_sum, number)
        d_previous = self.product.backward(d_sum, number, self._flows_into_past(number))
        return d_previous, d_c * forget if number > 0 or self.needs.c else None

    def finish_backward(self, previous: Tensor) -> dict[str, Gradient]:
        gradients = super().finish_backward(previous)
        gradients.update(gain_cell=self.cell.d_gain, bias_cell=self.cell.d_bias)
        if (
            self.needs.w_hr and self.d_projected
        ):  # a gradient through the cell alone reaches no projection at the last step
            steps = self.saved[: len(self.d_projected)]
            squeezed = torch.cat([gates.chunk(4, 1)[3] * squashed for gates, _, squashed in steps])
            gradients["w_hr"] = torch.cat(self.d_projected[::-1]).t() @ squeezed
        return gradients


_NETWORKS: dict[str, type[Steps]] = {
    "RNN_TANH": _RNNTanh,
    "RNN_RELU": _RNNRelu,
    "GRU": _GRU,
    "GRU_RESET_BEFORE": _GRUResetBefore,
    "LSTM": _LSTM,
}


class ByHand:
    """A pass over a sequence, step by step."""

    def __init__(self, kind: str, sizes: list[int], norms: Norms, t: Tensors) -> None:
        self.sizes, self.steps = sizes, _NETWORKS[kind](t, norms)

    def forward(self, t: Tensors) -> tuple[Tensor, ...]:
        """All steps."""
        hidden = t.hidden
        outputs: list[Tensor] = []
        ended: list[Hidden] = []
        for number, wx in enumerate((t.data @ t.w_ih.t()).split(self.sizes)):
            rows = len(wx)
            if rows < len(hidden[0]):
                ended.append(tuple(h[rows:] for h in hidden))
                hidden = tuple(h[:rows] for h in hidden)
            hidden = self.steps.forward(number, wx, hidden)
            outputs.append(hidden[0])
        return torch.cat(outputs), *(torch.cat(parts) for parts in zip(hidden, *reversed(ended)))

    def backward(
        self, t: Tensors, needs: Tensors, output: Tensor, d_output: Gradient, d_finals: Gradients
    ) -> dict[str, Gradient]:
        """All steps in reverse."""
        steps, sizes = self.steps, self.sizes
        states, before = output.split(sizes), states_before(t.h, output, sizes)
        d_states = [None] * len(sizes) if d_output is None else d_output.split(sizes)

        steps.start_backward(needs)
        d_hidden: Gradients = (None,) * len(d_finals)
        reached = 0
        for number in reversed(range(len(sizes))):
            d_hidden = tuple(_grown(d, d_final, reached, sizes[number]) for d, d_final in zip(d_hidden, d_finals))
            d_hidden = (plus(d_hidden[0], d_states[number]), *d_hidden[1:])
            d_hidden = steps.backward(number, states[number], before[number], d_hidden)
            reached = sizes[number]

        gradients = steps.finish_backward(torch.cat(before))
        if steps.d_wx:
            d_wx = torch.cat(steps.d_wx[::-1])
            gradients["data"] = d_wx @ t.w_ih if needs.data else None
            gradients["w_ih"] = d_wx.t() @ t.data if needs.w_ih else None
        gradients.update(zip(("h", "c"), d_hidden))
        return gradients


run = partial(sequence.run, ByHand)
"""Run one layer in one direction; ``loop.run`` explains the arguments."""


def _grown(d: Gradient, d_final: Gradient, reached: int, rows: int) -> Gradient:
    """The gradient of a hidden tensor after a step, of which the first ``reached`` rows went on to the next one."""
    if reached == rows or (d is None and d_final is None):
        return d
    ended = d_final[reached:rows] if d_final is not None else None
    if reached == 0:
        return ended
    like = d if d is not None else d_final
    assert like is not None
    parts = (
        like.new_zeros(reached, like.shape[1]) if d is None else d,
        like.new_zeros(rows - reached, like.shape[1]) if ended is None else ended,
    )
    return torch.cat(parts)


def plus(a: Gradient, b: Gradient) -> Gradient:
    """Their sum, where None is no gradient."""
    return b if a is None else a if b is None else a + b


def _any_but(needs: Tensors, *names: str) -> bool:
    return any(need for name, need in needs._asdict().items() if name not in names)


def _stacked(a: Gradient, b: Gradient) -> Gradient:
    return None if a is None or b is None else torch.cat((a, b))
