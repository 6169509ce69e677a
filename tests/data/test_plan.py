import numpy as np
import pytest

from research.data.plan import plan


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch():
    orders = [plan(seed, epoch, 50) for seed in (0, 1) for epoch in (0, 1)]
    assert all((np.sort(order) == np.arange(50)).all() for order in orders)
    assert len({order.tobytes() for order in orders}) == 4
    assert orders[0].dtype == np.int32


def test_an_order_never_changes_between_versions():
    assert plan(0, 0, 8).tolist() == [7, 4, 3, 6, 2, 5, 1, 0]


def test_without_shuffling_examples_come_in_their_own_order():
    assert plan(3, 9, 4, False).tolist() == [0, 1, 2, 3]


def test_fewer_draws_than_examples_come_without_replacement_from_all_of_them():
    draws = [plan(0, epoch, 1000, True, 300) for epoch in range(5)]
    assert all(len(set(order.tolist())) == 300 for order in draws)
    assert max(order.max() for order in draws) > 990


def test_a_plan_is_computed_once_and_cannot_be_changed():
    assert plan(0, 0, 10) is plan(0, 0, 10)
    with pytest.raises(ValueError, match=r"read-only"):
        plan(0, 0, 10)[0] = 1
