"""Cells: one time step per call, for loops of the user's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import arguments
from ..core.compiler import as_leaf, is_symbolic
from .base import Normalized
from .checks import check_gains, check_weights
from .norms import Factory, NormChoice, When
from .steps import STEPS, Hidden, Weights

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .norms import NormOptions

_CELL_DOC = """{title}: ``torch.nn.{name}`` with a normalization of the input's path and one of the hidden state's.

    Weight names, initial values and equations are those of ``torch.nn.{name}``, with ``N(W_ih·x) + b_ih`` and
    ``N(W_hh·h) + b_hh`` in place of the products alone. With ``norm=None`` it is ``torch.nn.{name}``.

    Args:
        input_size: features of the input.
        hidden_size: features of the hidden state.
        bias: whether to have ``bias_ih`` and ``bias_hh``.{extra}
        device: of the parameters.
        dtype: of the parameters.
        norm: ``"streaming"``, ``"batch"``, ``"batch-per-step"``, ``"layer"``, None, or a function that makes a module
            from a number of features.{own}
        **options: the norm's: ``p``, ``center``, ``scale``, ``eps``, ``gain``; for streaming ``window``, ``alpha``,
            ``beta``, ``kappa``; for the batch norms ``momentum``; for ``"batch-per-step"`` ``max_steps``.

    Shape:
        - input: ``(N, input_size)`` or ``(input_size,)``.
        - hx: {hidden}.
        - step: the number of the time step, from 0 on; only ``"batch-per-step"`` needs it.
        - mask: ``(N,)`` bool. Rows where it is False are padding: they enter no statistic and keep their hidden state.
        - Output: the next hidden state, as hx.

    Raises:
        ValueError: for an unknown norm or an option that it does not have.
        TypeError: for a keyword that the cell does not have; the nearest one is named.
        RuntimeError: for sizes, dtypes or devices that do not fit, as torch.nn's; no statistic has changed then.

    Example:
        >>> cell, h = {name}(3, 5), None
        >>> for x in torch.randn(7, 2, 3):
        ...     h = cell(x, h)
        >>> {probe}.shape
        torch.Size([2, 5])
    """


class _Cell(Normalized, nn.RNNCellBase):
    """The base of the cells: the forward pass around a step."""

    def _setup(self, kind: str, norm: str | Factory | None, options: Any, norm_cell: bool = False) -> None:
        self.kind, self.choice, self.suffixes = kind, NormChoice.of(type(self), norm, options), [""]
        if self.hidden_size == 0 and norm is not None:
            raise ValueError(
                f"{type(self).__name__} with hidden_size=0 has nothing to normalize: write norm=None, with which it is "
                "torch.nn's"
            )
        self._add_norms("", norm_cell)

    def _advance(self, x: Tensor, hidden: Hidden | None, step: int | None, mask: Tensor | None) -> Hidden:
        if x.dim() not in (1, 2) or x.shape[-1] != self.input_size or not self._fits(x, hidden):
            self._refuse(x, hidden)
        unbatched = x.dim() == 1
        if unbatched:
            x = x.unsqueeze(0)
            hidden = None if hidden is None else tuple(h.unsqueeze(0) for h in hidden)
        if hidden is None:  # len(x) would be a constant of an exported graph
            hidden = (x.new_zeros(x.shape[0], self.hidden_size),) * (2 if self.kind == "LSTM" else 1)
        hidden = self._step(x, hidden, step) if mask is None else self._masked_step(x, hidden, step, mask)
        return tuple(h.squeeze(0) for h in hidden) if unbatched else hidden

    def _fits(self, x: Tensor, hidden: Any) -> bool:
        """Whether a step can be made from these: found out halfway, it would have moved the first path's statistics."""
        if hidden is None:
            return True
        shape = (*x.shape[:-1], self.hidden_size)
        if not isinstance(hidden, (tuple, list)) or len(hidden) != (2 if self.kind == "LSTM" else 1):
            return False
        together = hidden if "norm_cell" in self._modules else hidden[:1]  # torch.nn lets c have a dtype of its own
        return all(h.shape == shape and h.device == x.device for h in hidden) and (
            all(h.dtype == x.dtype for h in together) or torch.is_autocast_enabled(x.device.type)
        )

    @torch.no_grad()
    def _refuse(self, x: Tensor, hidden: Any) -> NoReturn:
        """Raise what torch.nn's cell raises, with nothing changed."""
        hx = hidden if self.kind == "LSTM" or hidden is None else hidden[0]
        self._torch_type.forward(self, x, hx)
        raise ValueError(
            f"{type(self).__name__}: expected input of shape (N, {self.input_size}) and a hidden state of shape "
            f"(N, {self.hidden_size}), of one dtype, or both without N, got {tuple(x.shape)} and "
            f"{[tuple(h.shape) for h in hidden or ()]}"
        )

    def _step(self, x: Tensor, hidden: Hidden, step: int | None) -> Hidden:
        cell: Any = self  # and not _weights, which looks for what a cell never has: this runs at every step
        weights, norms = Weights(cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh), self._norms("")
        check_weights(self.kind, x.shape[1], weights)
        check_gains(self.kind, weights, norms)
        return STEPS[self.kind](F.linear(x, weights.ih), hidden, weights, norms, When(step))

    def _masked_step(self, x: Tensor, hidden: Hidden, step: int | None, mask: Tensor) -> Hidden:
        """The step of the rows that count, put back among the others, which stay as they are."""
        meaning = f"mask is a bool tensor of shape ({len(x)},), True where a row counts"
        if not isinstance(mask, Tensor):
            raise TypeError(f"{meaning}, got a {type(mask).__name__}")
        if mask.dtype != torch.bool or mask.shape != (len(x),):
            raise ValueError(
                f"{meaning}, got {mask.dtype} of shape {tuple(mask.shape)}; write mask.bool() for zeros and ones"
            )
        rows = mask.nonzero().squeeze(1)
        if len(rows) == 0:
            return hidden
        advanced = self._step(x[rows], tuple(h[rows] for h in hidden), step)
        return tuple(h.index_copy(0, rows, new) for h, new in zip(hidden, advanced))


