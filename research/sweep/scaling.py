"""How the loss falls with a model's size and the tokens that it sees, and which size a budget of compute is best spent on."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp
from threadpoolctl import threadpool_limits

from research.core.errors import ConfigError
from research.sweep.settings import SCORED, Outcome
from research.sweep.statistics import Interval

NAMES = ("E", "A", "B", "a", "b")
DELTA = 1e-3  # of the Huber loss, on log loss
GRID = {"a": (0.0, 0.5, 1.0, 1.5, 2.0), "E": (-1.0, -0.5, 0.0, 0.5, 1.0), "A": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)}  # E and A as logarithms
STARTS = 12  # of the grid's points, the best, from which the search begins
NO_E = -12.0  # the logarithm of an E that is none
BOUNDS = [(None, None), (None, None), (NO_E, None), (1e-3, 4.0), (1e-3, 4.0)]
RESAMPLES = 200
LEAST = 3  # different sizes, and different numbers of tokens: fewer do not determine the law
Points = Float[np.ndarray, "n 3"]  # parameters, tokens, loss


@dataclasses.dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^a + B / D^b, fitted.

    Args:    values: E, A, B, a, b.  samples: the same of each bootstrap resample of the runs.  points: the runs.  error: root mean square of what the
             log loss of the runs is off by.
    """

    values: Float[np.ndarray, "5"]
    samples: Float[np.ndarray, "k 5"]
    points: Points
    error: float

    @property
    def intervals(self) -> dict[str, Interval]:
        """95 % percentile intervals of E, A, B, a, b over resampled runs."""
        low, high = np.quantile(self.samples, [0.025, 0.975], axis=0)
        return {name: Interval(float(low[i]), float(high[i])) for i, name in enumerate(NAMES)}

    @property
    def determined(self) -> bool:
        """Whether the runs say how both exponents and E are; one at an end of its range is not known."""
        return self.values[0] > 1.01 * math.exp(NO_E) and all(BOUNDS[3][0] * 1.01 < self.values[i] < BOUNDS[3][1] * 0.99 for i in (3, 4))

    @property
    def largest(self) -> float:
        """The most FLOPs that any of the runs took, 6 N D."""
        return float(6 * (self.points[:, 0] * self.points[:, 1]).max())

    def best(self, flops: float) -> tuple[float, Interval]:
        """(the number of parameters with the least loss at this budget, its 95 % interval)."""
        value = float(optimal(self.values[None], flops)[0])
        low, high = np.quantile(optimal(self.samples, flops), [0.025, 0.975])
        return value, Interval(float(low), float(high))

    def told(self, flops: float) -> dict[str, Any]:
        """All that the report says, as it is written to report.json."""
        size, interval = self.best(flops)
        tokens = flops / 6 / size
        return {
            "law": "L(N, D) = E + A / N^a + B / D^b",
            "fit": {name: {"value": float(value), "interval": list(self.intervals[name])} for name, value in zip(NAMES, self.values, strict=True)},
            "error_of_log_loss": self.error,
            "runs": len(self.points),
            "budget_flops": flops,
            "beyond_runs": flops > 1.001 * self.largest,
            "parameters": size,
            "parameters_interval": list(interval),
            "tokens": tokens,
            "loss": float(predict(self.values[None], np.array([size]), np.array([tokens]))[0, 0]),
            "determined": self.determined,
            "sizes": [float(self.points[:, 0].min()), float(self.points[:, 0].max())],
            "lengths": [float(self.points[:, 1].min()), float(self.points[:, 1].max())],
        }


def predict(values: Float[np.ndarray, "k 5"], size: Float[np.ndarray, "n"], tokens: Float[np.ndarray, "n"]) -> Float[np.ndarray, "k n"]:
    """The loss of each law at each size and number of tokens."""
    e, big_a, big_b, a, b = (values[:, i : i + 1] for i in range(5))
    return e + big_a * size[None] ** -a + big_b * tokens[None] ** -b


def optimal(values: Float[np.ndarray, "k 5"], flops: float) -> Float[np.ndarray, "k"]:
    """The size N at which the loss is least where 6 N D = flops: G (flops / 6)^(b / (a + b)), G = (a A / b B)^(1 / (a + b)).

    Source:  Hoffmann et al. 2022, equation 4.
    """
    _, big_a, big_b, a, b = values.T
    return (a * big_a / (b * big_b)) ** (1 / (a + b)) * (flops / 6) ** (b / (a + b))


