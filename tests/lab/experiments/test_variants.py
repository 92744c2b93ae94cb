"""The references of the experiment ``variants``: which activations move which output."""

from __future__ import annotations

import pytest
import torch

from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.analysis.verdict import sentences
from streamnorm_lab.commands.main import main
from streamnorm_lab.experiments.variants import Variants

CHANNELS = 8
PER_GROUP = 2


def shares(name, place):
    """Whether statistics are shared by the first element of sample 0, channel 0 and the one at ``place``."""
    sample, channel, row = place
    family, of = name.split("-")
    near = {"channel": channel == 0, "ghost": channel == 0, "group": channel < PER_GROUP, "layer": True}
    if of == "position":
        return sample == 0 and row == 0
    if of == "ghost":
        return near[of] and sample % 8 == 0
    return near[of] and (family != "sample" or sample == 0)


@pytest.mark.parametrize("name", list(Variants().methods))
@pytest.mark.parametrize("place", [(0, 0, 2), (0, 1, 0), (0, 5, 0), (0, 5, 2), (3, 0, 2), (8, 0, 2), (8, 5, 0)])
def test_a_reference_holds_what_its_name_says(name, place):
    layer = Variants.catalogue[name].make(CHANNELS, 2)
    torch.manual_seed(0)
    x = torch.randn(16, CHANNELS, 3, 3)
    moved = x.clone()
    sample, channel, row = place
    moved[sample, channel, row, 1] += 5
    other = Variants.catalogue[name].make(CHANNELS, 2)
    changed = not torch.equal(layer(x)[0, 0, 0, 1], other(moved)[0, 0, 0, 1])
    assert changed is shares(name, place)


def test_all_eleven_references_are_compared():
    options = Variants()
    options.check()
    assert len(options.methods) == 11
    assert {name for pair in options.comparisons for name in pair} == {*options.methods, "none"}
    assert len({Variants.catalogue[name].colour for name in options.methods}) == 11


def test_from_the_command_to_the_report(tmp_path):
    folder = tmp_path / "out"
    methods = ["sample-position", "batch-ghost,ghosts=2", "streaming-group", "streaming-channel"]
    words = ["run", "variants", "--methods", *methods, "--settings", "4x1", "1x4", "--rates", "0.01", "--width", "4"]
    words += ["--seeds", "2", "--limit", "32", "--validation", "16", "--points", "2", "--jobs", "1"]
    assert main([*words, "--out", str(folder)]) == 0
    results = open_results(folder)
    assert "Streaming, channel is" in " ".join(sentences(results))
    assert all(cell.mean is not None for cell in results.cells.values())
