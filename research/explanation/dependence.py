"""What a model's outputs depend on over many examples of the run's own data: permutation importance, partial dependence."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from research.core.errors import ConfigError, nearest
from research.core.keys import named
from research.core.progress import track
from research.core.types import Batch
from research.explanation.lime import generator
from research.explanation.model import INPUT, Examples, Model, outputs_of
from research.explanation.perturbation import ROWS, axes, check_rows
from research.explanation.result import Finding
from research.explanation.segments import check_segments, grid
from research.explanation.split import Split
from research.figures import explanation as draw
from research.losses.cross_entropy import cross_entropy

SCORES = ("accuracy", "loss")
SHOWN = 12  # columns that are drawn: those along which the output changes most
CELLS = 16  # of an image that are drawn as bars beside the map of all
CURVES = 6  # outputs that are drawn side by side
EDGE = 0.05  # share of the examples beyond either end of a curve


@dataclasses.dataclass(frozen=True)
class Permutation:
    """How much worse the model does where a feature's values change places between examples, so that it tells nothing any more.

    A column is a feature; pixels form the cells of a grid.

    Args:    split: of the run's data; None: test, else validation, else train.  examples: at most so many, drawn by lot.
             repeats: orders that each feature is put in, at least 2; the interval is that of the mean over them, 95 % by Student's t.
             segments: cells of an image, or spans of an audio, at most.  score: accuracy | loss; None: accuracy of classes, else loss.
             rows: examples in one call of the model.
    Raises:  ConfigError: a value out of range, a split that is not there, accuracy of a model without classes.
    Source:  Breiman 2001; Fisher, Rudin and Dominici 2019.
    """

    split: str | None = None
    examples: int = 512
    repeats: int = 5
    segments: int = 49
    score: str | None = None
    rows: int = ROWS
    reads: ClassVar[str] = "nothing"

    def __post_init__(self):
        check_rows(self.rows)
        check_segments(self.segments, "grid")
        for name, least in (("examples", 2), ("repeats", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be at least {least}")
        if self.score not in (None, *SCORES):
            raise ConfigError(f"method.score={self.score!r} is unknown{nearest(str(self.score), SCORES)}")

    def fits(self, model: Model) -> str | None:
        """Why there is nothing to permute or to score."""
        if model.data is None:
            return "it needs the run's data"
        if model.field == "tokens":
            return "a token has no place of its own that it could change with another text's"
        if not {"label", "target"} & set(model.spec["fields"]):
            return "its data has neither label nor target to score by"
        return None

    def __call__(self, model: Model, examples: Examples | None, key: jax.Array) -> Finding:
        """The mean fall of the score at each feature, with an interval; largest first on the terminal."""
        score = self.score or ("accuracy" if "label" in model.spec["fields"] else "loss")
        if score == "accuracy" and "label" not in model.spec["fields"]:
            raise ConfigError("method.score=accuracy: this model has no classes; use loss")
        name, split = drawn_from(model, self.split, self.examples, key)
        batch = dict(split.batch(split.indices))
        groups = _groups(model, self.segments)
        names = _names(model, groups)
        features = [np.zeros(groups.shape, bool), *(groups == j for j in range(len(names)))]
        random, orders = generator(named(key, "orders")), []
        for _ in range(self.repeats):
            orders.append(random.permutation(len(split)))
        base = self._score(model, batch, orders[0], features[0], score)
        falls = np.empty((self.repeats, len(names)))
        todo = [(r, j) for r in range(self.repeats) for j in range(len(names))]
        for r, j in track(todo, "permutation importance"):
            falls[r, j] = base - self._score(model, batch, orders[r], features[1 + j], score)
        return self._finding(model, names, groups, falls, batch, name, score, base)

    def _score(self, model: Model, batch: Batch, order: Int[np.ndarray, "n"], covered: Bool[np.ndarray, "..."], score: str) -> float:
        """The mean score, the larger the better, with the covered positions from the examples in this order."""
        inputs, total = np.asarray(batch[model.field]), 0.0
        rows = min(self.rows, len(order))
        for start in range(0, len(order), rows):
            here = np.arange(start, min(start + rows, len(order)))
            filled = np.resize(here, rows)
            own = {field: np.asarray(values)[filled] for field, values in batch.items()}
            made = _swapped(model.objective, score, model.arrays, own, inputs[order[filled]], model.field, covered)
            total += float(np.asarray(made, np.float64)[: len(here)].sum())
        return total / len(order)

    def _finding(self, model: Model, names, groups, falls, batch, split: str, score: str, base: float) -> Finding:
        mean = falls.mean(0)
        half = stats.t.ppf(0.975, len(falls) - 1) * falls.std(0, ddof=1) / math.sqrt(len(falls))
        told = f"fall of the accuracy, {split} split" if score == "accuracy" else f"rise of the loss, {split} split"
        panels: list[draw.Panel] = []
        if model.field == "image":
            panels.append(draw.Overlay(np.asarray(batch["image"]).mean(0), mean[groups].astype(np.float32), f"{told}, by cell"))
        order = np.argsort(-mean, kind="stable")
        first = order[:CELLS] if model.field == "image" else order
        panels.append(draw.Bars([names[j] for j in first], mean[first], told, low=(mean - half)[first], high=(mean + half)[first]))
        best = [names[j] for j in order[:3]]
        shown = f"accuracy {base:.4g}" if score == "accuracy" else f"loss {-base:.4g}"
        return Finding(
            drawn=panels,
            numbers={
                "score": score,
                "split": split,
                "examples": len(batch["mask"]),
                "base": base if score == "accuracy" else -base,
                "importance": dict(zip(names, mean.tolist(), strict=True)),
                "half_interval": dict(zip(names, half.tolist(), strict=True)),
            },
            kept={"importance": mean, "low": mean - half, "high": mean + half, "falls": falls, "groups": groups},
            lines=[f"{shown} on {len(batch['mask'])} examples of the {split} split; it rests most on {', '.join(best)}"],
        )


@dataclasses.dataclass(frozen=True)
class PartialDependence:
    """The mean output over many examples whose one column is set to a value, as a function of that value; beside it some examples each alone.

    The mean is over all combinations of the column with the other columns, also those that do not occur. Where columns hang together, trust the
    faint lines of single examples (individual conditional expectation) and the part of the axis where there is data.

    Args:    columns: by name or number; (): all.  output: a number or a class's name; None: the first of a regression, each of at most 6 classes.
             points: values of a column, evenly between its 5th and 95th percentile, or all that it takes where they are no more.
             grid: column -> so many points, or these values, in the data's own units.  lines: examples that are drawn alone.
             split: of the run's data; None: train.  examples: at most so many, drawn by lot.  rows: examples in one call of the model.
    Raises:  ConfigError: a value out of range, no such column, output or split.
    Source:  Friedman 2001; Goldstein et al. 2015 (single examples).
    """

    columns: tuple[str | int, ...] = ()
    output: str | int | None = None
    points: int = 20
    grid: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lines: int = 24
    split: str | None = "train"
    examples: int = 256
    rows: int = ROWS
    reads: ClassVar[str] = "nothing"

    def __post_init__(self):
        check_rows(self.rows)
        for name, least in (("points", 2), ("examples", 1), ("lines", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be at least {least}")

    def fits(self, model: Model) -> str | None:
        """Why there are no columns to follow."""
        if model.field != "features":
            return f"it follows the columns of a table, and this model reads {model.field}"
        return "it needs the run's data" if model.data is None else None

    def __call__(self, model: Model, examples: Examples | None, key: jax.Array) -> Finding:
        """A curve for each column: in the data's own units where the run knows them."""
        names = column_names(model)
        chosen = [column(model, each, "columns") for each in self.columns] or list(range(len(names)))
        asked = {column(model, each, "grid"): value for each, value in self.grid.items()}
        outputs = self._outputs(model)
        _, split = drawn_from(model, self.split, self.examples, key)
        batch = split.batch(split.indices)
        places = {j: self._grid(model, np.asarray(batch["features"])[:, j], j, asked.get(j)) for j in chosen}
        todo = [(j, value) for j in chosen for value in places[j]]
        made = [self._along(model, batch, j, value)[:, outputs] for j, value in track(todo, "partial dependence")]
        panels, kept, changes, at = {}, {}, {}, 0
        for j in chosen:
            curves = np.stack(made[at : at + len(places[j])], 1)  # b points outputs
            at += len(places[j])
            x = restored(model, "features", places[j], j)
            curves = np.stack([restored(model, "target", curves[..., i], o) for i, o in enumerate(outputs)], -1)
            mean = curves.mean(0)
            changes[j] = float(np.ptp(mean, axis=0).max())
            kept |= {f"{names[j]}/x": x, f"{names[j]}/mean": mean, f"{names[j]}/each": curves}
            panels[j] = self._panel(model, names[j], x, curves, outputs)
        first = sorted(chosen, key=lambda j: -changes[j])[:SHOWN]
        return Finding(
            drawn=[panels[j] for j in first],
            numbers={"examples": len(split), "range": {names[j]: changes[j] for j in chosen}},
            kept=kept,
            lines=[f"the mean output over {len(split)} examples changes most along {', '.join(names[j] for j in first[:3])}"],
        )

    def _outputs(self, model: Model) -> list[int]:
        """The outputs to follow."""
        count = model.outputs[-1]
        if self.output is None:
            return list(range(min(count, CURVES))) if "classes" in model.spec else [0]
        if str(self.output) in model.classes:
            return [list(model.classes).index(str(self.output))]
        if not str(self.output).isdigit() or int(self.output) >= count:
            raise ConfigError(f"method.output={self.output}: this model has the outputs 0 to {count - 1}{nearest(str(self.output), model.classes)}")
        return [int(self.output)]

    def _grid(self, model: Model, values: Float[np.ndarray, "n"], j: int, asked: Any) -> Float[np.ndarray, "p"]:
        """The values of a column to visit, as the model reads them."""
        if isinstance(asked, Sequence) and not isinstance(asked, str):
            mean, deviation = _scale(model, "features", j)
            if not asked:
                raise ConfigError(f"method.grid: {column_names(model)[j]} lists no value")
            return ((np.array(asked, np.float64) - mean) / deviation).astype(np.float32)
        points = self.points if asked is None else asked
        if not isinstance(points, int) or points < 2:
            raise ConfigError(f"method.grid: {column_names(model)[j]}={points!r} must be a number of points, at least 2, or a list of values")
        there = np.unique(values)
        if len(there) <= points:
            return there
        low, high = np.quantile(values, [EDGE, 1 - EDGE])
        return np.linspace(low, high, points).astype(np.float32)

    def _along(self, model: Model, batch: Batch, j: int, value: float) -> Float[np.ndarray, "b n"]:
        """The outputs of all examples with the column at this value."""
        count = len(batch["mask"])
        rows, made = min(self.rows, count), []
        for start in range(0, count, rows):
            filled = np.resize(np.arange(start, min(start + rows, count)), rows)
            chunk = {field: np.asarray(values)[filled] for field, values in batch.items()}
            made.append(_set(model.objective, model.arrays, chunk, np.int32(j), np.float32(value)))
        return np.concatenate(made)[:count].astype(np.float64)

    def _panel(self, model: Model, name: str, x: np.ndarray, curves: Float[np.ndarray, "b p o"], outputs: list[int]) -> draw.Lines:
        along = f"column {name}" if name.isdigit() else name
        if len(outputs) > 1:
            return draw.Lines({model.name(o): (x, curves[..., i].mean(0)) for i, o in enumerate(outputs)}, x=along, y="output")
        faint = [(x, curve) for curve in curves[: self.lines, :, 0]]
        label = model.name(outputs[0]) if model.classes else "mean"
        return draw.Lines({label: (x, curves[..., 0].mean(0))}, x=along, y="output", faint=faint)


