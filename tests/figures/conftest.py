"""What a test can see of a figure: which colours are in it, and how much of them."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image


@pytest.fixture
def pixels_of():
    """pixels_of(path, color): how many pixels of the PNG have this colour."""

    def count(path, color, tolerance=12):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        return int((np.abs(pixels - np.array([round(255 * c) for c in to_rgb(color)])).max(-1) <= tolerance).sum())

    return count


@pytest.fixture
def size_of():
    """size_of(path): (width, height) of the PNG."""

    def size(path):
        with Image.open(path) as image:
            return image.size

    return size
