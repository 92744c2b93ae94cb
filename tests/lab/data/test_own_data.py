"""Data of the user's own: folders of images, and the data sets that a function gives."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.data.images import load, prepare
from streamnorm_lab.data.sources import digits, open_source


def draw(path: Path, count: int, colour: int, width: int = 6, height: int = 6) -> None:
    """Images of one colour."""
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (width, height), (colour, i, 0)).save(path / f"{i}.png")


def read_all(path: Path | str, size: int | None = None) -> tuple[Any, Any]:
    source = open_source(str(path), size)
    return source.train(source.train_size), source.test()


# Folders


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_folders_of_classes_in_two_splits(tmp_path: Path, test: str) -> None:
    for label, name in enumerate(("cat", "dog", "emu")):
        draw(tmp_path / "train" / name, 4, 100 + label)
        draw(tmp_path / test / name, 2, 100 + label)
    (train, labels), (others, other_labels) = read_all(tmp_path)
    assert train.shape == (12, 3, 6, 6)
    assert train.dtype == np.uint8
    assert sorted(labels) == sorted([0, 1, 2] * 4)
    assert labels.tolist() != sorted(labels)  # mixed, for the first ones alone may be used
    np.testing.assert_array_equal(train[:, 0, 0, 0], 100 + labels)
    np.testing.assert_array_equal(others[:, 0, 0, 0], 100 + other_labels)
    assert len(others) == 6


def test_folders_of_classes_alone_of_which_a_fifth_is_for_testing(tmp_path: Path) -> None:
    draw(tmp_path / "a", 20, 1)
    draw(tmp_path / "b", 20, 2)
    (train, labels), (test, test_labels) = read_all(tmp_path)
    assert (len(labels), len(test_labels)) == (32, 8)
    seen = {tuple(image[:2, 0, 0]) for image in np.concatenate([train, test])}
    assert len(seen) == 40  # every image is in one of the two


def test_images_of_different_sizes_are_scaled_and_cut(tmp_path: Path) -> None:
    draw(tmp_path / "a", 5, 7, 30, 20)
    draw(tmp_path / "b", 5, 9, 12, 40)
    with pytest.raises(UserError, match=r"the images are of different sizes; .* --size 64 makes them 64×64 pixels"):
        read_all(tmp_path)
    (train, labels), _ = read_all(tmp_path, 8)
    assert train.shape == (8, 3, 8, 8)
    np.testing.assert_array_equal(train[:, 0].reshape(8, -1).mean(1), np.where(labels == 0, 7, 9))


def test_images_of_any_source_are_scaled() -> None:
    pixels, _ = digits(16).train(5)
    assert pixels.shape == (5, 1, 16, 16)
    assert pixels.mean() == pytest.approx(digits().train(5)[0].mean(), rel=0.05)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["a"], "a folder with images is needed for each of at least two classes; found 'a' alone"),
        (["train/a", "train/b", "test/a", "test/c"], "test: class 'c' is not among those of"),
    ],
)
def test_folders_that_are_no_classes(tmp_path: Path, folders: list[str], message: str) -> None:
    for name in folders:
        draw(tmp_path / name, 2, 0)
    with pytest.raises(UserError, match=message):
        read_all(tmp_path)


def test_an_image_that_is_none(tmp_path: Path) -> None:
    draw(tmp_path / "a", 5, 0)
    draw(tmp_path / "b", 5, 0)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"\.png cannot be decoded"):
        read_all(tmp_path)


# Functions


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], str]:
    """The name of a function that gives this, or raises it."""
    module = ModuleType("given_data")
    monkeypatch.setitem(sys.modules, "given_data", module)

    def name(value: Any) -> str:
        def data() -> Any:
            if isinstance(value, Exception):
                raise value
            return value

        module.data = data  # type: ignore[attr-defined]
        return "given_data:data"

    return name


@pytest.mark.parametrize(
    ("make", "dtype", "shape"),
    [
        (lambda: torch.randn(2, 5), "float32", (2, 5)),
        (lambda: torch.randn(3, dtype=torch.float64), "float32", (3,)),
        (lambda: np.ones((4, 4), np.uint8), "uint8", (1, 4, 4)),
        (lambda: torch.ones(3, 4, 4, dtype=torch.uint8), "uint8", (3, 4, 4)),
        (lambda: Image.new("RGB", (5, 4)), "uint8", (3, 4, 5)),
        (lambda: torch.tensor([3, 1, 2]), "int64", (3,)),
    ],
)
def test_inputs_of_every_kind(tmp_path: Path, given: Callable[[Any], str], make: Any, dtype: str, shape: Any) -> None:
    item = make()
    train, test = [(item, i % 3) for i in range(12)], [(item, torch.tensor(1))] * 3
    facts = prepare(open_source(given((train, test))), 8, 4, tmp_path)
    assert (facts.get("dtype", "uint8"), tuple(facts["shape"]), facts["classes"]) == (dtype, shape, 3)
    data = load.__wrapped__(tmp_path)
    inputs, labels = data.train.batch(slice(2, 4))
    assert inputs.shape == (2, *shape)
    assert labels.tolist() == [2, 0]
    if dtype != "uint8":
        assert torch.equal(inputs[0], torch.as_tensor(item).to(inputs.dtype))
        inputs.zero_()  # what a network does to its input must not change the data
        assert torch.equal(data.train.batch(slice(2, 3))[0][0], torch.as_tensor(item).to(inputs.dtype))


GOOD = [(torch.zeros(3), 0)] * 4
LOST = r"must give two data sets, to train on and to test on, each with len\(\) and items \(input, label\), and gave "


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, LOST + "NoneType"),
        ([GOOD], LOST + r"\['list'\]"),
        ((GOOD, 5), LOST + r"\['list', 'int'\]"),
        (ValueError("no such file"), "calling it raises ValueError: no such file"),
        ((GOOD, []), "the test files hold no images"),
        ((GOOD, [torch.zeros(3)]), "test item 0 is a Tensor, and must be an input with its label"),
        ((GOOD, [(torch.zeros(3), 0.5)]), "test item 0: its label must be a whole number from 0 on, and is 0.5"),
        ((GOOD, [(torch.zeros(3), -1)]), "from 0 on, and is -1"),
        ((GOOD, [(torch.zeros(3), torch.zeros(2))]), r"from 0 on, and is of shape \(2,\)"),
        ((GOOD, [("text", 0)]), "test item 0: its input is a str, and must be a tensor, an array or an image"),
        (
            ([*GOOD, (torch.zeros(4), 0)], GOOD),
            r"training item 4 is float32 of shape \(4,\), and item 0 float32 of shape \(3,\)",
        ),
    ],
)
def test_data_of_another_form_are_one_clear_line(given: Callable[[Any], str], value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_all(given(value))
    assert "\n" not in str(error.value)
    assert "given_data:data" in str(error.value)


def test_an_item_that_raises(given: Callable[[Any], str]) -> None:
    class Data(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            raise OSError("it is gone")

    with pytest.raises(UserError, match="training item 0 raises OSError: it is gone"):
        open_source(given((Data(), Data()))).train(1)
