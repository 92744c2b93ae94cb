"""The forward pass of a layer in a graph: ``torch.compile`` and ``torch.export``."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_exporting

from .. import ops
from ..core.compiler import guard_on
from ..core.spec import Call
from . import inputs


def forward(layer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """As ``Norm.forward``, for a Norm: nothing is kept from call to call but the state."""
    layer._check_input(x)
    if layer.stream is not None and layer.training:
        if is_exporting() and not layer.frozen:
            raise RuntimeError(_NOT_EXPORTED.format(type(layer).__name__))
        layer._meet_while_tracing()
        guard_on(layer._ties.met)
    if x.numel() == 0:
        return layer._pass_empty(x)
    mask = None if mask is None else inputs.full_mask(mask, x)
    view = layer._view(x)
    if not layer.training or layer.frozen:
        return layer._evaluate(x, mask, view)
    if layer.stream is None:
        return layer._train(x, mask, view)
    formula = layer._formula_in_graph()
    return ops.normalize(Call(x, layer.weight, layer.bias, mask, view, formula, layer.state, layer._ties.grad_scale))


_NOT_EXPORTED = (
    "torch.export takes {} in evaluation, not in training: a graph of PyTorch's operations has another gradient than "
    "the layer, whose statistics are averages over calls, and does not notice weight updates. Write model.eval() or "
    "`with streamnorm.frozen(model):` before it; torch.compile takes a training step. For training behind an export, "
    "such as quantization-aware training, export streamnorm.to_batchnorm(model)"
)
