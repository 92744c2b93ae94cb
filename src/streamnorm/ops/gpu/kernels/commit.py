"""The kernel of a weight update."""

from __future__ import annotations

import triton
import triton.language as tl

from .formulas import PRIOR_SAMPLES, wait_for_readers


@triton.jit
def commit_streams(pointers_ptr, rates_ptr, G_MAX: tl.constexpr, BLOCK: tl.constexpr, DOUBLE: tl.constexpr):
    """A weight update (docs/mathematics.md) for many streams at once: one program per stream and direction.

    ``pointers`` is (programs, 6): where long, short, count and samples lie, and seen, which is 0 for gradients; and G.
    ``rates`` is (programs, 3): what a weight update keeps and takes, and the window, which stands in their place where
    it is above zero.
    """
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = tl.program_id(0)
    row = pointers_ptr + 6 * program
    long_ptr = tl.load(row).to(tl.pointer_type(WIDE))
    short_ptr = tl.load(row + 1).to(tl.pointer_type(WIDE))
    count_ptr = tl.load(row + 2).to(tl.pointer_type(tl.int64))
    samples_ptr = tl.load(row + 3).to(tl.pointer_type(tl.int64))
    has_seen = tl.load(row + 4) != 0
    seen_ptr = tl.load(row + 4).to(tl.pointer_type(tl.int64))
    G = tl.load(row + 5)
    keep = tl.load(rates_ptr + 3 * program)
    take = tl.load(rates_ptr + 3 * program + 1)
    window = tl.load(rates_ptr + 3 * program + 2)
    samples = tl.load(samples_ptr)
    seen = tl.load(seen_ptr, mask=has_seen, other=0)
    lasting = tl.where(has_seen, tl.minimum((seen + PRIOR_SAMPLES).to(tl.float64), window), window)
    total = tl.where(window > 0, lasting + samples.to(tl.float64), 1)
    keep = tl.where(window > 0, lasting / total, keep).to(WIDE)
    take = tl.where(window > 0, samples.to(tl.float64) / total, take).to(WIDE)
    for begin in range(0, G_MAX, BLOCK):
        g = begin + tl.arange(0, BLOCK)
        inside = g < G
        used = tl.load(count_ptr + g, mask=inside, other=0) > 0
        for statistic in range(2):
            at = statistic * G + g
            long = tl.load(long_ptr + at, mask=inside, other=0)
            short = tl.load(short_ptr + at, mask=inside, other=0)
            tl.store(long_ptr + at, keep * long + take * short, mask=inside & used)
            tl.store(short_ptr + at, tl.zeros((BLOCK,), WIDE), mask=inside)
        tl.store(count_ptr + g, tl.zeros((BLOCK,), tl.int64), mask=inside)
    wait_for_readers()
    tl.store(seen_ptr, seen + samples, mask=has_seen)
    tl.store(samples_ptr, 0)
