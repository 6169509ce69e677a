"""How every figure looks: one palette, one kind of axis, one way to a file. Only matplotlib's objects are used, never pyplot's global state."""

import functools
import io
import warnings

import matplotlib.font_manager
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from research.core.errors import ResearchError

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, PALE, ORANGE, GREEN, RED = "#1f5fbf", "#a9c1e8", "#dd6b20", "#2f855a", "#c53030"
DOTS_PER_INCH = 150
THOUSANDS = FuncFormatter(lambda x, _: f"{x:,.0f}")

# The first has Latin, Greek and Cyrillic; the others fill in what it lacks, where they are installed.
FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
)


@functools.cache
def fonts() -> list[str]:
    """Those of `FONTS` that this machine has, for text that users name."""
    installed = {font.name for font in matplotlib.font_manager.fontManager.ttflist}
    return [name for name in FONTS if name in installed]


def plain(text: object, width: int = 80) -> str:
    """The text as it should be drawn: one line, no formula, and at most `width` characters, the middle left out where there are more."""
    text = " ".join(str(text).split())
    if len(text) > width:
        tail = (width - 1) // 2
        text = f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"
    return text.replace("$", r"\$")


class Drawing(Figure):
    """A figure that a notebook shows as it is, whether or not pyplot is there."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return png(self), {"width": int(self.get_size_inches()[0] * DOTS_PER_INCH * 0.55)}


def new(width: float, height: float, title: str = "") -> Drawing:
    """A white figure of this size in inches, its title at the left."""
    figure = Drawing(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # type: ignore[union-attr]  # constrained layout has an engine
    if title:
        figure.suptitle(plain(title, int(width * 9)), x=0.012, ha="left", fontsize=12, fontweight="bold", color=INK, fontfamily=fonts())
    return figure


def tidy(axes: Axes, *, x: str = "", y: str = "", note: str = "", grid: str = "y") -> None:
    """Gives axes their labels, a light grid along `grid` (x, y, both or none), quiet ticks, and a note above at the left."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.tick_params(colors=FAINT, labelsize=8.5, which="both", length=0, pad=5)
    axes.set_axisbelow(True)
    if grid != "none":
        axes.grid(True, axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]  # the stub wants a literal
    axes.set_xlabel(plain(x), fontsize=9.5, color=INK)
    axes.set_ylabel(plain(y), fontsize=9.5, color=INK, fontfamily=fonts())
    if note:
        axes.set_title(plain(note, 120), loc="left", fontsize=9, color=FAINT, fontfamily=fonts())


def empty(axes: Axes, text: str) -> None:
    """Says in the middle of the axes why there is nothing to see, and drops their ticks."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, plain(text), transform=axes.transAxes, ha="center", va="center", color=FAINT, fontsize=10)


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # no font here has it: a box is drawn
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save(figure: Figure, path: epath.PathLike) -> None:
    """Writes the figure as a PNG; its folder is made where there is none.

    Raises:  ResearchError: the disk is full, read-only or not there.
    """
    data = png(figure)
    target = epath.Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    except OSError as error:
        raise ResearchError(f"cannot write {target}: {error.strerror or error}") from error
