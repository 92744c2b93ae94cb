"""Data sets that a function of the user's own gives: two, to train on and to test on."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.functions import described, find_function
from streamnorm_lab.data.decoding import resized
from streamnorm_lab.data.source import Samples, Source, of_files, refuse_empty

NEEDED = "it must give two data sets, to train on and to test on, each with len() and items (input, label)"


def from_function(text: str, size: int | None = None) -> Source:
    """The data sets of ``MODULE:FUNCTION``, a function without arguments.

    An item is read once, however many passes there are: what it draws at random stays the same. Its input is a tensor,
    an array or a Pillow image; its label a whole number from 0 on.

    Raises:
        UserError: there is no such function, or it gives something else.
    """
    function = find_function(text)
    try:
        given = function()
    except Exception as error:  # of the user's own
        raise UserError(f"--data {text}: calling it raises {described(error)}") from None
    if not isinstance(given, tuple | list) or len(given) != 2 or not all(map(_is_data_set, given)):
        kinds = [type(one).__name__ for one in given] if isinstance(given, tuple | list) else type(given).__name__
        raise UserError(f"--data {text}: {NEEDED}, and gave {kinds}")
    train, test = given
    sizes = len(train), len(test)
    refuse_empty(f"--data {text}", *sizes)
    return of_files(
        text.rpartition(":")[2],
        f"data sets of {text}",
        sizes,
        partial(_read, text, "training", train, size),
        partial(_read, text, "test", test, size, sizes[1]),
    )


def _is_data_set(value: Any) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, str | dict)


def _read(text: str, split: str, dataset: Any, size: int | None, count: int) -> Samples:
    inputs: list[np.ndarray] = []
    labels: list[int] = []
    for i in range(count):
        place = f"--data {text}: {split} item {i}"
        try:
            item = dataset[i]
        except Exception as error:  # of the user's own
            raise UserError(f"{place} raises {described(error)}") from None
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise UserError(f"{place} is a {type(item).__name__}, and must be an input with its label")
        inputs.append(_input(item[0], place))
        labels.append(_label(item[1], place))
        if inputs[-1].shape != inputs[0].shape or inputs[-1].dtype != inputs[0].dtype:
            first, other = (f"{one.dtype} of shape {one.shape}" for one in (inputs[0], inputs[-1]))
            raise UserError(f"{place} is {other}, and item 0 {first}: all inputs must have one shape and type")
    array = np.stack(inputs)
    return resized(array, size) if array.dtype == np.uint8 else array, np.asarray(labels, dtype=np.int64)


def _input(value: Any, place: str) -> np.ndarray:
    """As uint8 (images, channels first), float32 or int64."""
    is_image = hasattr(value, "convert") and hasattr(value, "getbands")
    array = value.numpy(force=True) if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype == np.uint8 and array.ndim in (2, 3):
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1) if is_image else array
        return np.ascontiguousarray(array)
    if array.dtype.kind == "f":
        return np.ascontiguousarray(array, dtype=np.float32)
    if array.dtype.kind in "iu":
        return np.ascontiguousarray(array, dtype=np.int64)
    raise UserError(f"{place}: its input is a {type(value).__name__}, and must be a tensor, an array or an image")


def _label(value: Any, place: str) -> int:
    try:
        number = value.item() if isinstance(value, Tensor | np.ndarray) else value
        if isinstance(number, bool | str) or number != int(number) or int(number) < 0:
            raise ValueError(number)
        return int(number)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        shown = (
            f"of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) and value.dim() else repr(value)[:40]
        )
        raise UserError(f"{place}: its label must be a whole number from 0 on, and is {shown}") from None
