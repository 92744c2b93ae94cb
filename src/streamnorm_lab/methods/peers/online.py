"""Online Normalization (Chiley et al. 2019, arXiv:1905.05894).

The samples of a mini-batch pass one after the other. With mean μ(x_t) and variance σ²(x_t) over the places of sample
t (the value itself and 0 where there is one place), the forward pass is

    y_t  = (x_t − μ_{t−1}) / σ_{t−1}
    μ_t  = α_f·μ_{t−1} + (1 − α_f)·μ(x_t)
    σ²_t = α_f·σ²_{t−1} + (1 − α_f)·σ²(x_t) + α_f·(1 − α_f)·(μ(x_t) − μ_{t−1})²

The backward pass is the paper's control process, which keeps the gradient orthogonal to y and to 1 on average over
time (a prime is the gradient of the loss, and a mean is over the places of the sample):

    x̃'_t = y'_t − (1 − α_b)·ε^y_{t−1}·y_t             ε^y_t = ε^y_{t−1} + mean(x̃'_t·y_t)
    x'_t  = x̃'_t/σ_{t−1} − (1 − α_b)·ε^1_{t−1}         ε^1_t = ε^1_{t−1} + mean(x'_t)

Then come gain and bias, and a guard against activations that grow from layer to layer: layer scaling, a division by
the root mean square over all features of the sample, or activation clamping to ±5, which the authors proposed later.
Evaluation uses μ and σ² as they are, and the same guard. ε = 1e-5 is added to variances and mean squares.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OnlineNorm(nn.Module):
    """Online Normalization of (N, C) or (N, C, ...).

    Args:
        num_features: C.
        forward_decay: α_f.
        backward_decay: α_b.
        guard: ``"scaling"``, ``"clamp"`` or ``"none"``.
        eps: added to variances and mean squares.

    Raises:
        ValueError: for an unknown guard or a decay outside [0, 1).
    """

    mean: Tensor
    variance: Tensor
    scale_error: Tensor
    mean_error: Tensor

    def __init__(
        self,
        num_features: int,
        forward_decay: float = 0.999,
        backward_decay: float = 0.99,
        guard: str = "scaling",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if guard not in ("scaling", "clamp", "none"):
            raise ValueError(f"guard must be 'scaling', 'clamp' or 'none', got {guard!r}")
        for decay in (forward_decay, backward_decay):
            if not 0 <= decay < 1:
                raise ValueError(f"a decay must be at least 0 and below 1, such as 0.999, got {decay}")
        self.forward_decay, self.backward_decay = forward_decay, backward_decay
        self.guard, self.eps = guard, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("variance", torch.ones(num_features))
        self.register_buffer("scale_error", torch.zeros(num_features))
        self.register_buffer("mean_error", torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, then gain, bias and guard."""
        places = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
        if self.training:
            y = _ControlledNorm.apply(places, self)
        else:
            y = (places - self.mean[:, None]) / (self.variance + self.eps).sqrt()[:, None]
        y = y * self.weight[:, None] + self.bias[:, None]
        return self._guarded(y).view_as(x)

    def _guarded(self, y: Tensor) -> Tensor:
        if self.guard == "scaling":
            return F.rms_norm(y, y.shape[1:], eps=self.eps)
        return y.clamp(-5, 5) if self.guard == "clamp" else y

    def extra_repr(self) -> str:
        """The constants."""
        return f"{len(self.mean)}, {self.forward_decay}, {self.backward_decay}, guard={self.guard!r}"


class _ControlledNorm(torch.autograd.Function):
    """The recursions, for (N, C, places), all channels at once. Each is linear in its own past."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: OnlineNorm) -> Tensor:
        decay = layer.forward_decay
        variance, mean = torch.var_mean(x, 2, correction=0)
        means, layer.mean = _run(layer.mean, torch.full_like(mean, decay), (1 - decay) * mean)
        news = (1 - decay) * (variance + decay * (mean - means).square())
        variances, layer.variance = _run(layer.variance, torch.full_like(mean, decay), news)
        sigma = (variances + layer.eps).sqrt()[:, :, None]
        y = (x - means[:, :, None]) / sigma
        ctx.layer = layer
        ctx.save_for_backward(y, sigma)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layer: OnlineNorm = ctx.layer
        y, sigma = ctx.saved_tensors
        gain = 1 - layer.backward_decay
        (dy,) = gradients
        errors, layer.scale_error = _run(layer.scale_error, 1 - gain * y.square().mean(2), (dy * y).mean(2))
        dx = (dy - gain * errors[:, :, None] * y) / sigma
        mean = dx.mean(2)
        errors, layer.mean_error = _run(layer.mean_error, torch.full_like(mean, layer.backward_decay), mean)
        return dx - gain * errors[:, :, None], None


def _run(start: Tensor, decays: Tensor, news: Tensor) -> tuple[Tensor, Tensor]:
    """v_t = decay_t·v_{t−1} + news_t, sample after sample: the value before each sample, and the one after the last.

    A step is an affine map of v, and maps are composed in any order: here each with the one 1, 2, 4, … steps before it,
    so that N samples take log2(N) operations on all of them.
    """
    reach = 1
    while reach < len(news):
        earlier = torch.cat([torch.zeros_like(news[:reach]), news[:-reach]])
        news = news + decays * earlier
        decays = decays * torch.cat([torch.ones_like(decays[:reach]), decays[:-reach]])
        reach *= 2
    values = torch.cat([start[None], decays * start + news])
    return values[:-1], values[-1].clone()
