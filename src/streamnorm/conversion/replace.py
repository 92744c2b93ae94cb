"""Replacement of modules in a model, with their hooks and parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from ..layers import StreamingNormAct2d

Module = TypeVar("Module", bound=nn.Module)

_HOOKS = tuple(
    name
    for name in nn.Module().__dict__
    if name.endswith(("hook", "hooks", "hooks_with_kwargs", "hooks_always_called"))
)


def replace(model: Module, change: Callable[[str, nn.Module], nn.Module | None]) -> Any:
    """Put ``change(name, module)`` in the place of every module where it is not None; shared modules stay shared.

    All of them are made before the first is put in its place: if one cannot be made, the model is as it was. They are
    put into the mode of what they replace; what they take over from it keeps its own.
    """
    made: dict[int, nn.Module] = {}
    places: list[tuple[nn.Module, str, nn.Module]] = []
    names = {id(module): name for name, module in model.named_modules()}

    def visit(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            new = change(names[id(module)], module)
            made[id(module)] = module if new is None else new
            if new is not None:
                modes = [(inside, inside.training) for child in module.children() for inside in child.modules()]
                new.train(module.training)
                for inside, mode in modes:
                    inside.training = mode
            else:
                children = [(name, child) for name, child in module._modules.items() if child is not None]
                places.extend((module, name, visit(child)) for name, child in children)
        return made[id(module)]

    replaced = visit(model)
    for parent, name, child in places:
        parent._modules[name] = child
    return replaced


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Move the hooks of one module to another; their handles go on working."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))


def move_parameters(old: nn.Module, new: nn.Module) -> None:
    """Move gain and bias of one layer to another: the same objects, with pruning or a parametrization.

    The buffers of a frozen layer become parameters.
    """
    for name in ("weight", "bias"):
        if parametrize.is_parametrized(old, name):
            parametrize.transfer_parametrizations_and_params(old, new, name)
        elif f"{name}_orig" in old._parameters:  # torch.nn.utils.prune, whose hook moves with the others
            del new._parameters[name]
            new.register_parameter(f"{name}_orig", old._parameters[f"{name}_orig"])
            new.register_buffer(f"{name}_mask", old._buffers[f"{name}_mask"])
            setattr(new, name, getattr(old, name))
        else:
            value = getattr(old, name)
            setattr(new, name, nn.Parameter(value) if name in old._buffers else value)


def what_follows(norm: nn.Module) -> nn.Module:
    """Give the dropout and activation of a layer, which come after normalizing."""
    return nn.Sequential(norm.drop, norm.act) if isinstance(norm, StreamingNormAct2d) else nn.Identity()
