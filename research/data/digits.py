"""1,797 real handwritten digits of 8x8 pixels that come with scikit-learn."""

import importlib.util
import pathlib

import numpy as np

from research.core.errors import DataError
from research.data.classification import labelled_images
from research.data.dataset import Dataset
from research.data.preprocess import Preprocessor
from research.data.split import Share, draw


def digits(
    seed: int = 0, validation: Share = 0.1, test: Share = 0.2, only: tuple[int, ...] | None = None, fitted: Preprocessor | None = None
) -> Dataset:
    """The digits as images of bytes, split at random.

    Args:    seed: of the split.  validation, test: rows, or a share of all rows.
             only: classes whose examples are kept; null: all.
             fitted: what a run has fitted; null: fit here.
    Raises:  ConfigError: parts that leave nothing to train on.  DataError: scikit-learn is not there, or has no digits any more.
    Source:  Alpaydin and Kaynak 1998, the test half of the UCI optical digits; pixels 0 to 16 become 0 to 255.
    """
    table = np.loadtxt(_file(), np.uint8, delimiter=",")
    pixels, labels = table[:, :-1], table[:, -1].astype(np.int64)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)  # n yx -> n y x c
    rows = draw(len(labels), seed, validation=validation, test=test)
    return labelled_images({name: (images[r], labels[r]) for name, r in rows.items()}, [str(i) for i in range(10)], rows, fitted, only)


def _file() -> pathlib.Path:
    """The table as scikit-learn ships it: importing all of scikit-learn for it would take two seconds of every command."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise DataError("the digits come with scikit-learn, which is not installed: pip install scikit-learn")
    file = pathlib.Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not file.is_file():
        raise DataError(f"{file} is missing: the digits come with scikit-learn; pip install 'scikit-learn>=1.5'")
    return file
