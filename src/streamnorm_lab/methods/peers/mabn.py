"""Moving Average Batch Normalization (Yan et al. 2020, arXiv:2001.06838).

The scale is the root of the second raw moment; nothing is subtracted, since the weights before the layer are kept
centred: each neuron's incoming weights less their mean. With χ² the mini-batch's mean of x², and z, y and g the values
and gradients of the mini-batch:

    χ̄²  = simple moving average of χ² over the last m mini-batches            z = x/√(χ̄² + ε)
    r    = clip(χ̄/χ̂, 1/λ, λ), no gradient through it                          x̂ = r·z          y = γ·x̂ + β
    χ̂²  ← α·χ̂² + (1 − α)·χ̄²                                                  α = 0.98, λ = 1.05

    Ψ    = mean of g·z over the mini-batch, with g = r·∂L/∂x̂                   ∂L/∂x = (g − z·Ψ̄)/√(χ̄² + ε)
    Ψ̄   = simple moving average of Ψ over the last m mini-batches

and x/√(χ̂² + ε) in evaluation. The paper simulates 32 samples: m = 16 mini-batches of 2. Here m is 32 divided by the
samples of the mini-batch, at least 1. Where fewer than m were seen, the average is over those, and until 1/t falls
below 1 − α the exponential average is the plain one of the t mini-batches seen, so that r begins at 1.

The authors' code differs: λ = 5, after 1,000 mini-batches with r = 1, and at first 100 mini-batches with their own χ²
and Ψ. A short run would consist of little else, so neither is here; ``mabn,clip=5`` has their λ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

SIMULATED_SAMPLES = 32


class MABN(nn.Module):
    """Moving Average Batch Normalization of (N, C) or (N, C, ...), for a network that ``centre_weights`` prepared.

    Args:
        num_features: C.
        momentum: α.
        clip: λ.
        eps: added to mean squares.
    """

    moments: Tensor
    gradients: Tensor
    counts: Tensor
    running_moment: Tensor

    def __init__(self, num_features: int, momentum: float = 0.98, clip: float = 1.05, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.clip, self.eps = momentum, clip, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("moments", torch.zeros(SIMULATED_SAMPLES, num_features))
        self.register_buffer("gradients", torch.zeros(SIMULATED_SAMPLES, num_features))
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("running_moment", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, then gain and bias."""
        places = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
        if self.training:
            normalized = _MovingAverageNorm.apply(places, self)
        else:
            normalized = places / (self.running_moment + self.eps).sqrt()[:, None]
        return (normalized * self.weight[:, None] + self.bias[:, None]).view_as(x)

    def average(self, which: int, new: Tensor, samples: int) -> Tensor:
        """Note χ² (``which`` 0) or Ψ (1) of a mini-batch, and return the simple moving average."""
        history = (self.moments, self.gradients)[which]
        width = max(1, SIMULATED_SAMPLES // samples)  # all mini-batches of a run have the same size
        history[int(self.counts[which]) % width] = new
        self.counts[which] += 1
        return history[: min(width, int(self.counts[which]))].mean(0)

    def renormalize(self, moment: Tensor) -> Tensor:
        """The correction r; then the moment enters its exponential average."""
        share = max(1 - self.momentum, 1 / int(self.counts[0]))
        if share == 1:
            self.running_moment.copy_(moment)
        r = ((moment + self.eps) / (self.running_moment + self.eps)).sqrt().clamp(1 / self.clip, self.clip)
        self.running_moment.lerp_(moment, share)
        return r


class _MovingAverageNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: MABN) -> Tensor:
        moment = layer.average(0, x.square().mean((0, 2)), len(x))
        scale = (moment + layer.eps).sqrt()[:, None]
        r = layer.renormalize(moment)[:, None]
        z = x / scale
        ctx.layer = layer
        ctx.save_for_backward(z, scale, r)
        return z * r

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        z, scale, r = ctx.saved_tensors
        g = gradients[0] * r
        psi = ctx.layer.average(1, (g * z).mean((0, 2)), len(z))
        return (g - z * psi[:, None]) / scale, None


class _Centred(nn.Module):
    """Weights less their mean over all that enters a neuron."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True)


def centre_weights(model: nn.Module) -> nn.Module:
    """Keep the weights before every normalization centred: those of all layers but the last one."""
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for layer in layers[:-1]:
        parametrize.register_parametrization(layer, "weight", _Centred())
    return model
