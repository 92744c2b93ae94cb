"""Text: where it comes from, how it is split, and the pieces it is cut into."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch

from streamnorm_lab.data.text import UNKNOWN, Text, TextSplit, load_text, open_text


def test_parts_follow_each_other_in_the_order_of_the_text(tmp_path):
    text = "".join(chr(97 + i % 7) for i in range(100))
    about = Text("letters", "", text).prepare(tmp_path)
    data = load_text(tmp_path, 4)
    assert [about[split] for split in ("train", "validation", "test")] == [80, 10, 10]
    assert data.spell(data.train.characters) == text[:80]
    assert data.spell(data.validation.characters) == text[80:90]
    assert data.spell(data.test.characters) == text[90:]
    assert data.vocabulary == "abcdefg"


def test_what_the_training_text_does_not_know_is_one_character(tmp_path):
    Text("letters", "", "ab" * 45 + "axyabababa").prepare(tmp_path)
    data = load_text(tmp_path, 4)
    assert data.vocabulary == "ab" + UNKNOWN
    assert data.classes == 3
    assert data.spell(data.test.characters) == f"a{UNKNOWN}{UNKNOWN}abababa"


def test_the_fingerprint_is_that_of_the_text(tmp_path):
    first, same, other = (
        Text("t", "", text).prepare(tmp_path / str(i))["fingerprint"]
        for i, text in enumerate(["abc" * 40, "abc" * 40, "abd" * 40])
    )
    assert first == same != other


def test_pieces_are_followed_by_their_next_characters():
    split = TextSplit(torch.arange(11, dtype=torch.int32), 3)
    assert len(split) == 3
    assert split.count == 9
    inputs, targets = split.batch(slice(1, 3))
    assert inputs.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert targets.tolist() == [4, 5, 6, 7, 8, 9]
    assert split.pieces(torch.tensor([7]))[1].tolist() == [8, 9, 10]
    assert len(split.first(6)) == 2


def test_random_pieces_begin_anywhere_and_end_inside():
    split = TextSplit(torch.arange(11, dtype=torch.int32), 3)
    starts = split.random_starts(1000, 0)
    assert set(starts.tolist()) == set(range(8))
    assert torch.equal(starts, split.random_starts(1000, 0))
    assert not torch.equal(starts, split.random_starts(1000, 1))
    split.pieces(starts)


def test_the_library_is_the_same_each_time_and_in_order():
    first, again = open_text(None, 30_000, 50), open_text(None, 30_000, 50)
    assert first == again
    assert len(first.text) == 30_000
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    assert first.text.startswith(modules[0].read_text(encoding="utf-8")[:1000])


def test_a_file_is_read_up_to_the_limit(tmp_path):
    path = tmp_path / "verse.txt"
    path.write_text("rosé\n" * 200, encoding="utf-8")
    assert open_text(str(path), None, 5).text == "rosé\n" * 200
    text = open_text(str(path), 500, 5)
    assert (text.name, len(text.text)) == ("verse", 500)
