"""What an explanation shows: overlays, coloured tokens, bars, heat maps, curves, points and pictures, as panels side by side."""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from etils import epath
from jaxtyping import Float, Num
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from research.figures import style
from research.figures.images import pixels

COLOURS = "RdBu_r"  # red: for the output, blue: against it
MOST = 32  # bars or rows that are drawn: those of the largest size


@dataclasses.dataclass(frozen=True, eq=False)
class Overlay:
    """A picture with a map of numbers laid over it: red speaks for the output, blue against it.

    Args:    image: of any range.  values: one number for each place; a coarser map is stretched.  title: above it.
    """

    image: Num[np.ndarray, "y x c"]
    values: Float[np.ndarray, "m n"]
    title: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """A text whose tokens are coloured by their numbers.

    Args:    tokens: as text.  values: one number each.
    """

    tokens: Sequence[str]
    values: Float[np.ndarray, "t"]
    title: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Bars:
    """One bar a name, the largest first.

    Args:    names, values: of equal length.  low, high: ends of intervals, where there are such.  ordered: False keeps the order given.
    """

    names: Sequence[str]
    values: Float[np.ndarray, "n"]
    title: str = ""
    x: str = ""
    low: Float[np.ndarray, "n"] | None = None
    high: Float[np.ndarray, "n"] | None = None
    ordered: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Heat:
    """A matrix as colours.

    Args:    values: rows from above.  rows, columns: names; empty: none are written.  signed: colours around 0; False: from the least to the largest.
    """

    values: Float[np.ndarray, "r c"]
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    title: str = ""
    x: str = ""
    y: str = ""
    signed: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Lines:
    """Curves.

    Args:    series: name -> (x, y).
    """

    series: Mapping[str, tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]]
    title: str = ""
    x: str = ""
    y: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Points:
    """Points in the plane, coloured by group.

    Args:    places: of the points.  groups: the group of each; empty: one group.
    """

    places: Float[np.ndarray, "n 2"]
    groups: Sequence[str] = ()
    title: str = ""
    x: str = ""
    y: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures in a grid, a line below each.

    Args:    images: of any range.  captions: one each, or none.
    """

    images: Num[np.ndarray, "n y x c"]
    captions: Sequence[str] = ()
    title: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """A table.

    Args:    columns: their names.  rows: cells, as text or numbers.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""


Panel: TypeAlias = Overlay | Tokens | Bars | Heat | Lines | Points | Pictures | Rows


def figure(panels: Sequence[Panel], title: str = "") -> Figure:
    """The panels side by side, at most four in a row."""
    panels = tuple(panels)
    columns = min(max(len(panels), 1), 4)
    rows = max(math.ceil(len(panels) / columns), 1)
    sizes = [_size(panel) for panel in panels] or [(3.0, 2.0)]
    wide, high = max(size[0] for size in sizes), max(size[1] for size in sizes)
    made = style.new(columns * wide, rows * high + (0.4 if title else 0.0), title)
    for axes, panel in zip(made.subplots(rows, columns, squeeze=False).ravel(), [*panels, *[None] * (rows * columns - len(panels))], strict=True):
        if panel is None:
            axes.set_axis_off()
        else:
            _DRAW[type(panel)](axes, panel)
    if not panels:
        style.empty(made.axes[0], "nothing to show")
    return made


def save(panels: Sequence[Panel], path: epath.PathLike, title: str = "") -> None:
    """Writes the panels as one PNG.

    Raises:  ResearchError: the disk is full, read-only or not there.
    """
    style.save(figure(panels, title), path)


