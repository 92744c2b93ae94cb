"""Folding our layers into the Linear or convolution before them, for inference."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ..core import arguments
from ..layers import GeneralBatchNorm, Norm
from ..recurrent.base import Normalized
from . import comparison
from .replace import Module, replace, what_follows
from .to_torch import RECURRENT, least_channel_view, per_channel

FOLDED = 1e-4
"""Tolerance for outputs of a matrix product or convolution."""

_Linear = nn.Linear | nn.modules.conv._ConvNd
_Chain = list[nn.Module]
"""Modules in the order in which they are called."""


def fold(model: Module) -> Module:
    """A copy of ``model`` for inference with our layers folded into the Linear or convolution before them.

    Statistics, gain and bias become part of that layer's weight and bias, and ``nn.Identity``, or dropout and
    activation alone, replaces the normalization. The preceding layer is found by tracing the model with ``torch.fx``;
    a normalization stays if it follows something else or a layer that is used more than once, or if either of the two
    has forward hooks. The output of a Linear is assumed to be ``(N, C)``. Recurrent layers and cells become those of
    torch.nn if these evaluate the same and take the same arguments. A layer whose results on a few random numbers
    would change stays too, with a warning that names it.

    Args:
        model: any module that ``torch.fx`` can trace.

    Returns:
        The copy, in evaluation mode.

    Raises:
        ValueError: if the model cannot be traced.

    Example:
        >>> import streamnorm as sn
        >>> fold(nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(4), nn.ReLU()))
        Sequential(
          (0): Linear(in_features=3, out_features=4, bias=True)
          (1): Identity()
          (2): ReLU()
        )
    """
    arguments.check_model(model)
    computed = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor) and t.grad_fn]
    folded = copy.deepcopy(model, {id(t): t.detach().clone() for t in computed}).eval()  # of pruned layers
    graph = _trace(folded)
    names = {id(module): name or "the model" for name, module in folded.named_modules()}
    instead: dict[int, nn.Module] = {}
    for old, new in (*_folded_pairs(folded, graph), *_plain_recurrent(folded, graph)):
        name, remark = names[id(old[-1])], None
        try:
            found = _difference(old, new)
            remark = found and f"{name} was not folded: {found}"
        except comparison.NotComparedError as error:
            found, remark = None, f"{name} could not be compared with what it becomes: {error}"
        if remark:
            warnings.warn(remark, stacklevel=2)
        if found is None:
            instead.update((id(before), after) for before, after in zip(old, new))
    return replace(folded, lambda _, module: instead.get(id(module)))


def _difference(old: _Chain, new: _Chain) -> str | None:
    """Compare a Linear or convolution and its norm, or a recurrent network, with what takes their place."""
    if not comparison.is_comparable(*old, *new):
        return None
    if isinstance(old[0], Normalized):
        return comparison.difference(old[0], new[0], comparison.inputs_of_recurrent(old[0]), 1.0, RECURRENT)
    before, norm = cast("_Linear", old[0]), cast("Norm", old[1])
    x = comparison.random(_input_shape(before), before.weight)
    with torch.no_grad():
        try:
            size = comparison.size_after(norm, _typical_sums(before, x))
        except Exception as error:
            raise comparison.NotComparedError(f"it does not run on random numbers ({error})") from error
    return comparison.difference(nn.Sequential(*old), nn.Sequential(*new), (x,), size, FOLDED)


def _typical_sums(before: _Linear, x: Tensor) -> Tensor:
    """Give the root of the sum of squared terms of each output: terms that cancel each other round all the same."""
    squares = {name: parameter.square() for name, parameter in before.named_parameters()}
    sums: Tensor = torch.func.functional_call(before, squares, (x.square(),), strict=True)
    return sums.sqrt()


def _input_shape(before: _Linear) -> tuple[int, ...]:
    """Give the shape of an input that is just large enough for a few outputs."""
    if isinstance(before, nn.Linear):
        return comparison.SAMPLES, before.in_features
    pads = before.padding if isinstance(before.padding, tuple) else (0,) * len(before.kernel_size)
    spatial = [d * (k - 1) + 2 + pad for k, d, pad in zip(before.kernel_size, before.dilation, pads)]
    return comparison.SAMPLES, before.in_channels, *spatial


def _trace(model: nn.Module) -> fx.Graph:
    """The calls that a model's forward makes; our own layers are calls, whatever is inside."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, (Norm, Normalized)) or super().is_leaf_module(module, name)

    try:
        return Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"fold finds the layer before each normalization with torch.fx, which cannot trace this model: {error}"
        ) from error


def _plain_recurrent(model: nn.Module, graph: fx.Graph) -> Iterator[tuple[_Chain, _Chain]]:
    """Each recurrent network of ours and torch.nn's: where there is one that can be called as it is."""
    called_plainly: dict[Any, bool] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in graph.nodes:
        if node.op == "call_module":
            module = modules[node.target]
            plainly = len(node.args) + len(node.kwargs) <= 2 and node.kwargs.keys() <= {"input", "hx"}
            called_plainly[module] = called_plainly.get(module, True) and plainly
    for module, plainly in called_plainly.items():
        if plainly and isinstance(module, Normalized) and not (module._forward_hooks or module._forward_pre_hooks):
            with suppress(ValueError):
                yield [module], [module.to_torch()]


def _folded_pairs(model: nn.Module, graph: fx.Graph) -> Iterator[tuple[_Chain, _Chain]]:
    """Each layer and norm where the norm's only input is that layer's only output, and nothing else looks at either.

    And what they become.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    # Calls of a module, and uses of its parameters elsewhere: of a weight that a decoder shares, for example.
    used = Counter(id(modules[node.target]) for node in calls)
    used.update(id(modules[node.target.rpartition(".")[0]]) for node in graph.nodes if node.op == "get_attr")
    for node in calls:
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        before, norm = modules[str(source.target)], modules[node.target]
        if used[id(before)] == used[id(norm)] == 1 and _can_fold(before, norm):
            yield [before, norm], [_folded(before, norm), what_follows(norm)]


def _can_fold(before: nn.Module, norm: nn.Module) -> bool:
    if not isinstance(norm, Norm) or not isinstance(before, (nn.Linear, nn.modules.conv._ConvNd)):
        return False
    keeps_statistics = norm.stream is not None or isinstance(norm, GeneralBatchNorm)
    features = before.out_features if isinstance(before, nn.Linear) else before.out_channels
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in (before, norm)]
    return (
        keeps_statistics
        and features == norm.num_features
        and least_channel_view(norm) is not None
        and not parametrize.is_parametrized(before)
        and not any(hooks)
    )


@torch.no_grad()
def _folded(before: Any, norm: Norm) -> nn.Module:
    """A layer with weight·a and bias·a + b per output channel, where the norm is x·a + b."""
    mu, variance = (per_channel("", norm, value) for value in norm.eval_stats())
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mu * scale if norm.bias is None else norm.bias - mu * scale
    weight = before.weight.to(scale.dtype)
    if getattr(before, "transposed", False):
        groups: Any = before.groups
        by_group = weight.view(groups, -1, *weight.shape[1:])
        scaled = by_group * scale.view(groups, 1, -1, *(1,) * (weight.dim() - 2))
    else:
        scaled = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
    bias = shift if before.bias is None else before.bias * scale + shift
    after = copy.copy(before)
    after._parameters = dict(before._parameters)
    after.bias = nn.Parameter(bias.to(before.weight.dtype))
    after.weight = nn.Parameter(scaled.view_as(weight).to(before.weight.dtype))
    return after
