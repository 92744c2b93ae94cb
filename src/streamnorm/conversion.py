"""Moving a model in and out: from other normalization layers, back to plain BatchNorm, and folded away."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from . import arguments, foreign
from .moments import LpMoment
from .norm import GeneralBatchNorm, Norm, StreamingNorm1d, StreamingNorm2d, StreamingNorm3d
from .norm_act import StreamingNormAct2d
from .normref import NormRef, RefName
from .ops.spec import View
from .recurrent.base import Normalized
from .stream import Stream

Module = TypeVar("Module", bound=nn.Module)
Converter = Callable[..., nn.Module]
Predicate = Callable[[str, nn.Module], bool]

_BatchNorm = nn.modules.batchnorm._BatchNorm
_InstanceNorm = nn.modules.instancenorm._InstanceNorm

_STREAMING: dict[type[nn.Module], type[Norm]] = {
    nn.BatchNorm1d: StreamingNorm1d,
    nn.BatchNorm2d: StreamingNorm2d,
    nn.BatchNorm3d: StreamingNorm3d,
    nn.InstanceNorm1d: StreamingNorm1d,
    nn.InstanceNorm2d: StreamingNorm2d,
    nn.InstanceNorm3d: StreamingNorm3d,
}
_PLAIN: dict[type[Norm], type[nn.Module]] = {
    StreamingNorm1d: nn.BatchNorm1d,
    StreamingNorm2d: nn.BatchNorm2d,
    StreamingNorm3d: nn.BatchNorm3d,
}
_HOOKS = tuple(
    name
    for name in nn.Module().__dict__
    if name.endswith(("hook", "hooks", "hooks_with_kwargs", "hooks_always_called"))
)

_converters: dict[type[nn.Module], Converter] = {}


def convert(
    model: nn.Module, where: Predicate | None = None, also: tuple[type[nn.Module], ...] = (), **options: Any
) -> nn.Module:
    """Replace the BatchNorm layers of ``model`` by Streaming Normalization, in place.

    The converted model evaluates as before, to rounding: running mean and variance become the long-term statistics
    (``scale="gaussian"`` unless said otherwise, so that σ of any p means a standard deviation). Parameters stay the
    same objects, so an optimizer made before goes on working; names, device, dtype, mode and hooks stay too. With a
    reference wider than a channel (``ref="layer"``) the channels' statistics are pooled, and evaluation changes.

    Args:
        model: any module. If it is itself a BatchNorm, the new layer is only returned.
        where: ``where(name, module)`` says which layers to convert. Default: all.
        also: further layer types to convert. ``nn.GroupNorm``, ``nn.InstanceNorm2d`` and their like keep no
            statistics (unless they track them), so the result does not evaluate as before: run
            :func:`streamnorm.calibrate` next. A ``FrozenBatchNorm2d``, as torchvision, timm and transformers have
            it, evaluates as before; its gain and bias become parameters, which the optimizer has to be told of.
        options: arguments of ``StreamingNorm2d``, such as ``p=2`` or ``window=500``. Not those that each layer
            brings along: ``affine``, ``bias``, ``device``, ``dtype``.

    Returns:
        ``model``.

    Raises:
        ValueError: for options that StreamingNorm refuses, or a type in ``also`` that is no InstanceNorm, GroupNorm
            or FrozenBatchNorm; nothing is changed.
        TypeError: for an option that StreamingNorm does not have; the nearest one is named.

    Warns:
        UserWarning: names each layer with a forward of its own, which stays as it is
            (:func:`streamnorm.register_converter` says how to convert it), and each lazy one. timm's layers with an
            activation inside are known and become :class:`streamnorm.StreamingNormAct2d`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> convert(model)[1]
        StreamingNorm2d(8, ref='n c ... -> c', p=1, center='mean', scale='gaussian', window=50, eps=1e-05, affine=True)
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

    def converted(name: str, module: nn.Module) -> nn.Module | None:
        if where is not None and not where(name, module):
            return None
        if type(module) in _converters:
            return _converters[type(module)](module, **options)
        if not isinstance(module, (_BatchNorm, *also)):
            return None
        if not (isinstance(module, (_BatchNorm, _InstanceNorm, nn.GroupNorm)) or foreign.is_frozen(module)):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}, which is no GroupNorm, InstanceNorm or "
                f"FrozenBatchNorm: say how with streamnorm.register_converter({type(module).__name__}, ...)"
            )
        obstacle = _obstacle(module)
        if obstacle is None:
            return _to_streaming(module, options)
        remarks.append(f"{name or 'the model'} is a {type(module).__name__} and was not converted: {obstacle}")
        return None

    result = _replace(model, converted)
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
    """Teach :func:`convert` a layer type.

    Args:
        cls: the type, exactly; its subclasses are not meant.
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
    _converters[cls] = converter


def to_batchnorm(model: nn.Module, dims: int | None = None) -> nn.Module:
    """Replace our layers by plain ``torch.nn`` ones that evaluate the same, in place: for deployment.

    Streaming and General Batch Normalization become ``nn.BatchNorm1d/2d/3d``; Sample Normalization with p = 2 becomes
    ``nn.GroupNorm``, which it equals. StreamingNormAct2d becomes timm's ``BatchNormAct2d`` again. Recurrent layers and
    cells become those of torch.nn, with the statistics in weights of their own (``to_torch``); these take no
    ``lengths``, ``mask`` or ``step``.

    Args:
        model: any module. If it is itself such a layer, the new one is only returned.
        dims: 1, 2 or 3: which BatchNorm stands for a layer that takes any rank (GeneralBatchNorm, Norm).

    Returns:
        ``model``.

    Raises:
        ValueError: if a layer has no plain equal, or takes any rank and ``dims`` is not given; nothing is changed.

    Example:
        >>> to_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), StreamingNorm2d(8)))[1]
        BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, ...)
    """
    arguments.check_model(model)
    if dims not in (None, 1, 2, 3):
        raise ValueError(f"dims is 1, 2 or 3, for nn.BatchNorm1d, 2d or 3d, got {dims!r}")

    def plain(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, Normalized):
            return _to_recurrent(name, module)
        return _to_plain(name, module, dims) if isinstance(module, Norm) else None

    return _replace(model, plain)


def fold(model: Module) -> Module:
    """A copy of ``model`` for inference with our layers folded into the Linear or convolution before them.

    Statistics, gain and bias become part of that layer's weight and bias, and ``nn.Identity``, or dropout and
    activation alone, stands where the normalization was. Which layer comes before is found by tracing the model with
    ``torch.fx``; a normalization stays if it follows something else or a layer that is used more than once, or if
    either of the two has forward hooks. A Linear is taken to give ``(N, C)``. Recurrent layers and cells become those
    of torch.nn where these evaluate the same and take the same arguments.

    Args:
        model: any module that ``torch.fx`` can trace.

    Returns:
        The copy, in evaluation mode.

    Raises:
        ValueError: if the model cannot be traced.

    Example:
        >>> fold(nn.Sequential(nn.Linear(3, 4), StreamingNorm1d(4), nn.ReLU()))
        Sequential(
          (0): Linear(in_features=3, out_features=4, bias=True)
          (1): Identity()
          (2): ReLU()
        )
    """
    arguments.check_model(model)
    folded = copy.deepcopy(model).eval()
    graph = _trace(folded)
    pairs = _foldable_pairs(folded, graph)
    for before, norm in pairs:
        _fold_into(before, norm)
    instead = {id(norm): _what_remains(norm) for _, norm in pairs} | _plain_recurrent(folded, graph)
    return _replace(folded, lambda _, module: instead.get(id(module)))


def _replace(model: Module, change: Callable[[str, nn.Module], nn.Module | None]) -> Any:
    """Put ``change(name, module)`` in the place of every module where it is not None; shared modules stay shared.

    All of them are made before the first is put in its place: if one cannot be made, the model is as it was.
    """
    made: dict[int, nn.Module] = {}
    places: list[tuple[nn.Module, str, nn.Module]] = []
    names = {id(module): name for name, module in model.named_modules()}

    def visit(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            new = change(names[id(module)], module)
            made[id(module)] = module if new is None else new.train(module.training)
            if new is None:
                children = [(name, child) for name, child in module._modules.items() if child is not None]
                places.extend((module, name, visit(child)) for name, child in children)
        return made[id(module)]

    replaced = visit(model)
    for parent, name, child in places:
        parent._modules[name] = child
    return replaced


def _obstacle(module: nn.Module) -> str | None:
    """Why a normalization layer cannot become a streaming one, if it cannot."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "it has no channels before the first batch; run one through the model"
    if foreign.is_frozen(module) or foreign.has_activation(module) or foreign.normalizes_as_torch(module):
        return None
    return (
        f"it has a forward of its own; say how with streamnorm.register_converter({type(module).__name__}, ...), or "
        "leave it out with where="
    )


