import numpy as np
import pytest

from research.data.beside import Beside
from research.data.loader import Loader


class Numbers:
    """A source of its own example numbers."""

    def __len__(self):
        return 10

    def take(self, indices):
        return {"features": np.asarray(indices, np.float32)[:, None]}

    def check(self, spec, where):
        raise AssertionError(where)


def test_every_example_keeps_its_own_row_whatever_the_order():
    loader = Loader(Beside(Numbers(), "teacher", 2 * np.arange(10.0)[:, None]), 4, seed=3)
    for step in range(6):  # two epochs, the last batch of each filled up
        batch = loader[step]
        np.testing.assert_array_equal(batch["teacher"], 2 * batch["features"])
        np.testing.assert_array_equal(batch["index"], batch["features"][:, 0])


def test_a_row_for_each_example_is_needed():
    with pytest.raises(ValueError, match="teacher: 9 rows for 10 examples"):
        Beside(Numbers(), "teacher", np.zeros((9, 2)))


def test_the_source_is_still_checked():
    with pytest.raises(AssertionError, match="train split"):
        Beside(Numbers(), "teacher", np.zeros((10, 2))).check({}, "train split")
