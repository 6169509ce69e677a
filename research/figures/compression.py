"""What a compression cost and gained, and which of many models are worth their size."""

from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from research.core.direction import direction
from research.figures import style
from research.figures.numbers import short

Interval = Sequence[float]  # value, low, high
LABELS = 40  # points with a name at most; of more, those on the front
PLACES = [  # of a label around its point: offset in points, alignment
    *((6, 0, "left", "center"), (-6, 0, "right", "center"), (0, 7, "center", "bottom"), (0, -7, "center", "top")),
    *((5, 5, "left", "bottom"), (-5, 5, "right", "bottom"), (5, -5, "left", "top"), (-5, -5, "right", "top")),
    *((0, 15, "center", "bottom"), (0, -15, "center", "top")),
]


def ledger(
    costs: Mapping[str, tuple[float, float]], metrics: Mapping[str, tuple[Interval, Interval]], path: epath.PathLike, *, title: str = ""
) -> None:
    """Draws each cost after compression as a share of the one before, and each metric before and after with its interval.

    Args:    costs: name -> (before, after).  metrics: name -> (before, after), each value, low and high.
    """
    panels = max(len(metrics), 1)
    figure = style.new(6.2 + 1.7 * panels, 1.3 + 0.42 * max(len(costs), 4), title)
    left, *right = figure.subplots(1, 1 + panels, squeeze=False, width_ratios=[4.0, *[1.4] * panels])[0]
    _shares(left, costs)
    if not metrics:
        style.empty(right[0], "no metric was measured")
        style.tidy(right[0], grid="none")
    for axes, (name, (before, after)) in zip(right, metrics.items(), strict=False):
        for place, color, (value, low, high) in ((0, style.PALE, before), (1, style.BLUE, after)):
            axes.errorbar(place, value, yerr=[[value - low], [high - value]], fmt="o", color=color, markersize=6, capsize=4, linewidth=1.6)
        axes.set(xlim=(-0.6, 1.6), xticks=[0, 1], xticklabels=["before", "after"])
        axes.margins(y=0.25)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.4g}"))
        style.tidy(axes, note=name.replace("_", " "))
    style.save(figure, path)


def _shares(axes: Axes, costs: Mapping[str, tuple[float, float]]) -> None:
    known = {name: pair for name, pair in costs.items() if pair[0] > 0 and np.isfinite(pair).all()}
    if not known:
        style.empty(axes, "no cost was measured")
        style.tidy(axes, grid="none")
        return
    shares = np.array([after / before for before, after in known.values()])
    rows = range(len(known))
    axes.barh(rows, shares, height=0.62, color=[style.BLUE if share < 1.005 else style.ORANGE for share in shares])
    axes.axvline(1.0, color=style.FAINT, linewidth=1, linestyle=(0, (4, 3)))
    widest = max(shares.max(), 1.0)
    for row, share, (before, after) in zip(rows, shares, known.values(), strict=True):
        note = f"{share:.1%}  ({short(before)} to {short(after)})"
        axes.text(max(share, 0) + 0.015 * widest, row, note, va="center", fontsize=8.5, color=style.INK, bbox={"color": "white", "pad": 0.6})
    axes.set(xlim=(0, 1.45 * widest), yticks=rows, yticklabels=[style.plain(name) for name in known])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= widest * 1.001])
    style.tidy(axes, note="after, as a share of before", grid="x")
    axes.tick_params(axis="y", colors=style.INK, labelsize=9.5)


def pareto(
    costs: Mapping[str, Float[np.ndarray, "n"]],
    metric: Float[np.ndarray, "n"],
    labels: Sequence[str],
    path: epath.PathLike,
    *,
    name: str,
    intervals: Float[np.ndarray, "n 2"] | None = None,
    title: str = "",
) -> None:
    """Draws the metric of many models over each of their costs, with the front of those that none beats in both.

    Args:    costs: name -> one number a model, drawn on a log scale; a model without one, NaN, is left out of that panel.
             labels: of the models.  name: of the metric, which also tells whether higher is better.  intervals: low and high.
    """
    panels = max(len(costs), 1)
    figure = style.new(5.6 * panels + 0.4, 4.6, title)
    grid = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    sign = 1 if direction(name) == "max" else -1
    jobs = []
    for axes, (cost, x) in zip(grid, costs.items(), strict=False):
        there = np.isfinite(x) & np.isfinite(metric) & (x > 0)
        first = axes is grid[0]
        style.tidy(axes, x=cost, y=name.replace("_", " ") if first else "", grid="both")
        if not there.any():
            style.empty(axes, f"no model with {cost}")
            continue
        best = front(x[there], sign * metric[there])
        _points(axes, x[there], metric[there], best, None if intervals is None else intervals[there])
        jobs.append((axes, x[there], metric[there], best, [label for label, keep in zip(labels, there, strict=True) if keep]))
    if not costs:
        style.empty(grid[0], "no cost was measured")
    figure.draw_without_rendering()  # the labels need to know where the points come to lie
    for axes, x, y, best, names in jobs:
        _label(axes, x, y, best, names, sign)
    style.save(figure, path)


def front(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Which points no other beats: none has less x and as much y, or more y and as little x."""
    less = (x[None] <= x[:, None]) & (y[None] >= y[:, None])
    better = (x[None] < x[:, None]) | (y[None] > y[:, None])
    return np.logical_not((less & better).any(1, keepdims=True))[:, 0]


def _points(axes: Axes, x, y, best, intervals) -> None:
    axes.set_xscale("log")
    if x.max() / x.min() < 30:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    order = np.argsort(x[best])
    axes.plot(x[best][order], y[best][order], color=style.BLUE, linewidth=1.4, alpha=0.6, zorder=2)
    if intervals is not None:
        spread = np.clip(np.stack([y - intervals[:, 0], intervals[:, 1] - y]), 0, None)
        axes.errorbar(x, y, yerr=spread, fmt="none", ecolor=style.GRID, elinewidth=1.4, zorder=1)
    axes.scatter(x[~best], y[~best], s=34, color=style.PALE, linewidth=0, zorder=3)
    axes.scatter(x[best], y[best], s=44, color=style.BLUE, linewidth=0, zorder=4)
    axes.margins(x=0.16, y=0.14)


def _label(axes: Axes, x, y, best, labels: Sequence[str], sign: int) -> None:
    """Names the points, those on the front first, each at the first place around it that is free; where none is, it stays without."""
    centres = axes.transData.transform(np.stack([x, y], axis=1))
    reach = 5 * style.DOTS_PER_INCH / 72
    taken = [(cx - reach * 0.8, cy - reach * 0.8, cx + reach * 0.8, cy + reach * 0.8) for cx, cy in centres]
    frame = axes.get_window_extent()
    free = [(-5, 5 * sign, "right", "bottom" if sign > 0 else "top")]  # no other point lies on this side of the front
    order = sorted(range(len(labels)), key=lambda i: (not best[i], x[i]))
    for i in order if len(labels) <= LABELS else [i for i in order if best[i]]:
        for dx, dy, horizontal, vertical in (free if best[i] else []) + PLACES:
            text = axes.annotate(
                style.plain(labels[i], 32),
                (x[i], y[i]),
                (dx, dy),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=8,
                color=style.INK if best[i] else style.FAINT,
                fontfamily=style.fonts(),
                zorder=5,
            )
            text.set_in_layout(False)
            box = text.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.x0 < x1 and x0 < box.x1 and box.y0 < y1 and y0 < box.y1 for x0, y0, x1, y1 in taken):
                taken.append((box.x0, box.y0, box.x1, box.y1))
                break
            text.remove()
