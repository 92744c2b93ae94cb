"""The environment of a run: versions, processor, threads."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import streamnorm as sn


def package_version(name: str) -> str:
    """The installed version of a package, or a dash."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "–"


def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def first_engine() -> str:
    """The engine that the layers run on wherever it takes their input."""
    return next(name for name, status in sn.engines().items() if status.startswith("available"))


def card(device: str) -> dict[str, str]:
    """The name of an NVIDIA card, where one is used."""
    return {} if device == "cpu" else {"device": torch.cuda.get_device_name(device)}


def environment() -> dict[str, str | int]:
    """The environment as a log records it."""
    return {
        "streamnorm": sn.__version__,
        "torch": torch.__version__,
        "numpy": package_version("numpy"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "engine": first_engine(),
    }
