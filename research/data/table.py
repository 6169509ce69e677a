"""Rows of numbers from a csv, jsonl or npz file: regression or classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from research.core.errors import ConfigError, DataError, nearest
from research.core.spec import fields
from research.data.checks import located
from research.data.dataset import Arrays, Dataset
from research.data.preprocess import Preprocessor, standardise
from research.data.rows import Rows, read_rows
from research.data.split import Share, draw

TASKS = ("regression", "classes")


def table(
    root: str,
    path: str,
    target: str | tuple[str, ...] | None = None,
    task: str = "regression",
    standardise_features: bool = True,
    standardise_target: bool = True,
    seed: int = 0,
    validation: Share = 0.1,
    test: Share = 0.0,
    fitted: Preprocessor | None = None,
) -> Dataset:
    """A data set of one file's rows, split at random.

    Args:    root: the folder that a relative path starts from.  path: a .csv with a header, a .jsonl or an .npz.
             target: the column, or columns, to predict; null: the last one. All others are features.
             task: regression | classes; a class is any text.
             standardise_features, standardise_target: less the mean, over the deviation of the training part; predictions are given back in
             the file's units.
             seed: of the split.  validation, test: rows, or a share of all rows.  fitted: what a run has fitted; null: fit here.
    Raises:  DataError: a missing or unreadable file or row, a cell that is no finite number, a class that the training part lacks.
             ConfigError: an unknown task; parts that leave nothing to train on.
    """
    if task not in TASKS:
        raise ConfigError(f"data.task={task!r} is unknown{nearest(task, TASKS)}")
    rows = read_rows(located(root, path))
    targets = (target,) if isinstance(target, str) else target or (list(rows.columns)[-1],)
    for name in targets:
        rows.column(name)  # a misspelt target is named before anything else
    columns = fitted.spec["columns"] if fitted else [name for name in rows.columns if name not in targets]
    if not columns:
        hint = "; its cells must be separated by commas" if any(mark in name for name in targets for mark in ";\t") else ""
        raise DataError(f"{rows.path} has no column beside the target {', '.join(targets)}{hint}")
    features = rows.numbers(columns)
    parts = draw(len(rows), seed, validation=validation, test=test)
    spec: dict[str, Any] = {"features": len(columns), "columns": list(columns), "examples": {name: len(part) for name, part in parts.items()}}
    statistics = dict(fitted.statistics) if fitted else standardise("features", features[parts["train"]]) if standardise_features else {}
    if task == "classes":
        classes = fitted.classes if fitted else _classes(rows, targets, parts["train"])
        raw = {"features": features, "label": _labels(rows, targets[0], classes)}
        spec |= {"fields": fields(features=((len(columns),), "float32"), label=((), "int32")), "classes": len(classes), "outputs": len(classes)}
    else:
        classes, value = (), rows.numbers(targets)
        raw = {"features": features, "target": value}
        spec |= {"fields": fields(features=((len(columns),), "float32"), target=((len(targets),), "float32")), "outputs": len(targets)}
        if standardise_target and not fitted:
            statistics |= standardise("target", value[parts["train"]])
    preprocessor = Preprocessor(spec, None, statistics, tuple(classes))
    return Dataset(
        {name: Arrays({key: array[part] for key, array in raw.items()}, preprocessor) for name, part in parts.items()}, preprocessor, parts
    )


def _classes(rows: Rows, targets: Sequence[str], train: np.ndarray) -> tuple[str, ...]:
    if len(targets) > 1:
        raise ConfigError(f"data.target={list(targets)}: classes are one column")
    cells = rows.column(targets[0])
    return tuple(sorted({str(cells[i]) for i in train}, key=_natural))


def _natural(name: str) -> tuple[float, str]:
    """Numbers in their order, then all else by the alphabet."""
    try:
        return float(name), name
    except ValueError:
        return float("inf"), name


def _labels(rows: Rows, target: str, classes: Sequence[str]) -> np.ndarray:
    number = {name: i for i, name in enumerate(classes)}
    for i, cell in enumerate(rows.column(target)):
        if str(cell) not in number:
            raise DataError(f"{rows.path}, {rows.names[i]}: class {str(cell)!r} is not in the training part{nearest(str(cell), classes)}")
    return np.array([number[str(cell)] for cell in rows.column(target)], np.int32)
