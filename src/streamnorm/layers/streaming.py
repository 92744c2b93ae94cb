"""StreamingNorm1d, 2d and 3d: drop-in for ``nn.BatchNorm1d``, ``2d`` and ``3d``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import arguments
from ..core.moment import LpMoment
from ..core.reference import NormRef, RefName
from ..core.stream import IMAGE_OWN, IMAGE_WINDOW, WINDOW, Stream
from .construction import check_groups
from .norm import Norm


@arguments.explained
class _StreamingNorm(Norm):
    """The base of StreamingNorm1d, 2d and 3d: the arguments, and the ranks that each accepts."""

    _ranks: tuple[int, ...]
    _window: float  # the default
    _own: float | None = None  # of the window rule
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
        scale: str = "gaussian",
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
        check_groups(ref, num_features)
        by_window = alpha is None and beta is None and kappa is None
        if window is None and by_window:
            window = self._window
        super().__init__(
            num_features,
            reference,
            LpMoment(p, center, scale),
            Stream(window, alpha, beta, kappa, own=self._own if by_window else None),
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
        center: ``"mean"`` or ``"zero"``, see :class:`LpMoment`.
        scale: ``"gaussian"``, so that outputs have a variance near 1 whatever p is, or ``"raw"``, see
            :class:`LpMoment`.
        ref: ``"channel"``, ``"layer"``, ``("group", g)``, or a NormRef that spans the samples.
        window: memory in samples, > 0; {window:g} if none of the four is given. :class:`Stream` has further
            options{own}, and :meth:`set_stream` takes one.
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


_OWN = f" (its ``own`` is {IMAGE_OWN:g} here)"


class StreamingNorm1d(_StreamingNorm):  # noqa: D101
    _ranks = (2, 3)
    _window = WINDOW
    __doc__ = _STREAMING_DOC.format(d=1, window=_window, own="", shape="``(N, C)`` or ``(N, C, L)``", example="1, 8")


class StreamingNorm2d(_StreamingNorm):  # noqa: D101
    _ranks = (4,)
    _window = IMAGE_WINDOW
    _own = IMAGE_OWN
    __doc__ = _STREAMING_DOC.format(d=2, window=_window, own=_OWN, shape="``(N, C, H, W)``", example="1, 8, 4, 4")


class StreamingNorm3d(_StreamingNorm):  # noqa: D101
    _ranks = (5,)
    _window = IMAGE_WINDOW
    _own = IMAGE_OWN
    __doc__ = _STREAMING_DOC.format(d=3, window=_window, own=_OWN, shape="``(N, C, D, H, W)``", example="1, 8, 2, 4, 4")
