"""What a sweep found: scores with intervals, learning curves with bands, and which of the swept values matter."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from research.figures import style

COLORS = (style.BLUE, style.ORANGE, style.GREEN, "#7b4fb5", style.RED, "#2596a6", "#8a6d3b", "#d6569c")
SHOWN = 40  # settings with a row of their own
LOG_RATIO = 50.0  # values that span as much are spread on a log scale
CELLS = 240  # of a heat map, with a number in each; of more, without
PALE_TO_DARK = LinearSegmentedColormap.from_list("pale_to_dark", ["#eaf0fa", style.PALE, style.BLUE, "#0b2a5c"])


@dataclasses.dataclass(frozen=True)
class Curves:
    """One setting's learning curves: values of each run at common steps."""

    name: str
    steps: Float[np.ndarray, "t"]
    values: Float[np.ndarray, "n t"]
    reach: Float[np.ndarray, "t"] | None = None  # half the width of the interval of the mean; None: one run


def learning(curves: Sequence[Curves], path: epath.PathLike, *, metric: str, title: str = "", note: str = "") -> None:
    """Draws a metric over steps: of the first settings the mean and the interval over seeds, the others in grey.

    Args:    curves: the best first; as many as there are colours have one.  note: what the bands are.
    """
    figure = style.new(8.0, 4.6, title)
    axes = figure.subplots()
    curves = [curve for curve in curves if curve.values.size]
    if grey := curves[len(COLORS) :]:
        lines = [np.stack([curve.steps, curve.values.mean(0)], axis=1) for curve in grey]
        axes.add_collection(LineCollection(lines, colors=style.GRID, linewidths=1.0, zorder=1, label=f"{len(grey)} others"), autolim=True)
    for color, curve in reversed(list(zip(COLORS, curves, strict=False))):  # the best on top
        mean = curve.values.mean(0)
        axes.plot(
            curve.steps, mean, color=color, linewidth=2.0, marker="o" if len(mean) == 1 else None, markersize=4, label=style.plain(curve.name, 44)
        )
        if curve.reach is not None:
            axes.fill_between(curve.steps, mean - curve.reach, mean + curve.reach, color=color, alpha=0.16, linewidth=0)
    style.tidy(axes, x="step", y=metric.replace("_", " "), note=note)
    if not curves:
        style.empty(axes, f"no run logged {metric}")
        return style.save(figure, path)
    means = np.concatenate([curve.values.mean(0) for curve in curves[: len(COLORS)]])
    if means.min() > 0 and means.max() / means.min() > LOG_RATIO:
        axes.set_yscale("log")
    else:
        _frame(axes, means, [curve.values.mean(0)[-1] for curve in curves])
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(style.THOUSANDS)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(handles)), key=lambda i: (isinstance(handles[i], LineCollection), -i))
    _legend(axes, [handles[i] for i in order], [labels[i] for i in order])
    return style.save(figure, path)


def _frame(axes: Axes, values: Float[np.ndarray, "n"], others: Sequence[float]) -> None:
    """Leaves out of the frame what a few diverged settings would stretch it to."""
    low, high = float(values.min()), float(values.max())
    ends = np.array(others)
    low, high = min(low, float(np.quantile(ends, 0.05))), max(high, float(np.quantile(ends, 0.95)))
    room = 0.06 * (high - low) or 0.01 * abs(high) or 0.01
    axes.set_ylim(low - room, high + room)


def _legend(axes: Axes, handles: Sequence[Any], labels: Sequence[str]) -> None:
    axes.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0,
        frameon=False,
        fontsize=8.5,
        labelcolor=style.INK,
        prop={"family": style.fonts(), "size": 8.5},
    )


def scores(
    names: Sequence[str],
    means: Float[np.ndarray, "n"],
    intervals: Float[np.ndarray, "n 2"],
    points: Sequence[Sequence[float]],
    path: epath.PathLike,
    *,
    metric: str,
    best: bool,
    near: Sequence[bool],
    title: str = "",
) -> None:
    """Draws each setting's mean with its interval and its runs as points, the best on top.

    Args:    best: the first is apart from all others.  near: of each, whether it is not apart from the first.
    """
    shown = min(len(names), SHOWN)
    figure = style.new(8.0, 1.4 + 0.27 * max(shown, 3), title)
    axes = figure.subplots()
    colors = [style.ORANGE if row == 0 and best else style.BLUE if near[row] or row == 0 else style.PALE for row in range(shown)]
    places = np.concatenate([np.full(len(points[row]), row + 0.26) for row in range(shown)])  # below the interval, which would hide them
    axes.scatter(
        np.concatenate([np.asarray(points[row], np.float64) for row in range(shown)]), places, s=9, color=style.FAINT, alpha=0.7, linewidth=0
    )
    axes.hlines(range(shown), *intervals[:shown].T, colors=colors, linewidth=2.4, zorder=3)
    axes.scatter(means[:shown], range(shown), s=36, color=colors, linewidth=0, zorder=4)
    axes.set_yticks(range(shown), [style.plain(name, 50) for name in names[:shown]], fontfamily=style.fonts())
    axes.set_ylim(shown - 0.4, -0.6)
    ends = np.concatenate([means[:shown], *(np.asarray(held, np.float64) for held in points[:shown])])
    _clip(axes, ends, intervals[:shown])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.4g}"))
    rest = f"; the best {shown} of {len(names)}" if shown < len(names) else ""
    told = "mean and 95 % t interval over seeds" if np.isfinite(intervals).any() else "one run each: no intervals"
    style.tidy(axes, x=metric.replace("_", " "), note=told + rest, grid="x")
    axes.tick_params(axis="y", colors=style.INK, labelsize=8.5)
    style.save(figure, path)


