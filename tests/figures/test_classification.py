"""Figures of a classifier: the colours tell right from wrong, for any number and kind of classes."""

import numpy as np
import pytest

from research.figures import classification as draw
from research.figures import style

UNICODE = ["kot żółty", "кошка", "猫", r"$a$ \frac{1", "a name that is much longer than anyone should ever give to a class"]


def _scores(names, f1=0.5):
    return [{"class": name, "precision": 0.4, "recall": 0.6, "f1": f1, "support": 10} for name in names]


def test_errors_are_orange_and_right_answers_blue(tmp_path, pixels_of):
    path, dark_blue, dark_orange = tmp_path / "matrix.png", "#12386f", "#8a3d0c"
    draw.confusion_matrix(np.diag([5, 7, 9]), ["a", "b", "c"], path)
    assert pixels_of(path, dark_blue) > 3 * 60**2
    assert not pixels_of(path, dark_orange)
    draw.confusion_matrix(np.array([[0, 9], [9, 0]]), ["a", "b"], path)
    assert pixels_of(path, dark_orange) > 2 * 60**2
    assert not pixels_of(path, dark_blue)


def test_an_error_of_one_in_a_hundred_can_be_seen(tmp_path, pixels_of):
    matrix = np.diag([99, 100])
    matrix[0, 1] = 1
    draw.confusion_matrix(matrix, ["a", "b"], tmp_path / "matrix.png")
    shade = draw.WRONG(np.sqrt(0.01 / draw.WORST))
    assert min(shade[:3]) < 0.9
    assert pixels_of(tmp_path / "matrix.png", shade[:3], 3) > 60**2


@pytest.mark.parametrize("count", [1, 100, 300])
def test_any_number_of_classes(tmp_path, size_of, count):
    names = [f"class {i}" for i in range(count)]
    draw.confusion_matrix(np.eye(count, dtype=int), names, tmp_path / "matrix.png")
    draw.per_class(_scores(names), tmp_path / "classes.png")
    assert 300 < size_of(tmp_path / "matrix.png")[0] < 2700
    assert size_of(tmp_path / "classes.png")[1] < 2500


def test_names_of_any_script_and_no_examples(tmp_path, size_of):
    draw.confusion_matrix(np.zeros((5, 5), int), UNICODE, tmp_path / "matrix.png")
    draw.per_class([{**row, "f1": None, "precision": None, "recall": None, "support": 0} for row in _scores(UNICODE)], tmp_path / "classes.png")
    draw.reliability(
        {"error": None, "bins": [{"lower": 0.0, "upper": 1.0, "count": 0, "confidence": None, "accuracy": None}]}, tmp_path / "calibration.png"
    )
    draw.per_class([], tmp_path / "none.png")
    assert all(size_of(path)[0] > 300 for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 4


def test_of_many_classes_the_worst_are_shown(tmp_path, pixels_of):
    good, bad = _scores([str(i) for i in range(100)], f1=1.0), _scores(["bad"] * draw.ROWS, f1=0.0)
    draw.per_class(good, tmp_path / "good.png")
    draw.per_class(good + bad, tmp_path / "bad.png")
    assert pixels_of(tmp_path / "good.png", style.PALE) > 50_000 > 2_000 > pixels_of(tmp_path / "bad.png", style.PALE)


@pytest.mark.parametrize(("accuracy", "color", "other"), [(0.5, draw.OVER, draw.UNDER), (1.0, draw.UNDER, draw.OVER)])
def test_the_gap_says_on_which_side_confidence_is_wrong(tmp_path, pixels_of, accuracy, color, other):
    row = {"lower": 0.6, "upper": 0.8, "count": 10, "confidence": 0.75, "accuracy": accuracy}
    draw.reliability({"error": 0.25, "bins": [row]}, tmp_path / "calibration.png")
    assert pixels_of(tmp_path / "calibration.png", color) > 4 * pixels_of(tmp_path / "calibration.png", other) > 0  # the legend shows both
