"""What an explanation shows: overlays, coloured tokens, bars, heat maps, curves, points and pictures, as panels side by side."""

import dataclasses
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from etils import epath
from jaxtyping import Float, Num
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, TwoSlopeNorm
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from research.figures import style
from research.figures.pixels import pixels

UNKNOWN = (0.8, 0.8, 0.8, 1.0)  # the colour of a value that is not finite
COLOURS: Colormap = colormaps["RdBu_r"].with_extremes(bad=UNKNOWN)  # red: for the output, blue: against it
AMOUNTS: Colormap = colormaps["Blues"].with_extremes(bad=UNKNOWN)
MOST = 32  # bars or rows that are drawn: those of the largest size
PICTURES = 64  # pictures of one panel
WIDE = 13.6  # inches that panels beside each other may take
PER_LINE, LINES = 88, 100  # characters of a line of coloured tokens, and such lines; the page shows all


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

    Args:    series: name -> (x, y).  faint: more curves as (x, y), thin and without a name, below those.
    """

    series: Mapping[str, tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]]
    title: str = ""
    x: str = ""
    y: str = ""
    faint: Sequence[tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]] = ()


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
    """The panels side by side at their own sizes, in as many rows as they need."""
    rows: list[list[Panel]] = [[]]
    for panel in panels:
        if rows[-1] and sum(_size(other)[0] for other in rows[-1]) + _size(panel)[0] > WIDE:
            rows.append([])
        rows[-1].append(panel)
    sizes = [[_size(panel) for panel in row] or [(3.0, 1.0)] for row in rows]
    wide, high = max(sum(w for w, _ in row) for row in sizes), [max(h for _, h in row) for row in sizes]
    made = style.new(wide, sum(high) + (0.4 if title else 0.0), title)
    if not panels:
        style.empty(made.subplots(), "nothing to show")
        return made
    for i, band in enumerate(made.subfigures(len(rows), 1, height_ratios=high, squeeze=False)[:, 0]):
        widths = [w for w, _ in sizes[i]]
        rest = wide - sum(widths)
        cells = band.subfigures(1, len(widths) + (rest > 0.05), width_ratios=[*widths, *[rest] * (rest > 0.05)], squeeze=False)[0]
        for panel, (_, h), cell in zip(rows[i], sizes[i], cells, strict=False):  # the last cell may be what is left over
            below = high[i] - h
            place = cell.subfigures(2, 1, height_ratios=[h, below])[0] if below > 0.05 else cell
            _DRAW[type(panel)](place, panel)
    return made


def save(panels: Sequence[Panel], path: epath.PathLike, title: str = "") -> None:
    """Writes the panels as one PNG.

    Raises:  ResearchError: the disk is full, read-only or not there.
    """
    style.save(figure(panels, title), path)


def png(panel: Panel) -> bytes:
    """One panel as the bytes of a PNG."""
    return style.png(figure((panel,)))


def strength(values: Num[np.ndarray, "..."]) -> float:
    """The largest size of a finite value, which gets the full colour; 1 where all are 0."""
    finite = np.abs(np.asarray(values, np.float64)[np.isfinite(values)])
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def visible(token: str) -> str:
    """A token as it can be seen: line breaks and tabs as signs."""
    return token.replace("\n", "↵").replace("\t", "→").replace("\r", "␍")


def cell_text(cell: Any) -> str:
    """A table's cell as text: numbers with four digits."""
    return f"{cell:.4g}" if isinstance(cell, float | np.floating) else str(cell)


def _size(panel: Panel) -> tuple[float, float]:
    """Inches that a panel needs."""
    if isinstance(panel, Overlay):
        return 3.4, 3.0
    if isinstance(panel, Tokens):
        return 7.2, 0.55 + 0.26 * (1 + _places(panel.tokens)[-1][1] if panel.tokens else 1)
    if isinstance(panel, Bars):
        return 5.0, 1.1 + 0.22 * min(len(panel.values), MOST)
    if isinstance(panel, Heat):
        r, c = panel.values.shape
        return float(np.clip(1.8 + 0.22 * c, 3.4, 11.0)), float(np.clip(1.2 + 0.22 * r, 2.2, 9.0))
    if isinstance(panel, Pictures):
        rows, columns, side, high = _grid(panel)
        return max(side * columns, 2.0) + 0.2, 0.4 + rows * (high + (0.25 if panel.captions else 0.06))
    if isinstance(panel, Rows):
        return float(np.clip(0.085 * sum(_columns(panel)) + 0.3, 2.4, WIDE)), 0.75 + 0.22 * max(min(len(panel.rows), MOST), 1)
    return 5.0, 3.4


