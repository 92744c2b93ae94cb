"""Encoded images, decoded with care: a few kilobytes can decode to gigabytes."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from streamnorm_lab.common.errors import UserError, first_line

LARGEST_IMAGE = 1 << 20
"""Pixels. The experiments are for small images; larger ones are taken where they are made smaller."""

DIFFERENT_SIZES = "the images are of different sizes; they must all have one size: --size 64 makes them 64×64 pixels"


def decode(encoded: bytes | Path, place: str, size: int | None = None) -> np.ndarray:
    """An image in colour, uint8 of shape (3, H, W).

    Args:
        encoded: a file, or what stands in one.
        place: what the image is called in errors.
        size: scale it to this height and width; what then stands out of the square is cut off.

    Raises:
        UserError: it cannot be decoded, or is too large.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
                if size is None and image.width * image.height > LARGEST_IMAGE:
                    raise Image.DecompressionBombError
                return _as_array(image.convert("RGB"), size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        message = f"{place} has more than {LARGEST_IMAGE:,} pixels: damaged, or give --size"
        raise UserError(message) from None
    except PermissionError:
        raise
    except Exception as error:  # a decoder raises whatever damaged bytes lead to
        raise UserError(f"{place} cannot be decoded ({first_line(error)}): fetch the file again") from None


def resized(pixels: np.ndarray, size: int | None) -> np.ndarray:
    """Images that are decoded already, uint8 of shape (N, C, H, W), of this height and width."""
    if size is None or pixels.shape[2:] == (size, size):
        return pixels
    from PIL import Image

    channels = ([Image.fromarray(channel) for channel in image] for image in pixels)
    return np.stack([np.concatenate([_as_array(channel, size) for channel in image]) for image in channels])


def _as_array(image: Any, size: int | None) -> np.ndarray:
    from PIL import Image, ImageOps

    fitted = image if size is None else ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    array = np.asarray(fitted)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def stacked(pixels: list[np.ndarray], place: Path | str) -> np.ndarray:
    """Images in one array.

    Raises:
        UserError: they are of different sizes.
    """
    if len({image.shape for image in pixels}) > 1:
        raise UserError(f"{place}: {DIFFERENT_SIZES}")
    return np.stack(pixels)
