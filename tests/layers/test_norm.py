import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from research.core.axis import device_axis
from research.layers.norm import BatchNorm, LayerNorm, RMSNorm, check_norm, standardized

X = jnp.asarray(np.random.RandomState(0).randn(8, 3, 5) * 3 + 1, jnp.float32)
MASK = jnp.array([True, True, False, True, False, True, True, True])


@functools.partial(jax.jit, static_argnames="train")
def batch_norm(variables, x, mask=None, train=True):
    return BatchNorm().apply(variables, x, mask=mask, train=train, mutable=["batch_stats"])


@pytest.fixture
def variables():
    return BatchNorm().init(jax.random.key(0), X, train=False)


def test_masked_rows_are_left_out(variables):
    y, stats = batch_norm(variables, X, MASK)
    alone, stats_alone = batch_norm(variables, X[MASK])
    np.testing.assert_allclose(y[MASK], alone, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stats, stats_alone)


def test_a_mask_may_cover_positions(variables):
    mask = jnp.arange(24).reshape(8, 3) % 5 > 0
    y, _ = batch_norm(variables, X, mask)
    np.testing.assert_allclose(y[mask].mean(0), np.zeros(5), atol=1e-5)
    np.testing.assert_allclose(y[mask].std(0), np.ones(5), atol=1e-3)


def test_the_statistics_are_those_of_the_global_batch(variables):
    whole, stats = batch_norm(variables, X, MASK)
    with device_axis("devices"):
        apply = functools.partial(BatchNorm().apply, variables, train=True, mutable=["batch_stats"])
        split = jax.jit(jax.vmap(lambda x, mask: apply(x, mask=mask), axis_name="devices"))
        y, stats_parts = split(X.reshape(2, 4, 3, 5), MASK.reshape(2, 4))
    np.testing.assert_allclose(y.reshape(X.shape), whole, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, np.stack([b, b]), rtol=1e-5), stats_parts, stats)


def test_a_batch_without_valid_rows_changes_nothing(variables):
    y, stats = batch_norm(variables, X, jnp.zeros(8, bool))
    assert np.isfinite(y).all()
    jax.tree.map(np.testing.assert_array_equal, stats, {"batch_stats": variables["batch_stats"]})


def test_evaluation_uses_the_running_statistics(variables):
    stats = {"mean": jnp.full(5, 2.0), "variance": jnp.full(5, 4.0)}
    y, after = batch_norm(variables | {"batch_stats": stats}, X, train=False)
    np.testing.assert_allclose(y, (X - 2) / 2, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, after["batch_stats"], stats)


def test_a_large_mean_does_not_drown_the_variance(variables):
    y, _ = batch_norm(variables, X + 1000.0)
    np.testing.assert_allclose(y, batch_norm(variables, X)[0], atol=2e-3)


@pytest.mark.parametrize("norm", [LayerNorm(), LayerNorm(bias=False), RMSNorm()])
def test_gradient(norm):
    variables = jax.jit(norm.init)(jax.random.key(0), X)
    check_grads(jax.jit(lambda x: norm.apply(variables, x)), (X,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_its_gradient_by_hand_is_that_of_the_formula():
    def formula(x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)

    def gradients(function):
        slope = jax.grad(lambda x: jnp.sin(function(x)).sum())
        return slope(X), jax.grad(lambda x: jnp.square(slope(x)).sum())(X), jax.jvp(function, (X,), (jnp.cos(X),))

    got, want = jax.jit(lambda: (gradients(lambda x: standardized(x, 1e-5)), gradients(formula)))()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), got, want)


@pytest.mark.parametrize("norm", [LayerNorm(), RMSNorm()])
def test_with_its_factor_held_a_norm_is_linear(norm):
    variables = jax.jit(norm.init)(jax.random.key(0), X)

    @jax.jit
    def run(x, edit=None):
        taps = {}
        return norm.apply({**variables, **({} if edit is None else {"edits": {"factor": edit}})}, x, taps), taps["factor"]

    y, factor = run(X)
    centred = X - X.mean(-1, keepdims=True) if isinstance(norm, LayerNorm) else X
    np.testing.assert_allclose(factor, 1 / np.sqrt(np.square(centred).mean(-1, keepdims=True) + norm.epsilon), rtol=1e-5)
    held = (jnp.ones((1, 1, 1), bool), factor)
    zero, double = run(0 * X, held)[0], run(2 * X, held)[0]
    np.testing.assert_allclose(double - zero, 2 * (y - zero), atol=1e-4)
    assert np.abs(run(2 * X)[0] - double).max() > 0.1  # not held, it takes the factor out


@pytest.mark.parametrize(("norm", "options"), [(LayerNorm(), {}), (RMSNorm(), {}), (BatchNorm(), {"train": False})])
def test_bfloat16_in_and_out_with_float32_inside(norm, options):
    y, variables = jax.jit(functools.partial(norm.init_with_output, **options))(jax.random.key(0), X.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    exact = norm.apply(variables, X.astype(jnp.bfloat16).astype(jnp.float32), **options)
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_a_typo_names_the_nearest():
    with pytest.raises(ValueError, match="'bacth' is unknown; did you mean 'batch'"):
        check_norm("bacth")