def drawn_from(model: Model, split: str | None, count: int, key: jax.Array) -> tuple[str, Split]:
    """(the name of a split of the run's data, at most so many of its examples, drawn by lot).

    Args:    split: None: test, else validation, else train.
    Raises:  ConfigError: no such split.
    """
    assert model.data is not None
    splits = model.data().splits
    name = split or next(name for name in ("test", "validation", "train") if name in splits)
    if name not in splits:
        raise ConfigError(f"method.split={name!r}: the run's data has no such split{nearest(name, splits)}")
    indices = np.arange(len(splits[name]))
    if count < len(indices):
        indices = np.sort(np.asarray(jax.random.permutation(named(key, "examples"), len(indices)))[:count])
    return name, Split(splits[name], indices)


def column_names(model: Model) -> list[str]:
    """The columns of a table, by name where they have one."""
    count = math.prod(model.spec["fields"]["features"]["shape"])
    return [str(name) for name in model.spec.get("columns") or range(count)]


def column(model: Model, name: str | int, where: str) -> int:
    """The number of a column that is named by name or number.

    Raises:  ConfigError: naming the nearest one.
    """
    names = column_names(model)
    if str(name) in names:
        return names.index(str(name))
    if str(name).isdigit() and int(name) < len(names):
        return int(name)
    raise ConfigError(f"method.{where}: {name!r} is no column of this run{nearest(str(name), names)}")


