import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from research.losses.cross_entropy import cross_entropy, z_loss

RANDOM = np.random.RandomState(0)
LOGITS = (3 * RANDOM.randn(4, 5, 7)).astype(np.float32)
LABEL = RANDOM.randint(0, 7, (4, 5)).astype(np.int32)
WEIGHTS = jnp.asarray(RANDOM.rand(7) + 0.5, jnp.float32)
FORMS = [
    functools.partial(cross_entropy, label=jnp.asarray(LABEL)),
    functools.partial(cross_entropy, label=jnp.asarray(LABEL), label_smoothing=0.1),
    functools.partial(cross_entropy, label=jnp.asarray(LABEL), label_smoothing=0.1, class_weights=WEIGHTS),
    z_loss,
]
ids = ["plain", "smoothed", "weighted", "z_loss"]


def test_is_the_negative_log_probability_of_the_label():
    probability = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    want = -np.log(np.take_along_axis(probability, LABEL[..., None], -1)[..., 0])
    np.testing.assert_allclose(cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABEL)), want, rtol=1e-5)


def test_smoothing_mixes_with_the_uniform_distribution():
    target = 0.9 * np.eye(7)[LABEL] + 0.1 / 7
    want = -(target * jax.nn.log_softmax(LOGITS)).sum(-1)
    np.testing.assert_allclose(cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABEL), label_smoothing=0.1), want, rtol=1e-5)


def test_z_loss_is_the_squared_log_normaliser():
    np.testing.assert_allclose(z_loss(jnp.asarray(LOGITS)), np.log(np.exp(LOGITS).sum(-1)) ** 2, rtol=1e-5)


@pytest.mark.parametrize("loss", FORMS, ids=ids)
def test_another_axis_equals_moveaxis(loss):
    got = loss(jnp.asarray(np.moveaxis(LOGITS, -1, 1)), axis=1)
    np.testing.assert_array_equal(got, loss(jnp.asarray(LOGITS)))


@pytest.mark.parametrize("loss", FORMS, ids=ids)
def test_gradient(loss):
    check_grads(jax.jit(loss), (LOGITS,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("loss", FORMS, ids=ids)
def test_large_logits_stay_finite_in_value_and_gradient(loss):
    value, gradient = jax.jit(jax.value_and_grad(lambda x: loss(x).sum()))(1e4 * LOGITS)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("loss", FORMS, ids=ids)
def test_bfloat16_logits_are_read_in_float32(loss):
    low = jnp.asarray(LOGITS, jnp.bfloat16)
    got = loss(low)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, loss(low.astype(jnp.float32)))


def test_a_traced_smoothing_equals_a_constant_one():
    traced = jax.jit(lambda s: cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABEL), label_smoothing=s))
    for s in (0.0, 0.3):
        np.testing.assert_allclose(traced(jnp.float32(s)), cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABEL), label_smoothing=s), rtol=1e-5)
    assert traced._cache_size() == 1
