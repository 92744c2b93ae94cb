"""Surroundings: the parameters, modules and optimizers that a streaming layer stands among."""

from __future__ import annotations

import heapq
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .streaming import Streaming
from .ties import alive


def own_parameters(layer: Streaming) -> list[Tensor]:
    """The parameters that the gain and bias of a layer are, or are computed from."""
    held = layer.parameters() if layer._modules else layer._parameters.values()  # parametrizations are modules
    return [parameter for parameter in held if parameter is not None] + list(alive(layer._ties.leaves))


def owns_any(layer: Streaming, ids: set[int]) -> bool:
    """Whether one of :func:`own_parameters` is among these."""
    for parameter in layer._parameters.values():
        if id(parameter) in ids:
            return True
    if layer._modules or layer._ties.leaves:
        return any(id(parameter) in ids for parameter in own_parameters(layer))
    return False


_MOST_NODES = 10_000


def leaves_of(layer: Streaming) -> tuple[weakref.ref[Tensor], ...]:
    """The parameters of others that the layer's gain and bias are computed from right now."""
    computed = [layer.__dict__.get(name, layer._parameters.get(name)) for name in (layer._gain, "bias")]
    to_visit = [tensor.grad_fn for tensor in computed if isinstance(tensor, Tensor) and tensor.grad_fn is not None]
    seen: set[Any] = set()
    leaves: dict[int, Tensor] = {}
    while to_visit and len(seen) < _MOST_NODES:
        node = to_visit.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(variable := getattr(node, "variable", None), Tensor):
            leaves[id(variable)] = variable
        to_visit += [following for following, _ in node.next_functions if following is not None]
    return tuple(weakref.ref(leaf) for leaf in leaves.values())


def weight_before(x: Tensor) -> weakref.ref[Tensor] | None:
    """The weight that was used last on the way to x, no gain or bias. Of two networks in a row it is the second's."""
    latest: list[tuple[int, int, Any]] = []
    seen: set[Any] = set()

    def meet(node: Any) -> None:
        if node is not None and node not in seen:
            seen.add(node)
            heapq.heappush(latest, (-node._sequence_nr(), len(seen), node))

    meet(x.grad_fn)
    while latest and len(seen) < _MOST_NODES:
        *_, node = heapq.heappop(latest)
        for following, _ in node.next_functions:
            if isinstance(weight := getattr(following, "variable", None), nn.Parameter) and weight.dim() > 1:
                return weakref.ref(weight)
            meet(following)
    return None


_CALL = nn.Module._wrapped_call_impl.__code__


def calling_modules() -> list[nn.Module]:
    """The modules that are being called right now, the outermost first.

    A module does not know what it stands in. The calls that lead to it do, and they tell networks apart that lie in
    one container, such as the two of a GAN.
    """
    modules = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            modules.append(frame.f_locals["self"])
        frame = frame.f_back
    return modules[::-1]


def set_surroundings(root: nn.Module, layers: Iterable[Streaming]) -> None:
    """Tell the streaming layers of a module which modules are around them, and those without a name their name."""
    modules = dict(root.named_modules())
    names = {id(module): name for name, module in modules.items()}
    layers = list(layers)
    norms = {id(parameter) for layer in layers for parameter in layer.parameters()}
    has_weights = {
        name: any(id(parameter) not in norms for parameter in module.parameters()) for name, module in modules.items()
    }
    for layer in layers:
        name = names[id(layer)]
        if not layer._ties.name:
            layer._ties.name = name.replace("_orig_mod.", "").removeprefix("module.")
        path = name.split(".")
        outwards = [".".join(path[:length]) for length in range(len(path) - 1, -1, -1)] if name else []
        around = tuple(weakref.ref(modules[outer]) for outer in outwards if has_weights[outer])
        layer._ties.around = max(around, layer._ties.around, key=len)


def optimizers_in(thing: Any, depth: int = 4) -> list[Optimizer]:
    """The optimizers whose steps PyTorch reports: this one, and those that it holds if it wraps others."""
    attributes = getattr(thing, "__dict__", {})
    reports = isinstance(thing, Optimizer) and "_optimizer_step_post_hooks" in attributes
    found = {id(thing): thing} if reports else {}
    parts = [value for name, value in attributes.items() if name not in ("state", "param_groups")]
    parts += thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else ()
    for part in parts if depth else ():
        if isinstance(part, (Optimizer, list, tuple, dict)) or hasattr(type(part), "step"):
            found.update((id(each), each) for each in optimizers_in(part, depth - 1))
    return [*found.values()]


def parameters_of(optimizer: Any) -> list[Tensor]:
    """All that an optimizer trains."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def is_collecting(layer: Streaming) -> bool:
    """Whether a layer holds statistics that no update has taken in; False where that cannot be read."""
    samples = layer._buffers.get("samples")
    if type(samples) is not Tensor or samples.device.type == "meta" or torch._C._len_torch_dispatch_stack():
        return False
    return bool((samples > 0) | (layer.grad_samples > 0))
