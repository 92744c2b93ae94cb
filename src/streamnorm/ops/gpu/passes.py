"""The launches of a forward and of a backward pass, and how one kind of input goes through them."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.spec import Formula, State, View, wide
from . import cut as cutting
from . import device
from .arguments import Affine, Amounts, OnePass, Sizes, Stream, Tile, Use, backward_stream, forward_stream, use_of
from .cut import Cut, Layout, power_of_two

ONE_PASS = (1.0, 0.0, 0.0)


class Plan(NamedTuple):
    """The plan of the launches for one kind of input."""

    whole: Cut | None
    collect: Cut
    write: Cut
    layout: Layout
    sizes: Sizes
    unit: int
    samples: int
    forward: Use
    backward: Use
    one_pass_forward: bool
    one_pass_backward: bool

    @property
    def elements(self) -> int:
        """n, the elements behind each statistic."""
        return self.layout.rows * self.layout.places * self.sizes.per_statistic

    @property
    def statistics(self) -> int:
        """G."""
        return self.layout.channels // self.sizes.per_statistic

    def tile(self, cut: Cut) -> Tile:
        """The tile of a cut."""
        return Tile(self.layout.columns, cut.block_rows, cut.block_cols, self.unit)


@lru_cache(maxsize=4096)
def plan(layout: Layout, view: View, formula: Formula, dtype: torch.dtype, place: torch.device, streams: bool) -> Plan:
    """The plan of one kind of input."""
    processors = device.processors(place)
    per_statistic = cutting.channels_per_statistic(view)
    most = cutting.WHOLE_TILE // (2 if wide(dtype) == torch.float64 else 1)
    unit = math.gcd(layout.channels if layout.columns else layout.places, 16 // dtype.itemsize)
    channels, places = layout.channels, layout.places
    one_pass = formula.window is None and formula.floor == 0 and streams
    return Plan(
        cutting.cut_whole(layout, processors, most) if per_statistic == 1 else None,
        cutting.cut_split(layout, cutting.PROGRAMS_PER_PROCESSOR * processors),
        cutting.cut_split(layout, 0, cutting.TILES_OF_AN_OUTPUT),
        layout,
        Sizes(
            layout.rows,
            channels // unit if layout.columns else channels,
            places if layout.columns else places // unit,
            per_statistic,
        ),
        unit,
        view.num_samples,
        use_of(formula, wide(dtype), backward=False),
        use_of(formula, wide(dtype), backward=True),
        one_pass and formula.alpha == ONE_PASS,
        one_pass and formula.beta == ONE_PASS,
    )


def forward(plan: Plan, x: Tensor, affine: Affine, state: State | None) -> tuple[Tensor, Tensor]:
    """y, and (4, G): mu, 1/s, the slope and m."""
    y = torch.empty_like(x)
    saved = torch.empty(4, plan.statistics, dtype=wide(x.dtype), device=x.device)
    stream = forward_stream(state)
    if plan.whole is not None:
        _launch_whole("forward_whole", plan, (x, y, affine, saved, stream, plan.sizes), plan.forward)
    elif plan.one_pass_forward:
        partial = _partial(4, plan, saved)
        _write_output(plan, plan.collect, x, y, affine, saved, stream.long, partial)
        _combine_statistics(plan, partial, saved, stream, location=True, moment=True, about_shift=False)
    else:
        _collect_statistics(plan, x, saved, stream)
        _write_output(plan, plan.write, x, y, affine, saved, None, None)
    return y, saved


def _launch_whole(name: str, plan: Plan, arguments: tuple[Any, ...], use: Use) -> None:
    cut = plan.whole
    assert cut is not None
    constants = {"USE": use, "TILE": plan.tile(cut), "TILES": cut.tiles}
    device.launch(name, (cut.blocks,), cut.warps, arguments, constants)


def _launch_split(name: str, plan: Plan, cut: Cut, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Launch a kernel of many programs for the same channels."""
    arguments = (*arguments, plan.sizes, cut.tiles_each)
    device.launch(name, (cut.blocks, cut.parts), cut.warps, arguments, {**constants, "TILE": plan.tile(cut)})