def _note(title: str, values: Num[np.ndarray, "..."], more: str = "") -> str:
    """The line above a panel: its title, and what else must be known of its values."""
    lost = int((~np.isfinite(values)).sum())
    told = [text for text in (f"{lost} not finite" if lost else "all 0" if np.size(values) and not np.any(values) else "", more) if text]
    return f"{title}   ({', '.join(told)})" if told else title


def _bar(axes: Axes, drawn: Any, values: Num[np.ndarray, "..."], signed: bool = True) -> None:
    """The colour bar beside an image; without its lower half where no value is negative."""
    bar = axes.figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03)  # type: ignore[union-attr]  # an Axes of ours has a figure
    if signed and np.isfinite(values).any() and np.nanmin(values) >= 0:
        bar.ax.set_ylim(0.0, strength(values))
    bar.ax.tick_params(labelsize=7, colors=style.FAINT, length=0)
    bar.ax.yaxis.get_offset_text().set(size=7, color=style.FAINT)
    bar.outline.set_visible(False)  # type: ignore[operator]  # matplotlib's stubs say it is callable
    bar.solids.set_alpha(1.0)  # type: ignore[union-attr]  # an image always has solids


def _overlay(place: FigureBase, panel: Overlay) -> None:
    axes = place.subplots()
    shown = pixels(panel.image[None])[0].mean(-1)
    if panel.image.shape[-1] < 3 and np.median(shown) < 0.25:  # light strokes on black: drawn as ink on paper
        shown = 1.0 - shown
    high, wide = shown.shape
    extent = (-0.5, wide - 0.5, high - 0.5, -0.5)
    axes.imshow(0.5 + 0.5 * shown, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    most = strength(panel.values)
    known = np.isfinite(panel.values)
    opacity = np.where(known, np.clip(np.abs(np.where(known, panel.values, 0.0)) / most, 0.0, 1.0) ** 0.7, 1.0)
    drawn = axes.imshow(panel.values, cmap=COLOURS, norm=TwoSlopeNorm(0.0, -most, most), alpha=opacity, extent=extent, interpolation="nearest")
    _bar(axes, drawn, panel.values)
    axes.set(xticks=[], yticks=[])
    style.tidy(axes, note=_note(panel.title, panel.values), grid="none")


def _places(tokens: Sequence[str]) -> list[tuple[int, int, int]]:
    """(column, line, width) of each token in monospaced letters; a token with a line break ends its line."""
    places, x, y = [], 0, 0
    for token in tokens:
        shown = visible(token)
        width = max(sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in shown), 1)
        width = min(width, PER_LINE)
        if x + width > PER_LINE:
            x, y = 0, y + 1
        places.append((x, y, width))
        x += width
        if "\n" in token:
            x, y = 0, y + 1
    return [place for place in places if place[1] < LINES]


def _tokens(place: FigureBase, panel: Tokens) -> None:
    axes = place.subplots()
    places = _places(panel.tokens)
    most = strength(panel.values)
    norm = TwoSlopeNorm(0.0, -most, most)
    axes.set(xlim=(0, PER_LINE), ylim=(1 + places[-1][1] if places else 1, 0), xticks=[], yticks=[])
    for token, value, (x, y, width) in zip(panel.tokens, panel.values, places, strict=False):
        colour = COLOURS(0.5 + 0.7 * (float(norm(float(value))) - 0.5)) if math.isfinite(value) else UNKNOWN
        axes.add_patch(Rectangle((x, y + 0.06), width, 0.88, facecolor=colour, edgecolor="none"))
        if token.strip() or visible(token).strip():
            text = style.plain(visible(token), width) if len(token) > PER_LINE else visible(token).replace("$", r"\$")
            axes.text(x + width / 2, y + 0.54, text, ha="center", va="center", fontsize=8.5, fontfamily=["DejaVu Sans Mono", *style.fonts()])
    axes.set_axis_off()
    hidden = len(panel.tokens) - len(places)
    more = f"full colour: {most:.3g}{f', and {hidden} more tokens' if hidden else ''}"
    axes.set_title(style.plain(_note(panel.title, panel.values, more), 120), loc="left", fontsize=9, color=style.FAINT)


