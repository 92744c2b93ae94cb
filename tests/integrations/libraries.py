"""What other libraries need before they can be imported here."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

_kept: list[torch.library.Library] = []


@cache
def prepare() -> None:
    """Let libraries be imported offline, and torchvision beside a PyTorch that its compiled part was not built for.

    PyPI's torchvision for Linux is built for PyTorch with CUDA. Beside a CPU build its compiled operators do not load,
    and ``import torchvision`` fails on their missing names. Its networks need none of them, so it is enough to
    declare the two names that it asks for.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or _loads(Path(spec.origin).with_name("_C.so")):
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


def _loads(operators: Path) -> bool:
    try:
        torch.ops.load_library(str(operators))
    except OSError:
        return False
    return True
