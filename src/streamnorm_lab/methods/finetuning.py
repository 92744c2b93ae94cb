"""The normalizations of a network that was trained with Batch Normalization, and is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import streamnorm as sn
from streamnorm_lab.methods.layers import METHODS
from streamnorm_lab.methods.method import Method, Methods, keywords, refuse_unknown
from streamnorm_lab.methods.peers.sample import group_norm


@dataclass(frozen=True)
class FinetuneMethod(Method):
    """The change to the layers of a trained network before it is trained on.

    Args:
        change: takes the network, images of the new data and ``options``, and gives the network to train.
        options: keywords for ``change``.
        accepts: the keywords that a variant may have.
    """

    change: Callable[..., nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    accepts: Sequence[str] = ()

    def prepare(self, model: nn.Module, images: Tensor) -> nn.Module:
        """The network to train."""
        return self.change(model, images, **self.options)

    def variant(self, options: Mapping[str, Any]) -> FinetuneMethod:
        """The same change with more options; a small network is tried, to see whether they can be."""
        refuse_unknown(options, self.accepts)
        variant = replace(self, options={**self.options, **options})
        variant.prepare(nn.Sequential(nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8)), torch.zeros(2, 1, 2, 2))
        return variant


class Held(nn.Sequential):
    """A network whose Batch Normalization normalizes by its running statistics in training mode, too."""

    def train(self, mode: bool = True) -> Held:
        """Set the mode, but for Batch Normalization."""
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()
        return self


def _held(model: nn.Module, images: Tensor) -> nn.Module:
    return Held(model).train()


def _batch(model: nn.Module, images: Tensor) -> nn.Module:
    return model


def _streaming(model: nn.Module, images: Tensor, **options: Any) -> nn.Module:
    return sn.convert(model, **options)


@torch.no_grad()
def to_group(model: nn.Module, images: Tensor, groups: int = 8) -> nn.Module:
    """Put Group Normalization in the place of Batch Normalization, and calibrate its gain and bias.

    On ``images`` each channel of its output then has the mean and the deviation that Batch Normalization's output has
    on the data of its training: its bias and its gain. Layers are calibrated from the input to the output, each on what
    those before it give.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)]
    handles = []
    for name, layer in layers:
        new = group_norm(layer.num_features, groups)
        new.eps = layer.eps
        handles.append(new.register_forward_hook(_calibrate(layer)))
        inside = (getattr(layer, part, None) for part in ("drop", "act"))  # timm's
        after = [module for module in inside if isinstance(module, nn.Module)]
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, nn.Sequential(new, *after) if after else new)
    mode = model.training
    model.eval()(images)
    for handle in handles:
        handle.remove()
    return model.train(mode)


def _calibrate(batch: _BatchNorm) -> Callable[[nn.GroupNorm, Any, Tensor], Tensor]:
    """A hook that gives Group Normalization, at its first use, the gain and bias that make up for the difference."""

    def calibrate(layer: nn.GroupNorm, _: Any, y: Tensor) -> Tensor:
        places = [0, *range(2, y.dim())]
        deviation, mean = torch.std_mean(y, places, correction=0)
        layer.weight.copy_(batch.weight / deviation.clamp_min(1e-3))
        layer.bias.copy_(batch.bias - layer.weight * mean)
        shape = (-1, *[1] * (y.dim() - 2))
        return y * layer.weight.view(shape) + layer.bias.view(shape)

    return calibrate


def _like(name: str, change: Callable[..., nn.Module], accepts: Sequence[str] = (), **options: Any) -> FinetuneMethod:
    """A method that looks like the one of this name in other experiments."""
    known = METHODS[name]
    return FinetuneMethod(name, known.label, known.colour, known.marker, name, change, options, accepts)


_OPTIONS = [name for name in keywords(sn.StreamingNorm2d) if name != "ref"]
_ALL = (
    FinetuneMethod("batch-frozen", "Frozen Batch", "#0072b2", "^", "batch-frozen", _held),
    _like("batch", _batch),
    replace(_like("batch-recalibrated", _batch), trained_as="batch"),
    _like("group", to_group, ("groups",)),
    _like("streaming-l2", _streaming, _OPTIONS, p=2),
    _like("streaming-l1", _streaming, _OPTIONS),
)
FINETUNE_METHODS = Methods({method.name: method for method in _ALL})
