"""Pictures with what a model said about them."""

from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Int, Num

from research.figures import style
from research.figures.pixels import pixels

MOST = 64  # pictures on one sheet


def image_grid(
    images: Num[np.ndarray, "b y x c"],
    labels: Int[np.ndarray, "b"] | None,
    predictions: Int[np.ndarray, "b"] | None,
    path: epath.PathLike,
    *,
    classes: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Draws the first 64 images in a grid, over each the prediction: green where it is right, else red, with the true class beside it.

    Args:    images: of any range, standardised ones too: the smallest value of the sheet becomes black, the largest white; the first of two
             channels, or the first three of more, are drawn.  labels, predictions: class numbers; None where there are none.  classes: names.
    """
    shown = pixels(images[:MOST])
    columns = max(int(np.ceil(np.sqrt(len(shown)))), 1)
    rows = max(-(-len(shown) // columns), 1)
    wide = float(np.clip(9.0 / columns, 1.1, 2.2))  # inches of one picture
    high = float(np.clip(wide * images.shape[1] / images.shape[2], 0.5, 4.0))
    figure = style.new(max(columns * (wide + 0.1), 3.0) + 0.2, rows * (high + 0.3) + (0.5 if title else 0.2), title)
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).ravel()):
        axes.set_axis_off()
        if i < len(shown):
            axes.imshow(shown[i], interpolation="nearest", aspect="equal")
            text, color = _caption(None if labels is None else int(labels[i]), None if predictions is None else int(predictions[i]), classes)
            axes.set_title(text, pad=3, fontsize=8, color=color, fontfamily=style.fonts())
    if not len(shown):
        style.empty(axes, "no images")
    style.save(figure, path)


def _caption(label: int | None, prediction: int | None, classes: Sequence[str] | None) -> tuple[str, str]:
    def name(i: int) -> str:
        return style.plain(classes[i] if classes is not None else i, 14)

    if prediction is None:
        return ("" if label is None else name(label)), style.INK
    if label is None or label == prediction:
        return name(prediction), style.INK if label is None else style.GREEN
    return f"{name(prediction)}, not {name(label)}", style.RED
