"""What a regressor predicts."""

from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Float

from research.figures import style

MOST = 9  # outputs on one sheet
POINTS = 20_000  # more are thinned out evenly


def predicted_against_true(
    predicted: Float[np.ndarray, "b o"],
    true: Float[np.ndarray, "b o"],
    path: epath.PathLike,
    *,
    names: Sequence[str] | None = None,
    title: str = "Predicted against true",
) -> None:
    """Draws each example's prediction over its true value, one panel per output up to nine, with the diagonal that a perfect model lies on.

    Args:    predicted, true: in the same units; a row that is not finite is left out and counted.  names: of the outputs.
    """
    outputs = true.shape[1]
    shown = min(outputs, MOST)
    columns = min(shown, 3)
    rows = -(-shown // columns)
    side = 5.0 if columns == 1 else 3.4
    figure = style.new(side * columns + 0.4, side * rows + 0.6, f"{title} ({MOST} of {outputs} outputs)" if outputs > MOST else title)
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).ravel()):
        if i >= shown:
            axes.set_axis_off()
            continue
        name = names[i] if names else f"output {i}" if outputs > 1 else ""
        _panel(axes, predicted[:, i].astype(np.float64), true[:, i].astype(np.float64), name)
    style.save(figure, path)


def _panel(axes, predicted, true, name):
    finite = np.isfinite(predicted) & np.isfinite(true)
    x, y = true[finite], predicted[finite]
    if not len(x):
        style.tidy(axes, note=name, grid="none")
        style.empty(axes, "no finite prediction")
        return
    error = np.abs(y - x).mean()
    dropped = f", {(~finite).sum():,} not finite" if not finite.all() else ""
    every = -(-len(x) // POINTS)
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    margin = 0.04 * (high - low) or max(abs(high), 1.0) * 0.1
    limits = (low - margin, high + margin)
    axes.plot(limits, limits, color=style.FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.scatter(x[::every], y[::every], s=14, color=style.BLUE, alpha=float(np.clip(60 / np.sqrt(len(x)) / 4, 0.08, 0.7)), linewidth=0, zorder=2)
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    style.tidy(axes, x="true", y="predicted", note=f"{name}{': ' if name else ''}mean absolute error {error:.3g}{dropped}", grid="both")
