"""Each kind of data set, whole and damaged."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.data.images import prepare
from streamnorm_lab.data.sources import CIFAR10_RECORD, open_source


def random_images(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    return pixels, rng.integers(0, min(10, count), count)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, pixels: np.ndarray, labels: np.ndarray, column: str = "img") -> None:
    images = [{"bytes": png(image), "path": None} for image in pixels]
    pq.write_table(pa.table({column: images, "label": labels.tolist()}), path)


def write_binary(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    records = np.concatenate([labels[:, None].astype(np.uint8), pixels.reshape(len(pixels), -1)], axis=1)
    path.write_bytes(records.tobytes())


def test_digits_come_with_the_package_and_the_splits_do_not_overlap():
    source = open_source(None)
    train, train_labels = source.train(source.train_size)
    test, test_labels = source.test()
    assert train.shape == (1297, 1, 8, 8)
    assert test.shape == (500, 1, 8, 8)
    assert set(train_labels) == set(test_labels) == set(range(10))
    first, _ = source.train(7)
    np.testing.assert_array_equal(first, train[:7])


@pytest.mark.parametrize("column", ["img", "image"])
def test_parquet_gives_the_pixels_that_were_encoded(tmp_path, column):
    pixels, labels = random_images(25)
    nested = tmp_path / "plain_text"
    nested.mkdir()
    write_parquet(nested / "train-00000-of-00002.parquet", pixels[:12], labels[:12], column)
    write_parquet(nested / "train-00001-of-00002.parquet", pixels[12:20], labels[12:20], column)
    write_parquet(nested / "test-00000-of-00001.parquet", pixels[20:], labels[20:], column)
    source = open_source(str(tmp_path))
    assert (source.train_size, source.test_size) == (20, 5)
    for count in (3, 15, 20):
        read, read_labels = source.train(count)
        np.testing.assert_array_equal(read, pixels[:count])
        np.testing.assert_array_equal(read_labels, labels[:count])
    np.testing.assert_array_equal(source.test()[0], pixels[20:])


def test_binary_version_gives_the_pixels_that_were_written(tmp_path):
    pixels, labels = random_images(25)
    write_binary(tmp_path / "data_batch_1.bin", pixels[:12], labels[:12])
    write_binary(tmp_path / "data_batch_2.bin", pixels[12:20], labels[12:20])
    write_binary(tmp_path / "test_batch.bin", pixels[20:], labels[20:])
    source = open_source(str(tmp_path))
    read, read_labels = source.train(15)
    np.testing.assert_array_equal(read, pixels[:15])
    np.testing.assert_array_equal(read_labels, labels[:15])
    np.testing.assert_array_equal(source.test()[0], pixels[20:])


def read_all(path: Path) -> None:
    source = open_source(str(path))
    source.train(source.train_size)
    source.test()


def refusal(path: Path) -> str:
    """What is said, in one line, when the folder is opened and all of it is read."""
    with pytest.raises(UserError) as error:
        read_all(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    for split, seed in (("train", 0), ("test", 1)):
        write_parquet(tmp_path / f"{split}.parquet", *random_images(6, seed))
    return tmp_path


def test_a_path_that_is_not_there(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder(parquet):
    assert "name the folder" in refusal(parquet / "train.parquet")


def test_a_folder_without_images(tmp_path):
    assert "neither Parquet files nor" in refusal(tmp_path)


def test_the_python_version(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"\x80")
    assert "--download" in refusal(tmp_path)


def test_parquet_without_test_images(parquet):
    (parquet / "test.parquet").unlink()
    assert "no file test*.parquet" in refusal(parquet)


@pytest.mark.parametrize("length", [0, 3, 200])
def test_parquet_cut_short(parquet, length):
    path = parquet / "train.parquet"
    path.write_bytes(path.read_bytes()[:length])
    assert "not a readable Parquet file" in refusal(parquet)


def test_parquet_with_a_damaged_middle(parquet):
    path = parquet / "train.parquet"
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\x00" * 1996
    path.write_bytes(content)
    message = refusal(parquet)
    assert str(path) in message
    assert "again" in message


def test_parquet_with_other_columns(parquet):
    pq.write_table(pa.table({"picture": [b""], "label": [0]}), parquet / "train.parquet")
    assert "has the columns picture, label" in refusal(parquet)


def test_parquet_whose_images_are_no_structs(parquet):
    pq.write_table(pa.table({"img": [b"abc"], "label": [0]}), parquet / "train.parquet")
    assert "structs" in refusal(parquet)


def test_parquet_with_an_image_that_is_none(parquet):
    pq.write_table(pa.table({"img": [{"bytes": b"no image"}], "label": [0]}), parquet / "train.parquet")
    assert "image 0 cannot be decoded" in refusal(parquet)


def a_large_image(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("width", "height"), [(1025, 1024), (10_000, 10_000), (20_000, 20_000)])
def test_an_image_that_would_fill_memory(parquet, width, height):
    """Beyond our own limit, that of Pillow's warning, and that of its error."""
    table = pa.table({"img": [{"bytes": a_large_image(width, height)}], "label": [0]})
    pq.write_table(table, parquet / "train.parquet")
    assert "train.parquet: image 0 has more than 1,048,576 pixels" in refusal(parquet)