def _streaming_class(module: nn.Module) -> Callable[..., Norm]:
    """What takes the place of a layer: a layer for the same ranks of input, and what it did after normalizing."""
    if foreign.has_activation(module):
        return partial(StreamingNormAct2d, drop=getattr(module, "drop", None), act=getattr(module, "act", None))
    if foreign.is_frozen(module):
        return StreamingNorm2d
    return next((_STREAMING[base] for base in type(module).__mro__ if base in _STREAMING), _any_rank)


def _to_streaming(module: nn.Module, options: dict[str, Any]) -> Norm:
    """The streaming layer with the parameters, statistics, mode and hooks of another normalization layer."""
    old: Any = module
    weight, bias = old.weight, old.bias
    if foreign.is_frozen(module):
        weight, bias = nn.Parameter(weight), nn.Parameter(bias)
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    like = next((t for t in (weight, mean) if t is not None), torch.empty(0))
    arguments: dict[str, Any] = {
        "eps": getattr(module, "eps", 1e-5),
        "affine": weight is not None,
        "bias": bias is not None,
        "device": like.device,
        "dtype": like.dtype,
        **options,
    }
    new = _streaming_class(module)(_num_features(old), **arguments)
    new.weight, new.bias = weight, bias
    if mean is not None and variance is not None:
        _set_statistics(new, mean, variance)
    _move_hooks(module, new)
    return new.train(module.training)


