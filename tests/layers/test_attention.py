import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.layers.attention import Attention

RANDOM = np.random.RandomState(0)


X = jnp.asarray(RANDOM.randn(2, 10, 12), jnp.float32)
POSITIONS = jnp.arange(10, dtype=jnp.int32)[None]


def run(module, params, x, positions, **collections):
    """((y, taps), changed collections)."""
    return _run(module, {"params": params, **collections}, jnp.asarray(x), jnp.asarray(positions))


@functools.partial(jax.jit, static_argnums=0)
def _run(module, variables, x, positions):
    return module.apply(variables, x, positions, mutable=["cache"])


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "rotary"])
def attention(request):
    module = Attention(4, 2, 6, rotary=request.param, scale=0.3, out_scale=0.3)
    return module, jax.jit(module.init)(jax.random.key(1), X, POSITIONS)["params"]


def test_kernels_have_head_axes(attention):
    _, params = attention
    shapes = {name: child["kernel"].shape for name, child in params.items()}
    assert shapes == {"query": (12, 4, 6), "key": (12, 2, 6), "value": (12, 2, 6), "out": (4, 6, 12)}
    assert params["key"]["bias"].shape == (2, 6)


def test_a_later_position_changes_no_earlier_one(attention):
    (y, _), _ = run(*attention, X, POSITIONS)
    (changed, _), _ = run(*attention, np.asarray(X) + (np.arange(10) == 6)[:, None].astype(np.float32), POSITIONS)
    np.testing.assert_array_equal(y[:, :6], changed[:, :6])
    assert (np.abs(y - changed)[:, 6:].max((0, 2)) > 1e-4).all()


CACHE = {name: np.zeros((2, 2, 12, 6), np.float32) for name in ("key", "value")}


@pytest.mark.parametrize("steps", [1, 3])
def test_with_a_cache_in_steps_equals_without(attention, steps):
    (want, _), _ = run(*attention, X, POSITIONS)
    cache = CACHE
    for start in range(0, 9, steps):
        part = slice(start, start + steps)
        (y, _), changed = run(*attention, X[:, part], POSITIONS[:, part], cache=cache)
        cache = changed["cache"]
        np.testing.assert_allclose(y, want[:, part], atol=1e-5)


def test_each_row_may_stand_at_its_own_position(attention):
    (want, _), changed = run(*attention, X, POSITIONS, cache=CACHE)
    rows, at = np.arange(2), np.array([3, 7], np.int32)
    (y, _), _ = run(*attention, np.asarray(X)[rows, at][:, None], at[:, None], **changed)
    np.testing.assert_allclose(y[:, 0], want[rows, at], atol=1e-5)


def test_the_output_follows_the_weights_tap_when_it_is_edited(attention):
    (y, taps), _ = run(*attention, X, POSITIONS)
    (same, _), _ = run(*attention, X, POSITIONS, edits={"weights": np.zeros((2, 4, 10, 10), np.float32)})
    np.testing.assert_allclose(same, y, atol=1e-5)
    first = np.zeros((2, 4, 10, 10), np.float32)
    first[..., 0] = 1  # everyone reads the first position
    (_, edited), _ = run(*attention, X, POSITIONS, edits={"weights": (np.ones_like(first, bool), first)})
    value = np.repeat(taps["value"], 2, 1)
    np.testing.assert_allclose(edited["heads"], np.broadcast_to(value[:, :, :1], value.shape), atol=1e-6)


def test_the_weights_tap_costs_nothing_unless_it_is_read(attention):
    module, params = attention

    def exponentials(read):
        program = jax.jit(lambda x: read(*module.apply({"params": params}, x, POSITIONS)))
        return program.lower(X).compile().as_text().count(" exponential(")

    assert exponentials(lambda y, taps: y) < exponentials(lambda y, taps: (y, taps["weights"]))