def test_the_largest_image(parquet):
    for split in ("train", "test"):
        pq.write_table(
            pa.table({"img": [{"bytes": a_large_image(1024, 1024)}], "label": [0]}), parquet / f"{split}.parquet"
        )
    read_all(parquet)


@pytest.mark.parametrize("split", ["train", "test"])
def test_parquet_without_rows(parquet, split):
    table = pq.read_table(parquet / f"{split}.parquet")
    pq.write_table(table.slice(0, 0), parquet / f"{split}.parquet")
    assert f"the {split} files hold no images" in refusal(parquet)


@pytest.mark.parametrize(
    "labels", [pa.array([0.5]), pa.array(["3"]), pa.array([True]), pa.array([None], pa.int64()), pa.array([np.nan])]
)
def test_labels_that_are_no_whole_numbers(parquet, labels):
    images = [{"bytes": png(np.zeros((3, 8, 8), np.uint8))}]
    pq.write_table(pa.table({"img": images, "label": labels}), parquet / "train.parquet")
    assert "label a whole number" in refusal(parquet)


def test_labels_that_are_whole_numbers_of_another_type(parquet):
    images = [{"bytes": png(np.zeros((3, 32, 32), np.uint8))}] * 2
    for labels in (pa.array([7.0, 3.0]), pa.array([7, 3], pa.uint8())):
        pq.write_table(pa.table({"img": images, "label": labels}), parquet / "train.parquet")
        assert open_source(str(parquet)).train(2)[1].tolist() == [7, 3]


def test_images_of_different_sizes(parquet):
    images = [{"bytes": png(np.zeros((3, size, size), np.uint8))} for size in (8, 9)]
    pq.write_table(pa.table({"img": images, "label": [0, 1]}), parquet / "train.parquet")
    assert "different sizes" in refusal(parquet)


@pytest.mark.parametrize("label", [-1, 255])
def test_labels_that_cannot_be(parquet, label):
    pixels, labels = random_images(3)
    labels[1] = label
    write_parquet(parquet / "train.parquet", pixels, labels)
    with pytest.raises(UserError, match=f"label {label} found among 9 samples; labels are 0, 1, and so on"):
        prepare(open_source(str(parquet)), 2, 1, parquet / "cache")


def test_binary_labels_beyond_the_classes(tmp_path):
    pixels, labels = random_images(3)
    for name in ("data_batch_1", "test_batch"):
        write_binary(tmp_path / f"{name}.bin", pixels, labels + 10)
    assert "labels are 0 to 9" in refusal(tmp_path)


def test_the_labels_tell_the_classes(tmp_path):
    pixels, _ = random_images(9)
    for name, classes in (("four", 4), ("two", 2)):
        for split in ("train", "test"):
            (tmp_path / name).mkdir(exist_ok=True)
            write_parquet(tmp_path / name / f"{split}.parquet", pixels, np.arange(9) % classes)
        assert prepare(open_source(str(tmp_path / name)), 5, 2, tmp_path / "cache")["classes"] == classes


def test_binary_file_cut_short(tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(b"\x00" * (CIFAR10_RECORD - 1))
    (tmp_path / "test_batch.bin").write_bytes(b"\x00" * CIFAR10_RECORD)
    assert "cut short" in refusal(tmp_path)


def test_binary_files_without_test_images(tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(b"\x00" * CIFAR10_RECORD)
    assert "test_batch.bin is missing" in refusal(tmp_path)
