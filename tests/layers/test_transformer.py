import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.layers.transformer import Block

X = np.random.RandomState(0).randn(2, 5, 8).astype(np.float32)
POSITIONS = np.arange(5, dtype=np.int32)[None]
block = functools.partial(Block, heads=2, kv_heads=1, head_width=4, hidden=16)


@functools.partial(jax.jit, static_argnums=0)
def run(module, params, x, index=None, hyper=None):
    how = {"index": index, "hyper": hyper or {}, "train": index is not None}
    return module.apply({"params": params}, x, jnp.asarray(POSITIONS), **how, rngs={"dropout": jax.random.key(0)})


def params_of(module):
    random = np.random.RandomState(1)
    how = {"index": None, "hyper": {}, "train": False}
    shapes = jax.eval_shape(functools.partial(module.init, **how), jax.random.key(0), jnp.asarray(X), jnp.asarray(POSITIONS))["params"]
    return jax.tree.map(lambda leaf: 0.3 * random.randn(*leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_what_it_adds_comes_from_the_normalised_stream(norm):
    module = block(norm=norm, bias=False)
    params = params_of(module)
    y, taps = run(module, params, X)
    scaled, _ = run(module, params, 1000 * X)  # the norm takes the factor out, so the same is added
    np.testing.assert_allclose(scaled - 1000 * X, run(module, params, 1e4 * X)[0] - 1e4 * X, atol=2e-2)
    np.testing.assert_array_equal(taps["output"], y)
    attention = (f"attention/{name}" for name in ("query", "key", "value", "weights", "heads"))
    assert set(taps) == {"middle", "output", "mlp/hidden", "attention_norm/factor", "mlp_norm/factor", *attention}


def test_without_hidden_units_there_is_attention_alone():
    module = block(hidden=0)
    params = params_of(module)
    assert set(params) == {"attention", "attention_norm"}
    y, taps = run(module, params, X)
    np.testing.assert_array_equal(y, taps["middle"])
    whole = {**params_of(block()), **params}
    whole["mlp"]["down"] = jax.tree.map(np.zeros_like, whole["mlp"]["down"])
    np.testing.assert_array_equal(run(block(), whole, X)[0], y)


def test_with_zero_output_projections_it_is_the_identity():
    module = block()
    params = params_of(module)
    params["attention"]["out"] = jax.tree.map(np.zeros_like, params["attention"]["out"])
    params["mlp"]["down"] = jax.tree.map(np.zeros_like, params["mlp"]["down"])
    np.testing.assert_array_equal(run(module, params, X)[0], X)


def test_dropout_of_everything_but_a_little_leaves_the_stream():
    module, index = block(dropout=None), np.arange(2, dtype=np.int32)
    params = params_of(module)
    y, _ = run(module, params, X, index, {"dropout": jnp.float32(0.999999)})
    np.testing.assert_array_equal(y, X)
