"""CIFAR-10's original files, fetched only when asked for."""

from __future__ import annotations

import hashlib
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.files import output_folder, replacing

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


def download(folder: Path, url: str = URL, md5: str = MD5) -> Path:
    """Fetch the archive, check it, and unpack its ``.bin`` files into ``folder``.

    Raises:
        UserError: the server cannot be reached, or sent something else.
    """
    output_folder(folder, "--download")
    archive = folder / "cifar-10-binary.tar.gz"
    with replacing(archive) as temporary:
        _fetch(url, temporary)
        if _md5(temporary) != md5:
            raise UserError(f"what {url} sent is not the CIFAR-10 archive (its checksum differs): try again later")
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith(".bin") else None
            if file is not None:
                with replacing(folder / Path(member.name).name) as temporary:
                    temporary.write_bytes(file.read())
    archive.unlink()
    return folder


def _fetch(url: str, target: Path) -> None:
    columns = (TextColumn("fetching CIFAR-10"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        with (
            urllib.request.urlopen(url, timeout=30) as answer,
            open(target, "wb") as file,
            Progress(*columns) as progress,
        ):
            task = progress.add_task("", total=int(answer.headers.get("Content-Length") or 0) or None)
            while chunk := answer.read(1 << 18):
                file.write(chunk)
                progress.advance(task, len(chunk))
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        message = (
            f"{url} cannot be reached ({reason}): check the network, or fetch the file elsewhere, unpack it, "
            "and name the folder with --data"
        )
        raise UserError(message) from None


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
