"""Fetching CIFAR-10, from an archive that is served from a file."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.data.download import download
from streamnorm_lab.data.sources import CIFAR10_RECORD, open_source


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "archive.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in ("data_batch_1.bin", "test_batch.bin", "../outside.bin", "readme.html"):
            content = bytes(3 * CIFAR10_RECORD)
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_fetched_files_are_a_data_set(archive, tmp_path):
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    folder = download(tmp_path / "got", archive.as_uri(), md5)
    source = open_source(str(folder))
    assert (source.train_size, source.test_size) == (3, 3)
    assert {path.name for path in folder.iterdir()} == {"data_batch_1.bin", "test_batch.bin", "outside.bin"}
    assert not (tmp_path / "outside.bin").exists()


def test_what_is_not_the_archive_is_not_kept(archive, tmp_path):
    with pytest.raises(UserError, match="checksum differs"):
        download(tmp_path / "got", archive.as_uri())
    assert not list((tmp_path / "got").iterdir())


def test_offline(tmp_path):
    with pytest.raises(UserError, match="cannot be reached") as error:
        download(tmp_path / "got", "http://127.0.0.1:9/nothing.tar.gz")
    assert "--data" in str(error.value)
    assert not list((tmp_path / "got").iterdir())
