"""Moving a model in and out: from other normalization layers, back to plain ones of torch.nn, and folded away."""

from .folding import fold
from .to_streaming import convert, register_converter
from .to_torch import to_batchnorm

__all__ = ["convert", "fold", "register_converter", "to_batchnorm"]
