"""Normalization for PyTorch that works where Batch Normalization does not: one sample at a time, tiny mini-batches."""

from . import insight
from .accumulation import accumulate
from .checkpoint import checkpoint_context_fn
from .conversion import convert, fold, register_converter, to_batchnorm
from .distributed import joinable, synchronize
from .insight.diagnosis import diagnose
from .insight.monitor import monitor
from .moments import LpMoment
from .norm import GeneralBatchNorm, Norm, SampleNorm, StreamingNorm1d, StreamingNorm2d, StreamingNorm3d
from .norm_act import StreamingNormAct2d
from .normref import NormRef
from .ops import engines
from .recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .statistics import Adaptation, adapt, calibrate, freeze, frozen, reset_stats, unfreeze
from .stream import Stream
from .updates import bind, commit

__version__ = "0.1.0"

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
    "synchronize",
    "to_batchnorm",
    "unfreeze",
]
