"""The smallest of many, and a sparsity shared out among layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.sparsity import layer_sparsities, smallest


@pytest.mark.parametrize("count", [0, 1, 7, 20])
def test_the_smallest_are_those_of_a_stable_sort_whether_the_count_is_traced_or_not(count):
    scores = np.random.RandomState(0).choice(np.float32([-np.inf, -2.5, -1e-30, -0.0, 0.0, 3.0, np.inf]), 20)  # with many ties
    expected = np.zeros(20, bool)
    expected[np.argsort(scores, kind="stable")[:count]] = True
    np.testing.assert_array_equal(smallest(jnp.asarray(scores), count), expected)
    np.testing.assert_array_equal(jax.jit(smallest)(jnp.asarray(scores), jnp.int32(count)), expected)


def oracle(shapes, sparsity):
    """The rule of RigL's section 3 by its own words, one layer made dense at a time."""
    n, raw = np.array([np.prod(s) for s in shapes]), np.array([sum(s) / np.prod(s) for s in shapes])
    dense = np.zeros(len(shapes), bool)
    while True:
        scale = ((1 - sparsity) * n.sum() - n[dense].sum()) / (n * raw)[~dense].sum()
        density = np.where(dense, 1.0, scale * raw)
        if density.max() <= 1:
            return 1 - density
        dense[np.argmax(density)] = True


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9, 0.98])
def test_erk_is_the_papers_rule_and_keeps_the_whole(sparsity):
    shapes = [(3, 3, 1, 8), (3, 3, 8, 16), (256, 64), (64, 10), (5, 2, 7)]
    found = layer_sparsities(dict(zip("abcde", shapes, strict=True)), sparsity, "erk")
    np.testing.assert_allclose(list(found.values()), oracle(shapes, sparsity), atol=1e-12)
    sizes = np.array([np.prod(shape) for shape in shapes])
    assert sizes @ list(found.values()) / sizes.sum() == pytest.approx(sparsity)
    assert found["a"] < found["c"]


def test_uniform_is_the_same_everywhere_and_no_sparsity_is_none():
    shapes = {"a": (3, 4), "b": (100, 100)}
    assert layer_sparsities(shapes, 0.7, "uniform") == {"a": 0.7, "b": 0.7}
    assert layer_sparsities(shapes, 0.0, "erk") == pytest.approx({"a": 0.0, "b": 0.0})
