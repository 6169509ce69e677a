"""Intervals and tests held against scipy, closed forms, and simulations in which the truth is known."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from research.sweep import statistics

X = np.random.default_rng(0).gamma(2.0, 1.0, 12)
SEEDS = [f"seed={i}" for i in range(12)]


def named(values):
    return dict(zip(SEEDS, map(float, values), strict=False))


def test_summary_is_scipys():
    found = statistics.summary(X)
    ends = stats.t.interval(0.95, len(X) - 1, X.mean(), stats.sem(X))
    np.testing.assert_allclose([found.n, found.mean, found.deviation, *found.t], [12, X.mean(), X.std(ddof=1), *ends], rtol=1e-12)


@pytest.mark.parametrize("n", [3, 5, 12])
def test_the_bootstrap_is_scipys(n):
    """BCa of skewed values, both with many resamples: apart by what is drawn alone."""
    ours = statistics.bootstrap_interval(X[:n], resamples=100_000)
    theirs = stats.bootstrap((X[:n],), np.mean, n_resamples=100_000, method="BCa", rng=np.random.default_rng(1)).confidence_interval
    np.testing.assert_allclose(ours, theirs, atol=0.004 * np.ptp(X[:n]))


def test_the_bootstrap_is_seeded_and_ties_are_fair():
    assert statistics.bootstrap_interval(X, seed=3) == statistics.bootstrap_interval(X, seed=3)
    assert statistics.bootstrap_interval(X, seed=3) != statistics.bootstrap_interval(X, seed=4)
    low, high = statistics.bootstrap_interval([0.0, 0.0, 1.0, 1.0], resamples=100_000)
    np.testing.assert_allclose(low + high, 1.0, atol=0.02)  # symmetric values, a symmetric interval


def test_few_values_have_no_interval():
    assert math.isnan(statistics.summary([]).mean)
    one = statistics.summary([0.5])
    assert (one.n, one.mean) == (1, 0.5)
    assert np.isnan([one.deviation, *one.t, *one.bootstrap]).all()
    same = statistics.summary([0.5, 0.5, 0.5])
    assert (same.deviation, same.t, same.bootstrap) == (0.0, (0.5, 0.5), (0.5, 0.5))


def coverage(interval, n, rounds):
    draws = np.random.default_rng(0).normal(3.0, 1.0, (rounds, n))
    return np.mean([low <= 3.0 <= high for low, high in map(interval, draws)])


def test_the_intervals_hold_the_mean_as_often_as_they_say():
    """t in 95 % of cases, within three standard errors; the bootstrap of five values in about 82 %, which the report admits."""
    assert abs(coverage(statistics.t_interval, 5, 3000) - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 3000)
    assert abs(coverage(lambda x: statistics.bootstrap_interval(x, resamples=500), 5, 1500) - 0.82) < 0.035
    assert coverage(lambda x: statistics.bootstrap_interval(x, resamples=500), 30, 500) > 0.91


def test_a_difference_is_scipys_paired_test():
    y = X + np.random.default_rng(1).normal(0.1, 0.2, 12)
    found, test = statistics.difference(named(X), named(y)), stats.ttest_rel(X, y)
    ends = test.confidence_interval()
    np.testing.assert_allclose([found.mean, *found.interval, found.p], [(X - y).mean(), ends.low, ends.high, test.pvalue], rtol=1e-9)
    assert found.pairs == 12
    shuffled = dict(reversed(named(y).items()))
    assert statistics.difference(named(X), shuffled) == found  # paired by seed, not by place


def test_only_shared_seeds_are_paired_and_without_them_it_is_welchs():
    a, b = named(X[:4]), {"seed=2": 1.0, "seed=3": 2.5, "seed=99": 50.0}
    found = statistics.difference(a, b)
    assert (found.pairs, found.mean) == (2, pytest.approx((X[2] + X[3] - 3.5) / 2))
    apart = {f"other={i}": float(value) for i, value in enumerate(2 * X[:5])}
    found, test = statistics.difference(named(X), apart), stats.ttest_ind(X, 2 * X[:5], equal_var=False)
    ends = test.confidence_interval()
    np.testing.assert_allclose([found.mean, *found.interval, found.p], [X.mean() - 2 * X[:5].mean(), ends.low, ends.high, test.pvalue])
    assert found.pairs == 0
    assert math.isnan(statistics.difference(named(X), {"other=1": 1.0}).p)


def test_equal_differences_are_not_taken_for_certain():
    """Coarse scores often differ by the same step in all of two or three seeds."""
    found = statistics.difference({"a": 0.5, "b": 0.25, "c": 0.75}, {"a": 0.25, "b": 0.0, "c": 0.5})
    assert (found.p, found.permutation) == (0.25, 0.25)  # two of the eight patterns of signs
    assert statistics.difference({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0}).p == 1.0


def test_sign_flips_are_scipys_permutations():
    d = np.random.default_rng(2).normal(0.5, 1.0, 8)
    theirs = stats.permutation_test((d, np.zeros(8)), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=10**6).pvalue
    np.testing.assert_allclose(statistics.sign_flips(d), theirs, rtol=1e-12)
    many = np.random.default_rng(3).normal(0.4, 1.0, 20)
    np.testing.assert_allclose(statistics.sign_flips(many), stats.ttest_1samp(many, 0).pvalue, atol=0.02)


def test_holm_by_hand():
    """Sorted 0.005, 0.011, 0.02, 0.04 times 4, 3, 2, 1, never falling; what was not compared does not count."""
    found = statistics.holm([0.04, math.nan, 0.005, 0.02, 0.011])
    np.testing.assert_allclose(found, [0.04, math.nan, 0.02, 0.04, 0.033])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_the_best_of_equals_is_seldom_called_apart():
    """Four settings that do not differ, whose best is chosen by the same seeds that judge it: in at most 5 % of sweeps it is apart from all."""
    generator, wrong = np.random.default_rng(0), 0
    for _ in range(400):
        scores = [named(row) for row in generator.normal(0, 1, (4, 5))]
        scores.sort(key=lambda held: -sum(held.values()))
        wrong += max(statistics.holm([statistics.difference(scores[0], other).p for other in scores[1:]])) < 0.05
    assert wrong / 400 < 0.05


def test_importance_finds_what_was_planted():
    """Of y = 3 a + b the total effects are 0.9 and 0.1 for uniform a and b, c has none; a diverged trial does not drown them."""
    generator = np.random.default_rng(0)
    a, b, c = generator.uniform(size=(3, 300))
    y = 3 * a + b
    y[7] = 1e6
    found = statistics.importance({"a": list(a), "b": list(b), "c": list(c)}, y)
    assert abs(found.shares["a"] - 0.9) < 0.12
    assert abs(found.shares["b"] - 0.1) < 0.08
    assert found.shares["c"] < 0.02
    assert found.explained > 0.9


def test_importance_of_categories_and_of_nothing():
    rows = list(itertools.product(["adam", "sgd", None], [1, 2, 3], range(4)))
    score = [{"adam": 1.0, "sgd": 0.0, None: 2.0}[name] for name, _, _ in rows]
    found = statistics.importance({"optimizer": [row[0] for row in rows], "width": [row[1] for row in rows]}, score)
    assert found.shares["optimizer"] > 0.7  # of few runs a shuffle leaves some where they were
    assert found.shares["width"] < 0.05
    noise = statistics.importance({"width": [row[1] for row in rows]}, np.random.default_rng(0).normal(size=len(rows)))
    assert noise.explained < 0.2
    assert statistics.importance({"width": [1, 2, 3, 4, 5]}, [1.0] * 5) == ({"width": 0.0}, 0.0)
