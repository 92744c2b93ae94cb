"""Conversion of normalization layers of torch.nn and of other libraries to streaming ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core import arguments
from ..core.stream import ESTABLISHED, TRAINED_WINDOW
from ..layers import Norm, StreamingNorm1d, StreamingNorm2d, StreamingNorm3d
from ..recurrent.base import Normalized
from . import comparison, foreign
from .foreign import BatchNorm, Converter, Foreign, InstanceNorm
from .replace import move_hooks, move_parameters, replace, what_follows

Predicate = Callable[[str, nn.Module], bool]

_LEFT_OUT = "leave it out with where="
_MEMORY = {"window", "alpha", "beta", "kappa"}
_EPSILONS = (1e-5, 0.0, 1e-3)
"""Values of eps to try for frozen layers, some of which have it in their forward alone."""


def convert(
    model: nn.Module, where: Predicate | None = None, also: tuple[type[nn.Module], ...] = (), **options: Any
) -> nn.Module:
    """Replace the BatchNorm layers of ``model`` by Streaming Normalization, in place.

    The converted model evaluates as before, to rounding: running mean and variance become the long-term statistics
    (by default with ``scale="gaussian"``, so that σ of any p means a standard deviation). Statistics of a trained
    network have a memory of 20,000 samples by default, for fine-tuning that changes the network little. Parameters stay
    the same objects, so an optimizer made before continues to work; names, device, dtype, mode and hooks stay too. With
    a reference wider than a channel (``ref="layer"``) the channels' statistics are pooled, and evaluation changes.

    Args:
        model: any module. If it is itself a BatchNorm, the new layer is only returned.
        where: ``where(name, module)`` says which layers to convert. Default: all.
        also: further layer types to convert. ``nn.GroupNorm``, ``nn.InstanceNorm2d`` and their like keep no
            statistics (unless they track them), so the result does not evaluate as before: run
            :func:`streamnorm.calibrate` next. A ``FrozenBatchNorm2d``, as torchvision, timm and transformers have
            it, evaluates as before; its gain and bias become parameters, so make the optimizer afterwards.
        options: arguments of ``StreamingNorm2d``, such as ``p=2`` or ``window=500``, but not ``affine``, ``bias``,
            ``device`` and ``dtype``, which are those of each layer.

    Returns:
        ``model``.

    Raises:
        ValueError: for options that StreamingNorm refuses, or a type in ``also`` that is no InstanceNorm, GroupNorm
            or FrozenBatchNorm; nothing is changed.
        TypeError: for an option that StreamingNorm does not have; the nearest one is named.

    Warns:
        UserWarning: for each layer that is not converted, with its name and the reason: a forward of its own
            (register a converter with :func:`streamnorm.register_converter`), no channels yet, or a streaming layer
            that gives other results on a few random numbers; for each BatchNorm without running statistics, which
            needs :func:`streamnorm.calibrate`; for layers held in evaluation mode within a module in training mode;
            and if nothing was converted. timm's layers with an activation become
            :class:`streamnorm.StreamingNormAct2d`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> convert(model)[1].stream
        Stream(window=100, own=8)
    """
    _check_options(options)
    options = {"scale": "gaussian", **options}
    arguments.check_model(model)
    if where is not None and not callable(where):
        raise TypeError(f"where is a function where(name, module) of True or False, got {where!r}")
    if not isinstance(also, (tuple, list)) or not all(isinstance(kind, type) for kind in also):
        raise TypeError(f"also is a tuple of layer types, such as (nn.GroupNorm,), got {also!r}")
    StreamingNorm1d(1, **{name: value for name, value in options.items() if name != "ref"})  # refuse before any change
    remarks: list[str] = []
    made: list[str] = []

    def converted(name: str, module: nn.Module) -> nn.Module | None:
        if where is not None and not where(name, module):
            return None
        new, remark = _converted(name or "the model", module, also, options)
        if remark is not None:
            remarks.append(remark)
        if new is not None:
            made.append(name)
        return new

    result = replace(model, converted)
    if not made and not remarks:
        remarks.append(_what_is_there(model, where is not None))
    held = _held_in_evaluation(model)
    if names := [name for name in made if name in held]:
        remarks.append(
            f"in evaluation mode within a module in training mode: {_list(names)}. Code that holds layers there by "
            "isinstance(layer, nn.BatchNorm2d) does not find streaming ones: write streamnorm.freeze(layer), which "
            "model.train() does not undo"
        )
    for remark in remarks:
        warnings.warn(remark, stacklevel=2)
    return result


def _check_options(options: dict[str, Any]) -> None:
    own = ("num_features", "affine", "bias", "device", "dtype")
    known = [name for name in arguments.keywords(StreamingNorm2d) if name not in own]
    for name, value in options.items():
        if name in own:
            raise ValueError(f"{name}={value}: convert takes it from each layer that it replaces; leave it out")
        if name not in known:
            raise arguments.unexpected("convert", name, value, ["where", "also", *known], StreamingNorm2d._hints)


def register_converter(cls: type[nn.Module], converter: Converter) -> None:
    """Register a converter for a layer type, for :func:`convert`.

    Args:
        cls: the exact type, without its subclasses.
        converter: ``converter(module, **options)`` returns the layer to put in its place.

    Example:
        >>> class ShiftedBatchNorm(nn.BatchNorm1d):
        ...     def forward(self, x):
        ...         return super().forward(x) + 1
        >>> def shifted(module, **options):
        ...     plain = nn.BatchNorm1d(module.num_features, eps=module.eps)
        ...     plain.load_state_dict(module.state_dict())
        ...     with torch.no_grad():
        ...         plain.bias += 1
        ...     return convert(plain, **options)
        >>> register_converter(ShiftedBatchNorm, shifted)
        >>> type(convert(nn.Sequential(ShiftedBatchNorm(4)))[0]).__name__
        'StreamingNorm1d'
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls is a layer type, a subclass of torch.nn.Module, got {cls!r}")
    if not callable(converter):
        raise TypeError(f"converter is a function converter(module, **options) of a new layer, got {converter!r}")
    foreign.TABLE.insert(0, Foreign(lambda module: type(module) is cls, converter, None))