def _clip(axes: Axes, values: Float[np.ndarray, "n"], intervals: Float[np.ndarray, "n 2"]) -> None:
    """The frame holds every run, and intervals as far as that leaves the runs room: of two seeds t's can be wide beyond all use."""
    low, high = float(values.min()), float(values.max())
    room = (high - low) or 0.02 * abs(high) or 0.01
    finite = intervals[np.isfinite(intervals)]
    ends = (low, high) if not finite.size else (min(low, float(finite.min())), max(high, float(finite.max())))
    axes.set_xlim(max(ends[0], low - room) - 0.05 * room, min(ends[1], high + room) + 0.05 * room)


def parallel(
    columns: Mapping[str, Sequence[Any]], values: Float[np.ndarray, "n"], path: epath.PathLike, *, metric: str, rising: bool, title: str = ""
) -> None:
    """Draws each run as a line through its swept values to its score: the darker, the better.

    Args:    columns: key -> the value of each run.  values: scores; NaN is a run without one, which is dashed in red and ends at the last key.
    """
    figure = style.new(max(6.0, 2.0 * (len(columns) + 1)), 4.6, title)
    axes = figure.subplots()
    finite = np.isfinite(values)
    places, marks = [], []
    for held in columns.values():
        place, ticks = _spread(held)
        places.append(place)
        marks.append(ticks)
    norm = _norm(values[finite])
    last, ticks = _spread(list(np.clip(np.where(finite, values, np.nan), norm.vmin, norm.vmax)))
    places.append(last)
    marks.append(ticks)
    x = np.arange(len(places))
    lines = np.stack(places, axis=1)
    colors = PALE_TO_DARK if rising else PALE_TO_DARK.reversed()
    order = np.argsort(np.where(finite, values if rising else -values, np.inf))  # the best drawn late, those without a score last
    drawn = [np.stack([x, lines[i]], axis=1) for i in order if finite[i]]
    shades = [colors(norm(values[i])) for i in order if finite[i]]
    axes.add_collection(LineCollection(drawn, colors=shades, linewidths=1.4, alpha=0.75, joinstyle="round"))
    missed = [np.stack([x, lines[i]], axis=1)[:-1] for i in order if not finite[i]]
    axes.add_collection(LineCollection(missed, colors=style.RED, linewidths=1.0, alpha=0.7, linestyles=[(0, (3, 3))]))
    for place, held in zip(x, marks, strict=True):
        axes.axvline(float(place), color=style.FAINT, linewidth=0.9, zorder=0)
        for height, text in held:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.75}
            axes.annotate(
                style.plain(text, 18), (place, height), (5, 0), textcoords="offset points", fontsize=7.5, color=style.INK, va="center", bbox=box
            )
    style.tidy(axes, grid="none", note="dashed: without a score" if not finite.all() else "")
    axes.set_xticks(x, [style.plain(name.replace("_", " "), 24) for name in (*columns, metric)], fontfamily=style.fonts())
    axes.tick_params(axis="x", colors=style.INK, labelsize=9)
    axes.yaxis.set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set(xlim=(-0.1, len(places) - 0.6), ylim=(-0.04, 1.04))
    bar = figure.colorbar(ScalarMappable(norm, colors), ax=axes, pad=0.02, aspect=34, format=FuncFormatter(lambda y, _: f"{y:.4g}"))
    _quiet(bar, metric)
    style.save(figure, path)


