"""Means over seeds with their intervals, and whether two settings differ by more than their seeds do."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr, ndtri, stdtr, stdtrit  # of scipy.stats, which takes a second to load, but two names

LEVEL = 0.95
RESAMPLES = 4999
EXACT = 12  # pairs up to which every pattern of signs is tried
NAN = float("nan")


class Interval(NamedTuple):
    """Two ends; both NaN where there is none."""

    low: float
    high: float


NONE = Interval(NAN, NAN)


class Summary(NamedTuple):
    """Scores of one setting.

    Args:    deviation: standard deviation of one score, with n - 1.  t, bootstrap: 95 % intervals of the mean. All three are NaN for n = 1.
    """

    n: int
    mean: float
    deviation: float
    t: Interval
    bootstrap: Interval


class Difference(NamedTuple):
    """How much higher one setting scores than another, on average.

    Args:    pairs: seeds that both have; 0: they are compared unpaired.  interval: of the mean, 95 %, by t.  p: two-sided, paired t, or Welch's
             where unpaired.  permutation: p of the sign-flip test; with few pairs it cannot be small: 1/16 at best for five.
    """

    pairs: int
    mean: float
    interval: Interval
    p: float
    permutation: float


def summary(values: Sequence[float], *, level: float = LEVEL, seed: int = 0) -> Summary:
    """Number, mean, standard deviation and both intervals of the mean.

    Args:    values: finite.  seed: of the bootstrap.
    Returns: all NaN for no values; of one value only the mean.
    """
    x = np.asarray(values, np.float64)
    if not len(x):
        return Summary(0, NAN, NAN, NONE, NONE)
    deviation = float(x.std(ddof=1)) if len(x) > 1 else NAN
    return Summary(len(x), float(x.mean()), deviation, t_interval(x, level), bootstrap_interval(x, level, seed=seed))


def t_interval(values: Sequence[float] | Float[np.ndarray, "n"], level: float = LEVEL) -> Interval:
    """The mean ± t of n - 1 degrees of freedom times the standard error: right for scores that are normal, near it for others.

    Returns: NaN for fewer than two values.
    """
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return NONE
    reach = float(stdtrit(len(x) - 1, (1 + level) / 2)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(float(x.mean()) - reach, float(x.mean()) + reach)


def bootstrap_interval(
    values: Sequence[float] | Float[np.ndarray, "n"], level: float = LEVEL, *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """The bias-corrected and accelerated bootstrap interval of the mean.

    It assumes no form of distribution, but with few values it is too narrow: of five normal ones it covers the mean in 82 % of cases, not 95.

    Returns: NaN for fewer than two values; the value twice where all are equal.
    Source:  Efron 1987, section 4; the acceleration is the jackknife's.
    """
    x = np.asarray(values, np.float64)
    n = len(x)
    if n < 2:
        return NONE
    if np.ptp(x) == 0:
        return Interval(float(x[0]), float(x[0]))
    means = x[np.random.default_rng(seed).integers(0, n, (resamples, n))].mean(1)
    below = ((means < x.mean()).sum() + (means <= x.mean()).sum()) / (2 * resamples)  # ties count half: scores are often coarse
    bias = ndtri(below)
    left_out = (x.sum() - x) / (n - 1)
    spread = left_out.mean() - left_out
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    z = bias + ndtri([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(means, ndtr(bias + z / (1 - acceleration * z)))
    return Interval(float(low), float(high))


def difference(a: Mapping[str, float], b: Mapping[str, float], *, level: float = LEVEL, seed: int = 0) -> Difference:
    """The mean of a - b over the seeds that both have; unpaired, by Welch's t, where they share fewer than two.

    Pairing takes out what a seed gives to both (the order of batches, the first parameters), so it sees smaller differences.

    Args:    a, b: seed -> score.  seed: of the sign flips where there are too many pairs to try all.
    Returns: NaN for p and interval where either has fewer than two scores. Where all differences are equal, t would call any of them certain: p
             is then that of the sign flips.
    """
    shared = [name for name in a if name in b]
    x, y = np.array(list(a.values()), np.float64), np.array(list(b.values()), np.float64)
    if len(shared) < 2:
        mean = float(x.mean() - y.mean()) if len(x) and len(y) else NAN
        if min(len(x), len(y)) < 2:
            return Difference(0, mean, NONE, NAN, NAN)
        if np.ptp(x) == np.ptp(y) == 0:
            return Difference(0, mean, Interval(mean, mean), 1.0 if mean == 0 else NAN, NAN)
        from scipy import stats

        test: Any = stats.ttest_ind(x, y, equal_var=False)
        ends = test.confidence_interval(level)
        return Difference(0, mean, Interval(float(ends.low), float(ends.high)), float(test.pvalue), NAN)
    d = np.array([a[name] - b[name] for name in shared], np.float64)
    flips = sign_flips(d, seed=seed)
    spread = float(d.std(ddof=1))
    if spread <= 1e-12 * float(np.abs(d).max()):
        return Difference(len(d), float(d.mean()), t_interval(d, level), flips, flips)
    p = 2 * float(stdtr(len(d) - 1, -abs(d.mean()) / (spread / math.sqrt(len(d)))))
    return Difference(len(d), float(d.mean()), t_interval(d, level), p, flips)


def sign_flips(differences: Sequence[float] | Float[np.ndarray, "n"], *, seed: int = 0, draws: int = 9999) -> float:
    """The share of patterns of signs under which the differences have as large a mean: Fisher's permutation test of paired scores, two-sided.

    Args:    draws: patterns that are drawn where there are more than `EXACT` pairs; the one that was seen counts among them.
    """
    d = np.asarray(differences, np.float64)
    seen = abs(d.sum()) * (1 - 1e-9)  # sums of the same terms in another order are equal
    if len(d) <= EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(d))))
        return float((np.abs(signs @ d) >= seen).mean())
    signs = np.random.default_rng(seed).choice((1.0, -1.0), (draws, len(d)))
    return float(((np.abs(signs @ d) >= seen).sum() + 1) / (draws + 1))


def holm(p: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, so that the chance of any false one among those below 0.05 is at most 0.05.

    Args:    p: NaN is a comparison that was not made: it stays NaN and is not counted.
    Source:  Holm 1979.
    """
    known = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    corrected, most = [NAN] * len(p), 0.0
    for rank, (value, i) in enumerate(known):
        most = max(most, min(1.0, (len(known) - rank) * value))
        corrected[i] = most
    return corrected


