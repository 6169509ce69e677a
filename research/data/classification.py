"""What all data sets of labelled images share."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from research.core.errors import ConfigError
from research.core.spec import fields
from research.data.dataset import Arrays, Dataset
from research.data.preprocess import Preprocessor, standardise

Labelled = tuple[UInt8[np.ndarray, "n y x c"], Int[np.ndarray, "n"]]


def labelled_images(
    splits: Mapping[str, Labelled],
    classes: Sequence[str],
    indices: Mapping[str, Any],
    fitted: Preprocessor | None = None,
    only: Sequence[int] | None = None,
) -> Dataset:
    """A data set of images and labels, standardised per channel by its training part.

    Args:    splits: name -> (images, labels).  classes: the names of the classes.  indices: rows of each split, where it was drawn here.
             fitted: what a run has fitted; None: the statistics of this training part.
             only: numbers of the classes whose examples are kept; labels and outputs stay as they are. None: all.
    Raises:  ConfigError: a number in `only` that is no class.
    """
    if only is not None:
        for number in only:
            if not 0 <= number < len(classes):
                raise ConfigError(f"data.only: {number} is no class; they are numbered 0 to {len(classes) - 1}")
        kept = {name: np.isin(labels, only) for name, (_, labels) in splits.items()}
        splits = {name: (images[kept[name]], labels[kept[name]]) for name, (images, labels) in splits.items()}
        indices = {name: np.asarray(rows)[kept[name]] for name, rows in indices.items()}
    images = splits["train"][0]
    shape = images.shape[1:]
    spec = {
        "fields": fields(image=(shape, "float32"), label=((), "int32")),
        "classes": len(classes),
        "outputs": len(classes),
        "image": list(shape),
        "examples": {name: len(labels) for name, (_, labels) in splits.items()},
    }
    statistics = fitted.statistics if fitted else standardise("image", images)
    preprocessor = Preprocessor(spec, None, statistics, tuple(classes))
    sources = {name: Arrays({"image": image, "label": label.astype(np.int32)}, preprocessor) for name, (image, label) in splits.items()}
    return Dataset(sources, preprocessor, indices)
