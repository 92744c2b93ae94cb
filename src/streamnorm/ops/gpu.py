"""The Triton engine: training steps on NVIDIA GPUs, in few passes over memory and without waiting for the device.

``gpu_kernels.py`` holds the kernels. This module decides how an input is cut into programs, launches them, and holds
what must be Python: the autograd function. Three ways lead to a result.

- *Whole*: each program takes all elements of its channels. One kernel each way, x read once (the cache serves the
  later looks). For channels that are small enough.
- *Split*: many programs for each channel. They collect partial sums, a small kernel combines them and advances the
  stream, a third kernel writes the output. Forward x is read twice for p = 2 and for centre zero; other p about the
  mean need mu before their moment and read it three times. Backward x and dy are read twice.
- *One pass*: α = (1, 0, 0) and β = (1, 0, 0) say what the statistics are before x is seen. One read and one write
  forward, two reads and one write backward; what the stream learns from this call is collected on the way.

Nothing here reads a value back from the device, so a step can be captured into a CUDA graph. With
``TRITON_INTERPRET=1`` in the environment before this package is imported, Triton interprets the kernels and the engine
takes CPU tensors: slow, and for tests.
"""

from __future__ import annotations

import importlib.util
import math
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..core.spec import FIELDS, PRESENT_ONLY, Call, Formula, State, View, wide
from . import operations
from .another_pass import counting_once
from .base import Committed, Engine, Uses
from .checks import check_backward
from .derivatives import any_order

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors."""

ONE_PASS = (1.0, 0.0, 0.0)

WHOLE_ELEMENTS = 1 << 14
"""A channel of at most so many elements is the work of one program, however few channels there are."""

WHOLE_ELEMENTS_OF_MANY = 1 << 17
"""The same where the channels alone keep the device busy."""

WHOLE_TILE = 8192
"""Elements that a program of the whole way takes at a time; half as many float64, of which more do not fit."""

TILE = 4096
"""Elements that a program of the split way takes at a time; 8 warps of 16 each."""

PROGRAMS_PER_PROCESSOR = 8
"""Programs of a collecting kernel per multiprocessor: enough loads under way to fill the memory's bandwidth."""

TILES_OF_AN_OUTPUT = 2
"""Tiles of a program that only writes an output: the fewer, the better the programs share the device at its end."""

MAX_PARTS = 1024
"""Partial results of a channel: one program adds them at once."""


@lru_cache(maxsize=1)
def _missing() -> str | None:
    """Why the engine cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with PyTorch's CUDA build for Linux)"
    if INTERPRETED:
        return None
    if not torch.backends.cuda.is_built():
        return f"this PyTorch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if torch.version.hip is not None:
        return "it is made for NVIDIA GPUs"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return None


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    """The kernels, imported when they are needed: Triton takes a while to import."""
    from . import gpu_kernels

    return gpu_kernels


_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def fits(state: State) -> bool:
    """Whether kernels find the buffers of a stream where they look for them."""
    size, dtype = state.count.numel(), state.long.dtype
    return _on_device(state.long) and all(
        t.shape == field.shape(size) and t.dtype == field.dtype(dtype) and t.is_contiguous()
        for t, field in zip(state, FIELDS.values())
    )


def _on_device(t: Tensor) -> bool:
    return t.device.type == ("cpu" if INTERPRETED else "cuda") and _missing() is None


def is_watched() -> bool:
    """Whether a mode wants to see PyTorch's functions. A default device is a mode too, but only places new tensors."""
    return torch._C._len_torch_function_stack() > 0 and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    )


@lru_cache(maxsize=4096)
def _channels_per_statistic(view: View) -> int:
    """K, or 0 where a statistic is not that of K neighbouring channels over all samples and places."""
    of_channels = [i for i, axis in enumerate(view.axes) if axis == 1]
    leading = of_channels[: len(view.kept)]
    if list(view.kept) != leading:
        return 0
    return math.prod(view.split[i] for i in of_channels) // view.num_stats


class Layout(NamedTuple):
    """How an input lies in memory: (A, C, B) as ``gpu_kernels`` explains."""

    columns: bool
    rows: int
    channels: int
    places: int


