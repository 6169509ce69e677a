import jax
import jax.numpy as jnp
import numpy as np

from research.layers.embedding import Embedding, rotate, sinusoidal

POSITIONS = jnp.arange(20, dtype=jnp.int32)[None]


def test_reads_rows_and_attends_with_the_same_table():
    module = Embedding(7, 4)
    tokens = np.array([[1, 6], [0, 3]], np.int32)
    x, variables = jax.jit(module.init_with_output)(jax.random.key(0), tokens)
    x, table = np.asarray(x), np.asarray(variables["params"]["embedding"])
    assert table.shape == (7, 4)
    np.testing.assert_array_equal(x, table[tokens])
    np.testing.assert_allclose(module.apply(variables, jnp.asarray(x), method="attend"), x @ table.T, atol=1e-6)


def test_sinusoidal_is_the_papers_formula():
    want = np.empty((20, 6))
    for p in range(20):
        for i in range(3):
            want[p, i], want[p, 3 + i] = np.sin(p / 10_000 ** (2 * i / 6)), np.cos(p / 10_000 ** (2 * i / 6))
    np.testing.assert_allclose(jax.jit(sinusoidal, static_argnums=1)(POSITIONS, 6)[0], want, atol=1e-5)


def test_rotation_keeps_lengths_and_makes_dot_products_depend_on_distance_alone():
    query, key = np.random.RandomState(0).randn(2, 1, 1, 1, 8).astype(np.float32)
    q, k = (np.asarray(jax.jit(rotate)(jnp.asarray(np.tile(x, (1, 1, 20, 1))), POSITIONS))[0, 0] for x in (query, key))
    np.testing.assert_allclose(np.square(q).sum(-1), np.tile(np.square(query).sum(), 20), rtol=1e-5)
    products = q @ k.T
    for distance in range(-10, 10):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert abs(products[0, 0] - products[0, 5]) > 1e-3


def test_rotation_at_position_0_is_none():
    x = jnp.asarray(np.random.RandomState(0).randn(1, 2, 1, 8), jnp.float32)
    np.testing.assert_array_equal(jax.jit(rotate)(x, jnp.zeros((1, 1), jnp.int32)), x)
