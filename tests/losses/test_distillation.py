"""Closed forms of what a student is held against."""

import jax
import jax.numpy as jnp
import numpy as np

from research.losses.distillation import attention_loss, cosine_distance, patient_distance, soft_loss

RANDOM = np.random.RandomState(0)
STUDENT, TEACHER = (jnp.asarray(3 * RANDOM.randn(6, 5), jnp.float32) for _ in range(2))


def test_equal_answers_cost_nothing_and_pull_nowhere():
    loss, slope = jax.value_and_grad(lambda x: soft_loss(x, TEACHER, 3.0).sum())(TEACHER)
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    shifted = soft_loss(TEACHER + 7.0, TEACHER, 3.0)  # logits count up to a constant
    np.testing.assert_allclose(shifted, 0, atol=1e-5)


def test_a_high_temperature_gives_the_gradient_of_the_squared_error_of_centred_logits():
    slope = jax.grad(lambda x: soft_loss(x, TEACHER, 1000.0).sum())(STUDENT)
    difference = np.asarray(STUDENT - TEACHER, np.float64)
    expected = (difference - difference.mean(-1, keepdims=True)) / 5  # of |d - mean d|² / (2 n)
    np.testing.assert_allclose(slope, expected, rtol=0.02, atol=2e-3)


def test_the_gradient_is_that_of_the_probabilities_times_the_temperature():
    slope = jax.grad(lambda x: soft_loss(x, TEACHER, 2.0).sum())(STUDENT)
    np.testing.assert_allclose(slope, 2.0 * (jax.nn.softmax(STUDENT / 2) - jax.nn.softmax(TEACHER / 2)), atol=1e-5)


def test_hidden_distances_ignore_length_and_know_their_range():
    np.testing.assert_allclose(cosine_distance(STUDENT, 4.0 * STUDENT), 0, atol=1e-6)
    np.testing.assert_allclose(cosine_distance(STUDENT, -STUDENT), 2, atol=1e-6)
    np.testing.assert_allclose(patient_distance(STUDENT, -STUDENT), 4, atol=1e-5)
    x, y = np.asarray(STUDENT, np.float64), np.asarray(TEACHER, np.float64)
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    np.testing.assert_allclose(cosine_distance(STUDENT, TEACHER), 1 - cosine, atol=1e-6)
    units = x / np.linalg.norm(x, axis=-1, keepdims=True) - y / np.linalg.norm(y, axis=-1, keepdims=True)
    np.testing.assert_allclose(patient_distance(STUDENT, TEACHER), (units**2).sum(-1), atol=1e-5)


def test_a_state_of_zeros_is_finite_with_its_gradient():
    zero = jnp.zeros_like(STUDENT)
    for distance in (cosine_distance, patient_distance):
        loss, slope = jax.value_and_grad(lambda x, distance=distance: distance(x, TEACHER).sum())(zero)
        assert np.isfinite(loss)
        assert np.isfinite(slope).all()


def causal(seed, heads):
    scores = np.random.RandomState(seed).randn(2, heads, 4, 4) - 1e9 * np.triu(np.ones((4, 4)), 1)
    return np.asarray(jax.nn.softmax(jnp.asarray(scores, jnp.float32)), np.float64)


def test_attention_is_compared_query_by_query_where_keys_are_seen():
    student, teacher = causal(0, 3), causal(1, 3)
    seen = np.tril(np.ones((4, 4), bool))
    ratio = np.where(seen, np.log(np.where(seen, teacher, 1) / np.where(seen, student, 1)), 0)
    expected = (teacher * ratio).sum(-1).mean(1)
    got = attention_loss(jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got.shape == (2, 4)
    np.testing.assert_allclose(got[:, 0], 0, atol=1e-6)  # the first query sees one key
    slope = jax.grad(lambda x: attention_loss(x, jnp.asarray(teacher, jnp.float32)).sum())(jnp.asarray(student, jnp.float32))
    assert np.isfinite(slope).all()


def test_other_numbers_of_heads_are_compared_by_their_mean():
    student, teacher = causal(0, 2), causal(1, 3)
    means = (jnp.asarray(x.mean(1, keepdims=True), jnp.float32) for x in (student, teacher))
    got = attention_loss(jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32))
    np.testing.assert_allclose(got, attention_loss(*means), atol=1e-6)
