"""What a sweep found, as pictures: any number of settings, scores that are missing, values that are no numbers."""

import numpy as np
import pytest

from research.figures import style
from research.figures import sweep as draw

DARKEST = "#0b2a5c"
MANY = len(draw.COLORS) + 4


def curves(number, runs=3, points=5):
    steps = np.arange(1.0, points + 1)
    values = np.random.default_rng(0).uniform(0.5, 1, (number, runs, points))
    reach = np.full(points, 0.1) if runs > 1 else None
    return [draw.Curves(f"width={i} $x_1$", steps, held, reach) for i, held in enumerate(values)]


@pytest.mark.parametrize(("number", "runs", "points"), [(0, 1, 1), (1, 1, 1), (2, 3, 5), (MANY, 2, 5)])
def test_any_number_of_learning_curves(tmp_path, size_of, number, runs, points):
    draw.learning(curves(number, runs, points), tmp_path / "figure.png", metric="validation/loss")
    assert size_of(tmp_path / "figure.png")[0] > 1000


def test_a_curve_that_left_the_others_does_not_shrink_them(tmp_path, pixels_of):
    """The best is drawn over as much of the frame whether or not a poor one ends far away."""
    good = draw.Curves("good", np.arange(50.0), np.linspace(2.0, 1.0, 50)[None])
    crowd = [good, *curves(MANY, 1, 50)]
    away = draw.Curves("away", np.arange(50.0), np.linspace(2.0, 40.0, 50)[None])
    draw.learning(crowd, tmp_path / "near.png", metric="validation/loss")
    draw.learning([*crowd, away], tmp_path / "away.png", metric="validation/loss")
    assert pixels_of(tmp_path / "away.png", style.BLUE) > 0.8 * pixels_of(tmp_path / "near.png", style.BLUE)


@pytest.mark.parametrize("best", [True, False])
def test_only_a_best_that_is_apart_is_orange(tmp_path, pixels_of, best):
    means = np.array([0.9, 0.8])
    intervals = np.array([[0.88, 0.92], [0.7, 0.9]])
    points = [[0.89, 0.91], [0.75, 0.85]]
    draw.scores(["a", "b"], means, intervals, points, tmp_path / "figure.png", metric="test/accuracy", best=best, near=[False, not best])
    assert (pixels_of(tmp_path / "figure.png", style.ORANGE) > 100) == best


def test_scores_without_intervals_and_of_many_settings(tmp_path, size_of):
    number = draw.SHOWN + 5
    arguments = ([str(i) for i in range(number)], np.ones(number), np.full((number, 2), np.nan), [[1.0]] * number)
    draw.scores(*arguments, tmp_path / "figure.png", metric="test/loss", best=False, near=[True] * number)
    assert size_of(tmp_path / "figure.png")[1] < 2200  # those beyond `SHOWN` have no row


def test_a_run_without_a_score_is_red_in_parallel_coordinates(tmp_path, pixels_of):
    columns = {"optimizer": ["adam", "sgd", None, "sgd"], "learning_rate": [1e-4, 1e-3, 1e-2, 1.0], "width": [8, 8, 8, 8]}
    for name, values in (("all", [0.1, 0.2, 0.3, 0.4]), ("some", [0.1, np.nan, 0.3, 0.4])):
        draw.parallel(columns, np.array(values), tmp_path / f"{name}.png", metric="test/loss", rising=False)
    red = "#dc8383"  # as it lies on white, half seen through
    assert pixels_of(tmp_path / "all.png", red, 30) < 50 < pixels_of(tmp_path / "some.png", red, 30)


@pytest.mark.parametrize("rising", [True, False])
def test_the_best_cell_of_a_heat_map_is_the_darkest(tmp_path, rising):
    from matplotlib.colors import to_rgb
    from PIL import Image

    table = np.array([[1.0, 2.0], [np.nan, 3.0]])
    path = tmp_path / "figure.png"
    draw.heat(table, ["a", "b"], [1, 2], path, names=("key", "other"), metric="test/x", rising=rising)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    dark = np.argwhere((np.abs(pixels - np.array([round(255 * c) for c in to_rgb(DARKEST)])).max(-1) <= 3)[:, : int(0.7 * pixels.shape[1])])
    assert len(dark) > 1000  # the bar at the right apart
    row = dark[:, 0].mean() / pixels.shape[0]
    assert row > 0.5 if rising else row < 0.5


@pytest.mark.parametrize("shares", [{"width": 0.5}, {"a": 0.0, "b": 0.0}, {f"key {i}": i / 10 for i in range(9)}])
def test_importances(tmp_path, size_of, shares):
    draw.importances(shares, tmp_path / "figure.png", explained=-0.2, metric="test/accuracy")
    assert size_of(tmp_path / "figure.png")[0] > 900


@pytest.mark.parametrize("values", [[1.0], [1e-4, 1e-2, 1.0], [-1.0, 0.0, 1.0]])
def test_a_response_over_any_values(tmp_path, size_of, values):
    means = np.linspace(0.1, 0.9, len(values))
    lines = {"width=8": (values, means, np.stack([means - 0.1, means + 0.1], 1)), "width=16": (values, means, np.full((len(values), 2), np.nan))}
    draw.response(lines, tmp_path / "figure.png", key="learning_rate", metric="test/accuracy")
    assert size_of(tmp_path / "figure.png")[0] > 900
