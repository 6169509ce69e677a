import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.layers.dropout import Dropout

KEY = jax.random.key(0)
X = jnp.ones((8, 1000))
INDEX = jnp.arange(8, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames=("rate", "train"))
def drop(x, index, rate, hyper=None, train=True):
    return Dropout(rate).apply({}, x, index=index, hyper=hyper or {}, train=train, rngs={"dropout": KEY})


def test_drops_its_share_and_keeps_the_mean():
    y = np.asarray(drop(X, INDEX, 0.25))
    assert abs(np.mean(y == 0) - 0.25) < 0.02
    np.testing.assert_allclose(y[y != 0], 1 / 0.75, rtol=1e-6)


def test_an_example_does_not_depend_on_how_the_batch_was_cut():
    whole = np.asarray(drop(X, INDEX, 0.5))
    order = np.array([6, 2, 5], np.int32)
    np.testing.assert_array_equal(drop(X[:3], jnp.asarray(order), 0.5), whole[order])
    assert not np.array_equal(whole[0], whole[1])


def test_a_traced_rate_equals_a_constant_one_and_compiles_once():
    before = drop._cache_size()
    traced = [drop(X, INDEX, None, {"dropout": jnp.float32(rate)}) for rate in (0.25, 0.5)]
    assert drop._cache_size() == before + 1
    for rate, y in zip((0.25, 0.5), traced, strict=True):
        np.testing.assert_allclose(y, drop(X, INDEX, rate), rtol=1e-6)


def test_does_nothing_outside_training():
    np.testing.assert_array_equal(drop(X, INDEX, 0.5, train=False), X)


def test_needs_the_index():
    with pytest.raises(ValueError, match="index"):
        drop(X, None, 0.5)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(ConfigError, match="dropout="):
        Dropout(rate)
