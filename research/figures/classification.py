"""What a classifier gets right: its confusions, its classes one by one, and how far its confidence can be trusted."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm

from research.figures import style

RIGHT = LinearSegmentedColormap.from_list("right", ["#ffffff", "#c3d5f0", style.BLUE, "#12386f"])
WRONG = LinearSegmentedColormap.from_list("wrong", ["#ffffff", "#f9c99a", style.ORANGE, "#8a3d0c"])
WORST = 0.3  # errors of this share of a row, and more, have the darkest shade
OVER, UNDER = "#f6c08f", "#93cfae"
NUMBERS = 20  # up to so many classes the counts are written into the cells
ROWS = 60  # at most so many classes are listed one by one
NAME = 24  # characters of a class name


def confusion_matrix(matrix: Int[np.ndarray, "n n"], classes: Sequence[str], path: epath.PathLike, *, title: str = "Confusion matrix") -> None:
    """Draws where each true class (row) went (column): right answers blue, errors orange, by their share of the row.

    The shade of an error follows the square root of its share, so that one in a hundred can be seen. A class without examples is an empty row.
    """
    count = len(matrix)
    support = matrix.sum(1, keepdims=True)
    share = matrix / np.maximum(support, 1)
    diagonal = np.eye(count, dtype=bool)
    cell = float(np.clip(9.0 / count, 0.12, 0.55))
    side = float(np.clip(cell * count, 1.6, 14.0))
    size = 7.5 if count <= 30 else 5.5
    room = 0.009 * size * max((len(style.plain(name, NAME)) for name in classes), default=1)  # inches that the names need
    figure = style.new(max(side + room + 0.9, 3.0), side + (room if room > 0.2 else 0.1) + 1.2, title)
    axes = figure.subplots()
    colors = np.where(diagonal[:, :, None], RIGHT(share), WRONG(PowerNorm(0.5, 0.0, WORST, clip=True)(share)))  # [n, n] -> [n, n, 4]
    axes.imshow(colors, interpolation="nearest", aspect="equal")
    right = int(np.trace(matrix))
    note = f"{right:,} of {matrix.sum():,} right" if matrix.sum() else "no examples"
    style.tidy(axes, x="predicted class", y="true class", note=note, grid="none")
    _names(axes, classes, size)
    if count <= NUMBERS:
        for i, j in np.argwhere(matrix > 0):
            color = "white" if share[i, j] > (0.5 if i == j else 0.12) else style.INK
            axes.text(j, i, f"{matrix[i, j]:,}", ha="center", va="center", fontsize=7.5, color=color)
    style.save(figure, path)


def _names(axes: Axes, classes: Sequence[str], size: float) -> None:
    every = -(-len(classes) // 110)  # of more classes than can be read, each second or third is named
    places = range(0, len(classes), every)
    names = [style.plain(classes[i], NAME) for i in places]
    flat = max(map(len, names), default=0) <= 2
    axes.set_yticks(places, names, fontsize=size, fontfamily=style.fonts())
    axes.set_xticks(places, names, fontsize=size, fontfamily=style.fonts(), rotation=0 if flat else 90)


def reliability(calibration: Mapping[str, Any], path: epath.PathLike, *, title: str = "Calibration") -> None:
    """Draws accuracy against confidence per bin, with the gap to the diagonal, above the share of examples in each bin.

    Args:    calibration: {"error": number or None, "bins": [{lower, upper, count, confidence, accuracy}]}, as the host metrics give it.
    """
    rows = [row for row in calibration["bins"] if row["count"]]
    figure = style.new(5.4, 6.4, title)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
    top.plot([0, 1], [0, 1], color=style.INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    total = sum(row["count"] for row in rows)
    for row in rows:
        left, width = row["lower"], row["upper"] - row["lower"]
        low, high = sorted((row["accuracy"], row["confidence"]))
        color = OVER if row["confidence"] > row["accuracy"] else UNDER
        top.bar(left, row["accuracy"], width, align="edge", color=style.BLUE, edgecolor="white", linewidth=0.8)
        top.bar(left, high - low, width, low, align="edge", color=color, edgecolor="white", linewidth=0.8)
        bottom.bar(left, row["count"] / total, width, align="edge", color=style.PALE, edgecolor="white", linewidth=0.8)
    error = calibration["error"]
    note = "no examples" if error is None else f"expected calibration error {100 * error:.2f} %, {total:,} examples"
    top.set(xlim=(0, 1), ylim=(0, 1.02))
    style.tidy(top, y="accuracy", note=note)
    style.tidy(bottom, x="confidence", y="share of examples")
    handles = [top.bar(0, 0, color=color) for color in (style.BLUE, OVER, UNDER)]
    top.legend(handles, ("accuracy", "too confident", "not confident enough"), loc="upper left", frameon=False, fontsize=9, labelcolor=style.INK)
    style.save(figure, path)


def per_class(scores: Sequence[Mapping[str, Any]], path: epath.PathLike, *, title: str = "Scores by class") -> None:
    """Draws F1 as a bar, precision and recall as points, and the number of examples, for each class, worst first.

    Args:    scores: [{"class", "precision", "recall", "f1", "support"}]; a score that is None is left out. At most 60 classes are shown.
    """
    ordered = sorted(scores, key=lambda row: (row["f1"] is None, row["f1"] or 0.0))
    shown = ordered[:ROWS]
    figure = style.new(7.6, 1.5 + 0.24 * max(len(shown), 3), title)
    axes = figure.subplots()
    f1 = [row["f1"] or 0.0 for row in shown]
    axes.barh(range(len(shown)), f1, height=0.62, color=style.PALE, label="F1")
    for name, marker, color in (("precision", "o", style.BLUE), ("recall", "D", style.ORANGE)):
        points = [(row[name], i) for i, row in enumerate(shown) if row[name] is not None]
        axes.scatter(*zip(*points, strict=True) if points else ((), ()), marker=marker, s=20, color=color, label=name, zorder=3, clip_on=False)
    for i, row in enumerate(shown):
        axes.text(1.03, i, f"{row['support']:,}", va="center", fontsize=8, color=style.FAINT)
    axes.text(1.03, -1.0, "examples", va="center", fontsize=8, color=style.FAINT)
    style.tidy(axes, x="score", note=f"the {ROWS} lowest of {len(scores):,} classes" if len(scores) > ROWS else "", grid="x")
    axes.set_yticks(range(len(shown)), [style.plain(row["class"], NAME) for row in shown], fontfamily=style.fonts(), fontsize=8.5, color=style.INK)
    axes.set(xlim=(0, 1), ylim=(len(shown) - 0.4, -1.4))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9, labelcolor=style.INK, borderaxespad=0.2)
    style.save(figure, path)
