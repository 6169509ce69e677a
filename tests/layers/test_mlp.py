import jax
import numpy as np
import pytest

from research.layers.activation import activation
from research.layers.mlp import FeedForward

X = np.random.RandomState(0).randn(2, 3, 4).astype(np.float32)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu"])
def test_is_two_projections_around_an_activation(name):
    module = FeedForward(5, name, scale=0.5, out_scale=0.5)
    (y, taps), variables = jax.jit(module.init_with_output)(jax.random.key(1), X)
    params = variables["params"]
    hidden = np.asarray(activation(name)(X @ params["up"]["kernel"]))
    np.testing.assert_allclose(taps["hidden"], hidden, atol=1e-6)
    np.testing.assert_allclose(y, hidden @ params["down"]["kernel"], atol=1e-6)


def test_swiglu_multiplies_by_a_gate():
    module = FeedForward(5, "swiglu", bias=False, scale=0.5, out_scale=0.5)
    (y, _), variables = jax.jit(module.init_with_output)(jax.random.key(1), X)
    up, gate, down = (np.asarray(variables["params"][name]["kernel"]) for name in ("up", "gate", "down"))
    np.testing.assert_allclose(y, X @ gate / (1 + np.exp(-X @ gate)) * (X @ up) @ down, atol=1e-6)


def test_down_starts_smaller():
    params = jax.jit(FeedForward(64, scale=0.02, out_scale=0.005).init)(jax.random.key(1), np.zeros((1, 1, 64), np.float32))["params"]
    assert abs(np.std(params["up"]["kernel"]) - 0.02) < 1e-3
    assert abs(np.std(params["down"]["kernel"]) - 0.005) < 3e-4