def _num_features(old: Any) -> int:
    if isinstance(old, nn.GroupNorm):
        return old.num_channels
    return old.num_features if hasattr(old, "num_features") else len(old.weight)


def _any_rank(num_features: int, ref: RefName | NormRef = "channel", p: float = 1, **options: Any) -> Norm:
    """The streaming layer for a module that takes inputs of any rank."""

    def of(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: options.pop(name) for name in names if name in options}

    moment = LpMoment(p, **of(("center", "scale")))
    stream = Stream(**of(("window", "alpha", "beta", "kappa")))
    return Norm(num_features, ref if isinstance(ref, NormRef) else NormRef.batch(ref), moment, stream, **options)


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


def _to_plain(name: str, layer: Norm, dims: int | None) -> nn.Module:
    plain: Any
    if layer.stream is None and not isinstance(layer, GeneralBatchNorm):
        plain = _to_groupnorm(name, layer)
    else:
        cls: Callable[..., nn.Module] | None = (
            foreign.batchnorm_with_activation(layer.drop, layer.act)
            if isinstance(layer, StreamingNormAct2d)
            else _PLAIN.get(type(layer)) or {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}.get(dims or 0)
        )
        if cls is None:
            raise ValueError(
                f"{name or 'the layer'} takes any rank: say with dims=1, 2 or 3 which BatchNorm to write for it"
            )
        mu, variance = (_per_channel(name, layer, value) for value in layer.eval_stats())
        plain = cls(layer.num_features, layer.eps, affine=layer.weight is not None, device=mu.device)
        dtype = mu.dtype if layer.weight is None else layer.weight.dtype
        plain.running_mean, plain.running_var = mu.to(dtype), variance.to(dtype)
    plain.weight, plain.bias = layer.weight, layer.bias
    _move_hooks(layer, plain)
    return plain.train(layer.training)