def _spread(held: Sequence[Any]) -> tuple[Float[np.ndarray, "n"], list[tuple[float, str]]]:
    """(each value's height in [0, 1], the heights that bear a text)."""
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in held):
        names = sorted({str(value) for value in held})
        place = {name: i / max(len(names) - 1, 1) for i, name in enumerate(names)}
        return np.array([place[str(value)] for value in held]), [(height, name) for name, height in place.items()][:20]
    levels = sorted({float(value) for value in held if math.isfinite(value)})
    log = levels[0] > 0 and levels[-1] / levels[0] >= 8
    scale = np.log if log else np.asarray
    low, high = float(scale(levels[0])), float(scale(levels[-1]))
    reach = (high - low) or 1.0
    inner = np.array(levels) if len(levels) <= 10 else (np.exp if log else np.asarray)(np.linspace(low, high, 6))
    marks: list[tuple[float, str]] = []
    for value in inner:
        height = float((scale(value) - low) / reach)
        if not marks or height - marks[-1][0] > 0.05:
            marks.append((height, f"{value:.3g}"))
    return (scale(np.array(held, np.float64)) - low) / reach, marks


def _norm(values: Float[np.ndarray, "n"]) -> Normalize:
    """From the worst to the best, but for a twentieth at either end, which a diverged run would stretch."""
    low, high = np.quantile(values, [0.05, 0.95]) if len(values) > 20 else (values.min(), values.max())
    return Normalize(float(low), float(high) if high > low else float(low) + 1e-9, clip=True)


def _quiet(bar: Any, label: str) -> None:
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=style.FAINT, labelsize=8, length=0)
    bar.set_label(style.plain(label.replace("_", " ")), fontsize=9, color=style.INK)


def importances(shares: Mapping[str, float], path: epath.PathLike, *, explained: float, metric: str, title: str = "") -> None:
    """Draws how much each swept key tells about the score, the most on top."""
    figure = style.new(6.4, 1.4 + 0.34 * max(len(shares), 3), title)
    axes = figure.subplots()
    names = sorted(shares, key=lambda name: -shares[name])
    values = [shares[name] for name in names]
    axes.barh(range(len(names)), values, height=0.62, color=style.BLUE)
    for row, value in enumerate(values):
        axes.text(value + 0.012 * max([*values, 0.01]), row, f"{value:.2f}", va="center", fontsize=8.5, color=style.INK)
    axes.set(xlim=(0, 1.14 * max([*values, 0.01])), yticks=range(len(names)))
    axes.set_yticklabels([style.plain(name, 40) for name in names], fontfamily=style.fonts())
    axes.invert_yaxis()
    note = f"a random forest explains {max(explained, 0.0):.0%} of the ranks of {metric}"
    style.tidy(axes, x="share of the variance that is lost without the key", note=note, grid="x")
    axes.tick_params(axis="y", colors=style.INK, labelsize=9)
    style.save(figure, path)


def heat(
    table: Float[np.ndarray, "r c"],
    rows: Sequence[Any],
    columns: Sequence[Any],
    path: epath.PathLike,
    *,
    names: tuple[str, str],
    metric: str,
    rising: bool,
    title: str = "",
    note: str = "",
) -> None:
    """Draws the mean score over two swept keys: the darker, the better; a cell without a run is white.

    Args:    table: NaN where no run finished.  names: of the keys of rows and columns.
    """
    figure = style.new(min(3.2 + 0.85 * len(columns), 14.0), min(1.9 + 0.46 * len(rows), 10.0), title)
    axes = figure.subplots()
    norm = _norm(table[np.isfinite(table)])
    colors = PALE_TO_DARK if rising else PALE_TO_DARK.reversed()
    picture = axes.imshow(np.ma.masked_invalid(table), cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    style.tidy(axes, x=names[1], y=names[0], grid="none", note=note)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    for axis, held in ((axes.xaxis, columns), (axes.yaxis, rows)):
        every = math.ceil(len(held) / 20)
        axis.set_ticks(range(0, len(held), every), [style.plain(_level(value), 16) for value in held[::every]])
    best = np.nanargmax(table) if rising else np.nanargmin(table)
    for i, row in enumerate(table if table.size <= CELLS else ()):
        for j, value in enumerate(row):
            dark = np.isfinite(value) and sum(colors(norm(value))[:3]) < 1.7
            text, weight = (f"{value:.4g}" if np.isfinite(value) else ""), "bold" if i * len(row) + j == best else "normal"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else style.INK, fontweight=weight)
    _quiet(figure.colorbar(picture, ax=axes, pad=0.02, aspect=24, format=FuncFormatter(lambda y, _: f"{y:.4g}")), metric)
    style.save(figure, path)


