"""Streaming sigma itself instead of the moment that it is the root of: the question of one experiment.

The layer is ``sn.StreamingNorm`` in all but this: of each use, sigma = k·mean(|x − mu|^p)^(1/p) enters the averages,
where the library lets mean(|x − mu|^p) enter and takes the root of the mix. The gradient of sigma is streamed likewise.
For p = 1 both are the same; for p > 1 the average of roots is below the root of the average, and at one sample a
mini-batch and one place sigma is |x − mu| whatever p is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import streamnorm as sn
from streamnorm.ops import View, plain


class StreamingSigma(sn.Norm):
    """Streaming Normalization of (N, C) or (N, C, ...) per channel, with sigma streamed.

    Args:
        num_features: C.
        p: order of the moment.
        eps: added to sigma².
        window, alpha, beta, kappa: see ``sn.Stream``.
    """

    def __init__(
        self,
        num_features: int,
        p: float = 2,
        eps: float = 1e-5,
        *,
        window: float | None = None,
        alpha: Sequence[float] | None = None,
        beta: Sequence[float] | None = None,
        kappa: float | Sequence[float] | None = None,
    ) -> None:
        stream = sn.Stream(window=window, alpha=alpha, beta=beta, kappa=kappa)
        super().__init__(num_features, sn.NormRef.batch("channel"), sn.LpMoment(p), stream, eps)

    def _stream(self, x: Tensor, mask: Tensor | None, view: View) -> Tensor:
        p, reduced = self.formula.p, view.reduced
        # The stream takes in two statistics of a use, and what the second one is, is our own choice.
        # It is of the first power, and so are its gradient's unit and its bound.
        of_sigma = self.formula._replace(p=1.0)
        use = plain.Use(self.state, of_sigma, view.num_elements, len(x), None)
        v = x.view(view.split)
        mu = plain.Streamed.apply(v.mean(reduced, keepdim=True), 0, use)
        moment = ((v - mu).abs() ** p).mean(reduced, keepdim=True)
        own = plain.power(moment, 1 / p)
        sigma = plain.bounded(plain.Streamed.apply(own, 1, use), own, of_sigma)
        s = (sigma.square() + self.eps).sqrt()
        use.inverse = 1 / s.detach().flatten()
        y = (v - mu) / s
        assert self.weight is not None
        assert self.bias is not None
        return (y * self.weight.view(view.channel_shape) + self.bias.view(view.channel_shape)).view(x.shape)

    @torch.no_grad()
    def eval_stats(self) -> tuple[Tensor, Tensor]:
        """mu and sigma² that evaluation uses."""
        assert self.stream is not None
        mu, sigma = self.stream.evaluation(self.state)
        return mu, sigma.square()
