"""Checks that tensors fit each other, before a sequence begins and before backward goes through it.

Users may put anything in the place of a weight, a gain, a buffer or a hidden state. If a wrong size were found at a
later step, the streams of the steps before would have moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..core.spec import wide
from ..layers import GeneralBatchNorm, Norm
from ..ops import native
from ..ops.checks import check_layer, check_memory
from .steps import GATES, Hidden, Norms, Weights


def check_forward(
    kind: str, data: Tensor, sizes: Sequence[int], hidden: Hidden, weights: Weights, norms: Norms
) -> None:
    """Check the tensors of one layer and direction; ``loop.run`` explains the arguments.

    Raises:
        RuntimeError: if a tensor has another size, dtype or device than the others ask for, or its storage was freed or
            shrunk.
    """
    check_weights(kind, data.shape[1], weights)
    rows, units = sizes[0], weights.ih.shape[0] // GATES[kind]
    widths = (weights.hh.shape[1], units)
    for name, h, width in zip(("hidden state", "cell state"), hidden, widths):
        if h.shape != (rows, width):
            raise RuntimeError(
                f"the {name} has the shape {tuple(h.shape)}, and the weights are for one of {(rows, width)}: are they "
                "what the layer was made with?"
            )
    check_memory((("the input", data), *(("the hidden state", h) for h in hidden), *zip(_NAMES, weights)))
    device, kind_of_device = data.get_device(), data.device.type
    autocast = torch.amp.is_autocast_available(kind_of_device) and torch.is_autocast_enabled(kind_of_device)
    dtype = wide(torch.get_autocast_dtype(kind_of_device) if autocast else data.dtype)
    for norm, features in zip(norms, _features(kind, units)):
        if isinstance(norm, Norm):
            _check_norm(norm, rows, features, dtype, device)


_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def check_weights(kind: str, features: int, weights: Weights) -> None:
    """Check that the weights fit each other and an input of so many features."""
    gates = len(weights.ih)
    units = gates // GATES[kind]
    seen = units if weights.hr is None else len(weights.hr)
    expected = ((units * GATES[kind], features), (units * GATES[kind], seen), (gates,), (gates,), (seen, units))
    for name, t, shape in zip(_NAMES, weights, expected):
        if t is not None and t.shape != shape:
            raise RuntimeError(
                f"{name} has the shape {tuple(t.shape)}; beside the other weights and an input of {features} features "
                f"its shape is {shape}"
            )


def check_gains(kind: str, weights: Weights, norms: Norms) -> None:
    """Check that gains and biases have the size of their paths, and that their memory and the weights' is there."""
    parameters: list[Tensor | None] = [*weights]
    for norm, features in zip(norms, _features(kind, len(weights.ih) // GATES[kind])):
        for parameter in (norm.weight, norm.bias) if isinstance(norm, Norm) else ():
            if parameter is not None and parameter.shape != (features,):
                raise RuntimeError(
                    f"a path has {features} features, and its normalization a gain or bias of the shape "
                    f"{tuple(parameter.shape)}"
                )
            parameters.append(parameter)
    _check_memory(parameters)


def _features(kind: str, units: int) -> tuple[int, int, int, int]:
    """Of the paths, in the order of ``Norms``."""
    gates = GATES[kind] * units
    return (gates, 2 * units, units, units) if kind == "GRU_RESET_BEFORE" else (gates, gates, units, units)


def _check_norm(norm: Norm, rows: int, features: int, dtype: torch.dtype, device: int) -> None:
    if norm.num_features != features:
        raise RuntimeError(f"the path has {features} features, and its normalization is {norm}")
    num_stats = norm.ref.view((rows, features)).num_stats
    state = None if norm.stream is None else norm.state
    check_layer(norm.weight, norm.bias, state, features, num_stats, dtype, device)
    if isinstance(norm, GeneralBatchNorm):
        norm._check_running(norm.ref.num_stats(features))


Shapes = tuple[torch.Size | None, ...]


def shapes_of(tensors: Sequence[Tensor | None]) -> Shapes:
    """The shapes of tensors, None for None."""
    return tuple(None if t is None else t.shape for t in tensors)


def check_backward(before: Shapes, saved: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    """Check that what forward saved is still what it was, and that the gradients that arrive can be read.

    Args:
        before: the shapes that the saved tensors had.
        saved: the output, and ``Tensors``.
        gradients: of the outputs.

    Raises:
        RuntimeError: if one has another shape or dtype now, or its storage was freed or shrunk.
    """
    dtypes = {t.dtype for t in saved if t is not None}
    if shapes_of(saved) != before or len(dtypes) > 1:
        raise RuntimeError(
            "a weight, a gain or a hidden state of a recurrent layer was changed between forward and backward: the "
            f"shapes were {before}, and are {shapes_of(saved)} now, of {dtypes}"
        )
    _check_memory((*saved, *gradients))


def _check_memory(tensors: Sequence[Tensor | None]) -> None:
    if torch.compiler.is_compiling():  # the tensors of a graph have no memory yet
        return
    extension = native.extension
    if extension is None or not extension.are_whole(*tensors):  # which does not know every tensor
        check_memory(("a tensor of a recurrent layer", t) for t in tensors)


def check_before_backward(outputs: Iterable[Tensor], tensors: Sequence[Tensor | None]) -> None:
    """Let autograd, before it goes back from one of the outputs, check that the memory of these tensors is there.

    PyTorch's operators, of which the reference is made, do not look.
    """

    def check(gradients: tuple[Tensor | None, ...]) -> None:
        _check_memory((*gradients, *tensors))

    if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        for output in outputs:
            if output.grad_fn is not None:
                output.grad_fn.register_prehook(check)
