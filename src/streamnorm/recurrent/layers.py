"""Layers: whole sequences per call, as torch.nn's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .. import ops
from ..core import arguments
from ..core.compiler import as_constant, as_leaf, is_symbolic
from .base import Normalized
from .checks import check_gains, check_weights
from .engines import choice, folded
from .norms import Factory, NormChoice
from .steps import Hidden

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .norms import NormOptions

_LAYER_DOC = """{title}: ``torch.nn.{name}`` with normalized paths.

    ``N(W_ih·x) + b_ih`` and ``N(W_hh·h) + b_hh`` replace the products of ``torch.nn.{name}``, with a separate
    normalization N for each layer, direction and path. Signature, weight names and semantics are those of
    ``torch.nn.{name}``; with ``norm=None`` it is that layer, and each loads the other's weights.

    Args:
        input_size: features of the input.
        hidden_size: features of the hidden state.
        num_layers: layers, each fed by the one before.{nonlinearity}
        bias: whether to have ``bias_ih`` and ``bias_hh``.
        batch_first: whether input and output are ``(N, T, features)`` instead of ``(T, N, features)``.
        dropout: probability of dropout between layers.
        bidirectional: whether a second set of weights reads each sequence backwards.{proj_size}
        device: of the parameters.
        dtype: of the parameters.
        norm: ``"streaming"``: one set of streamed statistics for all time steps; ``"batch"``: statistics of each
            step's mini-batch, one set of running statistics for evaluation; ``"batch-per-step"``: the same with running
            statistics of each time step; ``"layer"``; None; or a function that makes a module from a number of
            features.
        {own}**options: the norm's: ``p``, ``center``, ``scale``, ``eps``, ``gain``; for streaming ``window``,
            ``alpha``, ``beta``, ``kappa``; for the batch norms ``momentum``; for ``"batch-per-step"`` ``max_steps``.

    Shape:
        - input: ``(T, N, input_size)``, ``(N, T, input_size)`` with ``batch_first``, ``(T, input_size)`` for one
          sequence, or a PackedSequence.
        - hx: {hidden}.
        - lengths: ``(N,)`` integers: the length of each sequence without padding. Padding enters no statistic, its
          outputs are zero, and the final hidden state is that after each sequence's own last step.
        - Output: as torch.nn's: the hidden states of all steps, and the final one.

    Raises:
        ValueError: for an unknown norm or an option that it does not have; and as torch.nn's.
        TypeError: for a keyword that the layer does not have; the nearest one is named.
        RuntimeError: for hidden states of other sizes, dtype or device; no statistic has changed then.

    Example:
        >>> layer = {name}(3, 5, num_layers=2)
        >>> output, h = layer(torch.randn(7, 2, 3))
        >>> output.shape
        torch.Size([7, 2, 5])
    """


class _Layer(Normalized, nn.RNNBase):
    """The base of the layers: the forward pass around an engine that runs one layer in one direction."""

    def _setup(self, kind: str, norm: str | Factory | None, options: Any, norm_cell: bool = False) -> None:
        self.kind, self.choice = kind, NormChoice.of(type(self), norm, options)
        directions = ("", "_reverse") if self.bidirectional else ("",)
        # The endings of the parameters' names, layer by layer, the reverse direction second
        self.suffixes = [f"_l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]
        for suffix in self.suffixes:
            self._add_norms(suffix, norm_cell)

    def _torch_arguments(self) -> dict[str, Any]:
        names = ("num_layers", "batch_first", "dropout", "bidirectional")
        return {name: getattr(self, name) for name in names}

    def forward(self, input: Any, hx: Any = None, lengths: Tensor | None = None) -> Any:
        """The hidden states of all steps, and the final one."""
        if is_symbolic(input, hx):
            return as_leaf(self, _Layer.forward, input, hx, lengths)
        if is_dynamo_compiling():
            _make_boundary()
        return (_outside_the_graph or _Layer._forward)(self, input, hx, lengths)

    def _forward(self, input: Any, hx: Any, lengths: Tensor | None) -> Any:
        if lengths is not None:
            return self._run_padded(input, hx, lengths)
        if self._is_plain():
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(
                f"{type(self).__name__}: expected input to be 2D or 3D, got {input.dim()}D of shape "
                f"{tuple(input.shape)}"
            )
        if input.dim() == 2:
            return self._run_unbatched(input, hx)
        return self._run_batch(input, hx)

    def _run_padded(self, input: Tensor, hx: Any, lengths: Tensor) -> Any:
        if isinstance(input, PackedSequence) or input.dim() != 3:
            raise ValueError("lengths belong to a padded batch of sequences, a 3D tensor; a PackedSequence has its own")
        rows, steps = input.shape[:2] if self.batch_first else (input.shape[1], input.shape[0])
        meaning = f"lengths are {rows} integers, one for each sequence"
        try:
            lengths = torch.as_tensor(lengths).cpu()
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{meaning}, got {lengths!r}") from None
        if lengths.dtype not in (torch.int32, torch.int64) or lengths.shape != (rows,):
            raise ValueError(f"{meaning}, got {lengths.dtype} of shape {tuple(lengths.shape)}")
        if rows and not 1 <= int(lengths.min()) <= int(lengths.max()) <= steps:
            raise ValueError(
                f"lengths lie between 1 and {steps}, the padded length, got {lengths.tolist()}; leave empty sequences "
                "out"
            )
        packed = pack_padded_sequence(input, lengths.long(), self.batch_first, enforce_sorted=False)
        output, final = self(packed, hx)
        return pad_packed_sequence(output, self.batch_first, total_length=steps)[0], final

    def _run_unbatched(self, input: Tensor, hx: Any) -> Any:
        batch_dim = 0 if self.batch_first else 1
        for h in _as_tuple(hx):
            if h.dim() != 2:
                raise RuntimeError(f"for one sequence, a 2D input, hx is 2D too, got {h.dim()}D; a batch of one is 3D")
        output, final = self._run_batch(input.unsqueeze(batch_dim), _like(hx, [h.unsqueeze(1) for h in _as_tuple(hx)]))
        return output.squeeze(batch_dim), _like(final, [h.squeeze(1) for h in _as_tuple(final)])

    def _run_batch(self, input: Tensor, hx: Any) -> Any:
        hidden = self._start(input, None, hx)
        steps_first = input.transpose(0, 1) if self.batch_first else input
        steps, rows = steps_first.shape[:2]
        if steps == 0:
            raise RuntimeError("expected sequences of at least one time step, got none")
        if self._runs_in_torch():
            output, finals = folded.run(self.kind, steps_first, None, hidden, self._folded(), self)
        else:
            data, finals = self._run(steps_first.reshape(steps * rows, self.input_size), [rows] * steps, hidden)
            output = data.view(steps, rows, data.shape[1])
        return output.transpose(0, 1) if self.batch_first else output, self._pack_hidden(finals)

    def _run_packed(self, input: PackedSequence, hx: Any) -> Any:
        data, batch_sizes, order, back = input
        sizes = batch_sizes.tolist()
        if sum(sizes) != len(data) or sizes != sorted(sizes, reverse=True):
            raise ValueError(
                f"a PackedSequence has batch_sizes that never increase and add up to its rows of data, got {sizes} for "
                f"{len(data)} rows; were lengths greater than the padded length when it was packed?"
            )
        hidden = self._start(data, batch_sizes, hx, order)
        if self._runs_in_torch():
            data, finals = folded.run(self.kind, data, batch_sizes, hidden, self._folded(), self)
        else:
            data, finals = self._run(data, sizes, hidden)
        if back is not None:
            finals = tuple(h.index_select(1, back) for h in finals)
        return PackedSequence(data, batch_sizes, order, back), self._pack_hidden(finals)

    def _start(self, input: Tensor, batch_sizes: Tensor | None, hx: Any, order: Tensor | None = None) -> Hidden:
        """Check the input, and make or check the initial hidden tensors; torch.nn's own checks and messages."""
        rows = self.get_expected_hidden_size(input, batch_sizes)[1]
        if hx is None:
            widths = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if self.kind == "LSTM" else 1]
            hidden = tuple(input.new_zeros(len(self.suffixes), rows, width) for width in widths)
        else:
            hidden = _as_tuple(hx)
            if len(hidden) != (2 if self.kind == "LSTM" else 1):
                wanted = "a pair of tensors (h, c)" if self.kind == "LSTM" else "one tensor"
                raise ValueError(f"{type(self).__name__}: expected hx to be {wanted}, got {len(hidden)}")
            if batch_sizes is None and any(h.dim() != 3 for h in hidden):
                shapes = ", ".join(str(tuple(h.shape)) for h in hidden)
                raise RuntimeError(f"for a 3D input hx is 3D too, got hidden states of shape {shapes}")
            if order is not None:
                hidden = tuple(h.index_select(1, order) for h in hidden)
        self.check_forward_args(input, self._pack_hidden(hidden), batch_sizes)
        for h in hidden:
            _check_beside(input, h)
        return hidden

    def _pack_hidden(self, hidden: Hidden) -> Any:
        """As the user sees it: a tensor, or for the LSTM a pair."""
        return hidden if self.kind == "LSTM" else hidden[0]

    def _runs_in_torch(self) -> bool:
        """Whether the layer is torch.nn's with other weights now, see ``engines.folded``."""
        return ops.is_active("torch") and self._is_fixed()

    def _run(self, data: Tensor, sizes: list[int], hidden: Hidden) -> tuple[Tensor, Hidden]:
        """All layers and directions over packed data, see ``engines.loop.run``."""
        if len(self.suffixes) > 1:  # before the first of them changes anything
            self._check_weights(data.shape[1])
        backwards = _Backwards(sizes, data.device) if self.bidirectional else None
        finals: list[Hidden] = []
        for layer in range(self.num_layers):
            outputs = []
            for turn in (None, backwards) if self.bidirectional else (None,):
                suffix = self.suffixes[len(finals)]
                start = tuple(h[len(finals)] for h in hidden)
                read = data if turn is None else turn(data)
                output, final = choice.run(self.kind, read, sizes, start, self._weights(suffix), self._norms(suffix))
                outputs.append(output if turn is None else turn(output))
                finals.append(final)
            data = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
            if self.dropout and layer < self.num_layers - 1:
                data = F.dropout(data, self.dropout, self.training)
        if len(finals) == 1:
            return data, tuple(h.unsqueeze(0) for h in finals[0])
        return data, tuple(torch.stack(parts) for parts in zip(*finals))

    def _check_weights(self, features: int) -> None:
        """Check the weights and gains of all layers and directions."""
        directions = 2 if self.bidirectional else 1
        width = (self.proj_size or self.hidden_size) * directions
        for number, suffix in enumerate(self.suffixes):
            weights, norms = self._weights(suffix), self._norms(suffix)
            check_weights(self.kind, features if number < directions else width, weights)
            check_gains(self.kind, weights, norms)


