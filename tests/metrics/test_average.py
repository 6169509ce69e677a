import jax
import jax.numpy as jnp
import numpy as np

from research.metrics.average import average

VALUES = jnp.array([1.0, 2.0, jnp.nan, 4.0])
MASK = jnp.array([True, True, False, True])


def test_is_a_sum_and_its_weight_and_never_reads_what_is_masked():
    assert average(VALUES, MASK) == (7.0, 3.0)
    assert average(VALUES, jnp.array([0.5, 0.0, 0.0, 2.0])) == (8.5, 2.5)
    assert average(VALUES, jnp.zeros(4)) == (0.0, 0.0)


def test_counts_truth_values():
    total, weight = average(VALUES > 1.5, MASK)
    assert (total, weight) == (2.0, 3.0)
    assert total.dtype == weight.dtype == jnp.float32


def test_mask_equals_subset_also_in_the_gradient():
    gradient = jax.grad(lambda x: average(x * x, MASK)[0])(VALUES)
    np.testing.assert_array_equal(gradient[MASK], 2 * VALUES[MASK])
