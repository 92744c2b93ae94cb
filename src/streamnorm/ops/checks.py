"""Checks before anything changes: that tensors fit each other, and that their memory is still there.

Kernels are handed addresses, and PyTorch's own operators read a freed storage too. So sizes and storages are checked in
one place, for all engines, before a stream moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..core.spec import FIELDS, Call, State, View, wide

_has_storage = torch._C._has_storage


def check_call(call: Call) -> None:
    """Check that the tensors of a use fit its view and each other.

    Raises:
        RuntimeError: if a tensor has another size, dtype or device, or its storage was freed or shrunk.
    """
    x, view, stats = call.x, call.view, call.stats
    check_memory((("the input", x), ("the statistics", stats)))
    check_layer(call.weight, call.bias, call.state, view.num_channels, view.num_stats, wide(x.dtype), x.get_device())
    if stats is not None and stats.numel() != 2 * view.num_stats:
        raise RuntimeError(f"room for statistics has the shape (2, {view.num_stats}), got {tuple(stats.shape)}")


def check_layer(
    weight: Tensor | None,
    bias: Tensor | None,
    state: State | None,
    channels: int,
    num_stats: int,
    dtype: torch.dtype,
    device: int,
) -> None:
    """Check the tensors of a layer for an input.

    Args:
        weight: gain, or None.
        bias: or None.
        state: the stream, or None.
        channels: of the input.
        num_stats: G.
        dtype: of the statistics of such an input.
        device: that of the input, as ``get_device`` gives it.

    Raises:
        RuntimeError: if a tensor has another size, dtype or device, or its storage was freed or shrunk.
    """
    for name, parameter in (("gain", weight), ("bias", bias)):
        if parameter is not None and (parameter.shape != (channels,) or parameter.get_device() != device):
            raise RuntimeError(
                f"the {name} has the shape {tuple(parameter.shape)} and is on {parameter.device}; beside this input it "
                f"has {channels} values, one for each channel, and lies on the same device"
            )
    check_memory((("the gain", weight), ("the bias", bias)))
    if state is not None:
        check_state(state, num_stats, dtype, device)


def check_backward(
    x: Tensor, dy: Tensor, weight: Tensor | None, saved: Tensor, view: View, state: State | None
) -> None:
    """Check that what a use left for its backward is still what it was, before the streams of gradients move.

    Args:
        x: input of the forward pass.
        dy: gradient of its output.
        weight: gain, or None.
        saved: statistics that forward left.
        view: how x was seen.
        state: the stream, or None.

    Raises:
        RuntimeError: if a tensor has another size, dtype or device, or its storage was freed or shrunk.
    """
    if wide(x.dtype) != saved.dtype:
        raise RuntimeError(
            f"the input was changed between forward and backward: it is {x.dtype}, and its statistics are {saved.dtype}"
        )
    check_before_backward(x, weight, view, state, (dy,))


def check_before_backward(
    x: Tensor, weight: Tensor | None, view: View, state: State | None, gradients: tuple[Tensor, ...]
) -> None:
    """As ``check_backward``, for the reference: autograd keeps its statistics."""
    if x.numel() != math.prod(view.split):
        raise RuntimeError(f"the input was changed between forward and backward: it has the shape {tuple(x.shape)}")
    if weight is not None and weight.shape != (view.num_channels,):
        raise RuntimeError(f"the gain was changed between forward and backward: it has the shape {tuple(weight.shape)}")
    check_memory((("the input", x), ("the gain", weight), *(("the gradient of the output", dy) for dy in gradients)))
    if state is not None:
        check_state(state, view.num_stats, wide(x.dtype), x.get_device())


def check_state(state: State, num_stats: int, dtype: torch.dtype, device: int) -> None:
    """Check the buffers of a stream, or of half of one; ``check_layer`` explains the arguments."""
    for (name, field), t in zip(FIELDS.items(), state):
        if t is None:
            continue
        shape, wanted = field.shape(num_stats), field.dtype(dtype)
        if t.shape != shape or t.dtype != wanted or t.get_device() != device:
            raise RuntimeError(
                f"the buffer {name} has to be {wanted} of shape {shape} beside the input, and is {t.dtype} of shape "
                f"{tuple(t.shape)} on {t.device}"
            )
    check_memory(zip(State._fields, state))


def check_running(mean: Tensor, var: Tensor, batches: Tensor, steps: tuple[int, ...], num_stats: int) -> None:
    """Check running statistics: one set of them, or with ``steps = (T,)`` one for each of T time steps.

    Raises:
        RuntimeError: if one has another size, or its storage was freed or shrunk.
    """
    names, running, shape = (
        ("running_mean", "running_var", "num_batches_tracked"),
        (mean, var, batches),
        (*steps, num_stats),
    )
    for name, t, wanted in zip(names, running, (shape, shape, steps)):
        if t.shape != wanted:
            raise RuntimeError(f"the buffer {name} has the shape {tuple(t.shape)}, and {wanted} is that of the layer")
    check_memory(zip(names, running))


def check_memory(tensors: Iterable[tuple[str, Tensor | None]]) -> None:
    """Check that the storages behind tensors hold all of them; each comes with what a message calls it.

    Raises:
        RuntimeError: if a storage was freed or shrunk.
    """
    for name, t in tensors:
        if t is not None and not is_whole(t):
            size = t.untyped_storage().nbytes()
            raise RuntimeError(
                f"the memory of {name}, of shape {tuple(t.shape)}, was freed or shrunk: its storage has {size} bytes. "
                "Restore it before the layer is called, and before backward"
            )


def is_whole(t: Tensor) -> bool:
    """Whether the storage behind a tensor, if it is a plain one, is as long as the tensor says."""
    kind = type(t)
    if (kind is not Tensor and kind is not nn.Parameter) or not (t.is_cpu or t.is_cuda) or not _has_storage(t):
        return True
    count = t.numel()
    if count > 0 and not t.is_contiguous():
        count = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return count == 0 or (t.storage_offset() + count) * t.itemsize <= t.untyped_storage().nbytes()
