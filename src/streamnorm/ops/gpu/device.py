"""The devices on which Triton runs, and the launch of its kernels.

With ``TRITON_INTERPRET=1`` in the environment before this package is imported, Triton interprets the kernels and the
engine takes CPU tensors: slow, and for tests.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors."""


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why the engine cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with PyTorch's CUDA build for Linux)"
    if INTERPRETED:
        return None
    if not torch.backends.cuda.is_built():
        return f"this PyTorch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if torch.version.hip is not None:
        return "it is made for NVIDIA GPUs"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return None


def holds(t: Tensor) -> bool:
    """Whether kernels can read a tensor."""
    return t.device.type == ("cpu" if INTERPRETED else "cuda") and missing() is None


def is_watched() -> bool:
    """Whether a mode wants to see PyTorch's functions. A default device is a mode too, but only places new tensors."""
    return torch._C._len_torch_function_stack() > 0 and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    )


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors of the device."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def current(x: Tensor) -> AbstractContextManager[Any]:
    """The device of a tensor as the current one, on which Triton launches."""
    return nullcontext() if INTERPRETED else torch.cuda.device(x.device)


def is_capturing() -> bool:
    """Whether kernels go into a CUDA graph at present."""
    return not INTERPRETED and torch.cuda.is_current_stream_capturing()


def launch(name: str, grid: tuple[int, ...], warps: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Launch a kernel. They are imported when they are needed: Triton takes a while to import."""
    from . import kernels

    getattr(kernels, name)[grid](*arguments, **constants, num_warps=warps)
