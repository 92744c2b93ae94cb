"""GeneralBatchNorm: statistics of the mini-batch, over any reference and moment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..core import arguments
from ..core.moment import LpMoment
from ..core.reference import NormRef, RefName
from ..core.spec import View
from ..ops import checks
from ..ops.plain import elements
from .construction import check_groups, state_dtype
from .evaluation import affine_map
from .norm import Norm


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
            (lowered to a divisor of N). Evaluation ignores them.
        eps: added to sigma², ≥ 0.
        affine: whether to learn a gain and a bias per channel.
        p: order of the moment, ≥ 1.
        center: ``"mean"`` or ``"zero"``, see :class:`LpMoment`.
        scale: ``"raw"`` or ``"gaussian"``, see :class:`LpMoment`.
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
        check_groups(ref, num_features)
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
        self.register_buffer("running_mean", torch.zeros(num_stats, device=device, dtype=state_dtype(dtype)))
        self.register_buffer("running_var", torch.ones(num_stats, device=device, dtype=state_dtype(dtype)))
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
            n = elements(view, None if mask is None else mask.view(view.mask_shape))
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
        return affine_map(x, *self.eval_stats(), self, mask, self.ref.view(x.shape))

    def extra_repr(self) -> str:
        """The arguments that differ from layer to layer."""
        return f"{super().extra_repr()}, momentum={self.momentum}, ghosts={self.ghosts}"
