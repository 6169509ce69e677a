import numpy as np
import pytest

from research.core.errors import ConfigError
from research.data.random_regression import random_regression


def test_numbers_follow_the_seed_and_fit_the_spec():
    data, same, other = random_regression(), random_regression(), random_regression(seed=1)
    batch = data.splits["train"].take(np.arange(100))
    assert batch["features"].shape == (100, 10)
    assert batch["target"].shape == (100, 1)
    assert batch["features"].dtype == np.float32
    assert (batch["features"] == same.splits["train"].take(np.arange(100))["features"]).all()
    assert (batch["features"] != other.splits["train"].take(np.arange(100))["features"]).any()
    assert abs(batch["features"].mean()) < 0.15
    assert abs(batch["features"].std() - 1) < 0.1
    assert list(data.splits) == ["train"]


def test_parts_and_sizes_can_be_chosen():
    data = random_regression(rows=30, features=3, outputs=2, validation=0.2)
    assert data.spec["examples"] == {"train": 24, "validation": 6}
    assert data.spec["features"] == 3
    assert data.spec["outputs"] == 2
    with pytest.raises(ConfigError, match=r"data.features=0"):
        random_regression(features=0)
