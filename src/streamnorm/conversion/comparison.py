"""Comparison of a converted layer with the one that it replaces, on a few random inputs.

Conversion infers from the class and the buffers of a layer what it computes. The comparison tries it out and leaves no
trace: hooks do not fire, statistics do not move, and the global random number generator keeps its state.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import GeneralBatchNorm, Norm
from ..recurrent.base import Normalized

SAMPLES = 4
SIZES = (3, 2, 2)
"""Sizes of the spatial axes. An Instance Normalization needs more than one place."""


class NotComparedError(RuntimeError):
    """The old layer does not run on numbers of its own size, so that there is nothing to compare with."""


def difference(
    old: Callable[..., Any],
    new: Callable[..., Any],
    inputs: tuple[Any, ...],
    size: Tensor | float,
    tolerance: float = 2e-5,
) -> str | None:
    """Compare the outputs of two layers in evaluation.

    Args:
        old: a module, or a function.
        new: another.
        inputs: what both are called with.
        size: magnitude of the terms that an output is the sum of, which its rounding error is proportional to.
        tolerance: the largest difference that counts as rounding, relative to ``size`` plus the output's magnitude; at
            least four units in the last place, which counts for the 16-bit formats.

    Returns:
        The difference in words, or None where there is none.

    Raises:
        NotComparedError: if ``old`` does not run.
    """
    with (
        _at_rest(old, new),
        warnings.catch_warnings(),
        torch.no_grad(),
        torch.autocast(inputs[0].device.type, enabled=False),
    ):
        warnings.simplefilter("ignore")
        try:
            before = _tensors(_forward(old)(*_copies(inputs)))
        except Exception as error:
            raise NotComparedError(f"it does not run on random numbers ({type(error).__name__}: {error})") from error
        try:
            after = _tensors(_forward(new)(*_copies(inputs)))
        except Exception as error:
            return f"what would take its place does not run on its input ({type(error).__name__}: {error})"
    shapes = [[*map(tuple, (t.shape for t in each))] for each in (before, after)]
    if shapes[0] != shapes[1]:
        return f"it gives an output of shape {shapes[0]}, and what would take its place of {shapes[1]}"
    for was, now in zip(before, after):
        wide = torch.promote_types(was.dtype, torch.float32)
        was, now = was.to(wide), now.to(wide)
        apart = (now - was).abs()
        allowed = max(tolerance, 4 * torch.finfo(before[0].dtype).eps) * (size + was.abs())
        wrong = ~((apart <= allowed) | (was == now) | (was.isnan() & now.isnan()))
        if wrong.any():
            most = apart.masked_fill(~wrong, 0).nan_to_num(torch.inf).max()
            return (
                f"what would take its place gives another result: {most:.2g} apart, where results are up to "
                f"{was.abs().max():.2g}"
            )
    return None


def is_comparable(*modules: nn.Module) -> bool:
    """Whether there are numbers to compare: not on the meta device, nor where tensors only stand for others."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return not torch._C._len_torch_dispatch_stack() and all(
        type(t) in (Tensor, nn.Parameter) and not t.is_meta for t in tensors
    )


def random(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Standard normal numbers, always the same, with the dtype and on the device of ``like``."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)


@torch.no_grad()
def inputs_of(norm: Norm, dims: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Make an input ``(N, C, ...)`` with so many spatial axes, and the ``size`` of its output for :func:`difference`.

    Half of the samples have the layer's own mean and variance, so that a wrong scale and an activation that bends at
    zero show; the other half are standard normal, so that a wrong mean shows.
    """
    mu, variance, _ = _affine(norm, dims)
    x = random((SAMPLES, norm.num_features, *SIZES[:dims]), mu)
    x[::2] = (mu + variance.sqrt() * x[::2]).nan_to_num(0, 0, 0)
    x = x.to(dtype)
    return x, size_after(norm, x)


@torch.no_grad()
def size_after(norm: Norm, x: Tensor) -> Tensor:
    """Bound the terms that ``norm(x)`` is the sum of: the ``size`` for :func:`difference`."""
    mu, _, gain = _affine(norm, x.dim() - 2)
    size = (x.abs() + mu.abs()) * gain.abs()
    return size if norm.bias is None else size + norm.bias.abs().view(gain.shape)


def inputs_of_recurrent(network: Normalized) -> tuple[Any, ...]:
    """Make an input and a hidden state for a recurrent layer or cell."""
    like = next(network.parameters())
    widths = [network.hidden_size] * (2 if network.kind == "LSTM" else 1)  # of h, and of c
    widths[0] = getattr(network, "proj_size", 0) or widths[0]
    if isinstance(network, nn.RNNBase):
        x = random((SAMPLES, SAMPLES, network.input_size), like)  # as many steps as sequences, whichever comes first
        leading: tuple[int, ...] = (len(network.suffixes), SAMPLES)
    else:
        x = random((SAMPLES, network.input_size), like)
        leading = (SAMPLES,)
    hidden = tuple(random((*leading, width), like).tanh() for width in widths)
    return x, hidden if len(hidden) > 1 else hidden[0]


def _affine(norm: Norm, dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give mu, sigma² and gain/s per channel, to broadcast against an input; 0 and 1 where none are kept."""
    shape = (1, -1, *(1,) * dims)
    if norm.stream is None and not isinstance(norm, GeneralBatchNorm):
        mu = torch.zeros(norm.num_features, device=None if norm.weight is None else norm.weight.device)
        variance = torch.ones_like(mu)
    else:
        view = norm.ref.least_view(norm.num_features)
        mu, variance = (view.per_channel(value) for value in norm.eval_stats())
    gain = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight
    return mu.view(shape), variance.view(shape), gain.view(shape)


def _forward(module: Any) -> Any:
    """Give the forward method, which calls no hooks of the module itself and may be the instance's own."""
    return module.forward if isinstance(module, nn.Module) else module


def _copies(inputs: tuple[Any, ...]) -> list[Any]:
    return [t.clone() if isinstance(t, Tensor) else type(t)(_copies(t)) for t in inputs]


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for each in output for t in _tensors(each)]


@contextmanager
def _at_rest(*layers: Any) -> Iterator[None]:
    """Put layers and all inside them into evaluation without hooks, and restore them afterwards."""
    modules = {module for layer in layers if isinstance(layer, nn.Module) for module in layer.modules()}
    changes: list[tuple[nn.Module, dict[str, Any]]] = []
    for module in modules:
        quiet: dict[str, Any] = {
            "training": False,
            "_forward_hooks": OrderedDict(),
            "_forward_pre_hooks": OrderedDict(),
        }
        if isinstance(module, Norm):
            quiet["frozen"] = True  # one that adapts would move its statistics
        changes.append((module, {name: getattr(module, name) for name in quiet}))
        for name, value in quiet.items():
            setattr(module, name, value)
    try:
        yield
    finally:
        for module, before in changes:
            for name, value in before.items():
                setattr(module, name, value)
