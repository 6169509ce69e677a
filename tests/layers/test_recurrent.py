import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.layers.recurrent import LSTM, lstm

TIME, ROWS, WIDTH = 5, 3, 4


def by_formula(given, recurrent, hidden, cell, mask):
    """The same by its formula alone, differentiated by JAX."""

    def step(state, at):
        hidden, cell = state
        given, keep = at
        i, f, g, o = jnp.split((given + hidden @ recurrent).astype(jnp.float32), 4, -1)
        new_cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        new_hidden = (jax.nn.sigmoid(o) * jnp.tanh(new_cell)).astype(hidden.dtype)
        if keep is not None:
            new_hidden, new_cell = jnp.where(keep[:, None], new_hidden, hidden), jnp.where(keep[:, None], new_cell, cell)
        return (new_hidden, new_cell), (new_hidden, new_cell)

    return jax.lax.scan(step, (hidden, cell), (given, mask))[1]


def arguments(dtype=np.float32):
    random = np.random.RandomState(0)
    shapes = ((TIME, ROWS, 4 * WIDTH), (WIDTH, 4 * WIDTH), (ROWS, WIDTH), (ROWS, WIDTH))
    return [jnp.asarray(random.randn(*shape), dtype) for shape in shapes]


@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_those_of_the_formula(masked):
    """The hand-written backward pass against autodiff, for a loss that reads hidden states and cells of every position."""
    mask = jnp.asarray(np.random.RandomState(1).rand(TIME, ROWS) < 0.6) if masked else None
    random = np.random.RandomState(2)
    weight = [jnp.asarray(random.randn(TIME, ROWS, WIDTH), jnp.float32) for _ in range(2)]

    @jax.jit
    def both(*given):
        def loss(form, *given):
            states = form(*given, mask)
            return sum((w * jnp.sin(state)).sum() for w, state in zip(weight, states, strict=True)), states

        return [jax.value_and_grad(lambda *x, form=form: loss(form, *x), (0, 1, 2, 3), has_aux=True)(*given) for form in (lstm, by_formula)]

    got, want = both(*arguments())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_a_masked_position_changes_nothing():
    """Positions that do not count may hold anything: what is read after them is what is read without them."""
    random = np.random.RandomState(0)
    x = random.randn(2, 6, 3).astype(np.float32)
    keep = np.array([True, False, True, True, False, True])
    module = LSTM(WIDTH)
    variables = module.init(jax.random.key(0), jnp.asarray(x))
    got = module.apply(variables, jnp.asarray(x), mask=jnp.asarray(np.broadcast_to(keep, (2, 6))))
    want = module.apply(variables, jnp.asarray(x[:, keep]))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a[:, keep], b, atol=1e-6)
        np.testing.assert_array_equal(a[:, 1], a[:, 0])


def test_a_sequence_goes_on_from_a_state():
    x = jnp.asarray(np.random.RandomState(0).randn(2, 6, 3), jnp.float32)
    module = LSTM(WIDTH)
    variables = module.init(jax.random.key(0), x)
    hidden, cell = module.apply(variables, x)
    rest = module.apply(variables, x[:, 4:], state=(hidden[:, 3], cell[:, 3]))
    np.testing.assert_allclose(rest[0], hidden[:, 4:], atol=1e-6)


def test_bfloat16_is_near_float32():
    x = jnp.asarray(np.random.RandomState(0).randn(2, 6, 3), jnp.float32)
    variables = LSTM(WIDTH).init(jax.random.key(0), x)
    exact, low = (LSTM(WIDTH, dtype).apply(variables, x)[0] for dtype in ("float32", "bfloat16"))
    assert low.dtype == jnp.bfloat16
    assert 0 < np.abs(low.astype(jnp.float32) - exact).max() < 0.03


def test_kernels_start_as_in_keras():
    params = jax.jit(LSTM(WIDTH).init)(jax.random.key(0), jnp.zeros((1, 1, 3)))["params"]
    np.testing.assert_array_equal(params["input"]["bias"], np.repeat(np.float32([0, 1, 0, 0]), WIDTH))
    np.testing.assert_allclose(params["recurrent"] @ params["recurrent"].T, np.eye(WIDTH), atol=1e-5)
