"""How the cost of a step grows."""

from collections.abc import Mapping, Sequence

from etils import epath
from matplotlib.axes import Axes

from research.figures import style


def over_context(points: Sequence[Mapping[str, float]], path: epath.PathLike, *, title: str = "") -> None:
    """Draws step time and memory a token over the context, each measured beside what the formula says, on log axes.

    Args:    points: each with context (tokens), ms_per_step, formula_ms, bytes_per_token, kept_per_token.  path: the PNG to write.
    """
    figure = style.new(9.0, 3.9, title)
    time, memory = figure.subplots(1, 2)
    contexts = [point["context"] for point in points]
    _lines(time, contexts, [point["ms_per_step"] for point in points], [point["formula_ms"] for point in points], "6 N + 6 A T, from the first")
    style.tidy(time, x="context, tokens", y="ms a step", note="time", grid="both")
    measured, kept = ([point[name] / 1024 for point in points] for name in ("bytes_per_token", "kept_per_token"))
    _lines(memory, contexts, measured, kept, "kept for the backward pass, by shapes")
    style.tidy(memory, x="context, tokens", y="KiB a token", note="memory beside the state", grid="both")
    style.save(figure, path)


def _lines(axes: Axes, contexts: Sequence[float], measured: Sequence[float], formula: Sequence[float], name: str) -> None:
    axes.plot(contexts, formula, color=style.ORANGE, linewidth=1.6, linestyle="--", label=name)
    axes.plot(contexts, measured, color=style.BLUE, linewidth=2.2, marker="o", markersize=5, label="measured")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{context:,.0f}" for context in contexts])
    values = [*measured, *formula]
    axes.set_ylim(0.5 * min(values), 2.5 * max(values))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(style.THOUSANDS)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