def png(panel: Panel) -> bytes:
    """One panel as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure((panel,)).savefig(buffer, format="png")
    return buffer.getvalue()


def strength(values: Num[np.ndarray, "..."]) -> float:
    """The largest size of a finite value, which gets the full colour; 1 where all are 0."""
    finite = np.abs(np.asarray(values, np.float64)[np.isfinite(values)])
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def _size(panel: Panel) -> tuple[float, float]:
    """Inches that a panel needs."""
    if isinstance(panel, Overlay):
        return 3.4, 3.2
    if isinstance(panel, Tokens):
        return 7.0, 0.8 + 0.3 * _lines(panel.tokens)
    if isinstance(panel, Bars):
        return 5.0, 1.1 + 0.22 * min(len(panel.values), MOST)
    if isinstance(panel, Heat):
        r, c = panel.values.shape
        return float(np.clip(1.8 + 0.22 * c, 3.4, 11.0)), float(np.clip(1.2 + 0.22 * r, 2.2, 9.0))
    if isinstance(panel, Pictures):
        columns = _columns(len(panel.images))
        return float(np.clip(1.1 * columns, 2.2, 9.0)), 0.6 + 1.3 * math.ceil(len(panel.images) / columns)
    if isinstance(panel, Rows):
        return 6.0, 0.8 + 0.24 * min(len(panel.rows), MOST)
    return 5.0, 3.4


def _overlay(axes: Axes, panel: Overlay) -> None:
    shown = pixels(panel.image[None])[0].mean(-1)
    high, wide = shown.shape
    extent = (-0.5, wide - 0.5, high - 0.5, -0.5)
    axes.imshow(0.55 + 0.45 * (1.0 - shown), cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    most = strength(panel.values)
    opacity = np.clip(np.abs(np.nan_to_num(panel.values)) / most, 0.0, 1.0) ** 0.7
    drawn = axes.imshow(panel.values, cmap=COLOURS, norm=TwoSlopeNorm(0.0, -most, most), alpha=opacity, extent=extent, interpolation="nearest")
    bar = axes.figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03)  # type: ignore[union-attr]  # an Axes of ours has a figure
    bar.ax.tick_params(labelsize=7, colors=style.FAINT, length=0)
    bar.outline.set_visible(False)  # type: ignore[operator]  # matplotlib's stubs say it is callable
    bar.solids.set_alpha(1.0)  # type: ignore[union-attr]  # an overlay always has solids
    axes.set(xticks=[], yticks=[])
    style.tidy(axes, note=panel.title, grid="none")


PER_LINE = 64  # characters of a line of coloured tokens


def _lines(tokens: Sequence[str]) -> int:
    return 1 + sum(max(len(visible(token)), 1) for token in tokens) // PER_LINE


def visible(token: str) -> str:
    """A token as it can be seen: line breaks and tabs as signs."""
    return token.replace("\n", "↵").replace("\t", "→").replace("\r", "␍")


def _tokens(axes: Axes, panel: Tokens) -> None:
    most = strength(panel.values)
    colour = _colour(most)
    lines = _lines(panel.tokens)
    axes.set(xlim=(0, PER_LINE), ylim=(lines, 0), xticks=[], yticks=[])
    x = y = 0
    for token, value in zip(panel.tokens, panel.values, strict=True):
        text = visible(token) or " "
        if x + len(text) > PER_LINE and x:
            x, y = 0, y + 1
        axes.add_patch(_box(x, y, len(text), colour(float(value))))
        axes.text(
            x + len(text) / 2, y + 0.5, style.plain(text) if text.strip() else " ", ha="center", va="center", fontsize=9, fontfamily="monospace"
        )
        x += len(text)
    axes.set_axis_off()
    axes.set_title(style.plain(f"{panel.title}   (full colour: {most:.3g})", 120), loc="left", fontsize=9, color=style.FAINT)


def _box(x: float, y: float, wide: float, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y + 0.08), wide, 0.84, facecolor=colour, edgecolor="none")


def _colour(most: float) -> Any:
    from matplotlib import colormaps

    norm, colours = TwoSlopeNorm(0.0, -most, most), colormaps[COLOURS]
    return lambda value: colours(0.5 + 0.7 * (float(norm(value)) - 0.5)) if math.isfinite(value) else (0.8, 0.8, 0.8, 1.0)


def _bars(axes: Axes, panel: Bars) -> None:
    values = np.asarray(panel.values, np.float64)
    order = np.argsort(-np.abs(values), kind="stable")[:MOST] if panel.ordered else np.arange(min(len(values), MOST))
    rows = np.arange(len(order))
    axes.barh(rows, values[order], height=0.66, color=[style.RED if v >= 0 else style.BLUE for v in values[order]])
    if panel.low is not None and panel.high is not None:
        ends = np.stack([values - panel.low, panel.high - values])[:, order]
        axes.errorbar(values[order], rows, xerr=np.maximum(ends, 0.0), fmt="none", ecolor=style.INK, elinewidth=1, capsize=2)
    axes.set_yticks(rows, [style.plain(panel.names[int(i)], 28) for i in order], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0.0, color=style.FAINT, linewidth=0.8)
    hidden = len(values) - len(order)
    style.tidy(axes, x=panel.x, note=f"{panel.title}{f'   (and {hidden} more)' if hidden else ''}", grid="x")


def _heat(axes: Axes, panel: Heat) -> None:
    values = np.asarray(panel.values, np.float64)
    most = strength(values)
    how: dict[str, Any] = {"cmap": COLOURS, "norm": TwoSlopeNorm(0.0, -most, most)} if panel.signed else {"cmap": "Blues"}
    drawn = axes.imshow(values, aspect="auto", interpolation="nearest", **how)
    bar = axes.figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03)  # type: ignore[union-attr]  # an Axes of ours has a figure
    bar.ax.tick_params(labelsize=7, colors=style.FAINT, length=0)
    bar.outline.set_visible(False)  # type: ignore[operator]  # matplotlib's stubs say it is callable
    style.tidy(axes, x=panel.x, y=panel.y, note=panel.title, grid="none")
    for names, put, limit in ((panel.columns, axes.set_xticks, 48), (panel.rows, axes.set_yticks, 40)):
        step = max(1, math.ceil(len(names) / limit))
        places = range(0, len(names), step)
        long = put == axes.set_xticks and any(len(visible(str(name))) > 2 for name in names)
        put(list(places), [style.plain(visible(str(names[i])), 20) for i in places], fontsize=7.5, rotation=90 if long else 0)


def _curves(axes: Axes, panel: Lines) -> None:
    colours = (style.BLUE, style.ORANGE, style.GREEN, style.RED, style.FAINT, style.PALE)
    for i, (name, (x, y)) in enumerate(panel.series.items()):
        axes.plot(
            x, y, color=colours[i % len(colours)], linewidth=1.6, marker="o" if len(x) < 20 else None, markersize=3, label=style.plain(name, 28)
        )
    style.tidy(axes, x=panel.x, y=panel.y, note=panel.title)
    if len(panel.series) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=style.INK)


def _points(axes: Axes, panel: Points) -> None:
    groups = np.array([str(group) for group in panel.groups] or [""] * len(panel.places))
    names = list(dict.fromkeys(groups))
    from matplotlib import colormaps

    colours = colormaps["tab10" if len(names) <= 10 else "tab20"]
    for i, name in enumerate(names):
        x, y = panel.places[groups == name].T
        axes.scatter(x, y, s=10, color=colours(i % 20), alpha=0.75, linewidths=0, label=style.plain(name, 20))
    style.tidy(axes, x=panel.x, y=panel.y, note=panel.title, grid="both")
    if 1 < len(names) <= 20:
        axes.legend(frameon=False, fontsize=7, markerscale=1.6, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _columns(count: int) -> int:
    return max(1, min(8, math.ceil(math.sqrt(count))))


def _pictures(axes: Axes, panel: Pictures) -> None:
    shown = pixels(panel.images)
    columns = _columns(len(shown))
    axes.set_axis_off()
    axes.set_title(style.plain(panel.title, 120), loc="left", fontsize=9, color=style.FAINT)
    rows = math.ceil(len(shown) / columns)
    for i, image in enumerate(shown):
        inner = axes.inset_axes((i % columns / columns + 0.01, 1 - (i // columns + 1) / rows + 0.03, 0.98 / columns, 0.94 / rows - 0.03))
        inner.imshow(image, interpolation="nearest")
        inner.set(xticks=[], yticks=[])
        for side in inner.spines.values():
            side.set_visible(False)
        if panel.captions:
            inner.set_xlabel(style.plain(panel.captions[i], 24), fontsize=7, color=style.INK)


def _rows(axes: Axes, panel: Rows) -> None:
    axes.set_axis_off()
    axes.set_title(style.plain(panel.title, 120), loc="left", fontsize=9, color=style.FAINT)
    cells = [[style.plain(cell_text(cell), 28) for cell in row] for row in panel.rows[:MOST]]
    if not cells:
        style.empty(axes, "no rows")
        return
    table = axes.table(cellText=cells, colLabels=[style.plain(name, 28) for name in panel.columns], loc="upper left", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(8)


def cell_text(cell: Any) -> str:
    """A table's cell as text: numbers with four digits."""
    return f"{cell:.4g}" if isinstance(cell, float | np.floating) else str(cell)


_DRAW: dict[type, Any] = {
    Overlay: _overlay, Tokens: _tokens, Bars: _bars, Heat: _heat, Lines: _curves, Points: _points, Pictures: _pictures, Rows: _rows,
}  # fmt: skip
