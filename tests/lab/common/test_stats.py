from __future__ import annotations

import math

import pytest
from scipy import stats

from streamnorm_lab.common.stats import interval, paired


def test_interval_is_that_of_the_t_test():
    values = [0.41, 0.39, 0.44, 0.40, 0.43]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = interval(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found.known


def test_one_value_has_no_interval():
    assert interval([0.5]).mean == 0.5
    assert math.isnan(interval([0.5]).half)
    assert not interval([0.5]).known


def test_paired_difference_is_that_of_the_paired_t_test_over_common_seeds():
    ours = {0: 0.50, 1: 0.52, 2: 0.47, 7: 0.99}
    theirs = {2: 0.45, 1: 0.50, 0: 0.49, 8: 0.01}
    expected = stats.ttest_rel([0.50, 0.52, 0.47], [0.49, 0.50, 0.45]).confidence_interval(0.95)
    found = paired(ours, theirs)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_no_common_seed_no_difference():
    assert paired({0: 0.5}, {1: 0.5}) is None
