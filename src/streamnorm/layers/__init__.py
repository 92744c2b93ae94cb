"""The normalization layers."""

from .batch import GeneralBatchNorm
from .norm import Norm, streaming_layers
from .norm_act import StreamingNormAct2d
from .sample import SampleNorm
from .streaming import StreamingNorm1d, StreamingNorm2d, StreamingNorm3d

__all__ = [
    "GeneralBatchNorm",
    "Norm",
    "SampleNorm",
    "StreamingNorm1d",
    "StreamingNorm2d",
    "StreamingNorm3d",
    "StreamingNormAct2d",
    "streaming_layers",
]
