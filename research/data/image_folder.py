"""Labelled images from a folder with one subfolder for each class."""

import numpy as np
from etils import epath

from research.core.errors import DataError, nearest
from research.data.checks import existing, located
from research.data.classification import Labelled, labelled_images
from research.data.dataset import Dataset
from research.data.images import SUFFIXES, decode, image_paths, read_files
from research.data.preprocess import Preprocessor
from research.data.split import Share, draw

PARTS = ("train", "validation", "test")


def image_folder(
    root: str,
    path: str,
    size: tuple[int, int] | None = None,
    channels: int = 3,
    seed: int = 0,
    validation: Share = 0.1,
    test: Share = 0.1,
    fitted: Preprocessor | None = None,
) -> Dataset:
    """A data set of `<path>/<class>/*.png` (jpg, …), or of `<path>/{train,validation,test}/<class>/…`.

    All images are decoded at once, so a damaged one is found before training, and kept in memory as bytes: rows x columns x channels each.

    Args:    root: the folder that a relative path starts from.  path: the folder of the classes.
             size: (rows, columns) that every image is resized to; null: that of the first image.  channels: 1 = grey, 3 = RGB.
             seed: of the split.  validation, test: images, or a share; drawn only where the folder has no such subfolder, and a test part only
             where it has no subfolders at all.  fitted: what a run has fitted; null: fit here.
    Raises:  DataError: a missing or empty folder, an image that cannot be read, a class that the training part lacks.
    """
    folder = existing(located(root, path))
    parted = (folder / "train").is_dir()
    folders = {part: folder / part for part in PARTS if (folder / part).is_dir()} if parted else {"train": folder}
    classes = fitted.classes if fitted else tuple(sorted(entry.name for entry in folders["train"].iterdir() if entry.is_dir()))
    files = {part: _files(place, classes) for part, place in folders.items()}
    shape = fitted.spec["image"] if fitted else _shape(files["train"][0][0], size, channels)
    splits = {part: (read_files(paths, shape), labels) for part, (paths, labels) in files.items()}
    if "validation" in splits:
        return labelled_images(splits, classes, {}, fitted)
    drawn = draw(len(splits["train"][1]), seed, validation=validation, test=0 if parted else test)
    images, labels = splits["train"]
    parts: dict[str, Labelled] = {part: (images[rows], labels[rows]) for part, rows in drawn.items()}
    return labelled_images({**splits, **parts}, classes, drawn, fitted)


def _files(folder: epath.Path, classes: tuple[str, ...]) -> tuple[list[epath.Path], np.ndarray]:
    """The images of a folder in the order of their paths, and the number of the class of each."""
    paths, labels = [], []
    for entry in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        if entry.name not in classes:
            raise DataError(f"{entry}: the training part has no class {entry.name!r}{nearest(entry.name, classes)}")
        found = image_paths(entry)
        paths += found
        labels += [classes.index(entry.name)] * len(found)
    if not paths:
        raise DataError(f"{folder} has no images: expected <class>/<name>, named {', '.join(SUFFIXES)}")
    return paths, np.array(labels, np.int64)


def _shape(first: epath.Path, size: tuple[int, int] | None, channels: int) -> tuple[int, int, int]:
    y, x = size or decode(first.read_bytes(), None, first).shape[:2]
    return y, x, channels
