"""Normalization for PyTorch that works where Batch Normalization does not: one sample at a time, tiny mini-batches."""

import sys

from . import insight
from .adaptation import Adaptation, adapt
from .conversion import convert, fold, register_converter, to_batchnorm
from .core.moment import LpMoment
from .core.reference import NormRef
from .core.stream import Stream
from .distributed import joinable, synchronize
from .insight.diagnosis import diagnose
from .insight.monitor import monitor
from .insight.suggestion import suggest
from .layers import (
    GeneralBatchNorm,
    Norm,
    SampleNorm,
    StreamingNorm1d,
    StreamingNorm2d,
    StreamingNorm3d,
    StreamingNormAct2d,
)
from .ops import engines
from .recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .statistics import calibrate, freeze, frozen, reset_stats, unfreeze
from .training.accumulation import accumulate
from .training.checkpoint import checkpoint_context_fn
from .training.updates import bind, commit

__version__ = "0.3.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Adaptation",
    "GRUCell",
    "GeneralBatchNorm",
    "LSTMCell",
    "LpMoment",
    "Norm",
    "NormRef",
    "RNNCell",
    "SampleNorm",
    "Stream",
    "StreamingNorm1d",
    "StreamingNorm2d",
    "StreamingNorm3d",
    "StreamingNormAct2d",
    "accumulate",
    "adapt",
    "bind",
    "calibrate",
    "checkpoint_context_fn",
    "commit",
    "convert",
    "diagnose",
    "engines",
    "fold",
    "freeze",
    "frozen",
    "insight",
    "joinable",
    "monitor",
    "register_converter",
    "reset_stats",
    "suggest",
    "synchronize",
    "to_batchnorm",
    "unfreeze",
]

for _name in __all__:
    if getattr(globals()[_name], "__module__", "").startswith(__name__):
        globals()[_name].__module__ = __name__  # what a pickle says of a layer stays true when its file moves

# Where pickles from before these files moved look for what they hold.
for _before, _now in {
    "agreement": "training.ties",
    "moments": "core.moment",
    "norm": "layers",
    "normref": "core.reference",
    "ops.spec": "core.spec",
    "stream": "core.stream",
}.items():
    sys.modules[f"{__name__}.{_before}"] = sys.modules[f"{__name__}.{_now}"]
