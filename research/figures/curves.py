"""Learning curves."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from research.core.direction import HEADLINES, direction
from research.figures import style

LOG_RATIO = 50.0  # a loss that spans more than this is drawn on a log scale
Line = tuple[Float[np.ndarray, "t"], Float[np.ndarray, "t"]]


def curves(records: Sequence[Mapping[str, Any]], path: epath.PathLike, *, title: str = "", metric: str | None = None) -> None:
    """Draws how a run learned: loss, the headline metric where there is one, and the learning rate, over steps.

    Training is thin, validation thick with a point per evaluation and its best marked. A value that is None or not finite leaves a gap.

    Args:    records: the lines of metrics.jsonl, each with `step` and any of `<split>/<name>`.  path: the PNG to write.  title: over the figure.
             metric: the headline, as "accuracy"; None: the first of `HEADLINES` that was evaluated.
    """
    metric = metric or _headline(records)
    rate = _line(records, "learning_rate", "train/learning_rate")
    names, heights = ["loss"], [3.0]
    if metric is not None:
        names, heights = [*names, metric], [*heights, 2.0]
    figure = style.new(8.0, 1.4 + 1.05 * (sum(heights) + (0.9 if len(rate[0]) else 0)), title)
    rows = len(names) + bool(len(rate[0]))
    grid = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=[*heights, 0.9][:rows])[:, 0]
    for axes, name in zip(grid, names, strict=False):
        _metric(axes, records, name)
    if len(rate[0]):
        grid[-1].plot(*rate, color=style.FAINT, linewidth=1.3, marker="." if len(rate[0]) == 1 else None)
        grid[-1].set_ylim(bottom=0)
        grid[-1].yaxis.set_major_formatter(lambda x, _: f"{x:g}")
        style.tidy(grid[-1], y="learning rate")
    grid[-1].set_xlabel("step", fontsize=9.5, color=style.INK)
    if any(axes.has_data() for axes in grid):
        grid[-1].xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
        grid[-1].xaxis.set_major_formatter(style.THOUSANDS)
    figure.align_ylabels()
    style.save(figure, path)


def _metric(axes: Axes, records: Sequence[Mapping[str, Any]], name: str) -> None:
    train, validation = _line(records, f"train/{name}"), _line(records, f"validation/{name}")
    if len(train[0]):
        axes.plot(*train, color=style.PALE, linewidth=1.1, label="train", marker="." if len(train[0]) == 1 else None)
    if len(validation[0]):
        axes.plot(*validation, color=style.BLUE, linewidth=2.2, label="validation", marker="o" if len(validation[0]) <= 60 else None, markersize=4)
    values = np.concatenate([train[1], validation[1]])
    values = values[np.isfinite(values)]
    note = ""
    if not len(values):
        style.empty(axes, f"no {name} was logged")
    elif _log(values):
        axes.set_yscale("log")
    if np.isfinite(validation[1]).any():
        note = _mark_best(axes, validation, name)
    style.tidy(axes, y=name.replace("_", " "), note=note)
    if len(values):
        axes.legend(loc="best", frameon=False, fontsize=9, labelcolor=style.INK)


def _log(values: Float[np.ndarray, "t"]) -> bool:
    return len(values) > 0 and values.min() > 0 and values.max() / values.min() > LOG_RATIO


def _mark_best(axes: Axes, line: Line, name: str) -> str:
    """A ring around the best point; returns the words for it."""
    steps, values = line
    best = int(np.nanargmax(values) if direction(name) == "max" else np.nanargmin(values))
    axes.plot(steps[best], values[best], marker="o", markersize=10, markerfacecolor="none", markeredgecolor=style.ORANGE, markeredgewidth=1.8)
    return f"best validation {name.replace('_', ' ')} {values[best]:.4g} at step {steps[best]:,.0f}"


def _headline(records: Sequence[Mapping[str, Any]]) -> str | None:
    seen = {key for record in records for key in record}
    return next((name for name in HEADLINES if f"validation/{name}" in seen or f"train/{name}" in seen), None)


def _line(records: Sequence[Mapping[str, Any]], *names: str) -> Line:
    """Steps and values of the first of these names that occurs; a value that is missing there is NaN, which breaks the line."""
    for name in names:
        found = [(record["step"], record[name]) for record in records if name in record and "step" in record]
        if found:
            steps, values = zip(*found, strict=True)
            finite = [math.nan if value is None or not math.isfinite(value) else value for value in values]
            return np.asarray(steps, np.float64), np.asarray(finite, np.float64)
    return np.zeros(0), np.zeros(0)
