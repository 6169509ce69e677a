"""Errors made up for by later inputs: against the update written out, one input at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from research.compression.compensate import compensate, inverse_cholesky

RANDOM = np.random.RandomState(0)
X = (RANDOM.randn(80, 20) @ (np.eye(20) + 0.3 * RANDOM.randn(20, 20))).astype(np.float32)
W = RANDOM.randn(20, 6).astype(np.float32)
HESSIAN = 2 / 80 * X.T @ X


def rounded(scale, i, weights):
    return jnp.round(weights / scale) * scale


def test_the_factor_is_the_upper_cholesky_factor_of_the_damped_inverse():
    hessian = HESSIAN.copy()
    hessian[4] = hessian[:, 4] = 0  # an input that is always zero
    factor = np.asarray(inverse_cholesky(jnp.asarray(hessian), 0.1), np.float64)
    hessian[4, 4] = 1
    damped = hessian + 0.1 * np.diag(hessian).mean() * np.eye(20)
    np.testing.assert_allclose(factor, np.linalg.cholesky(np.linalg.inv(damped)).T, atol=1e-4)


def test_a_matrix_that_is_not_positive_definite_gives_nan():
    assert np.isnan(inverse_cholesky(jnp.ones((4, 4)), 0.0)).any()


@pytest.mark.parametrize("block", [4, 8, 12, 20, 128])
def test_each_error_is_taken_from_the_later_inputs_whatever_the_block(block):
    factor = np.asarray(inverse_cholesky(jnp.asarray(HESSIAN)), np.float64)
    expected, scales = W.astype(np.float64), []
    for i in range(20):
        if i % 4 == 0:
            scales.append(np.abs(expected[i : i + 4]).max() / 3)
        new = np.round(expected[i] / scales[-1]) * scales[-1]
        expected[i + 1 :] -= np.outer(factor[i, i + 1 :], (expected[i] - new) / factor[i, i])
        expected[i] = new
    seen = compensate(
        jnp.asarray(W), inverse_cholesky(jnp.asarray(HESSIAN)), lambda start, weights: jnp.abs(weights).max() / 3, rounded, group=4, block=block
    )
    np.testing.assert_allclose(seen, expected, atol=1e-4)


def test_the_product_with_the_data_stays_nearer_than_by_the_rule_alone():
    factor = inverse_cholesky(jnp.asarray(HESSIAN))
    made_up = compensate(jnp.asarray(W), factor, lambda *_: 0.5, rounded)
    alone = np.round(W / 0.5) * 0.5
    error = [np.linalg.norm(X @ (W - np.asarray(matrix))) for matrix in (made_up, alone)]
    assert error[0] < 0.8 * error[1]


def test_the_first_input_and_the_place_in_the_group_are_told():
    told = compensate(
        jnp.zeros((20, 6)),
        jnp.eye(20),
        lambda start, _: start,
        lambda start, i, weights: weights + (100 * start + i).astype(jnp.float32),
        group=5,
        block=10,
    )
    np.testing.assert_array_equal(told[:, 0], [100 * (i - i % 5) + i % 5 for i in range(20)])


@pytest.mark.parametrize(("group", "block"), [(3, 128), (8, 16)])
def test_a_group_that_does_not_divide_is_refused(group, block):
    with pytest.raises(ValueError, match=f"group={group} must divide block={block} and the 20 inputs"):
        compensate(jnp.asarray(W), jnp.eye(20), lambda *_: 0.5, rounded, group=group, block=block)
