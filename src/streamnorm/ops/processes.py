"""The operation over the mini-batches of several processes, as if they were one.

Sums over this process's elements become sums over all processes: in the forward pass for the location and then for the
moment, which is taken about it; in the backward pass once. So the statistics, the change of the stream and what reaches
x through them are those of one process with the joined mini-batch. Gradients of gain and bias stay this process's own,
for DistributedDataParallel or whoever averages gradients.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.spec import Call
from . import operations
from .checks import check_call
from .derivatives import is_recorded, refuse


def normalize(call: Call, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Normalize as ``plain.normalize`` does, over all processes of ``group``; x may be empty in some of them.

    Returns:
        y, and how many elements of all processes are behind each statistic, ``(G,)``.
    """
    if is_recorded():
        refuse(call.x, call.weight, call.bias)
    check_call(call)
    over = OverProcesses(operations.Here.of(call.x, call.mask, call.view), call.view.num_stats, group)
    y = operations.normalize(call, over)
    return y, over.n


class OverProcesses:
    """A :class:`operations.Reduction` over the elements of all processes; the first all-reduce counts them, too.

    Args:
        own: this process's part.
        num_stats: G.
        group: the processes.
    """

    n: Tensor
    samples: Tensor

    def __init__(self, own: operations.Here, num_stats: int, group: dist.ProcessGroup | None) -> None:
        self.own, self.num_stats, self.group = own, num_stats, group
        self.is_counted = False

    def means(self, *sums: Tensor) -> tuple[Tensor, ...]:
        """Divide each sum over all processes by the number of its elements."""
        numbers = () if self.is_counted else self._own_numbers(sums[0].device)
        totals = self._over_all(*sums, *numbers)
        if not self.is_counted:
            *totals, n, samples = totals
            self.n, self.samples, self.is_counted = n.long(), samples.long().squeeze(), True
        divisor = self.n.clamp(min=1)
        return tuple((total / divisor).to(own.dtype) for total, own in zip(totals, sums))

    def _own_numbers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        n, samples = (torch.as_tensor(number, device=device) for number in self.own)
        return n.expand(self.num_stats), samples.view(1)

    def _over_all(self, *parts: Tensor) -> list[Tensor]:
        """These vectors, summed over the processes by one all-reduce; in float64, which keeps counts exact."""
        flat = torch.cat([part.to(torch.float64) for part in parts])
        dist.all_reduce(flat, group=self.group)
        return [*flat.split([len(part) for part in parts])]