def fit(points: Points, *, seed: int = 0, resamples: int = RESAMPLES) -> Law:
    """The law of these runs, with resamples for its intervals.

    The Huber loss of log L against the logarithm of the law is minimised by L-BFGS from the best points of a grid, as there; the loss is summed, not
    averaged, and the search ends late: ended early, it gave the published values an error (Besiroglu et al. 2024). Each resample of the runs is
    fitted from the values of the whole fit.

    Raises:  ConfigError: fewer than three different sizes or numbers of tokens, fewer than six runs, or a loss that has no logarithm.
    Source:  Hoffmann et al. 2022, section 3.3 and appendix D.3.
    """
    points = np.asarray(points, np.float64)
    for name, column in (("sizes", points[:, 0]), ("numbers of tokens", points[:, 1])):
        if len(set(column)) < LEAST:
            raise ConfigError(f"scaling=true: the runs have {len(set(column))} different {name}; a law needs at least {LEAST}")
    if len(points) < 6:
        raise ConfigError(f"scaling=true: {len(points)} runs finished; a law of five numbers needs at least 6")
    if points.min() <= 0:
        raise ConfigError(f"scaling=true: a loss of {points[:, 2].min():g} has no logarithm; choose a metric that stays above 0")
    middle = np.log(points[:, :2]).mean(0)
    x, y = np.log(points[:, :2]) - middle, np.log(points[:, 2])
    generator, samples = np.random.default_rng(seed), []
    with threadpool_limits(1):  # L-BFGS works on five numbers: several threads of BLAS wait for each other, on a busy machine five times as long
        first = min((_search(x, y, start) for start in _starts(x, y, middle)), key=lambda pair: pair[1])[0]
        while len(samples) < resamples:
            rows = generator.integers(0, len(points), len(points))
            if all(len(set(points[rows, i])) >= LEAST for i in (0, 1)):
                samples.append(_search(x[rows], y[rows], first)[0])
    values = _values(np.stack([first, *samples]), middle)
    error = math.sqrt(float(((_log_law(first, x)[0] - y) ** 2).mean()))
    return Law(values[0], values[1:], points, error)


def _log_law(theta: Float[np.ndarray, "5"], x: Float[np.ndarray, "n 2"]) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n 3"]]:
    """(log of the law, the share of each of its three terms); theta holds the terms' logarithms at the middle of the runs, and the exponents."""
    terms = np.stack([theta[0] - theta[3] * x[:, 0], theta[1] - theta[4] * x[:, 1], np.full(len(x), theta[2])], axis=1)
    total = np.logaddexp(np.logaddexp(terms[:, 0], terms[:, 1]), terms[:, 2])
    return total, np.exp(terms - total[:, None])


def _search(x: Float[np.ndarray, "n 2"], y: Float[np.ndarray, "n"], start: Float[np.ndarray, "5"]) -> tuple[Float[np.ndarray, "5"], float]:
    from scipy.optimize import minimize  # here: the table of a sweep, printed at its end, needs none of it

    def objective(theta):
        total, share = _log_law(theta, x)
        off = total - y
        small = np.abs(off) <= DELTA
        value = np.where(small, 0.5 * off**2 / DELTA, np.abs(off) - 0.5 * DELTA).sum()
        slope = np.where(small, off / DELTA, np.sign(off))[:, None] * share
        return value, np.concatenate([slope.sum(0), [-(slope[:, 0] * x[:, 0]).sum(), -(slope[:, 1] * x[:, 1]).sum()]])

    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=BOUNDS, options={"maxiter": 1000, "ftol": 1e-10, "gtol": 1e-6})
    return found.x, float(found.fun)


def _starts(x: Float[np.ndarray, "n 2"], y: Float[np.ndarray, "n"], middle: Float[np.ndarray, "2"]) -> Float[np.ndarray, "s 5"]:
    """The points of the grid with the least loss."""
    grid = np.array(list(itertools.product(GRID["A"], GRID["A"], GRID["E"], GRID["a"], GRID["a"])))
    grid[:, :2] -= grid[:, 3:] * middle
    terms = [grid[:, None, 0] - grid[:, 3:4] * x[None, :, 0], grid[:, None, 1] - grid[:, 4:5] * x[None, :, 1]]
    off = np.abs(logsumexp(np.stack([*terms, np.broadcast_to(grid[:, 2:3], terms[0].shape)]), axis=0) - y[None])
    return grid[np.argsort(off.sum(1))[:STARTS]]


def _values(theta: Float[np.ndarray, "k 5"], middle: Float[np.ndarray, "2"]) -> Float[np.ndarray, "k 5"]:
    """E, A, B, a, b."""
    a, b = theta[:, 3], theta[:, 4]
    return np.stack([np.exp(theta[:, 2]), np.exp(theta[:, 0] + a * middle[0]), np.exp(theta[:, 1] + b * middle[1]), a, b], axis=1)


def points(outcomes: Sequence[Outcome], metric: str) -> Points:
    """(parameters, tokens seen, loss) of each run that finished.

    Parameters are all that were trained, embeddings too, as in Hoffmann et al. 2022 (Kaplan et al. 2020 leave them out); tokens that were seen
    twice count twice.

    Raises:  ConfigError: a metric that is no loss, runs that know no tokens.
    """
    if metric.rpartition("/")[2] != "loss":
        raise ConfigError(f"metric={metric!r}: a scaling law is one of a loss, as validation/loss")
    found = []
    for outcome in outcomes:
        if outcome.state not in SCORED or metric not in outcome.metrics:
            continue
        data, result = outcome.config.get("data") or {}, outcome.result
        numbers = [result.get("params"), result.get("step"), data.get("batch"), data.get("time")]
        if not all(isinstance(number, int) for number in numbers):
            raise ConfigError(f"scaling=true: {outcome.run} does not know its parameters and tokens; it must be a language model's")
        found.append((numbers[0], math.prod(numbers[1:]), outcome.metrics[metric]))
    return np.array(found, np.float64).reshape(-1, 3)


def budgets(law: Law, number: int = 5) -> list[float]:
    """Budgets from the smallest run's to the largest's, evenly on a log scale."""
    flops = 6 * law.points[:, 0] * law.points[:, 1]
    return [float(value) for value in np.geomspace(flops.min(), flops.max(), number)]
