import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.layers.tap import nest, tap


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        taps = {}
        return tap(self, taps, "double", x * 2), taps


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, taps = Inner(name="inner")(x)
        return tap(self, taps, "sum", x.sum()), taps


X = jnp.arange(3.0)


def run(edits):
    return Outer().apply({"edits": nest(edits)}, X)


def test_records_under_absolute_paths():
    total, taps = run({})
    assert list(taps) == ["inner/double", "sum"]
    np.testing.assert_array_equal(taps["inner/double"], X * 2)
    assert total == taps["sum"] == 6


def test_a_pair_replaces_where_its_mask_is_true_and_the_rest_follows():
    total, taps = run({"inner/double": (jnp.array([True, False, False]), jnp.full(3, 10.0))})
    np.testing.assert_array_equal(taps["inner/double"], [10, 2, 4])
    assert total == 16


def test_an_array_is_added_and_can_be_differentiated():
    gradient = jax.grad(lambda zeros: run({"inner/double": zeros})[0])(jnp.zeros(3))
    np.testing.assert_array_equal(gradient, jnp.ones(3))


def test_an_unread_tap_is_not_computed():
    read = jax.jit(lambda x: Outer().apply({}, x)[0]).lower(X).compile().as_text()
    assert "sine" not in read


def test_one_program_serves_all_values_of_an_edit():
    traces = []

    @jax.jit
    def program(edits):
        traces.append(1)
        return run(edits)[0]

    for value in (0.0, 5.0):
        program({"inner/double": (jnp.ones(3, bool), jnp.full(3, value))})
    assert len(traces) == 1


def test_nest_keeps_the_siblings_of_a_path():
    assert nest({"a/b": 1, "a/c/d": 2, "e": 3}) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert nest(None) == {}
