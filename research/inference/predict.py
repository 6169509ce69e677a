"""Predictions for inputs without labels, as arrays, rows, a file and a table."""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float
from rich.markup import escape
from rich.table import Table

from research.core.errors import DataError
from research.core.folder import plain, write_text
from research.core.types import Batch, Hyper, Objective, Tree
from research.inference.batches import fetched, padded, valid


def predict(
    objective: Objective, params: Tree, extra: Tree, frozen: Tree, hyper: Hyper, batches: Iterable[Batch], *, rows: int | None = None
) -> dict[str, np.ndarray]:
    """What the objective predicts for every valid example, in order: {"logits" | "value" | …: array}.

    One compiled program: a short last batch is filled up with masked rows.

    Args:    batches: of the model's input fields and `mask`.  rows: examples per call of the program; None: as many as the first batch has.
    Raises:  DataError: no batches.
    """
    model = jax.device_put((params, extra, frozen, hyper))  # once, not with every batch
    results = ((valid(batch), _predict(objective, *model, batch)) for batch in padded(batches, rows))
    parts = [{name: x[keep] for name, x in outputs.items()} for keep, outputs in fetched(results)]
    if not parts:
        raise DataError("there is nothing to predict: the input has no examples")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@functools.partial(jax.jit, static_argnums=0)
def _predict(objective, params, extra, frozen, hyper, batch):
    return objective.predict(params, extra, frozen, batch, None, hyper)[0]


def class_rows(probability: Float[np.ndarray, "b n"], names: Sequence[str], classes: Sequence[str], top: int = 5) -> list[dict[str, Any]]:
    """One row per example: {input, class, probability, top: [{class, probability}, …] likeliest first}.

    Args:    names: of the examples, as file names.  classes: names by number; empty: the numbers themselves.  top: classes listed, at least 1.
    """
    known = classes or [str(i) for i in range(probability.shape[1])]
    order = np.argsort(-probability, axis=1, kind="stable")[:, : max(top, 1)]
    rows = []
    for name, places, values in zip(names, order, probability, strict=True):
        best = [{"class": known[i], "probability": float(values[i])} for i in places]
        rows.append({"input": name, **best[0], "top": best})
    return rows


def value_rows(value: Float[np.ndarray, "b o"], names: Sequence[str]) -> list[dict[str, Any]]:
    """One row per example: {input, value: [one number per output]}.

    Args:    value: in the units of the data.  names: of the examples.
    """
    return [{"input": name, "value": [float(x) for x in values]} for name, values in zip(names, value, strict=True)]


def write_predictions(path: epath.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line; a number that is not finite becomes null. The file appears whole or not at all.

    Raises:  ResearchError: the disk is full, read-only or not there.
    """
    write_text(path, "".join(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def table(rows: Sequence[Mapping[str, Any]], limit: int = 20) -> Table:
    """The first rows as a table for the terminal, with a last line that counts the others."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    shown.add_column("input", overflow="fold")
    if rows and "class" in rows[0]:
        shown.add_column("class")
        shown.add_column("probability", justify="right")
        shown.add_column("next likeliest", style="dim")
        for row in rows[:limit]:
            others = ", ".join(f"{other['class']} {other['probability']:.1%}" for other in row["top"][1:])
            shown.add_row(escape(row["input"]), escape(row["class"]), f"{row['probability']:.1%}", escape(others))
    else:
        shown.add_column("value", justify="right")
        for row in rows[:limit]:
            shown.add_row(escape(row["input"]), "  ".join(f"{x:.6g}" for x in row["value"]))
    if len(rows) > limit:
        shown.add_row(f"… and {len(rows) - limit:,} more")
    return shown
