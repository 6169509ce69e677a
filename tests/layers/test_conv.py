import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.layers.conv import Conv, max_pool


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 6, 6, 3), (2, 7, 11, 3)])
def test_max_pool_equals_reduce_window(size, shape):
    x = jnp.asarray(np.random.RandomState(0).randn(*shape), jnp.float32)

    def window(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, size, size, 1), (1, size, size, 1), "VALID")

    @jax.jit
    def outputs_and_gradients(x):
        return [jax.value_and_grad(lambda x, f=f: jnp.square(f(x)).sum())(x) for f in (lambda x: max_pool(x, size), window)]

    got, want = outputs_and_gradients(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


def test_equal_maxima_share_the_gradient():
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: max_pool(x, 2).sum()))(jnp.ones((1, 2, 2, 1))), jnp.full((1, 2, 2, 1), 0.25))


@pytest.mark.parametrize(("padding", "side"), [("VALID", 4), ("SAME", 6)])
def test_conv_shape_and_glorot_start(padding, side):
    y, variables = Conv(32, 3, padding).init_with_output(jax.random.key(0), jnp.ones((2, 6, 6, 16)))
    assert y.shape == (2, side, side, 32)
    kernel = np.asarray(variables["params"]["kernel"])
    limit = (6 / (9 * 16 + 9 * 32)) ** 0.5
    assert kernel.shape == (3, 3, 16, 32)
    assert 0.98 * limit < abs(kernel).max() <= limit
    assert not np.any(variables["params"]["bias"])


def test_conv_is_a_sum_over_its_window():
    module, x = Conv(2, 3), jnp.asarray(np.random.RandomState(0).randn(1, 5, 5, 3), jnp.float32)
    y, variables = jax.jit(module.init_with_output)(jax.random.key(1), x)
    np.testing.assert_allclose(y[0, 1, 2], np.einsum("yxc,yxcd->d", x[0, 1:4, 2:5], variables["params"]["kernel"]), atol=1e-5)
