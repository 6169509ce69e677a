"""Predicted against true: any number of outputs and points, and rows that are not finite."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from research.figures import style
from research.figures.regression import predicted_against_true


@pytest.mark.parametrize(("examples", "outputs"), [(0, 1), (1, 1), (50, 2), (50, 12), (30_000, 1)])
def test_any_number_of_points_and_outputs(tmp_path, size_of, examples, outputs):
    true = np.random.RandomState(0).randn(examples, outputs).astype(np.float32)
    predicted_against_true(true * np.float32(0.5), true, tmp_path / "figure.png", names=[f"żółw ${i}" for i in range(outputs)])
    assert size_of(tmp_path / "figure.png")[0] > 500


def test_points_are_drawn_and_those_that_are_not_finite_left_out(tmp_path, pixels_of):
    true = np.linspace(0, 1, 20)[:, None]
    predicted_against_true(true, true, tmp_path / "all.png")
    predicted_against_true(np.where(true > 0.5, np.inf, true), true, tmp_path / "half.png")
    predicted_against_true(np.full_like(true, np.nan), true, tmp_path / "none.png")
    point = 0.7 * np.array(to_rgb(style.BLUE)) + 0.3  # a point is 70 % opaque
    every, half, none = (pixels_of(tmp_path / f"{name}.png", point) for name in ("all", "half", "none"))
    assert every > 1.5 * half > 0 == none
