"""The interface to the compiler and to torch.fx, without an import of the compiler, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, TypeVar

from torch import nn
from torch.fx import Proxy

F = TypeVar("F", bound=Callable[..., Any])

_hooks = attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_hooked(module: nn.Module) -> bool:
    """Whether something wants to see a module's forward or backward."""
    return any(_hooks(module))


def as_constant(function: F) -> F:
    """Let ``torch.compile`` call a function while it makes a graph, and take its result for a constant.

    As ``torch.compiler.assume_constant_result``, whose decorator would import the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_symbolic(*values: Any) -> bool:
    """Whether ``torch.fx.symbolic_trace`` asks: one of these, or of the items of a tuple, stands for a tensor."""
    return any(isinstance(v, Proxy) or (isinstance(v, tuple | list) and is_symbolic(*v)) for v in values)


def as_leaf(module: nn.Module, forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The node of a ``torch.fx`` graph that calls a module of ours, as graphs call the modules of torch.nn.

    Args:
        module: what is called.
        forward: the forward that asks. In a subclass with one of its own it is only a part of the call.
        *arguments: of the call; those at the end that are None are left out.
        **options: of the call, likewise.

    Raises:
        TypeError: if a call of the module is more than ``forward``.
    """
    while arguments[-1] is None:
        arguments = arguments[:-1]
    tracer: Any = _first_symbol(arguments).tracer
    if type(module).forward is not forward or is_hooked(module) or not hasattr(tracer, "root"):
        raise TypeError(
            f"torch.fx takes {type(module).__name__} for one node of its graph where a call of it is what streamnorm's "
            "own forward does. Here a subclass has a forward of its own, the layer has hooks, or no module is traced: "
            "use a torch.fx.Tracer whose is_leaf_module is true for the layer"
        )
    given = {name: value for name, value in options.items() if value is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, given)


def _first_symbol(values: Any) -> Any:
    found = next(value for value in values if is_symbolic(value))
    return found if isinstance(found, Proxy) else _first_symbol(found)


def guard_on(value: Any) -> None:
    """Make the graph that is being made depend on a value, which is true: the next one is made for another.

    ``torch.compile`` guards on what a branch depends on, and on nothing that :func:`as_constant` reads.
    """
    if not value:
        raise AssertionError("a value to guard on is true")
