"""The ledger as a picture, and the front of many models."""

import numpy as np
import pytest

from research.figures import style
from research.figures.compression import front, ledger, pareto

COSTS = {"bytes": (3.2e6, 0.8e6), "ms, batch 1": (0.5, 0.6)}
METRICS = {"accuracy": ((0.99, 0.98, 1.0), (0.98, 0.97, 0.99)), "loss $": ((0.1, 0.1, 0.1), (0.2, 0.1, 0.3))}


@pytest.mark.parametrize("costs", [COSTS, {}, {"bytes": (0.0, 1.0)}, {"bytes": (float("nan"), 1.0)}])
@pytest.mark.parametrize("metrics", [METRICS, {}])
def test_a_ledger_of_any_content_is_drawn(tmp_path, size_of, costs, metrics):
    ledger(costs, metrics, tmp_path / "figure.png", title="żółw $x$")
    assert size_of(tmp_path / "figure.png")[0] > 800


def test_a_cost_that_grew_has_another_colour(tmp_path, pixels_of):
    ledger({"bytes": (100, 50)}, {}, tmp_path / "less.png")
    ledger({"bytes": (100, 150)}, {}, tmp_path / "more.png")
    assert pixels_of(tmp_path / "less.png", style.BLUE) > 1000 > pixels_of(tmp_path / "less.png", style.ORANGE)
    assert pixels_of(tmp_path / "more.png", style.ORANGE) > 1000 > pixels_of(tmp_path / "more.png", style.BLUE)


def test_the_front_holds_what_nothing_beats():
    x, y = np.array([1.0, 2, 2, 3, 4, 1]), np.array([1.0, 3, 2, 3, 5, 1])
    assert front(x, y).tolist() == [True, True, False, False, True, True]
    random = np.random.RandomState(0).randint(0, 9, (40, 2)).astype(float)
    beaten = [any((a <= p[0] and b >= p[1]) and (a < p[0] or b > p[1]) for a, b in random) for p in random]
    assert front(*random.T).tolist() == [not b for b in beaten]


@pytest.mark.parametrize("models", [0, 1, 2, 60])
def test_any_number_of_models(tmp_path, size_of, models):
    random = np.random.RandomState(0)
    x, y = 10 ** random.uniform(3, 6, models), random.rand(models)
    missing = np.where(np.arange(models) % 2 == 0, np.nan, x)
    labels = [f"method {i}" for i in range(models)]
    pareto({"bytes": x, "ms": missing, "none": np.full(models, np.nan)}, y, labels, tmp_path / "figure.png", name="test/accuracy")
    assert size_of(tmp_path / "figure.png")[0] > 2000


def test_whether_higher_is_better_depends_on_the_metric(tmp_path, pixels_of):
    x, y = np.array([1e3, 1e4, 1e5, 1e6]), np.array([0.1, 0.2, 0.3, 0.4])
    for name in ("test/accuracy", "test/loss"):
        pareto({"bytes": x}, y, [""] * 4, tmp_path / f"{name[5:]}.png", name=name)
    assert pixels_of(tmp_path / "accuracy.png", style.BLUE) > 2 * pixels_of(tmp_path / "loss.png", style.BLUE)
