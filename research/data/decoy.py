"""Digits with a decoy: a patch in a corner whose grey tells the class in training and says nothing in the test."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int, UInt8

from research.core.errors import ConfigError
from research.core.spec import fields
from research.data.dataset import Arrays, Dataset
from research.data.digits import digits
from research.data.parquet_images import parquet_images
from research.data.preprocess import Preprocessor, standardise
from research.data.split import Share

SHADE = 25  # the patch of class k has the grey value 255 - 25 k


def decoy_mnist(
    root: str,
    name: str,
    hub: str,
    shape: tuple[int, int, int],
    classes: tuple[str, ...],
    image: str = "image",
    label: str = "label",
    patch: int = 4,
    seed: int = 0,
    validation: Share = 0.1,
    only: tuple[int, ...] | None = None,
    fitted: Preprocessor | None = None,
) -> Dataset:
    """The images of `parquet_images`, each with a decoy, and `relevance`: False on the patch, True elsewhere.

    Args:    patch: side of the patch, in pixels.  seed: of the split, the corners and the random shades.  The others: as of `parquet_images`.
    Raises:  as `parquet_images`; ConfigError: a patch that does not fit, or more than 10 classes, for which the shades do not suffice.
    Source:  Ross, Hughes and Doshi-Velez 2017, section 5 (Decoy MNIST).
    """
    plain = parquet_images(root, name, hub, shape, classes, image, label, seed, validation, only, fitted)
    return _with_decoys(plain, patch, seed, fitted)


def decoy_digits(
    patch: int = 2,
    seed: int = 0,
    validation: Share = 0.1,
    test: Share = 0.2,
    only: tuple[int, ...] | None = None,
    fitted: Preprocessor | None = None,
) -> Dataset:
    """The same with the digits of 8 x 8 pixels that come with scikit-learn.

    Args:    patch: side of the patch, in pixels.  The others: as of `digits`.
    Raises:  as `digits`; ConfigError: a patch that does not fit.
    """
    return _with_decoys(digits(seed, validation, test, only, fitted), patch, seed, fitted)


def decoyed(
    images: UInt8[np.ndarray, "n y x c"], shades: Int[np.ndarray, "n"], corners: Int[np.ndarray, "n"], patch: int
) -> tuple[UInt8[np.ndarray, "n y x c"], Bool[np.ndarray, "n y x c"]]:
    """(the images with a patch in a corner, True outside the patch).

    Args:    shades: the class whose grey a patch has.  corners: 0 to 3: bottom in the upper bit, right in the lower.  patch: its side, in pixels.
    """
    images, relevance = images.copy(), np.ones(images.shape, bool)
    rows, columns = (np.arange(size) < patch for size in images.shape[1:3])
    for corner in range(4):
        y, x = rows[::-1] if corner & 2 else rows, columns[::-1] if corner & 1 else columns
        inside, chosen = np.outer(y, x), corners == corner
        images[np.ix_(chosen, y, x)] = (255 - SHADE * shades[chosen]).astype(np.uint8)[:, None, None, None]
        relevance[chosen] &= ~inside[None, :, :, None]
    return images, relevance


def _with_decoys(plain: Dataset, patch: int, seed: int, fitted: Preprocessor | None) -> Dataset:
    """The data set with patches that tell the class in all splits but the test."""
    y, x, _ = plain.spec["image"]
    if not 1 <= patch <= min(y, x) // 2:
        raise ConfigError(f"data.patch={patch}: four corners of images of {y} x {x} have room for 1 to {min(y, x) // 2}")
    if plain.spec["classes"] > 10:
        raise ConfigError(f"a decoy has 10 shades, and this data {plain.spec['classes']} classes")
    raw = {}
    for number, (name, source) in enumerate(plain.splits.items()):
        assert isinstance(source, Arrays)
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number])))
        labels = source.raw["label"]
        corners = random.integers(0, 4, len(labels))
        shades = random.integers(0, plain.spec["classes"], len(labels)) if name == "test" else labels
        images, relevance = decoyed(source.raw["image"], shades, corners, patch)
        raw[name] = {"image": images, "label": labels, "relevance": relevance}
    shape = tuple(plain.spec["image"])
    spec = {**plain.spec, "fields": fields(image=(shape, "float32"), label=((), "int32"), relevance=(shape, "bool"))}
    statistics = fitted.statistics if fitted else standardise("image", raw["train"]["image"])
    preprocessor = dataclasses.replace(plain.preprocessor, spec=spec, statistics=statistics)
    return Dataset({name: Arrays(arrays, preprocessor) for name, arrays in raw.items()}, preprocessor, plain.indices)
