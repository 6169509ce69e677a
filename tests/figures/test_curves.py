"""Learning curves: what is drawn, where lines break, and records that are empty or bad."""

import numpy as np
import pytest

from research.figures import style
from research.figures.curves import _headline, _line, _log, curves


def _records(steps=200):
    train = [{"step": s, "train/loss": 1 + 3 * 0.98**s, "learning_rate": 1e-3} for s in range(1, steps)]
    return train + [{"step": s, "validation/loss": 1.5 + 3 * 0.98**s} for s in range(20, steps, 20)]


def test_train_validation_and_best_are_drawn(tmp_path, pixels_of):
    curves(_records(), tmp_path / "curves.png", title="żółw $x")
    assert pixels_of(tmp_path / "curves.png", style.PALE) > 100
    assert pixels_of(tmp_path / "curves.png", style.BLUE) > 1000
    assert pixels_of(tmp_path / "curves.png", style.ORANGE) > 20
    curves([record for record in _records() if "train/loss" in record], tmp_path / "train.png")
    assert not pixels_of(tmp_path / "train.png", style.BLUE)
    assert not pixels_of(tmp_path / "train.png", style.ORANGE)


def test_a_headline_metric_and_a_learning_rate_have_their_own_axes(tmp_path, size_of):
    heights = {}
    for name, records in {
        "loss": [{"step": 1, "validation/loss": 1.0}],
        "rate": [{"step": 1, "validation/loss": 1.0, "learning_rate": 1e-3}],
        "all": [{"step": 1, "validation/loss": 1.0, "validation/accuracy": 0.5, "learning_rate": 1e-3}],
    }.items():
        curves(records, tmp_path / f"{name}.png")
        heights[name] = size_of(tmp_path / f"{name}.png")[1]
    assert heights["loss"] < heights["rate"] < heights["all"]


def test_the_headline_is_the_first_that_was_evaluated():
    assert _headline([{"step": 1, "validation/accuracy": 0.1}, {"step": 2, "validation/perplexity": 3.0}]) == "perplexity"
    assert _headline([{"step": 1, "train/loss": 3.0}]) is None


def test_holes_break_the_line():
    records = [{"step": s, "train/loss": value} for s, value in enumerate([3.0, None, float("nan"), float("inf"), 2.0])] + [{"step": 9}]
    steps, values = _line(records, "train/loss")
    assert steps.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(values, [3.0, np.nan, np.nan, np.nan, 2.0])
    assert len(_line(records, "validation/loss")[0]) == 0


def test_a_log_scale_only_where_values_span_orders_of_magnitude():
    assert _log(np.array([1e-5, 1.0]))
    assert not _log(np.array([1.2, 4.0]))
    assert not _log(np.array([0.0, 1.0]))
    assert not _log(np.array([-1.0, 1e6]))
    assert not _log(np.zeros(0))


@pytest.mark.parametrize(
    "records", [[], [{"step": 5, "train/loss": 1.0}], [{"step": s, "train/loss": None, "validation/loss": float("nan")} for s in range(9)]]
)
def test_next_to_nothing_is_drawn_too(tmp_path, size_of, records):
    curves(records, tmp_path / "curves.png")
    assert size_of(tmp_path / "curves.png")[0] == 1200
