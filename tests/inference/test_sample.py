"""Sampling: the distribution, the restrictions, the errors, and that settings are values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from research.core.errors import ConfigError
from research.inference.sample import Sampling, candidates, sample, scale

LOGITS = np.array([1.0, 0.2, -0.5, 2.0, 0.0, -3.0], np.float32)
DRAWS = 20_000


def _softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


@jax.jit
def _sample(logits, keys, settings):
    return sample(logits, keys, *settings)


def _draw(temperature=1.0, top_k=None, top_p=None, logits=LOGITS):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return np.asarray(_sample(np.tile(logits, (DRAWS, 1)), keys, Sampling(temperature, top_k, top_p).values(6)))


def _smallest_set(probability, p):
    """Token by token in falling order until the mass reaches p."""
    kept, mass = [], 0.0
    for token in np.argsort(-probability, kind="stable"):
        kept.append(int(token))
        mass += probability[token]
        if mass >= p:
            break
    return sorted(kept)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, None, None), (0.5, None, None), (2.0, 3, None), (1.0, None, 0.8), (1.5, 4, 0.7)])
def test_distribution_by_chi_square(temperature, top_k, top_p):
    order = np.argsort(-LOGITS)[: top_k or 6]
    probability = np.zeros(6)
    probability[order] = _softmax(LOGITS[order].astype(float) / temperature)
    kept = _smallest_set(probability, top_p or 1.0)
    expected = np.zeros(6)
    expected[kept] = probability[kept] / probability[kept].sum()
    counts = np.bincount(_draw(temperature, top_k, top_p), minlength=6)
    assert not counts[expected == 0].any()
    assert stats.chisquare(counts[expected > 0], DRAWS * expected[expected > 0]).pvalue > 1e-3


def test_temperature_zero_is_greedy_and_takes_the_first_of_equals():
    assert set(_draw(0.0)) == {3}
    assert set(_draw(0.0, logits=np.array([0.0, 1.0, 1.0, 1.0, 0.5, 0.0], np.float32))) == {1}
    assert set(_draw(0.0, top_k=2, top_p=0.5)) == {3}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40])
def test_a_tiny_temperature_is_nearly_greedy_and_finite(temperature):
    assert np.isfinite(np.asarray(scale(jnp.asarray(LOGITS[None]), 1e-3))).all()
    assert set(_draw(temperature)) == {3}


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_it(p):
    logits = np.random.RandomState(1).randn(8, 50).astype(np.float32) * 2
    keep = np.asarray(candidates(jnp.asarray(logits), 50, p))
    for row, kept in zip(logits.astype(np.float64), keep, strict=True):
        assert np.flatnonzero(kept).tolist() == _smallest_set(_softmax(row), p if p < 1 else 2.0)


def test_equal_logits_keep_exactly_the_first():
    logits = jnp.zeros((2, 8))
    assert np.asarray(candidates(logits, 3, 1.0)).tolist() == [[True] * 3 + [False] * 5] * 2
    assert np.asarray(candidates(logits, 8, 0.5)).tolist() == [[True] * 4 + [False] * 4] * 2


def test_minus_infinity_is_never_drawn():
    logits = np.where(np.arange(6) % 2 == 0, LOGITS, -np.inf).astype(np.float32)
    assert set(_draw(1.0, logits=logits)) == {0, 2, 4}


def test_a_row_depends_on_its_own_key_alone():
    keys, logits = jax.random.split(jax.random.key(3), 16), np.random.RandomState(4).randn(16, 30).astype(np.float32)
    settings = Sampling(1.0, 20, 0.9).values(30)
    together = _sample(logits, keys, settings)
    assert together.tolist() == [int(_sample(logits[i : i + 1], keys[i : i + 1], settings)[0]) for i in range(16)]
    assert together.dtype == jnp.int32


def test_half_precision_logits_are_sampled_in_float32():
    logits, keys = jnp.tile(jnp.asarray(LOGITS, jnp.bfloat16), (8, 1)), jax.random.split(jax.random.key(0), 8)
    settings = Sampling().values(6)
    assert _sample(logits, keys, settings).tolist() == _sample(logits.astype(jnp.float32), keys, settings).tolist()


def test_other_settings_compile_nothing():
    before = _sample._cache_size()
    keys = jax.random.split(jax.random.key(0), 5)
    for settings in (Sampling(), Sampling(0.0), Sampling(0.7, 5), Sampling(1.3, 2, 0.4), Sampling(1, 10**9, 1)):
        _sample(np.tile(LOGITS, (5, 1)), keys, settings.values(6))
    assert _sample._cache_size() == before + 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: must be a number of at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0: must be a whole number of at least 1"),
        ({"top_k": 2.5}, "top_k=2.5: must be a whole number"),
        ({"temperature": "warm"}, "temperature=warm: must be a number"),
        ({"temperature": True}, "temperature=True: must be a number"),
        ({"top_p": "all"}, "top_p=all: must be a number"),
        ({"top_p": 0.0}, "top_p=0.0: must be a number above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": float("nan")}, "top_p=nan"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)
