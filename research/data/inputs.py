"""What a person hands to a trained model: image files, folders, tables."""

import numpy as np
from etils import epath

from research.core.errors import DataError
from research.core.spec import Spec
from research.data.checks import existing
from research.data.images import SUFFIXES, image_paths, read_files
from research.data.rows import read_arrays, read_rows

Inputs = tuple[list[str], dict[str, np.ndarray]]


def read_inputs(path: epath.PathLike, spec: Spec) -> Inputs:
    """The names and the raw arrays of examples to predict, by what the run's data spec says it reads.

    For images: an image, a folder of images, an .npz with `image` (bytes), or a .csv or .jsonl whose `image` is a path beside it. For
    features: a .csv, .jsonl or .npz with the columns that the model was trained on; others are ignored. `Preprocessor` makes fields of them,
    as it does in training.

    Args:    path: of the input.  spec: `Preprocessor.spec`.
    Raises:  DataError: a missing or unreadable file or row, a missing column, an image array of another shape, a run that reads text.
    """
    path = existing(path)
    if "image" in spec:
        return _images(path, tuple(spec["image"]))
    if "columns" in spec or "features" in spec:
        rows = read_rows(path)
        columns = spec.get("columns") or [f"features_{j}" for j in range(spec["features"])]
        return list(rows.names), {"features": rows.numbers(columns)}
    raise DataError(f"{path}: this model reads neither images nor features; a language model is given prompt=…")


def _images(path: epath.Path, shape: tuple[int, ...]) -> Inputs:
    suffix = path.suffix.lower()
    if path.is_dir():
        files = image_paths(path)
        if not files:
            raise DataError(f"{path} has no images named {', '.join(SUFFIXES)}")
        return [str(file.relative_to(path)) for file in files], {"image": read_files(files, shape)}
    if suffix == ".npz":
        return _image_array(path, shape)
    if suffix in (".csv", ".jsonl"):
        rows = read_rows(path)
        names = [str(cell) for cell in rows.column("image")]
        return names, {"image": read_files([_beside(path, name) for name in names], shape)}
    return [path.name], {"image": read_files([path], shape)}


def _beside(table: epath.Path, name: str) -> epath.Path:
    """The file that a table's cell names; only in the table's own folder and below it, since a table may come from anyone."""
    if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
        raise DataError(f"{table}: image {name!r} lies outside the table's folder; only files in {table.parent} and below it are read")
    return existing(table.parent / name)


def _image_array(path: epath.Path, shape: tuple[int, ...]) -> Inputs:
    arrays = read_arrays(path)
    if "image" not in arrays:
        raise DataError(f"{path} has no array 'image'; it holds {', '.join(arrays) or 'nothing'}")
    images = arrays["image"]
    if images.ndim == 3 and shape[-1] == 1:
        images = images[..., None]  # n y x -> n y x 1
    if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
        raise DataError(f"{path}: image is {images.dtype}{list(images.shape)}, and the model reads uint8[n, {', '.join(map(str, shape))}]")
    return [f"row {i}" for i in range(len(images))], {"image": images}