class RNNCell(_Cell, nn.RNNCell):  # noqa: D101
    _torch_type = nn.RNNCell
    __doc__ = _CELL_DOC.format(
        title="A step of a simple recurrent network",
        name="RNNCell",
        extra='\n        nonlinearity: ``"tanh"`` or ``"relu"``.',
        own="",
        hidden="``(N, hidden_size)`` or ``(hidden_size,)``; zeros if None",
        probe="h",
    )

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        norm: str | Factory | None = "streaming",
        **options: Unpack[NormOptions],
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        nn.RNNCell.__init__(self, input_size, hidden_size, bias, nonlinearity, device, dtype)
        self._setup(f"RNN_{nonlinearity.upper()}", norm, options)

    def _torch_arguments(self) -> dict[str, Any]:
        return {"nonlinearity": self.nonlinearity}

    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, step: int | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The next hidden state."""
        if is_symbolic(input, hx):
            return as_leaf(self, RNNCell.forward, input, hx, step=step, mask=mask)
        if self._is_plain() and mask is None:
            return nn.RNNCell.forward(self, input, hx)
        return self._advance(input, None if hx is None else (hx,), step, mask)[0]


class GRUCell(_Cell, nn.GRUCell):  # noqa: D101
    _torch_type = nn.GRUCell
    __doc__ = _CELL_DOC.format(
        title="A step of a GRU",
        name="GRUCell",
        extra="",
        own="\n        reset_after: whether the reset gate acts after the matrix product, as in torch.nn.",
        hidden="``(N, hidden_size)`` or ``(hidden_size,)``; zeros if None",
        probe="h",
    )

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        norm: str | Factory | None = "streaming",
        reset_after: bool = True,
        **options: Unpack[NormOptions],
    ) -> None:
        nn.GRUCell.__init__(self, input_size, hidden_size, bias, device, dtype)
        self._setup("GRU" if arguments.flag("reset_after", reset_after) else "GRU_RESET_BEFORE", norm, options)

    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, step: int | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The next hidden state."""
        if is_symbolic(input, hx):
            return as_leaf(self, GRUCell.forward, input, hx, step=step, mask=mask)
        if self._is_plain() and mask is None:
            return nn.GRUCell.forward(self, input, hx)
        return self._advance(input, None if hx is None else (hx,), step, mask)[0]


class LSTMCell(_Cell, nn.LSTMCell):  # noqa: D101
    _torch_type = nn.LSTMCell
    __doc__ = _CELL_DOC.format(
        title="A step of an LSTM",
        name="LSTMCell",
        extra="",
        own="\n        norm_cell: whether to normalize the cell state too, before its tanh.",
        hidden="a pair (h, c), each ``(N, hidden_size)`` or ``(hidden_size,)``; zeros if None",
        probe="h[0]",
    )

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        norm: str | Factory | None = "streaming",
        norm_cell: bool = False,
        **options: Unpack[NormOptions],
    ) -> None:
        nn.LSTMCell.__init__(self, input_size, hidden_size, bias, device, dtype)
        self._setup("LSTM", norm, options, arguments.flag("norm_cell", norm_cell))

    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        step: int | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The next hidden state and cell."""
        if is_symbolic(input, hx):
            return as_leaf(self, LSTMCell.forward, input, hx, step=step, mask=mask)
        if self._is_plain() and mask is None:
            return nn.LSTMCell.forward(self, input, hx)
        h, c = self._advance(input, hx, step, mask)
        return h, c
