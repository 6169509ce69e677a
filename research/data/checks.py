"""Checks of data before anything is trained on it: a gather out of range clamps silently, and one NaN poisons a run."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from research.core.errors import DataError, nearest


def existing(path: epath.PathLike) -> epath.Path:
    """The path, known to exist.

    Raises:  DataError: naming the first part of the path that is missing, and the nearest name beside it.
    """
    path = epath.Path(path).expanduser()
    if path.exists():
        return path
    missing = path
    while not missing.parent.exists() and missing.parent != missing:
        missing = missing.parent
    beside = [entry.name for entry in missing.parent.iterdir()] if missing.parent.is_dir() else []
    within = "" if missing == path else f": there is no {missing}"
    raise DataError(f"{path} does not exist{within}{nearest(missing.name, beside)}")


def located(root: str, path: str) -> epath.Path:
    """`<root>/<path>`, or the path itself where it is absolute.

    Raises:  DataError: it is not there, but under the current folder, where the user may have meant it to be.
    """
    full = epath.Path(root).expanduser() / epath.Path(path).expanduser()
    if not full.exists() and epath.Path(path).exists():
        raise DataError(f"{full} does not exist, but {path} does: data.root=. starts from the current folder")
    return full


def check_finite(values: Float[np.ndarray, "n f"], columns: Sequence[Any], row: Callable[[int], str], where: Any) -> None:
    """Refuses NaN, infinity and numbers beyond float32.

    Args:    columns: a name for each column.  row: the name of a row by its number, as "line 3".  where: the file.
    Raises:  DataError: naming the first such value, its row and column.
    """
    with np.errstate(over="ignore"):
        bad = np.argwhere(~np.isfinite(values.astype(np.float32)))
    if len(bad):
        i, j = (int(k) for k in bad[0])
        raise DataError(f"{where}, {row(i)}, column {columns[j]!r}: {values[i, j]} is not a finite float32")


def check_labels(labels: Int[np.ndarray, "n"], classes: int, row: Callable[[int], str], where: Any) -> None:
    """Refuses labels outside 0 … classes - 1.

    Raises:  DataError: naming the first such label, its row and the range.
    """
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if bad.size:
        i = int(bad[0])
        raise DataError(f"{where}, {row(i)}: label {labels[i]} is outside 0 … {classes - 1}")


def check_tokens(tokens: Int[np.ndarray, "t"], vocabulary: int, where: Any) -> None:
    """Refuses token numbers outside 0 … vocabulary - 1.

    Raises:  DataError: naming the first such token, its position and the range.
    """
    bad = np.flatnonzero((tokens < 0) | (tokens >= vocabulary))
    if bad.size:
        i = int(bad[0])
        raise DataError(f"{where}: token {tokens[i]} at position {i} is outside 0 … {vocabulary - 1}")