_outside_the_graph: Any = None
"""``_Layer._forward``, once ``torch.compile`` has met a layer: there it breaks the graph, as at torch.nn's own."""


@as_constant
def _make_boundary() -> bool:
    """While a graph is made. Before, it would import the compiler, which takes seconds."""
    global _outside_the_graph
    if _outside_the_graph is None:
        _outside_the_graph = torch.compiler.disable(_Layer._forward, reason="a whole sequence runs in one call")
    return True


class _Backwards:
    """Turns packed sequences around, each at its own end: step t of a sequence of length n becomes n − 1 − t."""

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        self.steps, self.rows = len(sizes), sizes[0]
        self.index: Tensor | None = None
        if sizes[-1] != self.rows:
            batch_sizes = torch.tensor(sizes)
            starts = batch_sizes.cumsum(0) - batch_sizes
            row = torch.cat([torch.arange(size) for size in sizes])
            step = torch.arange(self.steps).repeat_interleave(batch_sizes)
            lengths = (batch_sizes[:, None] > torch.arange(self.rows)).sum(0)
            self.index = (starts[lengths[row] - 1 - step] + row).to(device)

    def __call__(self, data: Tensor) -> Tensor:
        if self.index is None:
            return data.view(self.steps, self.rows, data.shape[1]).flip(0).view(data.shape)
        return data.index_select(0, self.index)