def _to_groupnorm(name: str, layer: Norm) -> nn.GroupNorm:
    groups = {NormRef.sample("layer"): 1, NormRef.sample("channel"): layer.num_features}
    if layer.ref.pattern == NormRef.sample(("group", 1)).pattern:
        groups[layer.ref] = dict(layer.ref.sizes)["g"]
    if (
        layer.ref not in groups
        or layer.moment.p != 2
        or layer.moment.center != "mean"
        or (layer.weight is None) != (layer.bias is None)
    ):
        raise ValueError(
            f"{name or 'the layer'} has no equal in torch.nn: {layer}. Convert the parts of the model that do have one"
        )
    return nn.GroupNorm(groups[layer.ref], layer.num_features, layer.eps, affine=layer.weight is not None)


def _per_channel(name: str, layer: Norm, value: Tensor) -> Tensor:
    """One value per channel from one per statistic."""
    view = _least_channel_view(layer)
    if view is None:
        raise ValueError(
            f"{name or 'the layer'} keeps a statistic per place ({layer.ref.pattern!r}), which BatchNorm cannot"
        )
    return view.per_channel(value)


def _least_channel_view(layer: Norm) -> View | None:
    """The least view of a reference whose statistics are the same all over a channel."""
    view = layer.ref.least_view(layer.num_features)
    return view if all(view.axes[i] == 1 for i in view.kept) else None


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


def _plain_recurrent(model: nn.Module, graph: fx.Graph) -> dict[int, nn.Module]:
    """The torch.nn network for each recurrent one of ours, by id: where there is one that can be called as it is."""
    called_plainly: dict[Any, bool] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in graph.nodes:
        if node.op == "call_module":
            module = modules[node.target]
            plainly = len(node.args) + len(node.kwargs) <= 2 and node.kwargs.keys() <= {"input", "hx"}
            called_plainly[module] = called_plainly.get(module, True) and plainly
    plain = {}
    for module, plainly in called_plainly.items():
        if plainly and isinstance(module, Normalized) and not (module._forward_hooks or module._forward_pre_hooks):
            with suppress(ValueError):
                plain[id(module)] = module.to_torch()
    return plain


def _to_recurrent(name: str, module: Normalized) -> nn.Module:
    try:
        plain: nn.Module = module.to_torch()
    except ValueError as error:
        raise ValueError(f"{name or 'the model'}: {error}") from None
    _move_hooks(module, plain)
    return plain


def _foldable_pairs(model: nn.Module, graph: fx.Graph) -> list[tuple[Any, Norm]]:
    """(layer, norm) where the norm's only input is that layer's only output, and nothing else looks at either."""
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    # Calls of a module, and uses of its parameters elsewhere: of a weight that a decoder shares, for example.
    used = Counter(id(modules[node.target]) for node in calls)
    used.update(id(modules[node.target.rpartition(".")[0]]) for node in graph.nodes if node.op == "get_attr")
    pairs = []
    for node in calls:
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        before, norm = modules[str(source.target)], modules[node.target]
        if used[id(before)] == used[id(norm)] == 1 and _can_fold(before, norm):
            pairs.append((before, norm))
    return pairs


def _can_fold(before: nn.Module, norm: nn.Module) -> bool:
    if not isinstance(norm, Norm) or not isinstance(before, (nn.Linear, nn.modules.conv._ConvNd)):
        return False
    keeps_statistics = norm.stream is not None or isinstance(norm, GeneralBatchNorm)
    features = before.out_features if isinstance(before, nn.Linear) else before.out_channels
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in (before, norm)]
    return (
        keeps_statistics
        and features == norm.num_features
        and _least_channel_view(norm) is not None
        and not parametrize.is_parametrized(before)
        and not any(hooks)
    )


def _what_remains(norm: nn.Module) -> nn.Module:
    """What a layer does after normalizing."""
    return nn.Sequential(norm.drop, norm.act) if isinstance(norm, StreamingNormAct2d) else nn.Identity()


@torch.no_grad()
def _fold_into(before: nn.Linear | nn.modules.conv._ConvNd, norm: Norm) -> None:
    """weight ← weight·a and bias ← bias·a + b per output channel, where the norm is x·a + b."""
    mu, variance = (_per_channel("", norm, value) for value in norm.eval_stats())
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
    before.bias = nn.Parameter(bias.to(before.weight.dtype))
    before.weight = nn.Parameter(scaled.view_as(weight).to(before.weight.dtype))


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