def _converted(
    name: str, module: nn.Module, also: tuple[type[nn.Module], ...], options: dict[str, Any]
) -> tuple[nn.Module | None, str | None]:
    """Give the replacement of a module, if there is one, and a remark on it, if there is one."""
    row = foreign.find(module)
    if row is not None and row.becomes is None:
        return row.make(module, **options), None
    if not isinstance(module, (BatchNorm, *also)):
        return None, None
    if row is None and not isinstance(module, (BatchNorm, InstanceNorm, nn.GroupNorm)):
        raise ValueError(
            f"{name} is a {type(module).__name__}, which is no GroupNorm, InstanceNorm or FrozenBatchNorm: say how "
            f"with streamnorm.register_converter({type(module).__name__}, ...)"
        )
    obstacle = _obstacle(module, row)
    if row is None or obstacle is not None:
        return None, f"{name} is a {type(module).__name__} and was not converted: {obstacle}"
    try:
        new, remark = _compared(module, row, options)
    except comparison.NotComparedError as error:
        new, remark = _to_streaming(module, row, options), f"it could not be compared with its streaming layer: {error}"
    kept = " and was not converted" if new is None else ""
    return new, None if remark is None else f"{name} is a {type(module).__name__}{kept}: {remark}"


def _obstacle(module: nn.Module, row: Foreign | None) -> str | None:
    """Give the reason why a normalization layer cannot become a streaming one, if there is one."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "it has no channels before the first batch; run one through the model"
    say_how = f"say how with streamnorm.register_converter({type(module).__name__}, ...), or {_LEFT_OUT}"
    if row is None:
        return f"it has a forward of its own; {say_how}"
    if "forward" in module.__dict__:
        return f"its forward was replaced, on this object alone; {say_how}"
    for name in ("weight", "bias"):
        pruned = f"{name}_orig" in module._parameters
        kept = name in module._parameters or name in module._buffers
        if not (kept or pruned or parametrize.is_parametrized(module, name)):
            return f"its {name} is computed in a way that is not known here: make a parameter of it, or {_LEFT_OUT}"
    return None


def _compared(module: nn.Module, row: Foreign, options: dict[str, Any]) -> tuple[Norm | None, str | None]:
    """Give the streaming layer, if it evaluates as the layer does, and a remark on it."""
    # The other two options change the evaluation, as the user asks.
    faithful = {name: value for name, value in options.items() if name not in ("eps", "ref")}
    if getattr(module, "running_mean", None) is None:
        new = _to_streaming(module, row, options)
        found = _difference_of_own_statistics(module, _to_streaming(module, row, faithful), row)
        if found is None and isinstance(module, BatchNorm):
            return new, (
                "it keeps no running statistics (track_running_stats=False), so that the streaming layer starts from "
                "a prior and evaluates otherwise: write streamnorm.calibrate(model, batches)"
            )
        return (new, None) if found is None else (None, f"{found}; {_LEFT_OUT}")
    found = None
    for eps in _epsilons(module, options):
        beside = _to_streaming(module, row, {**faithful, "eps": eps})
        found = _difference(module, beside, row)
        if found is None:
            return beside if options == faithful else _to_streaming(module, row, {"eps": eps, **options}), None
    return None, f"{found}; {_LEFT_OUT}"


def _epsilons(module: Any, options: dict[str, Any]) -> list[float]:
    """Give the values of eps that a layer may have."""
    known = [module.eps] if hasattr(module, "eps") else []
    if foreign.is_frozen(module):
        return [*known, *_EPSILONS, *([options["eps"]] if "eps" in options else [])]
    return known


def _difference(module: Any, new: Norm, row: Foreign) -> str | None:
    if not comparison.is_comparable(module, new):
        return None
    x, size = comparison.inputs_of(new, _dims(row), _dtype(module))
    return comparison.difference(module, new, (x,), size)


def _difference_of_own_statistics(module: Any, new: Norm, row: Foreign) -> str | None:
    """Compare a layer that takes its statistics from each input with torch.nn's of its kind."""
    if not comparison.is_comparable(module):
        return None

    def normalize(x: Tensor) -> Tensor:
        if isinstance(module, nn.GroupNorm):
            y = F.group_norm(x, module.num_groups, module.weight, module.bias, module.eps)
        elif isinstance(module, InstanceNorm):
            y = F.instance_norm(x, None, None, module.weight, module.bias, True, 0.0, module.eps)
        else:
            y = F.batch_norm(x, None, None, module.weight, module.bias, True, 0.0, module.eps)
        z: Tensor = what_follows(new)(y)
        return z

    x, size = comparison.inputs_of(new, _dims(row), _dtype(module))
    return comparison.difference(module, normalize, (x,), size)