def _bars(place: FigureBase, panel: Bars) -> None:
    axes = place.subplots()
    values = np.asarray(panel.values, np.float64)
    known = np.where(np.isfinite(values), values, 0.0)
    order = np.argsort(-np.abs(known), kind="stable")[:MOST] if panel.ordered else np.arange(min(len(values), MOST))
    rows = np.arange(len(order))
    axes.barh(rows, known[order], height=0.66, color=[style.RED if v >= 0 else style.BLUE for v in known[order]])
    if panel.low is not None and panel.high is not None:
        ends = np.nan_to_num(np.stack([values - panel.low, panel.high - values])[:, order])
        axes.errorbar(known[order], rows, xerr=np.maximum(ends, 0.0), fmt="none", ecolor=style.INK, elinewidth=1, capsize=2)
    else:
        for row, i in enumerate(order):
            left = known[i] < 0
            axes.annotate(
                f"{values[i]:.3g}", (known[i], row), (-3 if left else 3, 0), textcoords="offset points", ha="right" if left else "left", va="center",
                fontsize=7, color=style.FAINT,
            )  # fmt: skip
        axes.margins(x=0.14)
    axes.set_yticks(rows, [style.plain(panel.names[int(i)], 28) for i in order], fontsize=8)
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    axes.axvline(0.0, color=style.FAINT, linewidth=0.8)
    axes.xaxis.get_offset_text().set(size=7, color=style.FAINT)
    hidden = len(values) - len(order)
    style.tidy(axes, x=panel.x, note=_note(panel.title, values, f"and {hidden} more" if hidden else ""), grid="x")
    if not len(values):
        style.empty(axes, "no values")


def _heat(place: FigureBase, panel: Heat) -> None:
    axes = place.subplots()
    values = np.asarray(panel.values, np.float64)
    most = strength(values)
    how: dict[str, Any] = {"cmap": COLOURS, "norm": TwoSlopeNorm(0.0, -most, most)} if panel.signed else {"cmap": AMOUNTS}
    drawn = axes.imshow(np.ma.masked_invalid(values), aspect="auto", interpolation="nearest", **how)
    _bar(axes, drawn, values, panel.signed)
    style.tidy(axes, x=panel.x, y=panel.y, note=_note(panel.title, values), grid="none")
    for names, put, limit in ((panel.columns, axes.set_xticks, 48), (panel.rows, axes.set_yticks, 40)):
        step = max(1, math.ceil(len(names) / limit))
        places = range(0, len(names), step)
        long = put == axes.set_xticks and any(len(visible(str(name))) > 2 for name in names)
        put(list(places), [style.plain(visible(str(names[i])), 20) for i in places], fontsize=7.5, rotation=90 if long else 0)


