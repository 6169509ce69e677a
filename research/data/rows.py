"""Tables from csv, jsonl and npz files: named columns of cells, and where each row stands in its file."""

import csv
import dataclasses
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from research.core.errors import DataError, nearest
from research.data.checks import check_finite, existing


@dataclasses.dataclass(frozen=True)
class Rows:
    """A table in memory.

    Args:    path: its file.  columns: name -> cells, all of one length.  names: of the rows, as "line 3".
    """

    path: epath.Path
    columns: Mapping[str, Any]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def column(self, name: str) -> Any:
        """The cells of a column.

        Raises:  DataError: naming the nearest column.
        """
        if name not in self.columns:
            raise DataError(f"{self.path} has no column {name!r}{nearest(name, self.columns)}")
        return self.columns[name]

    def numbers(self, names: Sequence[str]) -> Float[np.ndarray, "n f"]:
        """Some columns as numbers.

        Raises:  DataError: naming the first cell that is no finite number.
        """
        values = np.empty((len(self), len(names)))
        for j, name in enumerate(names):
            cells = self.column(name)
            try:
                values[:, j] = np.asarray(cells, np.float64)
            except (ValueError, TypeError):
                values[:, j] = [_number(cell, f"{self.path}, {self.names[i]}, column {name!r}") for i, cell in enumerate(cells)]
        check_finite(values, names, self.names.__getitem__, self.path)
        return values


def read_rows(path: epath.PathLike) -> Rows:
    """The table in a file: .csv with a header, .jsonl with one object a line, or .npz with arrays whose first axis is the row.

    A list in an object, or an array of two axes, becomes the columns `name_0`, `name_1` …

    Raises:  DataError: a missing, unreadable or empty file, or a row unlike the others; file and row are named.
    """
    path = existing(path)
    readers = {".csv": _csv, ".jsonl": _jsonl, ".npz": _npz}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path} is not a table: its name must end in {', '.join(readers)}")
    try:
        rows = readers[path.suffix.lower()](path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not len(rows):
        raise DataError(f"{path} has no rows")
    return rows


def _csv(path: epath.Path) -> Rows:
    reader = csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True)
    lines, numbers = [], []
    try:
        for cells in reader:
            if cells:
                lines.append(cells)
                numbers.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    header, body = (lines[0], lines[1:]) if lines else ([], [])
    if header and all(map(_is_number, header)):
        raise DataError(f"{path}, line 1: the first line must name the columns, and holds only numbers")
    if len(set(header)) < len(header):
        raise DataError(f"{path}, line 1: the column {next(name for name in header if header.count(name) > 1)!r} is there twice")
    for cells, number in zip(body, numbers[1:], strict=True):
        if len(cells) != len(header):
            raise DataError(f"{path}, line {number}: {len(cells)} cells, and the header names {len(header)}")
    return Rows(path, dict(zip(header, zip(*body, strict=True), strict=True)) if body else {}, [f"line {number}" for number in numbers[1:]])


def _jsonl(path: epath.Path) -> Rows:
    columns: dict[str, list[Any]] = {}
    names = []
    for number, line in enumerate(path.read_bytes().decode("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # its own words call this line 1
            fault = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else error
            raise DataError(f"{path}, line {number} is not JSON: {fault}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
        cells = dict(_flat(row))
        if not names:
            columns = {name: [] for name in cells}
        if cells.keys() != columns.keys():
            name = sorted(cells.keys() ^ columns.keys())[0]
            raise DataError(
                f"{path}, line {number}: {name!r} is {'missing' if name in columns else 'not'} in {'it' if name in columns else names[0]}"
            )
        for name, cell in cells.items():
            columns[name].append(cell)
        names.append(f"line {number}")
    return Rows(path, columns, names)


def read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz, nothing in it executed.

    Raises:  DataError: a file that is truncated, no .npz, or holds Python objects.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, EOFError, zipfile.BadZipFile, AttributeError, OSError) as error:
        raise DataError(f"{path} cannot be read as .npz: {str(error).splitlines()[0]}") from error


def _npz(path: epath.Path) -> Rows:
    columns: dict[str, Any] = {}
    for name, array in read_arrays(path).items():
        if array.ndim not in (1, 2):
            raise DataError(f"{path}: array {name!r} of shape {array.shape} is no column: one or two axes are")
        columns |= {name: array} if array.ndim == 1 else {f"{name}_{j}": array[:, j] for j in range(array.shape[1])}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{path}: arrays of unequal length: {lengths}")
    return Rows(path, columns, [f"row {i}" for i in range(next(iter(lengths.values()), 0))])


def _flat(row: Mapping[str, Any]):
    for name, value in row.items():
        yield from ((f"{name}_{j}", cell) for j, cell in enumerate(value)) if isinstance(value, list) else [(name, value)]


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (ValueError, TypeError):
        return False
    return True


def _number(cell: Any, where: str) -> float:
    if not _is_number(cell):
        raise DataError(f"{where}: {cell!r} is not a number")
    return float(cell)
