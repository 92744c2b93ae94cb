"""NormRef: which elements share a statistic."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import Any

import torch
from torch.compiler import is_compiling

from . import arguments
from .compiler import as_constant
from .spec import View

RefName = str | tuple[str, int]
"""``"channel"``, ``"layer"``, ``"position"`` or ``("group", g)``."""

_AXIS = re.compile(r"\(([^()]*)\)|(\.\.\.)|(\w+)")


@arguments.explained
@dataclass(frozen=True)
class NormRef:
    """The normalization reference: the set of activations that a statistic is collected from (the paper's NormRef).

    A reference is one line of text. To the left of the arrow stand the axes of the input, samples first,
    channels second; a pair of brackets splits an axis, and ``...`` stands for all spatial axes. To the right stand
    the axes that keep a statistic of their own; over all others it is collected.

    ====================================  ==========================================
    Batch Normalization                   ``"n c ... -> c"``
    one statistic for the whole layer     ``"n c ... ->"``
    channel groups over the batch         ``"n (g k) ... -> g"`` with ``g=4``
    ghost batches (sample i mod p)        ``"(a p) c ... -> p c"`` with ``p=2``
    Layer Normalization over C and S      ``"n c ... -> n"``
    Instance Normalization                ``"n c ... -> n c"``
    Group Normalization                   ``"n (g k) ... -> n g"`` with ``g=4``
    across channels at one place          ``"n c ... -> n ..."``
    one's own: rows of an image           ``"n c h w -> c h"`` with ``h=32``
    ====================================  ==========================================

    Args:
        pattern: the line of text.
        sizes: sizes of named axes as ``(name, size)`` pairs; :meth:`of` takes them as keywords.

    Raises:
        ValueError: if the pattern cannot be read, or an axis on the right is not on the left.

    Example:
        >>> NormRef.of("n (g k) ... -> n g", g=2).view((8, 6, 5, 5)).split
        (8, 2, 3, 5, 5)
        >>> NormRef.sample(("group", 2)) == NormRef.of("n (g k) ... -> n g", g=2)
        True
    """

    pattern: str
    sizes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise TypeError(f"a NormRef is written like 'n c ... -> c', got {self.pattern!r}")
        axes, kept = _parsed(self.pattern)
        names = [name for axis in axes for name in axis]
        if len(axes) < 2 or "..." in axes[0] + axes[1]:
            raise ValueError(
                f"a NormRef names the samples and the channels first, as 'n c ... -> c' does, got {self.pattern!r}"
            )
        if len(set(names)) != len(names) or not set(kept) <= set(names):
            raise ValueError(
                f"every axis stands once on the left, and those on the right on the left too, got {self.pattern!r}"
            )
        for name, size in self.sizes:
            if name not in names or not _is_count(size):
                raise ValueError(f"{name}={size!r}: give a positive size of an axis that {self.pattern!r} names")

    @classmethod
    def of(cls, pattern: str, **sizes: int) -> NormRef:
        """A reference from a pattern and the sizes of its split axes.

        Example:
            >>> NormRef.of("(a p) c ... -> p c", p=4).view((8, 3)).num_stats
            12
        """
        return cls(pattern, tuple(sorted(sizes.items())))

    @classmethod
    def sample(cls, ref: RefName) -> NormRef:
        """The reference inside one sample: ``"layer"``, ``"channel"``, ``"position"`` or ``("group", g)``.

        Raises:
            ValueError: if ``ref`` is none of these.

        Example:
            >>> NormRef.sample("layer").pattern
            'n c ... -> n'
        """
        patterns = {"layer": "n c ... -> n", "channel": "n c ... -> n c", "position": "n c ... -> n ..."}
        return cls._named(ref, patterns, "n (g k) ... -> n g")

    @classmethod
    def batch(cls, ref: RefName) -> NormRef:
        """The reference that spans the mini-batch: ``"channel"``, ``"layer"`` or ``("group", g)``.

        Raises:
            ValueError: if ``ref`` is none of these.

        Example:
            >>> NormRef.batch("channel").pattern
            'n c ... -> c'
        """
        return cls._named(ref, {"channel": "n c ... -> c", "layer": "n c ... ->"}, "n (g k) ... -> g")

    @classmethod
    def _named(cls, ref: RefName, patterns: dict[str, str], group_pattern: str) -> NormRef:
        if isinstance(ref, str) and ref in patterns:
            return cls(patterns[ref])
        if isinstance(ref, tuple) and len(ref) == 2 and ref[0] == "group" and _is_count(ref[1]):
            return cls.of(group_pattern, g=ref[1])
        choices = ", ".join(repr(name) for name in patterns)
        hint = ""
        if isinstance(ref, str):
            hint = f"; write NormRef({ref!r})" if "->" in ref else arguments.nearest(ref, patterns)
        raise ValueError(f"ref must be {choices} or ('group', g) with g groups of channels, got {ref!r}{hint}")

    def ghosts(self, partitions: int) -> NormRef:
        """The same reference in each of ``partitions`` parts of the batch: sample i belongs to part i mod partitions.

        Example:
            >>> NormRef.batch("channel").ghosts(2).pattern
            '(n ghost) c ... -> ghost c'
        """
        samples, rest = self.pattern.split(" ", 1)
        left, right = rest.split("->")
        return NormRef.of(
            f"({samples} ghost) {left.strip()} -> ghost {right.strip()}".rstrip(), **dict(self.sizes), ghost=partitions
        )

    @property
    def spans_samples(self) -> bool:
        """Whether every statistic is collected over all samples, so that a stream can carry it from call to call."""
        axes, kept = _parsed(self.pattern)
        return not set(axes[0]) & set(kept)

    @property
    def spans_places(self) -> bool:
        """Whether every statistic is collected over all spatial places; a mask cannot hide one from it altogether."""
        axes, kept = _parsed(self.pattern)
        return set(kept) <= {name for axis in axes[:2] for name in axis}

    def num_stats(self, num_features: int) -> int:
        """G, for an input with this many channels.

        Raises:
            ValueError: if G depends on the batch or on a spatial size that the reference does not give.

        Example:
            >>> NormRef.batch(("group", 4)).num_stats(64)
            4
        """
        axes, kept = _parsed(self.pattern)
        sizes = dict(self.sizes)
        if not self.spans_samples or any(name not in sizes and name not in axes[1] for name in kept):
            raise ValueError(
                f"{self.pattern!r} has a number of statistics that depends on the input: a stream cannot carry it. "
                "Use SampleNorm for statistics of one sample, or give the size of each kept spatial axis"
            )
        count = 1
        for name, size in zip(axes[1], _split_axis(axes[1], num_features, sizes, self.pattern)):
            count *= size if name in kept else 1
        for name in kept:
            count *= 1 if name in axes[1] else sizes[name]
        return count

    def least_view(self, num_features: int) -> View:
        """The view of the smallest input of this many channels.

        Example:
            >>> NormRef.of("n (g k) h w -> g h", g=2, h=5).least_view(6).split
            (1, 2, 3, 5, 1)
        """
        axes, _ = _parsed(self.pattern)
        sizes = dict(self.sizes)
        shape = [math.prod(sizes.get(name, 1) for name in names) for names in axes if "..." not in names]
        return self.view((shape[0], num_features, *shape[2:]))

    def view(self, shape: tuple[int, ...]) -> View:
        """The view of an input of this shape, ``(N, C, ...)``, as ``(A, G, B)``.

        Raises:
            ValueError: if the rank does not fit the pattern, or an axis does not divide as the pattern asks.
        """
        if is_compiling() or torch._C._get_tracing_state() is not None:  # the sizes may be symbols or tensors
            return _make_view(self, tuple(shape))
        return _view(self, tuple(shape))


def _is_count(value: Any) -> bool:
    return isinstance(value, (int, Integral)) and not isinstance(value, bool) and int(value) > 0


def _make_view(ref: NormRef, shape: tuple[int, ...]) -> View:
    axes, kept_names = _parsed(ref.pattern)
    if "..." in axes[-1]:
        spatial = tuple((f"...{i}",) for i in range(len(shape) - len(axes) + 1))
        axes = (*axes[:-1], *spatial)
        dots = tuple(name for (name,) in spatial)
        kept_names = tuple(n for name in kept_names for n in (dots if name == "..." else (name,)))
    if len(axes) != len(shape):
        raise ValueError(f"{ref.pattern!r} does not fit an input of shape {shape}: it has {len(shape)} axes")
    split: list[int] = []
    origin: list[int] = []
    kept: list[int] = []
    for axis, (names, size) in enumerate(zip(axes, shape)):
        for name, part in zip(names, _split_axis(names, size, dict(ref.sizes), ref.pattern)):
            if name in kept_names:
                kept.append(len(split))
            split.append(part)
            origin.append(axis)
    if len(kept) == len(split):  # a statistic for each element: an axis to sum over, since a sum over none is over all
        split.append(1)
        origin.append(0)
    return View(tuple(split), tuple(kept), tuple(origin))


_view = lru_cache(maxsize=4096)(_make_view)


def _split_axis(names: tuple[str, ...], size: int, sizes: dict[str, int], pattern: str) -> list[int]:
    """The sizes of the parts of an axis; at most one of them is not given and follows from the others."""
    known = 1
    for name in names:
        known *= sizes.get(name, 1)
    unknown = [name for name in names if name not in sizes]
    if len(unknown) > 1:
        raise ValueError(f"{pattern!r}: give the size of all but one of {', '.join(names)}")
    if size % known or (not unknown and size != known):
        parts = ", ".join(f"{name}={sizes[name]}" for name in names if name in sizes)
        raise ValueError(f"{parts} does not divide an axis of size {size} (NormRef {pattern!r})")
    return [sizes.get(name, size // known) for name in names]


@as_constant
def _parsed(pattern: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    return _parse(pattern)


@lru_cache(maxsize=256)
def _parse(pattern: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """The axes on the left, each as the names it is split into, and the names on the right."""
    left, arrow, right = pattern.partition("->")
    if not arrow or _AXIS.sub("", left).strip() or _AXIS.sub("", right).strip() or "(" in right:
        raise ValueError(f"a NormRef is written like 'n c ... -> c', got {pattern!r}")
    axes = tuple(tuple((m[1] or m[2] or m[3]).split()) for m in _AXIS.finditer(left))
    if ("...",) in axes[:-1] or any("..." in axis and len(axis) > 1 for axis in axes):
        raise ValueError(f"'...' stands for all spatial axes and so comes last on the left, got {pattern!r}")
    return axes, tuple(right.split())