def restored(model: Model, field: str, values: np.ndarray, j: int) -> np.ndarray:
    """Numbers of one column as they stand in the data's own file."""
    mean, deviation = _scale(model, field, j)
    return np.asarray(values, np.float64) * deviation + mean


def _scale(model: Model, field: str, j: int) -> tuple[float, float]:
    if f"{field}_mean" not in model.statistics:
        return 0.0, 1.0
    mean, deviation = (float(np.ravel(model.statistics[f"{field}_{name}"])[j]) for name in ("mean", "std"))
    return mean, deviation


def _groups(model: Model, segments: int) -> Int[np.ndarray, "..."]:
    """The feature of each position, the same for all examples."""
    places = model.spec["fields"][model.field]["shape"][: axes(model)]
    return grid(places, math.prod(places) if model.field == "features" else segments)


def _names(model: Model, groups: Int[np.ndarray, "..."]) -> list[str]:
    if model.field == "features":
        return column_names(model)
    names = []
    for j in range(int(groups.max()) + 1):
        ends = [(place.min(), place.max()) for place in np.nonzero(groups == j)]
        axis_names = ("y", "x") if len(ends) == 2 else ("time",)
        names.append(" ".join(f"{axis} {low}-{high}" for axis, (low, high) in zip(axis_names, ends, strict=True)))
    return names


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def _swapped(objective, score, arrays, batch, donor, field, covered):
    """The score of each example, its covered positions from its donor."""
    value = outputs_of(objective, arrays, {**batch, field: donor})[1][INPUT]
    mask = covered.reshape((1, *covered.shape) + (1,) * (value.ndim - 1 - covered.ndim))
    outputs, _ = outputs_of(objective, arrays, batch, {INPUT: (mask, value)})
    if score == "accuracy":
        return (outputs.argmax(-1) == batch["label"]).astype(jnp.float32)
    if "label" in batch:
        return -cross_entropy(outputs, batch["label"])
    return -jnp.square(outputs - batch["target"]).mean(-1)


@functools.partial(jax.jit, static_argnums=0)
def _set(objective, arrays, batch, column, value):
    """All outputs with one column at this value."""
    mask = (jnp.arange(batch["features"].shape[1], dtype=jnp.int32) == column)[None]
    return outputs_of(objective, arrays, batch, {INPUT: (mask, value[None, None])})[0]