def _launch_combine(name: str, plan: Plan, parts: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Launch a kernel that combines the partial results of each statistic."""
    side_by_side, per_statistic = power_of_two(parts), plan.sizes.per_statistic
    channels = max(1, min(power_of_two(per_statistic), 4096 // side_by_side))
    arguments = (*arguments, Amounts(parts, plan.elements, per_statistic))
    constants = {**constants, "PARTS": side_by_side, "CHANNELS": channels}
    device.launch(name, (plan.statistics,), 4, arguments, constants)


def _partial(kinds: int, plan: Plan, saved: Tensor) -> Tensor:
    """Room for the partial results of a collecting kernel."""
    return saved.new_empty(kinds, plan.collect.parts, plan.layout.channels)


def _collect_statistics(plan: Plan, x: Tensor, saved: Tensor, stream: Stream) -> None:
    """The statistics of x into ``saved``, and into the stream."""
    cut, partial, p, centered = plan.collect, _partial(4, plan, saved), plan.forward.p, plan.forward.centered
    _launch_split("collect_location", plan, cut, (x, partial), {"P": p, "CENTERED": centered})
    second_about_mean = centered and p == 2
    at_once = second_about_mean or not centered
    _combine_statistics(plan, partial, saved, stream, location=True, moment=at_once, about_shift=second_about_mean)
    if not at_once:
        _launch_split("collect_moment", plan, cut, (x, saved, partial), {"P": p})
        _combine_statistics(plan, partial, saved, stream, location=False, moment=True, about_shift=False)


def _combine_statistics(
    plan: Plan, partial: Tensor, saved: Tensor, stream: Stream, *, location: bool, moment: bool, about_shift: bool
) -> None:
    constants = {"USE": plan.forward, "LOCATION": location, "MOMENT": moment, "ABOUT_SHIFT": about_shift}
    _launch_combine("combine_statistics", plan, partial.shape[1], (partial, saved, stream), constants)


def _write_output(
    plan: Plan,
    cut: Cut,
    x: Tensor,
    y: Tensor,
    affine: Affine,
    saved: Tensor,
    long: Tensor | None,
    partial: Tensor | None,
) -> None:
    _launch_split("output", plan, cut, (x, y, affine, saved, long, partial), {"USE": plan.forward})


def backward(
    plan: Plan,
    x: Tensor,
    dy: Tensor,
    gain: Tensor | None,
    gradients: Affine,
    saved: Tensor,
    state: State | None,
    loss_scale: Tensor | None,
) -> Tensor:
    """dx; those of gain and bias are written into ``gradients``."""
    dx, stream = torch.empty_like(x), backward_stream(state, plan.samples)
    if plan.whole is not None:
        whole = (x, dy, dx, gain, gradients, saved, loss_scale, stream, plan.sizes)
        _launch_whole("backward_whole", plan, whole, plan.backward)
        return dx
    partial, use = _partial(3, plan, saved), plan.backward
    moment = {"P": use.p, "CENTERED": use.centered}
    one_pass = OnePass(dx, gain, loss_scale, stream.long) if plan.one_pass_backward else OnePass()
    paths = None if plan.one_pass_backward else saved.new_empty(2, plan.statistics)
    _launch_split("collect_gradients", plan, plan.collect, (x, dy, saved, partial, one_pass), moment)
    combined = (partial, paths, gain, gradients, saved, loss_scale, stream)
    _launch_combine("combine_gradients", plan, plan.collect.parts, combined, {"USE": use})
    if paths is not None:
        _launch_split("input_gradient", plan, plan.write, (x, dy, dx, gain, saved, paths), moment)
    return dx
