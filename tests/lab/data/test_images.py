from __future__ import annotations

import numpy as np
import pytest
import torch

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.data.images import load, prepare, split_sizes
from streamnorm_lab.data.sources import digits


def test_splits_follow_each_other_and_test_is_whole(tmp_path):
    about = prepare(digits(), 100, 30, tmp_path)
    data = load(tmp_path)
    pixels, labels = digits().train(130)
    test_pixels, test_labels = digits().test()
    for split, expected, targets in (
        (data.train, pixels[:100], labels[:100]),
        (data.validation, pixels[100:], labels[100:]),
        (data.test, test_pixels, test_labels),
    ):
        np.testing.assert_array_equal(split.pixels.numpy(), expected)
        np.testing.assert_array_equal(split.labels.numpy(), targets)
    assert [about[split] for split in ("train", "validation", "test")] == [100, 30, 500]
    assert data.shape == (1, 8, 8)


def test_validation_follows_the_images_of_short_runs(tmp_path):
    about = prepare(digits(), 100, 30, tmp_path, 40)
    data = load(tmp_path)
    assert [about[part] for part in ("train", "tune", "validation")] == [100, 40, 30]
    assert torch.equal(data.validation.pixels, data.train.pixels[40:70])


@pytest.mark.parametrize("tune_limit", [0, -3, 101])
def test_short_runs_that_do_not_fit(tune_limit):
    with pytest.raises(UserError, match=f"--tune-limit {tune_limit}: must be between 1 and the 100 training images"):
        split_sizes(digits(), 100, 30, tune_limit)


def test_fewer_test_images(tmp_path):
    about = prepare(digits(), 100, 30, tmp_path, test_limit=20)
    data = load(tmp_path)
    assert about["test"] == len(data.test) == 20
    assert torch.equal(data.test.labels, torch.as_tensor(digits().test()[1][:20]))
    with pytest.raises(UserError, match="--test-limit 501: digits has 500 test images"):
        prepare(digits(), 100, 30, tmp_path, test_limit=501)


def test_training_images_are_standardized_and_others_with_the_same_numbers(tmp_path):
    prepare(digits(), 100, 30, tmp_path)
    data = load(tmp_path)
    train, _ = data.train.batch(slice(None))
    assert train.mean().item() == pytest.approx(0, abs=1e-5)
    assert train.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    values = data.train.pixels.double()
    expected = (data.test.pixels[:5].double() - values.mean()) / values.std(correction=0)
    torch.testing.assert_close(data.test.batch(torch.arange(5))[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_fingerprint_tells_splits_apart(tmp_path):
    prints = [
        prepare(digits(), *sizes, tmp_path / str(i))["fingerprint"] for i, sizes in enumerate([(9, 8), (8, 9), (9, 8)])
    ]
    assert prints[0] == prints[2] != prints[1]


def test_default_sizes_of_digits():
    assert split_sizes(digits(), None, None) == (800, 297)


@pytest.mark.parametrize(("limit", "validation"), [(0, 10), (10, 0), (1297, 1), (-5, 10), (1, 1297)])
def test_sizes_that_do_not_fit(limit, validation):
    with pytest.raises(UserError, match="1297 training images"):
        split_sizes(digits(), limit, validation)