def _level(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def response(
    lines: Mapping[str, tuple[Sequence[float], Float[np.ndarray, "n"], Float[np.ndarray, "n 2"]]],
    path: epath.PathLike,
    *,
    key: str,
    metric: str,
    title: str = "",
    note: str = "",
) -> None:
    """Draws the score over one swept number, with intervals; a line for each value of another key.

    Args:    lines: name ("" for a single one) -> (values of the key, means, intervals, NaN where there is none).
    """
    figure = style.new(8.0 if len(lines) > 1 else 6.4, 4.2, title)
    axes = figure.subplots()
    every = sorted({value for x, _, _ in lines.values() for value in x})
    for color, (name, (x, means, intervals)) in zip(COLORS * math.ceil(len(lines) / len(COLORS)), lines.items(), strict=False):
        axes.plot(x, means, color=color, linewidth=1.8, marker="o", markersize=4.5, label=style.plain(name, 40))
        known = np.isfinite(intervals).all(1)
        axes.fill_between(np.asarray(x)[known], *intervals[known].T, color=color, alpha=0.14, linewidth=0)
    if every[0] > 0 and every[-1] / every[0] >= 8:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    if len(every) <= 8:
        axes.xaxis.set_major_locator(FixedLocator(every))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    means = np.concatenate([held for _, held, _ in lines.values()])
    if means.min() > 0 and means.max() / means.min() > LOG_RATIO:
        axes.set_yscale("log")
    else:
        room = 0.35 * float(np.ptp(means)) or 0.05 * abs(float(means.max())) or 0.01
        axes.set_ylim(max(axes.get_ylim()[0], means.min() - room), min(axes.get_ylim()[1], means.max() + room))
    style.tidy(axes, x=key, y=metric.replace("_", " "), note=note)
    if len(lines) > 1:
        _legend(axes, *axes.get_legend_handles_labels())
    style.save(figure, path)


def iso_flop(
    budgets: Sequence[float],
    curves: Sequence[tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"]]],
    optima: Float[np.ndarray, "b 2"],
    runs: Float[np.ndarray, "n 3"],
    path: epath.PathLike,
    *,
    band: tuple[Float[np.ndarray, "m"], Float[np.ndarray, "m"], Float[np.ndarray, "m 2"]],
    chosen: tuple[float, float],
    metric: str,
    title: str = "",
) -> None:
    """Draws a fitted scaling law: the loss over the size at fixed budgets with the runs nearest to each, and the best size over the budget.

    Args:    budgets: FLOPs.  curves: (parameters, loss) of each.  optima: (parameters, loss) of each.  runs: (parameters, FLOPs, loss).
             band: (FLOPs, best parameters, their interval).  chosen: (FLOPs, parameters) that the report names.
    """
    figure = style.new(11.0, 4.6, title)
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1.0])
    shades = [PALE_TO_DARK(0.25 + 0.7 * i / max(len(budgets) - 1, 1)) for i in range(len(budgets))]
    nearest = np.abs(np.log(runs[:, 1:2]) - np.log(np.asarray(budgets))[None]).argmin(1)
    for i, (budget, (size, loss), color) in enumerate(zip(budgets, curves, shades, strict=True)):
        left.plot(size, loss, color=color, linewidth=1.7, label=f"{budget:.2g}")
        left.scatter(*runs[nearest == i][:, [0, 2]].T, s=20, color=color, edgecolor="white", linewidth=0.5, zorder=3)
    left.plot(*optima.T, color=style.ORANGE, linewidth=1.2, marker="D", markersize=5, linestyle="--", zorder=4, label="best size")
    left.set_xscale("log")
    low, high = min(runs[:, 2].min(), optima[:, 1].min()), runs[:, 2].max()
    left.set_ylim(float(low - 0.4 * (high - low)), float(high + 0.3 * (high - low)))
    left.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.4g}"))
    style.tidy(left, x="parameters", y=metric.replace("_", " "), note="curves of equal FLOPs, and the runs nearest to each", grid="both")
    legend = {"facecolor": "white", "edgecolor": "none", "framealpha": 0.85, "fontsize": 8, "labelcolor": style.INK}
    left.legend(**legend, title="FLOPs", title_fontsize=8.5, loc="lower left", ncols=3)
    flops, size, interval = band
    right.fill_between(flops, *interval.T, color=style.BLUE, alpha=0.16, linewidth=0, label="95 % interval")
    right.plot(flops, size, color=style.BLUE, linewidth=2.0, label="best size")
    right.scatter(runs[:, 1], runs[:, 0], s=16, color=style.FAINT, alpha=0.6, linewidth=0, label="runs")
    right.plot(*chosen, color=style.ORANGE, marker="D", markersize=7, linestyle="none", label="the budget asked for")
    right.set(xscale="log", yscale="log")
    bottom, top = runs[:, 0].min() / 4, runs[:, 0].max() * 8
    right.set_ylim(bottom=max(bottom, right.get_ylim()[0]), top=min(top, right.get_ylim()[1]))
    style.tidy(right, x="FLOPs", y="parameters", note="compute-optimal size", grid="both")
    right.legend(frameon=False, fontsize=8.5, labelcolor=style.INK, loc="upper left")
    style.save(figure, path)
