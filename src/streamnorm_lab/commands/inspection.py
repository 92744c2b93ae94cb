"""``streamnorm data`` and ``streamnorm info``: what there is to work with."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table

import streamnorm as sn
from streamnorm_lab.common.environment import package_version, processor, usable_cores
from streamnorm_lab.common.files import typed_path
from streamnorm_lab.data.download import download
from streamnorm_lab.data.sources import open_source

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "pyarrow", "pillow", "matplotlib", "tyro", "rich")

FORMATS = """A folder given with --data may hold:
  Parquet files in the layout of the Hub's cifar10, at any depth: train*.parquet and test*.parquet with a column img (or
  image) of structs with bytes, an encoded image, and a column label, from 0 on;
  CIFAR-10's binary version, at any depth: data_batch_1.bin to data_batch_5.bin and test_batch.bin, which
  `streamnorm data --download FOLDER` fetches (162 MB); or
  images in folders of their classes: train/CLASS and test/CLASS, or CLASS alone, a fifth of which is tested on.

--data MODULE:FUNCTION takes the data sets that a function gives without arguments, to train on and to test on, with
items (input, label). Modules of the current folder are found."""


@dataclass(frozen=True)
class DataOptions:
    """Describe the images that experiments can use, or fetch CIFAR-10's original files (162 MB)."""

    folder: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[FOLDER]", help_behavior_hint="")] = None
    """A folder to look into. It may hold Parquet files in the Hub's cifar10 layout (train*.parquet and test*.parquet
    with the columns img and label), CIFAR-10's binary files (data_batch_1.bin to 5, test_batch.bin), or images in
    folders of their classes (train/CLASS and test/CLASS, or CLASS alone). Or MODULE:FUNCTION, which gives two data
    sets."""

    download: Annotated[str | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Fetch CIFAR-10's binary files into this folder. Nothing is ever downloaded unasked."""


def describe_data(words: Sequence[str]) -> int:
    """``streamnorm data``."""
    options = tyro.cli(DataOptions, args=list(words), prog="streamnorm data")
    console = Console()
    if options.download is not None:
        folder = download(typed_path(options.download))
        console.print(f"CIFAR-10 is in {folder}: use it with --data {folder}", highlight=False, soft_wrap=True)
        return 0
    source = open_source(options.folder)
    pixels, _ = source.train(1)
    shape = "×".join(map(str, pixels.shape[1:]))
    console.print(
        f"[bold]{source.name}[/]: {source.description}\n  {source.train_size:,} training and {source.test_size:,} test "
        f"images of {shape} values; by default {source.default_validation:,} of the training images choose rates",
        highlight=False,
    )
    if options.folder is None:
        console.print(f"This is what experiments use without --data.\n\n{FORMATS}", highlight=False)
    return 0


@dataclass(frozen=True)
class InfoOptions:
    """Show versions, processor, threads, and the engines that run the layers: what a bug report needs."""


def show_info(words: Sequence[str]) -> int:
    """``streamnorm info``."""
    tyro.cli(InfoOptions, args=list(words), prog="streamnorm info")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("streamnorm", sn.__version__)
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    table.add_row("processor", f"{processor()}, {usable_cores()} cores usable")
    table.add_row("torch threads", str(torch.get_num_threads()))
    table.add_row("gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use")
    for name, status in sn.engines().items():
        table.add_row(f"engine {name}", status)
    forced = os.environ.get("STREAMNORM_ENGINE")
    table.add_row("STREAMNORM_ENGINE", forced or "not set: the first engine that fits is used")
    for name in PACKAGES:
        table.add_row(name, package_version(name))
    Console().print(table, highlight=False)
    return 0
