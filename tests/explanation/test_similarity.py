"""CKA against its formula, its invariances, and between runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.explanation.similarity import CKA, cka

KEY = jax.random.key(0)


@pytest.fixture
def vectors():
    random = np.random.RandomState(0)
    x = random.standard_normal((40, 7)).astype(np.float32)
    return x, (x[:, :3] @ random.standard_normal((3, 5)) + 0.5 * random.standard_normal((40, 5)) + 2).astype(np.float32)


def unbiased(k, m):
    """HSIC_1 of Song et al. 2012, equation 5, term by term."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    return (np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def test_it_is_the_formula(vectors):
    x, y = vectors
    a, b = (v - v.mean(0) for v in (x, y))
    wanted = np.linalg.norm(b.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    np.testing.assert_allclose(cka(jnp.asarray(x), jnp.asarray(y)), wanted, rtol=1e-5)
    k, m = x.astype(np.float64) @ x.T, y.astype(np.float64) @ y.T
    wanted = unbiased(k, m) / np.sqrt(unbiased(k, k) * unbiased(m, m))
    np.testing.assert_allclose(cka(jnp.asarray(x), jnp.asarray(y), debias=True), wanted, rtol=1e-4)


@pytest.mark.parametrize("debias", [False, True])
def test_rotation_scale_and_shift_change_nothing_but_another_metric_does(vectors, debias):
    x, y = vectors
    turn = np.linalg.qr(np.random.RandomState(1).standard_normal((7, 7)))[0].astype(np.float32)
    here = float(cka(jnp.asarray(x), jnp.asarray(y), debias))
    assert float(cka(jnp.asarray(x), jnp.asarray(x @ turn * 30 + 4), debias)) == pytest.approx(1.0, abs=1e-5)
    assert float(cka(jnp.asarray(x @ turn * 0.01), jnp.asarray(y), debias)) == pytest.approx(here, abs=1e-4)
    assert float(cka(jnp.asarray(x * np.float32([9, 1, 1, 1, 1, 1, 1])), jnp.asarray(y), debias)) != pytest.approx(here, abs=0.02)


def test_only_the_debiased_one_tells_wide_layers_apart_that_share_nothing():
    random = np.random.RandomState(0)
    x, y = (jnp.asarray(random.standard_normal((40, 400)).astype(np.float32)) for _ in range(2))
    assert float(cka(x, y)) > 0.8
    assert abs(float(cka(x, y, debias=True))) < 0.05


def images(rows=50):
    random = np.random.RandomState(0)
    return {"image": random.standard_normal((rows, 8, 8, 1)).astype(np.float32), "label": random.randint(0, 5, rows).astype(np.int32)}


def test_layers_of_one_run_and_of_two(model, with_data):
    mlp = with_data(model("mlp"), train=images(), test=images())
    found = CKA()(mlp, None, KEY)
    values = found.kept["similarity"]
    assert found.numbers["rows"] == ["input", "hidden_0", "hidden_1", "logits"]
    np.testing.assert_allclose(np.diag(values), 1.0, atol=1e-4)
    np.testing.assert_allclose(values, values.T, atol=1e-5)
    split = images()["image"]
    _, taps = mlp.read({"image": split, "mask": np.ones(50, bool), "index": np.arange(50, dtype=np.int32)}, ["hidden_0"])
    wanted = cka(jnp.asarray(split.reshape(50, -1)), taps["hidden_0"], debias=True)
    np.testing.assert_allclose(values[0, 1], wanted, atol=1e-4)
    cnn = model("cnn")
    both = CKA(other="there")(dataclasses.replace(mlp, open={"there": cnn}.get), None, KEY)
    assert both.numbers["columns"] == ["input", "maps_0", "maps_1", "hidden_0", "logits"]
    np.testing.assert_allclose(both.kept["similarity"][0, 0], 1.0, atol=1e-4)  # both read the same images
    assert both.lines[0].startswith("input: nearest is input (1.000)")


def test_runs_that_read_other_inputs_cannot_be_compared(model, with_data):
    mlp = with_data(model("mlp"), test=images())
    with pytest.raises(ConfigError, match="reads other features"):
        CKA(other="there")(dataclasses.replace(mlp, open=lambda path: model("regression")), None, KEY)
    with pytest.raises(ConfigError, match="no other run can be opened"):
        CKA(other="there")(mlp, None, KEY)
