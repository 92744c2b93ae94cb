from __future__ import annotations

import pytest

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.setting import Setting


@pytest.mark.parametrize("text", ["2x16", "2×16", " 2 x 16 "])
def test_reads_samples_and_batches(text):
    assert Setting.parse(text) == Setting(2, 16)


@pytest.mark.parametrize("text", ["", "2", "x16", "0x1", "2x0", "-1x2", "2x16x3", "1.5x2", "twox16"])
def test_refuses_what_is_no_setting_and_shows_how_to_write_one(text):
    with pytest.raises(UserError, match="2x16") as refusal:
        Setting.parse(text)
    assert repr(text) in str(refusal.value)


def test_sorts_from_easy_to_hard():
    settings = [Setting.parse(text) for text in ("1x1", "1x32", "2x1", "32x1", "2x16")]
    ordered = sorted(settings, key=lambda setting: setting.difficulty)
    assert [str(setting) for setting in ordered] == ["32x1", "2x16", "1x32", "2x1", "1x1"]
