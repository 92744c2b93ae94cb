"""Batch Renormalization (Ioffe 2017, arXiv:1702.03275), algorithm 1.

With the mini-batch's mean μ_B and σ_B = √(ε + variance), and moving averages μ and σ of both:

    r = clip(σ_B/σ, 1/r_max, r_max)        d = clip((μ_B − μ)/σ, −d_max, d_max)      no gradient through r and d
    x̂ = (x − μ_B)/σ_B·r + d                y = γ·x̂ + β
    μ ← μ + α·(μ_B − μ)                     σ ← σ + α·(σ_B − σ)                        α = 0.01

and (x − μ)/σ in evaluation. The paper trains for 130,000 steps: at first with r_max = 1 and d_max = 0, which is Batch
Normalization; from step 5,000 on both limits grow, here linearly, until d_max = 5 at step 25,000 and r_max = 3 at step
40,000. Here these steps are the same fractions of a run's mini-batches, so that short runs pass through all of it (and
a layer that each mini-batch uses k times passes k times as fast).

One thing is kinder than the paper: until 1/t falls below α, the moving averages are the plain averages of the t
mini-batches seen. From fixed starting values, short runs would be evaluated with statistics that never arrived.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 130_000
RELAXED_FROM, D_MAX_AT, R_MAX_AT = 5_000 / STEPS, 25_000 / STEPS, 40_000 / STEPS
R_MAX, D_MAX = 3.0, 5.0


class BatchRenorm(nn.Module):
    """Batch Renormalization of (N, C) or (N, C, ...); with one value per channel it refuses, as BatchNorm does.

    Args:
        num_features: C.
        momentum: α.
        eps: added to variances.
    """

    running_mean: Tensor
    running_std: Tensor
    uses: Tensor

    def __init__(self, num_features: int, momentum: float = 0.01, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.length = STEPS
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))
        self.register_buffer("uses", torch.zeros((), dtype=torch.int64))

    def plan(self, length: int) -> None:
        """Say how many mini-batches the layer will be trained on."""
        self.length = length

    def limits(self) -> tuple[float, float]:
        """r_max and d_max for the next mini-batch."""
        done = int(self.uses) / self.length
        return 1 + (R_MAX - 1) * _ramp(done, R_MAX_AT), D_MAX * _ramp(done, D_MAX_AT)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, then gain and bias."""
        if self.training:
            normalized = F.batch_norm(x, None, None, training=True, eps=self.eps)
            r, d = self._corrections(x.detach())
            return normalized * _per_channel(r * self.weight, x) + _per_channel(d * self.weight + self.bias, x)
        gain = self.weight / self.running_std
        return x * _per_channel(gain, x) + _per_channel(self.bias - self.running_mean * gain, x)

    @torch.no_grad()
    def _corrections(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """r and d by the averages so far, which then take in this mini-batch."""
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        std = (variance + self.eps).sqrt()
        r_max, d_max = self.limits()
        r = (std / self.running_std).clamp(1 / r_max, r_max)
        d = ((mean - self.running_mean) / self.running_std).clamp(-d_max, d_max)
        self.uses += 1
        share = max(self.momentum, 1 / int(self.uses))
        self.running_mean.lerp_(mean, share)
        self.running_std.lerp_(std, share)
        return r, d

    def extra_repr(self) -> str:
        """The constants."""
        return f"{len(self.weight)}, momentum={self.momentum}, eps={self.eps}"


def _ramp(done: float, end: float) -> float:
    """0 until the limits are relaxed, 1 from ``end`` on."""
    return min(1.0, max(0.0, (done - RELAXED_FROM) / (end - RELAXED_FROM)))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))
