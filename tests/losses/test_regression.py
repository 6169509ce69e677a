import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from research.losses.regression import absolute_error, huber, squared_error

RANDOM = np.random.RandomState(0)
VALUE, TARGET = RANDOM.randn(2, 6, 3).astype(np.float32) * 3
LOSSES = {
    "mse": (squared_error, lambda d: d**2),
    "mae": (absolute_error, np.abs),
    "huber": (huber, lambda d: np.where(np.abs(d) < 1, d**2 / 2, np.abs(d) - 0.5)),
    "huber 2.5": (functools.partial(huber, delta=2.5), lambda d: np.where(np.abs(d) < 2.5, d**2 / 2, 2.5 * (np.abs(d) - 1.25))),
}


@pytest.mark.parametrize(("loss", "formula"), LOSSES.values(), ids=LOSSES)
def test_equals_its_formula(loss, formula):
    np.testing.assert_allclose(loss(jnp.asarray(VALUE), jnp.asarray(TARGET)), formula(VALUE - TARGET), rtol=1e-5)


@pytest.mark.parametrize(("loss", "formula"), LOSSES.values(), ids=LOSSES)
def test_gradient(loss, formula):
    check_grads(jax.jit(lambda x: loss(x, jnp.asarray(TARGET))), (VALUE,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("loss", "formula"), LOSSES.values(), ids=LOSSES)
def test_gradient_at_no_error_is_0(loss, formula):
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: loss(x, x * 0).sum()))(jnp.zeros(3)), np.zeros(3))


@pytest.mark.parametrize(("loss", "formula"), LOSSES.values(), ids=LOSSES)
def test_bfloat16_is_read_in_float32(loss, formula):
    low = jnp.asarray(VALUE, jnp.bfloat16)
    got = loss(low, jnp.asarray(TARGET))
    np.testing.assert_array_equal(got, loss(low.astype(jnp.float32), jnp.asarray(TARGET)))
    assert got.dtype == jnp.float32
