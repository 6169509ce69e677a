"""Which way a score is better."""

import pytest

from research import compose
from research.core.direction import direction


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("validation/accuracy", "max"),
        ("train/top_5_accuracy", "max"),
        ("r2", "max"),
        ("validation/loss", "min"),
        ("bits_per_byte", "min"),
        ("test/mae", "min"),
    ],
)
def test_the_direction_of_a_score(name, best):
    assert direction(name) == best


def test_best_follows_what_is_monitored_unless_it_is_told():
    assert compose().train.mode == "min"
    assert compose(["train.monitor=validation/accuracy"]).train.mode == "max"
    assert compose(["train.monitor=validation/accuracy", "schedule=plateau"]).schedule.mode == "max"
    assert compose(["train.monitor=validation/accuracy", "train.mode=min"]).train.mode == "min"
