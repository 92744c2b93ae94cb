"""The experiments about DAU and about the constants: what they declare, and that their reports answer it."""

from __future__ import annotations

import re

import pytest

from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.analysis.verdict import sentences
from streamnorm_lab.commands.main import main
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.common.stats import paired
from streamnorm_lab.experiments.coefficients import Coefficients
from streamnorm_lab.experiments.dau import DAU
from streamnorm_lab.methods.layers import METHODS

SMALL = [
    *("--rates", "0.01", "--seeds", "3", "--limit", "64", "--validation", "32", "--width", "16", "--depth", "2"),
    *("--points", "2", "--jobs", "1", "--epochs", "1"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dau") / "out"
    words = ["run", "figure4", "--settings", "8x1", "4x8", "4x1", "2x16", "2x1", *SMALL, "--out", str(folder)]
    assert main(words) == 0
    return folder


def test_each_method_is_compared_with_itself_at_the_other_setting(finished):
    results = open_results(finished)
    pairs = [(f"{left}", f"{right}") for left, right in results.setting_pairs]
    assert pairs == [("4x8", "4x1"), ("2x16", "2x1")]
    left, right = Setting(2, 16), Setting(2, 1)
    change = results.change("batch", left, right)
    assert change == paired(results.cells["batch", left].scores, results.cells["batch", right].scores)
    said = [sentence for sentence in sentences(results) if "4×8 against 4×1" in sentence]
    assert [sentence.split(" is ")[0] for sentence in said] == ["Batch", "Recalibrated Batch", "Streaming L1"]
    assert re.search(r"(better|worse|not clearly different) at (4×8 against 4×1 and )?2×16 against 2×1", said[0])
    tuned = [results.cells["batch", setting].tuning[0.01] for setting in (left, right)]
    expected = f"{100 * (tuned[0] - tuned[1]):+.1f} at 0.01 (points, validation).".replace("-", "−")
    assert f"At equal learning rates Batch at 2×16 less 2×1 is {expected}" in sentences(results)
    page = (finished / "report.html").read_text()
    assert "2×16 − 2×1" in page
    assert "figure 4" in page


def test_a_pair_compares_as_many_samples_per_mini_batch():
    for left, right in DAU.setting_pairs:
        dau, plain = Setting.parse(left), Setting.parse(right)
        assert dau.samples == plain.samples
        assert (dau.samples * dau.batches, plain.batches) == (32, 1)


def test_every_pair_of_coefficients_is_run_by_default():
    options = Coefficients()
    options.check()
    assert {name for pair in options.comparisons for name in pair} == set(options.methods)
    layers = [METHODS[name].make(4, 0) for name in options.methods]
    assert len({repr(layer) for layer in layers}) == len(layers)


def test_coefficients_from_the_command_to_the_report(tmp_path):
    folder = tmp_path / "out"
    methods = ["streaming-l1", "streaming-l1,alpha=0.7+0.3,beta=0+0+0,kappa=0.7", "streaming-l2", "streaming-sigma"]
    assert main(["run", "coefficients", "--methods", *methods, "--settings", "1x4", *SMALL, "--out", str(folder)]) == 0
    said = " ".join(sentences(open_results(folder)))
    assert "Streaming L2 is" in said
    assert "Streaming sigma, L2" in said