def _check_beside(input: Tensor, h: Tensor) -> None:
    """Refuse a hidden state that a time step would refuse when the input's path has moved its statistics."""
    if h.device != input.device:
        raise RuntimeError(
            f"Input and hidden tensors are not at the same device, found input tensor at {input.device} and hidden "
            f"tensor at {h.device}: write hx.to({str(input.device)!r})"
        )
    if h.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
        raise RuntimeError(
            f"Input and hidden tensors are not the same dtype, found input tensor with {input.dtype} and hidden tensor "
            f"with {h.dtype}: write hx.to({input.dtype})"
        )


def _as_tuple(hx: Any) -> Hidden:
    return () if hx is None else tuple(hx) if isinstance(hx, tuple | list) else (hx,)


def _like(hx: Any, hidden: list[Tensor]) -> Any:
    return None if hx is None else tuple(hidden) if isinstance(hx, tuple | list) else hidden[0]


class RNN(_Layer, nn.RNN):  # noqa: D101
    _torch_type = nn.RNN
    __doc__ = _LAYER_DOC.format(
        title="A simple recurrent network",
        name="RNN",
        nonlinearity='\n        nonlinearity: ``"tanh"`` or ``"relu"``.',
        proj_size="",
        own="",
        hidden="``(layers·directions, N, hidden_size)``, zeros if None",
    )

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        norm: str | Factory | None = "streaming",
        **options: Unpack[NormOptions],
    ) -> None:
        nn.RNN.__init__(
            self,
            input_size,
            hidden_size,
            num_layers,
            nonlinearity,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self._setup(self.mode, norm, options)

    def _torch_arguments(self) -> dict[str, Any]:
        return {**super()._torch_arguments(), "nonlinearity": self.nonlinearity}


class GRU(_Layer, nn.GRU):  # noqa: D101
    _torch_type = nn.GRU
    __doc__ = _LAYER_DOC.format(
        title="A gated recurrent unit",
        name="GRU",
        nonlinearity="",
        proj_size="",
        own="reset_after: whether the reset gate acts after the matrix product, as in torch.nn.\n        ",
        hidden="``(layers·directions, N, hidden_size)``, zeros if None",
    )

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        norm: str | Factory | None = "streaming",
        reset_after: bool = True,
        **options: Unpack[NormOptions],
    ) -> None:
        nn.GRU.__init__(
            self,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self._setup("GRU" if arguments.flag("reset_after", reset_after) else "GRU_RESET_BEFORE", norm, options)


class LSTM(_Layer, nn.LSTM):  # noqa: D101
    _torch_type = nn.LSTM
    __doc__ = _LAYER_DOC.format(
        title="A long short-term memory",
        name="LSTM",
        nonlinearity="",
        proj_size="\n        proj_size: if above 0, the hidden state is projected to this many features.",
        own="norm_cell: whether to normalize the cell state too, before its tanh.\n        ",
        hidden="a pair (h, c), each ``(layers·directions, N, hidden_size)``, h with ``proj_size``; zeros if None",
    )

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        norm: str | Factory | None = "streaming",
        norm_cell: bool = False,
        **options: Unpack[NormOptions],
    ) -> None:
        nn.LSTM.__init__(
            self,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
        )
        self._setup("LSTM", norm, options, arguments.flag("norm_cell", norm_cell))

    def _torch_arguments(self) -> dict[str, Any]:
        return {**super()._torch_arguments(), "proj_size": self.proj_size}
