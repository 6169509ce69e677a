import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.layers.activation import activation

X = np.linspace(-4, 4, 33, dtype=np.float32)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("relu", lambda x: np.maximum(x, 0)),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
        ("silu", lambda x: x / (1 + np.exp(-x))),
        ("tanh", np.tanh),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
        ("elu", lambda x: np.where(x > 0, x, np.expm1(x))),
        ("leaky_relu", lambda x: np.where(x > 0, x, 0.01 * x)),
        ("identity", lambda x: x),
    ],
)
def test_equals_its_formula(name, formula):
    np.testing.assert_allclose(activation(name)(jnp.asarray(X)), formula(X), atol=1e-6)


def test_exact_gelu_is_x_times_the_normal_distribution_function():
    np.testing.assert_allclose(activation("gelu")(jnp.asarray(X)), X * jax.scipy.stats.norm.cdf(X), atol=1e-6)


def test_a_typo_names_the_nearest():
    with pytest.raises(ValueError, match="'rellu' is unknown; did you mean 'relu'"):
        activation("rellu")


def test_the_slope_of_gelu_by_hand_is_that_of_jax():
    def gradients(function):
        slope = jax.grad(lambda x: jnp.sin(function(x)).sum())
        x = jnp.asarray(X)
        return slope(x), jax.grad(lambda x: jnp.square(slope(x)).sum())(x), jax.jvp(function, (x,), (jnp.cos(x),))

    got, want = jax.jit(lambda: (gradients(activation("gelu_tanh")), gradients(jax.nn.gelu)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