class Cut(NamedTuple):
    """How the elements are cut into tiles and tiles into programs."""

    block_rows: int
    block_cols: int
    tiles: int
    """Of a program that takes all elements of its channels."""
    blocks: int
    """Programs side by side, each with its own channels."""
    parts: int
    """Programs for the same channels."""
    warps: int

    @property
    def tiles_each(self) -> int:
        """Tiles of each part."""
        return _ceil(self.tiles, self.parts)


def _layout(x: Tensor) -> Layout | None:
    """How a dense input lies in memory, or None where it has to be copied first."""
    samples, channels, places = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    if x.is_contiguous() and places > 1 and channels > 1:
        return Layout(False, samples, channels, places)
    moved = x.movedim(1, -1)
    if moved.is_contiguous():
        return Layout(True, samples * places, channels, 1)
    if x.is_contiguous():
        return Layout(False, samples, channels, places)
    return None


def _dense(x: Tensor) -> tuple[Tensor, Layout]:
    """The input, copied if it has gaps, and how it lies in memory."""
    layout = _layout(x)
    if layout is None:
        x = x.contiguous()
        layout = _layout(x)
        assert layout is not None
    return x, layout


@lru_cache(maxsize=4096)
def _whole(layout: Layout, processors: int, tile: int) -> Cut | None:
    """The cut of the whole way, or None where channels are too large for it."""
    elements = layout.rows * layout.places
    many = layout.channels >= 3 * processors // 4 and not layout.columns
    if elements > (WHOLE_ELEMENTS_OF_MANY if many else WHOLE_ELEMENTS) // (8 if layout.columns else 1):
        return None
    if layout.columns:
        rows = min(_power_of_two(layout.rows), 256)
        cols = max(1, min(32, _power_of_two(layout.channels), tile // rows))
        tiles, blocks = _ceil(layout.rows, rows), _ceil(layout.channels, cols)
    else:
        cols = min(_power_of_two(layout.places), tile)
        if cols * layout.rows > tile:
            cols = _side_by_side(layout.places, tile)
        rows = min(_power_of_two(layout.rows), max(1, tile // cols))
        tiles, blocks = _ceil(layout.rows, rows) * _ceil(layout.places, cols), layout.channels
    # All warps of a multiprocessor on one channel where it takes several tiles: fewer channels then share the cache.
    most = 16 if layout.columns else 32
    warps = most if tiles > 2 else max(1, min(16, rows * cols // 512))
    return Cut(rows, cols, tiles, blocks, 1, warps)


@lru_cache(maxsize=4096)
def _split(layout: Layout, programs: int, tiles_each: int | None = None) -> Cut:
    """The cut of the split way: about so many programs, or so many tiles for each of them."""
    if layout.columns:
        cols = min(_power_of_two(layout.channels), 128)
        rows = max(1, TILE // cols)
        tiles, blocks = _ceil(layout.rows, rows), _ceil(layout.channels, cols)
    else:
        cols = _side_by_side(layout.places, TILE)
        rows = max(1, TILE // cols)
        tiles, blocks = _ceil(layout.rows, rows) * _ceil(layout.places, cols), layout.channels
    parts = _ceil(programs, blocks) if tiles_each is None else _ceil(tiles, tiles_each)
    parts = max(1, min(tiles, parts, MAX_PARTS if tiles_each is None else 65535))
    parts = _ceil(tiles, _ceil(tiles, parts))  # so that no part is empty
    return Cut(rows, cols, tiles, blocks, parts, 8)


def _side_by_side(places: int, most: int) -> int:
    """Places of a tile, a power of two: the largest whose tiles leave few lanes idle, but whole sectors of memory."""
    choices = [1 << k for k in range(4, 20) if 1 << k <= min(most, _power_of_two(places))] or [_power_of_two(places)]

    def idle(cols: int) -> float:
        return _ceil(places, cols) * cols / places - 1

    return max((cols for cols in choices if idle(cols) < 1 / 6), default=min(choices, key=idle))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    """Multiprocessors of the device."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


class _Plan(NamedTuple):
    """How one kind of input goes through the kernels."""

    whole: Cut | None
    collect: Cut
    write: Cut
    layout: Layout
    per_statistic: int
    sizes: tuple[int, int, int]
    """A, and C and B in the units that the kernels take."""
    common: dict[str, Any]
    formula: dict[str, Any]
    scaling: dict[str, Any]
    forward_mix: dict[str, Any]
    backward_mix: dict[str, Any]
    one_pass_forward: bool
    one_pass_backward: bool

    @property
    def elements(self) -> int:
        """n, the elements behind each statistic."""
        return self.layout.rows * self.layout.places * self.per_statistic

    @property
    def statistics(self) -> int:
        """G."""
        return self.layout.channels // self.per_statistic


@lru_cache(maxsize=4096)
def _plan(
    layout: Layout, view: View, formula: Formula, dtype: torch.dtype, device: torch.device, streams: bool
) -> _Plan:
    tl = _kernels().tl
    processors = _processors(device)
    per_statistic = _channels_per_statistic(view)
    one_pass = formula.window is None and formula.floor == 0 and streams
    double = wide(dtype) == torch.float64
    whole = _whole(layout, processors, WHOLE_TILE // 2 if double else WHOLE_TILE) if per_statistic == 1 else None
    collect = _split(layout, PROGRAMS_PER_PROCESSOR * processors)
    write = _split(layout, 0, TILES_OF_AN_OUTPUT)
    side = layout.channels if layout.columns else layout.places
    unit = math.gcd(side, 16 // dtype.itemsize)
    sizes = (
        (layout.rows, side // unit, layout.places) if layout.columns else (layout.rows, layout.channels, side // unit)
    )
    constants = {"P": formula.p, "CENTERED": formula.centered}
    return _Plan(
        whole,
        collect,
        write,
        layout,
        per_statistic,
        sizes,
        {"UNIT": unit, "COLUMNS": layout.columns, "WIDE": tl.float64 if double else tl.float32},
        constants,
        {"K_P": formula.k, "EPS": formula.eps, "TINY": torch.finfo(wide(dtype)).tiny},
        {**_mix("A", formula.alpha, formula.window), "FLOOR": formula.floor},
        _mix("B", formula.beta, formula.grad_window),
        one_pass and formula.alpha == ONE_PASS,
        one_pass and formula.beta == ONE_PASS,
    )


def _mix(letter: str, weights: tuple[float, float, float] | None, window: float | None) -> dict[str, Any]:
    """α or β as the kernels take them."""
    numbers = weights or (0.0, 0.0, 0.0)
    return {**{f"{letter}{i + 1}": number for i, number in enumerate(numbers)}, "WINDOW": window or 0.0}


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: None,
        view: View,
        formula: Formula,
        state: State | None,
        grad_scale: Tensor | None,
        stats: Tensor | None,
    ) -> Tensor:
        _refuse_other_devices(x, weight, bias, None if state is None else state.long)
        dense, layout = _dense(x)
        plan = _plan(layout, view, formula, x.dtype, x.device, state is not None)
        with _device(x):
            if state is not None:
                state.samples.add_(x.shape[0])
            y, saved = _forward(plan, dense, _flat(weight), _flat(bias), state)
        if stats is not None:
            stats.copy_(saved[::3])
        ctx.save_for_backward(x, weight, None, saved[:3])
        ctx.plan, ctx.state, ctx.grad_scale, ctx.over = plan, state, grad_scale, None
        # What the PyTorch engine's backward pass wants to know, which serves where the input needs no gradient.
        ctx.view, ctx.formula = view, formula
        ctx.n, ctx.samples, ctx.has_bias = plan.elements, x.shape[0], bias is not None
        return y

    @staticmethod
    @any_order(operations.again)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        watched = type(dy) is not Tensor or torch._C._are_functorch_transforms_active()
        gradients = operations.gradients if watched or not ctx.needs_input_grad[0] else _gradients
        with counting_once(ctx):
            return *gradients(ctx, dy), *(None,) * 6


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As ``operations.gradients``."""
    x, weight, _, saved = ctx.saved_tensors
    state = ctx.state
    if not getattr(ctx, "checked", False):
        check_backward(x, dy, weight, saved, ctx.view, state)
    x, layout = _dense(x)
    plan: _Plan = ctx.plan
    if layout != plan.layout:  # hooks on saved tensors bring x back as they like, such as torch's save_on_cpu
        plan = _plan(layout, ctx.view, ctx.formula, x.dtype, x.device, state is not None)
    if dy.stride() != x.stride() or dy.is_neg():
        dy = torch.empty_like(x).copy_(dy)
    with _device(x):
        if state is not None:
            state.grad_samples.add_(ctx.samples)
        wants_weight = weight is not None and ctx.needs_input_grad[1]
        wants_bias = ctx.has_bias and ctx.needs_input_grad[2]
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if wants_weight else None
        dbias = torch.empty(x.shape[1], dtype=saved.dtype, device=x.device) if wants_bias else None
        scale = None if ctx.grad_scale is None else ctx.grad_scale.to(x.device)
        dx = _backward(plan, x, dy, _flat(weight), dweight, dbias, saved, state, scale)
    return dx, dweight, dbias


def _refuse_other_devices(x: Tensor, *others: Tensor | None) -> None:
    """A kernel that read another GPU's memory would fail later, and everything after it."""
    for other in others:
        if other is not None and other.device != x.device:
            raise RuntimeError(
                f"the input is on {x.device}, and the layer has a tensor on {other.device}: move the layer with "
                f".to({str(x.device)!r})"
            )


def _device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return nullcontext() if INTERPRETED else torch.cuda.device(x.device)


def _flat(parameter: Tensor | None) -> Tensor | None:
    """A gain or bias without gaps."""
    return None if parameter is None else parameter.resolve_neg().contiguous()


def _forward(
    plan: _Plan, x: Tensor, weight: Tensor | None, bias: Tensor | None, state: State | None
) -> tuple[Tensor, Tensor]:
    """y, and (4, G): mu, 1/s, the slope and m."""
    y = torch.empty_like(x)
    saved = torch.empty(4, plan.statistics, dtype=wide(x.dtype), device=x.device)
    if plan.whole is not None:
        _launch(
            "forward_whole",
            (plan.whole.blocks,),
            plan.whole,
            (x, y, weight, bias, saved, *_streams(state), *plan.sizes),
            {**_of_tiles(plan, plan.whole), **plan.scaling, **plan.forward_mix, "TILES": plan.whole.tiles},
        )
    elif plan.one_pass_forward:
        _forward_in_one_pass(plan, x, y, saved, weight, bias, state)
    else:
        _forward_in_parts(plan, x, y, saved, weight, bias, state)
    return y, saved


def _forward_in_parts(
    plan: _Plan, x: Tensor, y: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, state: State | None
) -> None:
    cut = plan.collect
    partial = torch.empty(4, cut.parts, plan.layout.channels, dtype=saved.dtype, device=x.device)
    tiles = _of_tiles(plan, cut)
    _launch("collect_location", (cut.blocks, cut.parts), cut, (x, partial, *plan.sizes, cut.tiles_each), tiles)
    second_about_mean = plan.formula["CENTERED"] and plan.formula["P"] == 2
    at_once = second_about_mean or not plan.formula["CENTERED"]
    _combine_statistics(plan, partial, saved, state, location=True, moment=at_once, about_shift=second_about_mean)
    if not at_once:
        arguments = (x, saved, partial, *plan.sizes, plan.per_statistic, cut.tiles_each)
        _launch("collect_moment", (cut.blocks, cut.parts), cut, arguments, tiles)
        _combine_statistics(plan, partial, saved, state, location=False, moment=True, about_shift=False)
    _write_output(plan, plan.write, x, y, saved, weight, bias, None, None)


def _forward_in_one_pass(
    plan: _Plan, x: Tensor, y: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, state: State | None
) -> None:
    assert state is not None
    partial = torch.empty(4, plan.collect.parts, plan.layout.channels, dtype=saved.dtype, device=x.device)
    _write_output(plan, plan.collect, x, y, saved, weight, bias, state.long, partial)
    _combine_statistics(plan, partial, saved, state, location=True, moment=True, about_shift=False)


def _write_output(
    plan: _Plan,
    cut: Cut,
    x: Tensor,
    y: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    long: Tensor | None,
    partial: Tensor | None,
) -> None:
    _launch(
        "output",
        (cut.blocks, cut.parts),
        cut,
        (x, y, weight, bias, saved, long, partial, *plan.sizes, plan.per_statistic, cut.tiles_each),
        {**_of_tiles(plan, cut), **plan.scaling, "ONE_PASS": partial is not None},
    )


def _combine_statistics(
    plan: _Plan,
    partial: Tensor,
    saved: Tensor,
    state: State | None,
    *,
    location: bool,
    moment: bool,
    about_shift: bool,
) -> None:
    parts = partial.shape[1]
    _launch(
        "combine_statistics",
        (plan.statistics,),
        None,
        (partial, saved, *_streams(state), parts, plan.elements, plan.per_statistic),
        {
            "LOCATION": location,
            "MOMENT": moment,
            "ABOUT_SHIFT": about_shift,
            **_of_partials(plan, parts),
            **plan.scaling,
            **plan.forward_mix,
            "P": plan.formula["P"],
        },
    )


def _backward(
    plan: _Plan,
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    saved: Tensor,
    state: State | None,
    scale: Tensor | None,
) -> Tensor:
    """dx; the gradients of gain and bias are written into ``dweight`` and ``dbias``."""
    dx = torch.empty_like(x)
    gradient = _gradient_streams(state)
    if plan.whole is not None:
        _launch(
            "backward_whole",
            (plan.whole.blocks,),
            plan.whole,
            (x, dy, dx, weight, dweight, dbias, saved, scale, *gradient, *plan.sizes),
            {**_of_tiles(plan, plan.whole), **plan.backward_mix, "TILES": plan.whole.tiles},
        )
        return dx
    cut, one_pass = plan.collect, plan.one_pass_backward
    partial = torch.empty(3, cut.parts, plan.layout.channels, dtype=saved.dtype, device=x.device)
    paths = None if one_pass else torch.empty(2, plan.statistics, dtype=saved.dtype, device=x.device)
    on_the_way = (dx, weight, saved, scale, gradient[0]) if one_pass else (None, None, saved, None, None)
    _launch(
        "collect_gradients",
        (cut.blocks, cut.parts),
        cut,
        (x, dy, *on_the_way, partial, *plan.sizes, plan.per_statistic, cut.tiles_each),
        {**_of_tiles(plan, cut), "ONE_PASS": one_pass},
    )
    numbers = (cut.parts, plan.elements, plan.per_statistic)
    _launch(
        "combine_gradients",
        (plan.statistics,),
        None,
        (partial, paths, weight, dweight, dbias, saved, scale, *gradient, *numbers),
        {**_of_partials(plan, cut.parts), **plan.formula, **plan.backward_mix},
    )
    if not one_pass:
        cut = plan.write
        _launch(
            "input_gradient",
            (cut.blocks, cut.parts),
            cut,
            (x, dy, dx, weight, saved, paths, *plan.sizes, plan.per_statistic, cut.tiles_each),
            _of_tiles(plan, cut),
        )
    return dx


def _streams(state: State | None) -> tuple[Tensor | None, ...]:
    """The stream's part of the forward pass."""
    return (None,) * 5 if state is None else (state.long, state.short, state.count, state.samples, state.seen)


def _gradient_streams(state: State | None) -> tuple[Tensor | None, ...]:
    """The stream's part of the backward pass."""
    return (None,) * 4 if state is None else (state.long_grad, state.short_grad, state.grad_count, state.grad_samples)


def _of_tiles(plan: _Plan, cut: Cut) -> dict[str, Any]:
    """What a kernel that works on tiles must know beforehand."""
    return {**plan.common, **plan.formula, "ROWS": cut.block_rows, "COLS": cut.block_cols}


def _of_partials(plan: _Plan, parts: int) -> dict[str, Any]:
    """What a kernel that combines partial results must know beforehand."""
    side_by_side = _power_of_two(parts)
    channels = max(1, min(_power_of_two(plan.per_statistic), 4096 // side_by_side))
    return {"PARTS": side_by_side, "CHANNELS": channels, "WIDE": plan.common["WIDE"]}


@lru_cache(maxsize=64)
def _arguments_of(name: str) -> frozenset[str]:
    return frozenset(getattr(_kernels(), name).arg_names)


def _launch(
    name: str, grid: tuple[int, ...], cut: Cut | None, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """Launch a kernel with the constants that it names."""
    kernel = getattr(_kernels(), name)
    names = _arguments_of(name)
    wanted = {key: value for key, value in constants.items() if key in names}
    kernel[grid](*arguments, **wanted, num_warps=4 if cut is None else cut.warps)


def commit(uses: Uses) -> None:
    """As ``plain.commit``, in one kernel for all layers on a device, whatever their number."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[State, Formula]]] = {}
    for use in uses:
        groups.setdefault((use[0].long.device, use[0].long.dtype), []).append(use)
    for (device, dtype), group in groups.items():
        rows = tuple(map(_row, group))
        pointers, rates, largest = _table(rows, device)
        tl = _kernels().tl
        block = min(1024, _power_of_two(largest))
        constants = {
            "G_MAX": _power_of_two(largest),
            "BLOCK": block,
            "WIDE": tl.float64 if dtype == torch.float64 else tl.float32,
        }
        with _device(pointers):
            if _is_capturing():
                _captured[rows] = pointers, rates
            _launch("commit_streams", (len(pointers),), None, (pointers, rates), constants)


_Row = tuple[tuple[int, ...], tuple[float, ...]]


def _row(use: tuple[State, Formula]) -> _Row:
    """Where the state of a stream lies, and its rates; twice six and twice three numbers."""
    state, formula = use
    keep, take, keep_grad, take_grad = formula.kappa or (0.0, 0.0, 0.0, 0.0)
    size, window, grad_window = state.long.shape[1], formula.window or 0.0, formula.grad_window or 0.0
    there = [t.data_ptr() for t in (state.long, state.short, state.count, state.samples, state.seen)]
    back = [t.data_ptr() for t in (state.long_grad, state.short_grad, state.grad_count, state.grad_samples)]
    return (*there, size, *back, 0, size), (keep, take, window, keep_grad, take_grad, grad_window)


@lru_cache(maxsize=256)
def _table(rows: tuple[_Row, ...], device: torch.device) -> tuple[Tensor, Tensor, int]:
    """The rows on the device, and the largest G. Copying them there waits for the device: it happens once.

    Raises:
        RuntimeError: within the capture of a CUDA graph, which cannot hold the copy.
    """
    if _is_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and these layers have not committed together before: run a few whole "
            "training steps first, the optimizer's step included"
        )
    pointers = torch.tensor([row[0] for row in rows], dtype=torch.int64, device=device).view(-1, 6)
    rates = torch.tensor([row[1] for row in rows], dtype=torch.float64, device=device).view(-1, 3)
    return pointers, rates, max(row[0][5] for row in rows)


_captured: dict[tuple[_Row, ...], tuple[Tensor, Tensor]] = {}
"""Tables that CUDA graphs read. A graph does not keep what was there before it, nor does the bounded cache."""


def _is_capturing() -> bool:
    """Whether kernels go into a CUDA graph at present."""
    return not INTERPRETED and torch.cuda.is_current_stream_capturing()


class _Gpu(Engine):
    name = "triton"
    by_name_only = INTERPRETED  # the interpreter is thousands of times slower than the engines after this one
    function = _Normalize

    def status(self) -> str:
        missing = _missing()
        if missing is not None:
            return f"not available: {missing}; GPU tensors take the PyTorch engine"
        if INTERPRETED:
            return (
                "available: Triton's interpreter on CPU tensors (TRITON_INTERPRET=1); only used when forced, for tests"
            )
        return f"available: Triton on {torch.cuda.get_device_name()}"

    def takes(self, call: Call) -> bool:
        """Plain tensors on the device without a mask, with statistics of whole channels of the mini-batch."""
        x, state, formula = call.x, call.state, call.formula
        return (
            _on_device(x)
            and call.mask is None
            and x.dtype in _DTYPES
            and not x.is_neg()  # its memory holds the values with the other sign
            and type(x) in (Tensor, torch.nn.Parameter)
            and not is_compiling()
            and not torch._C._len_torch_dispatch_stack()
            and not is_watched()
            and torch._C._get_tracing_state() is None
            and _channels_per_statistic(call.view) > 0
            and (state is None or fits(state))
            and (state is not None or formula.alpha == formula.beta == PRESENT_ONLY)
        )

    def normalize(self, call: Call) -> Tensor:
        y: Tensor = _Normalize.apply(*call)
        return y

    def commit(self, uses: Uses) -> Committed:
        fitting = [fits(state) for state, _ in uses]
        commit([use for use, fit in zip(uses, fitting) if fit])
        return Committed([use for use, fit in zip(uses, fitting) if not fit])


ENGINE = _Gpu()