class Importance(NamedTuple):
    """How much each swept key tells about the score.

    Args:    shares: key -> half the rise of the forest's squared error when the key's values are shuffled among the trials, as a share of the
             variance: an estimate of the key's total effect, interactions with others counted in full for each of them.
             explained: R² of the forest on trials that it has not seen; where it is near 0 the shares mean nothing.
    """

    shares: dict[str, float]
    explained: float


def importance(columns: Mapping[str, Sequence[object]], scores: Sequence[float], *, seed: int = 0, folds: int = 5) -> Importance:
    """Permutation importance, by a random forest that predicts the rank of a trial's score from its settings, on held-out trials.

    Ranks, since one diverged trial would else be all that there is to explain. Trials that differ in their seed alone stay in the forest: what
    it cannot explain is the seeds'. Two keys that always change together share one importance in a way that means nothing.

    Args:    columns: key -> its value in each trial; what is no number is taken as a category.  scores: of the trials, at least `folds`.
    Source:  Breiman 2001, section 10, on folds instead of out-of-bag trials; that half the rise is the total effect: Jansen 1999, for the index,
             Gregorutti et al. 2017, for forests.
    """
    from scipy import stats
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.model_selection import KFold

    x = np.stack([_numbers(values) for values in columns.values()], axis=1)
    y = stats.rankdata(scores)
    generator = np.random.default_rng(seed)
    error, shuffled = 0.0, np.zeros(x.shape[1])
    for train, test in KFold(folds, shuffle=True, random_state=seed).split(x):
        forest = RandomForestRegressor(50, min_samples_leaf=2, random_state=seed).fit(x[train], y[train])
        error += float(((forest.predict(x[test]) - y[test]) ** 2).sum())
        for j in range(x.shape[1]):
            probe = np.tile(x[test], (5, 1))
            probe[:, j] = np.concatenate([generator.permutation(x[test][:, j]) for _ in range(5)])
            shuffled[j] += float(((forest.predict(probe) - np.tile(y[test], 5)) ** 2).sum()) / 5
    total = float(((y - y.mean()) ** 2).sum())
    if total == 0:
        return Importance(dict.fromkeys(columns, 0.0), 0.0)
    rise = np.maximum(shuffled - error, 0.0) / (2 * total)
    return Importance(dict(zip(columns, map(float, rise), strict=True)), 1 - error / total)


def _numbers(values: Sequence[object]) -> Float[np.ndarray, "n"]:
    if all(isinstance(value, int | float) for value in values):
        return np.array(values, np.float64)
    order = {text: i for i, text in enumerate(sorted({str(value) for value in values}))}
    return np.array([order[str(value)] for value in values], np.float64)
