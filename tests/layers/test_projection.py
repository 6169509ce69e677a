import jax
import jax.numpy as jnp
import numpy as np

from research.layers.projection import Projection

X = jnp.asarray(np.random.RandomState(0).randn(2, 5, 3, 4), jnp.float32)


def test_is_an_einsum_over_the_input_axes():
    module = Projection((3, 4), (6, 7), 0.5, True, "float32")
    y, variables = jax.jit(module.init_with_output)(jax.random.key(1), X)
    params = variables["params"]
    params["bias"] = jnp.asarray(np.random.RandomState(1).randn(6, 7), jnp.float32)
    want = np.einsum("btij,ijkl->btkl", X, params["kernel"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(module.apply({"params": params}, X), want, atol=1e-5)
    assert y.shape == (2, 5, 6, 7)


def test_starts_with_the_scale_that_was_asked_for():
    params = jax.jit(Projection((100,), (100,), 0.02, False, "float32").init)(jax.random.key(0), jnp.zeros((1, 1, 100)))["params"]
    assert list(params) == ["kernel"]
    assert abs(np.std(params["kernel"]) - 0.02) < 1e-3


def test_computes_in_bfloat16_and_keeps_float32_parameters():
    y, variables = Projection((3, 4), (5,), 0.5, True, "bfloat16").init_with_output(jax.random.key(1), X.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
