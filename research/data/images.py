"""Image files as arrays of bytes."""

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from research.core.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_BLOCK = 256  # images that a thread decodes at a time


def decode(data: bytes, shape: tuple[int, ...] | None, where: Any) -> UInt8[np.ndarray, "y x c"]:
    """An encoded image as pixels of a given shape: turned upright, made grey or RGB, and resized where its size differs.

    Args:    data: the file's bytes.  shape: (rows, columns, channels), channels 1 or 3; None: RGB of its own size.  where: its name in messages.
    Raises:  DataError: bytes that are no image, or a truncated one.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            y, x, c = shape or (image.height, image.width, 3)
            if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow clips rather than scales
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = ImageOps.exif_transpose(image).convert("L" if c == 1 else "RGB")
            if image.size != (x, y):
                image = image.resize((x, y), Image.Resampling.BILINEAR)
            return np.asarray(image).reshape(y, x, c)
    except UnidentifiedImageError as error:
        raise DataError(f"{where} cannot be read as an image: it is of no known kind") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} cannot be read as an image: {str(error).splitlines()[0]}") from error


def decode_all(read: Callable[[int], bytes], count: int, shape: Sequence[int], name: Callable[[int], Any]) -> UInt8[np.ndarray, "n y x c"]:
    """Many encoded images as one array, decoded by a thread for each core.

    Args:    read: number -> the image's bytes.  count: how many.  shape: of each image.  name: number -> its name in messages.
    Raises:  DataError: naming the first image that cannot be read.
    """
    y, x, c = shape
    pixels = np.empty((count, y, x, c), np.uint8)

    def block(start: int) -> None:
        for i in range(start, min(start + _BLOCK, count)):
            pixels[i] = decode(read(i), (y, x, c), name(i))

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        for _ in pool.map(block, range(0, count, _BLOCK)):
            pass
    return pixels


def read_files(paths: Sequence[epath.Path], shape: Sequence[int]) -> UInt8[np.ndarray, "n y x c"]:
    """Image files as one array.

    Raises:  DataError: naming the first file that cannot be read.
    """
    return decode_all(lambda i: paths[i].read_bytes(), len(paths), shape, lambda i: paths[i])


def image_size(path: epath.Path) -> tuple[int, int]:
    """(rows, columns) of an image file, by its header.

    Raises:  DataError: a file that is no image.
    """
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            return image.height, image.width
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def image_paths(folder: epath.Path) -> list[epath.Path]:
    """The image files of a folder and of those below it, sorted."""
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            found += image_paths(entry)
        elif entry.suffix.lower() in SUFFIXES:
            found.append(entry)
    return found
