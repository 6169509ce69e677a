"""Labelled images by name: parquet files on this machine, or the same data from the Hugging Face Hub."""

import urllib.error
import urllib.request
from typing import Any

import numpy as np
from etils import epath

from research.core.errors import DataError, nearest
from research.data.checks import check_labels, existing
from research.data.classification import Labelled, labelled_images
from research.data.dataset import Dataset
from research.data.images import decode_all
from research.data.preprocess import Preprocessor
from research.data.split import Share, draw

_PROBE_S = 5


def parquet_images(
    root: str,
    name: str,
    hub: str,
    shape: tuple[int, int, int],
    classes: tuple[str, ...],
    image: str = "image",
    label: str = "label",
    seed: int = 0,
    validation: Share = 0.1,
    only: tuple[int, ...] | None = None,
    fitted: Preprocessor | None = None,
) -> Dataset:
    """A data set of `<root>/<name>/{train,test}.parquet`; without that folder, of the Hub, whose files have the same columns.

    The official test set stays the test set; validation is drawn from the training set. Pixels are kept as bytes.

    Args:    root: where named data sets lie.  name: the folder.  hub: the name on the Hub.  shape: of an image; others are resized.
             classes: the names of the classes.  image, label: the columns.  seed: of the split.  validation: rows, or a share.
             only: numbers of the classes whose examples are kept; null: all.
             fitted: what a run has fitted; null: fit here.
    Raises:  DataError: no such data and no network; a file, image or label that cannot be read.  ConfigError: too large a validation part.
    """
    folder = epath.Path(root).expanduser() / name
    local = folder.exists()

    def rows(part: str) -> Labelled:
        if local:
            where = existing(folder / f"{part}.parquet")
            table = _read(where)
        else:
            where, table = f"{hub} ({part})", _download(hub, part, name, root)
        return _decode(table, where, image, label, shape, len(classes))

    images, labels = rows("train")
    drawn = draw(len(labels), seed, validation=validation)
    splits = {part: (images[r], labels[r]) for part, r in drawn.items()}
    return labelled_images({**splits, "test": rows("test")}, classes, drawn, fitted, only)


def _read(path: epath.Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file:
            return pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from error


def _download(hub: str, part: str, name: str, root: str) -> Any:
    """The split as an Arrow table; only from the library's cache where there is no network, without its half minute of retries."""
    try:
        import datasets
        import datasets.config
        import huggingface_hub.constants
    except ModuleNotFoundError as error:
        hint = f"set paths.data or RESEARCH_DATA to the folder that holds {name}/, or install what downloads it: pip install 'ontogeny[hub]'"
        raise DataError(f"no data set {name!r} in {root!r}: {hint}") from error

    offline = not _reachable(huggingface_hub.constants.ENDPOINT)
    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if offline:
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        return datasets.load_dataset(hub, split=part).data.table
    except Exception as error:  # the library raises many kinds, from a missing name to a broken connection
        reason = "there is no network" if offline else f"the Hub's {hub!r} cannot be loaded ({type(error).__name__})"
        raise DataError(
            f"no data set {name!r} in {root!r}, and {reason}: set paths.data or RESEARCH_DATA to the folder that holds {name}/"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def _reachable(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=_PROBE_S).close()
    except urllib.error.HTTPError:  # it answers, if only with a refusal
        return True
    except OSError:
        return False
    return True


def _decode(table: Any, where: Any, image: str, label: str, shape: tuple[int, int, int], classes: int) -> Labelled:
    for column in (image, label):
        if column not in table.column_names:
            raise DataError(f"{where} has no column {column!r}{nearest(column, table.column_names)}")
    encoded = [row["bytes"] or b"" if row else b"" for row in table.column(image).to_pylist()]
    labels = np.array([-1 if value is None else value for value in table.column(label).to_pylist()], np.int64)
    check_labels(labels, classes, "row {}".format, where)
    return decode_all(encoded.__getitem__, len(encoded), shape, lambda i: f"{where}, row {i}"), labels