def _lines(place: FigureBase, panel: Lines) -> None:
    axes = place.subplots()
    colours: Sequence[Any] = (style.BLUE, style.ORANGE, style.GREEN, style.RED, style.FAINT, style.PALE)
    if len(panel.series) > len(colours):
        colours = colormaps["tab20"].colors  # type: ignore[attr-defined]  # a listed map has them
    for x, y in panel.faint:
        axes.plot(x, y, color=style.PALE, linewidth=0.8)
    for i, (name, (x, y)) in enumerate(panel.series.items()):
        mark = "o" if len(x) < 20 else None
        axes.plot(x, y, color=colours[i % len(colours)], linewidth=1.6, marker=mark, markersize=3, label=style.plain(name, 28))
    style.tidy(axes, x=panel.x, y=panel.y, note=panel.title)
    if all(np.issubdtype(np.asarray(x).dtype, np.integer) for x, _ in panel.series.values()):  # counts have no halves
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if 1 < len(panel.series) <= 6:
        axes.legend(frameon=False, fontsize=8, labelcolor=style.INK)
    elif len(panel.series) > 6:
        axes.legend(frameon=False, fontsize=7, labelcolor=style.INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    if not any(np.isfinite(np.asarray(y, np.float64)).any() for _, y in panel.series.values()):
        style.empty(axes, "no finite values")


def _points(place: FigureBase, panel: Points) -> None:
    axes = place.subplots()
    groups = np.array([str(group) for group in panel.groups] or [""] * len(panel.places))
    names = list(dict.fromkeys(groups))
    colours = colormaps["tab10" if len(names) <= 10 else "tab20"]
    for i, name in enumerate(names):
        x, y = panel.places[groups == name].T
        axes.scatter(x, y, s=10, color=colours(i % 20), alpha=0.75, linewidths=0, label=style.plain(name, 20))
    more = f"{len(names)} groups, colours repeat" if len(names) > 20 else ""
    style.tidy(axes, x=panel.x, y=panel.y, note=f"{panel.title}   ({more})" if more else panel.title, grid="both")
    if 1 < len(names) <= 20:
        axes.legend(frameon=False, fontsize=7, markerscale=1.6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    if not len(panel.places):
        style.empty(axes, "no points")


def _grid(panel: Pictures) -> tuple[int, int, float, float]:
    """(rows, columns, inches of a picture's width and height)."""
    count = max(min(len(panel.images), PICTURES), 1)
    columns = count if count <= 6 else min(8, math.ceil(math.sqrt(1.5 * count)))
    side = 2.6 if count == 1 else 1.3
    return math.ceil(count / columns), columns, side, float(np.clip(side * panel.images.shape[1] / panel.images.shape[2], 0.3, 2 * side))


def _pictures(place: FigureBase, panel: Pictures) -> None:
    shown = pixels(panel.images[:PICTURES])
    rows, columns, side, _ = _grid(panel)
    hidden = len(panel.images) - len(shown)
    note = _note(panel.title, np.asarray(panel.images), f"and {hidden} more" if hidden else "")
    place.suptitle(style.plain(note, 120), x=0.02, ha="left", fontsize=9, color=style.FAINT, fontfamily=style.fonts())
    for i, axes in enumerate(place.subplots(rows, columns, squeeze=False).ravel()):
        axes.set(xticks=[], yticks=[])
        for edge in axes.spines.values():
            edge.set_visible(False)
        if i < len(shown):
            axes.imshow(shown[i], interpolation="nearest")
            if panel.captions:
                text = style.plain(panel.captions[i], int(side * 18))
                axes.set_xlabel(text, fontsize=7, color=style.INK, fontfamily=style.fonts())
    if not len(shown):
        style.empty(axes, "no pictures")


def _columns(panel: Rows) -> list[int]:
    """Letters of each column."""
    cells = [list(map(str, panel.columns)), *([cell_text(cell) for cell in row] for row in panel.rows[:MOST])]
    return [2 + min(max(len(row[j]) for row in cells), 48) for j in range(len(panel.columns))]


def _rows(place: FigureBase, panel: Rows) -> None:
    axes = place.subplots()
    axes.set_axis_off()
    hidden = len(panel.rows) - MOST
    title = f"{panel.title}   (and {hidden} more)" if hidden > 0 else panel.title
    axes.set_title(style.plain(title, 120), loc="left", fontsize=9, color=style.FAINT, fontfamily=style.fonts())
    widths = _columns(panel)
    lines = [panel.columns, *panel.rows[:MOST]]
    axes.set(xlim=(0, max(sum(widths), 24)), ylim=(max(len(lines), 2), 0))
    for y, line in enumerate(lines):
        for j, cell in enumerate(line):
            number = all(isinstance(row[j], int | float | np.number) for row in panel.rows)
            x = sum(widths[: j + 1]) - 2 if number else sum(widths[:j])
            how: dict[str, Any] = {"ha": "right" if number else "left", "va": "center", "fontsize": 8, "color": style.FAINT if y == 0 else style.INK}
            axes.text(x, y + 0.5, style.plain(visible(cell_text(cell)), 48), fontfamily=style.fonts(), **how)
        axes.axhline(y + 1, color=style.GRID, linewidth=0.8)
    if not panel.rows:
        axes.text(0, 1.5, "no rows", va="center", fontsize=8, color=style.FAINT)


_DRAW: dict[type, Callable[[FigureBase, Any], None]] = {
    Overlay: _overlay, Tokens: _tokens, Bars: _bars, Heat: _heat, Lines: _lines, Points: _points, Pictures: _pictures, Rows: _rows,
}  # fmt: skip
