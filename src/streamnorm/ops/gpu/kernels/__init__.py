"""The Triton kernels of the GPU engine; ``passes.py`` launches them, and ``engine.py`` says which when.

All of them see the input as rows and channels. In *columns* (channels_last, or an input of shape (N, C)) a row is one
place of one sample, channels lie side by side, and a program works on a few neighbouring channels. Otherwise a row is
one sample, the places of a channel lie side by side, and a program works on one channel. A tile is ``rows × cols``
elements; what is summed over a tile keeps both axes, so that one formula serves both layouts:

    columns       x is (A, C),    a tile is rows × channels,  a statistic of a tile has the shape (1, cols)
    lines         x is (A, C, B), a tile is rows × places,    a statistic of a tile has the shape (1, 1)

A statistic belongs to K neighbouring channels (K = 1: one statistic per channel). The letters are those of
``plain.py``; ``arguments.py`` explains the groups of arguments.

Sums are deterministic: every program adds in a fixed order and writes where no other writes; ``combine_*`` add what
the programs of one statistic found. Sums of x are taken about a shift near the mean (that of a program's first tile),
so that an offset of the data costs no digits. Statistics and sums have the dtype of ``saved`` and ``partial``.
"""

from .backward import backward_whole, collect_gradients, combine_gradients, input_gradient
from .commit import commit_streams
from .forward import collect_location, collect_moment, combine_statistics, forward_whole, output

__all__ = [
    "backward_whole",
    "collect_gradients",
    "collect_location",
    "collect_moment",
    "combine_gradients",
    "combine_statistics",
    "commit_streams",
    "forward_whole",
    "input_gradient",
    "output",
]
