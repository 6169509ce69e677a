"""What a wider model changes: how far its activations move, and which learning rate is its best."""

from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from research.figures import style

PLAIN = FuncFormatter(lambda y, _: f"{y:g}")
FEW = FuncFormatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "25" else "")  # of the ticks between powers of ten
COLOURS = (style.BLUE, style.ORANGE, style.GREEN, style.RED, style.FAINT, style.PALE)


def coordinates(panels: Mapping[str, Mapping[int, Mapping[str, float]]], path: epath.PathLike, *, title: str = "", note: str = "") -> None:
    """Draws the coordinate check: one panel for each parametrization, one line for each tap, its size over the width on log axes.

    Args:    panels: title -> {width: {tap: how far it has moved}}.  path: the PNG to write.  note: what the sizes are.
    """
    figure = style.new(4.9 * len(panels), 4.2, title)
    drawn = list(np.atleast_1d(figure.subplots(1, len(panels), sharey=True)))
    shades = None
    for axes, (name, by_width) in zip(drawn, panels.items(), strict=True):
        widths = sorted(by_width)
        taps = [tap for tap in by_width[widths[0]] if all(by_width[width][tap] > 0 for width in widths)]
        shades = style_of(taps)
        for tap in taps:
            axes.plot(widths, [by_width[width][tap] for width in widths], label=style.plain(tap, 40), **shades[tap])
        _width_axis(axes, widths)
        axes.yaxis.set_major_formatter(PLAIN)
        axes.yaxis.set_minor_formatter(FEW)
        style.tidy(axes, x="width", y=note if axes is drawn[0] else "", note=name, grid="both")
    drawn[-1].legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    style.save(figure, path)


def transfer(
    panels: Mapping[str, Mapping[int, Mapping[float, Sequence[float]]]],
    path: epath.PathLike,
    *,
    score: str,
    title: str = "",
    top: float | None = None,
) -> None:
    """Draws the score over the learning rate: one panel for each parametrization, one line for each width, its best rate marked.

    Lines are means over seeds, bands from the lowest to the highest seed. A rate at which a seed has diverged ends the line.

    Args:    panels: title -> {width: {learning rate: scores, one a seed}}; lower is better.  score: its name.  top: of the score's axis.
    """
    figure = style.new(4.9 * len(panels), 3.9, title)
    drawn = list(np.atleast_1d(figure.subplots(1, len(panels), sharey=True)))
    for axes, (name, by_width) in zip(drawn, panels.items(), strict=True):
        for i, (width, by_rate) in enumerate(sorted(by_width.items())):
            colour, line = COLOURS[i % len(COLOURS)], "--" if i >= len(COLOURS) else "-"
            rates = sorted(by_rate)
            scores = [np.where(np.isfinite(by_rate[rate]), by_rate[rate], np.nan) for rate in rates]  # a seed may be missing at some rates
            means = np.array([seeds.mean() for seeds in scores])
            axes.fill_between(rates, [seeds.min() for seeds in scores], [seeds.max() for seeds in scores], color=colour, alpha=0.15, linewidth=0)
            axes.plot(rates, means, line, color=colour, linewidth=2, marker="o", markersize=3.5, label=f"width {width:,}")
            if np.isfinite(means).any():
                best = int(np.nanargmin(means))
                axes.plot(rates[best], means[best], marker="o", markersize=10, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        if top is not None:  # else a shared axis would stay as the first panel has it
            axes.set_ylim(top=top)
        axes.yaxis.set_major_formatter(PLAIN)
        axes.yaxis.set_minor_formatter(FEW)
        style.tidy(axes, x="learning rate", y=score if axes is drawn[0] else "", note=name, grid="both")
        axes.legend(frameon=False, fontsize=8.5)
    style.save(figure, path)


def style_of(taps: Sequence[str]) -> dict[str, dict[str, object]]:
    """{tap: how its line looks}: a colour for each part of the network, so that equal layers of a stack look alike."""
    parts = list(dict.fromkeys(tap.rpartition("/")[0] or tap for tap in taps))
    marks = {tap: "os^Dvx*P"[i % 8] for i, tap in enumerate(taps)}
    return {
        tap: {"color": COLOURS[parts.index(tap.rpartition("/")[0] or tap) % len(COLOURS)], "linewidth": 1.6, "marker": marks[tap], "markersize": 4.5}
        for tap in taps
    }


def _width_axis(axes: Axes, widths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(widths, [f"{width:,}" for width in widths])
    axes.set_xticks([], minor=True)
