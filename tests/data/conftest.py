"""Small data sets, made on the spot."""

import io

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image


def _encode(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, kind)
    return buffer.getvalue()


def _write_parquet(path, images, labels, image="image", label="label"):
    cells = [{"bytes": x if isinstance(x, bytes) else _encode(x), "path": None} for x in images]
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({image: cells, label: pyarrow.array(list(labels), pyarrow.int64())}), path)


@pytest.fixture
def pixels():
    """Twenty random images of 6x5 RGB bytes."""
    return np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)


@pytest.fixture
def encode():
    """encode(pixels, kind="PNG"): an image file's bytes."""
    return _encode


@pytest.fixture
def write_parquet():
    """write_parquet(path, images, labels): a parquet file as the Hub has it; images are arrays or bytes."""
    return _write_parquet