def _dtype(module: Any) -> torch.dtype:
    """Give the dtype of a layer's inputs."""
    tensors = (getattr(module, "running_mean", None), module.weight)
    return next((t.dtype for t in tensors if t is not None), torch.float32)


def _dims(row: Foreign) -> int:
    """Give the number of spatial axes to compare with."""
    return {StreamingNorm1d: 1, StreamingNorm3d: 3}.get(row.becomes, 2)  # type: ignore[arg-type]


def _to_streaming(module: nn.Module, row: Foreign, options: dict[str, Any]) -> Norm:
    """Make the streaming layer with the parameters, statistics and hooks of another normalization layer."""
    old: Any = module
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    like = next((t for t in (old.weight, mean) if t is not None), torch.empty(0))
    arguments: dict[str, Any] = {
        "eps": getattr(module, "eps", _EPSILONS[0]),
        "affine": old.weight is not None,
        "bias": old.bias is not None,
        "device": like.device,
        "dtype": like.dtype,
        **options,
    }
    trained = mean is not None and variance is not None and _are_trained(mean, variance)
    if trained and not _MEMORY & arguments.keys():
        arguments["window"] = TRAINED_WINDOW
    new = row.make(module, **arguments)
    assert isinstance(new, Norm)
    move_parameters(module, new)
    if mean is not None and variance is not None:
        _set_statistics(new, mean, variance)
    if trained:
        new.state.seen.fill_(ESTABLISHED)
    move_hooks(module, new)
    return new


def _are_trained(mean: Tensor, variance: Tensor) -> bool:
    """Whether running statistics are other than a new layer has them."""
    return type(mean) is Tensor and not mean.is_meta and bool((mean != 0).any() | (variance != 1).any())


@torch.no_grad()
def _set_statistics(layer: Norm, mean: Tensor, variance: Tensor) -> None:
    """Let a streaming layer evaluate with this mean and variance per channel, averaged where it keeps fewer."""
    long, formula = layer.state.long, layer.formula
    view = layer.ref.least_view(layer.num_features)
    mean, variance = (t.to(long.dtype).view(view.channel_shape).expand(view.split) for t in (mean, variance))
    mu = mean.mean(view.reduced, keepdim=True)
    sigma_squared = (variance + (mean - mu).square()).mean(view.reduced)
    long[0] = mu.flatten()
    long[1] = (sigma_squared.flatten() / formula.k**2) ** (formula.p / 2)


def _what_is_there(model: nn.Module, chosen: bool) -> str:
    """Describe a model in which nothing was converted."""
    names: dict[type[nn.Module], list[str]] = {}
    for name, module in model.named_modules():
        names.setdefault(type(module), []).append(name or "the model")
    kinds = [(cls, next(m for m in model.modules() if type(m) is cls)) for cls in names]
    said = [f"{cls.__name__} ({_list(names[cls])}): {_advice(module)}" for cls, module in kinds if _advice(module)]
    why = "where= chose no layer" if chosen and any(issubclass(cls, BatchNorm) for cls in names) else "no BatchNorm"
    return f"{why} in {type(model).__name__}, and nothing was converted. It holds " + (
        "; ".join(said) or "no normalization layer: put streaming ones where it needs them, such as StreamingNorm2d"
    )


def _advice(module: nn.Module) -> str | None:
    """Advise on a normalization layer that convert left as it was; None for any other module."""
    name = type(module).__name__
    if isinstance(module, BatchNorm):
        return "left out"
    if isinstance(module, (nn.GroupNorm, InstanceNorm)):
        known = f"nn.{name}" if hasattr(nn, name) else name
        return f"write also=({known},), and then streamnorm.calibrate(model, batches)"
    if foreign.is_frozen(module):
        return f"write also=({name},)"
    if isinstance(module, (Norm, Normalized)):
        return "of streamnorm already"
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return f"streamnorm.{name} takes its weights"
    if "Norm" in name and not module._modules:
        return (
            "it normalizes the last axes of each sample, where streaming layers have the channels second; also= does "
            "not take it, streamnorm.register_converter tells how to convert it"
        )
    return None


def _held_in_evaluation(model: nn.Module) -> set[str]:
    """Give the names of modules in evaluation mode whose parent is in training mode."""
    modes = {name: module.training for name, module in model.named_modules()}
    return {name for name, mode in modes.items() if name and not mode and modes[name.rpartition(".")[0]]}


def _list(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
