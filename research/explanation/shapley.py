"""Shapley values: the output's change from a background to the input, shared fairly among the features."""

import dataclasses
import functools
import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Bool, Float

from research.core.errors import ConfigError, nearest
from research.core.progress import track
from research.explanation.gradient import drawn
from research.explanation.lime import generator
from research.explanation.model import Examples, Model
from research.explanation.perturbation import ROWS, check_rows, coalition_scores, read, shape
from research.explanation.result import Attribution
from research.explanation.segments import check_segments, features_of, spread

ESTIMATORS = ("kernel", "exact", "permutation")
BACKENDS = ("own", "shap")
EXACT = 12  # features whose coalitions are all gone through
Game = Callable[[Bool[np.ndarray, "m n"]], Float[np.ndarray, "m"]]  # coalitions -> what each is worth


@dataclasses.dataclass(frozen=True)
class Shap:
    """Shapley values of the features: what a feature adds to the output, averaged over all orders in which features may join.

    A feature that has not joined is replaced by the background. The values sum to the output less the output at the background, and the entries
    of a feature share its value evenly.

    Args:    estimator: "kernel": weighted least squares over coalitions, all of them where `samples` suffices, else the smallest and the largest
             and a lot of the others, each with its opposite; "exact": all coalitions, of at most 12 features; "permutation": random orders, each
             forwards and backwards.
             samples: coalitions that the model is asked about.  segments, features: as of `Ablation`.
             background: a number, in the units that the model reads; "data": the mean output over `references` training examples.
             backend: "own" | "shap": the package of that name does the estimate.  rows: inputs in one call of the model.
    Raises:  ConfigError: a value out of range, too few samples, too many features for "exact", a backend that is not installed.
    Source:  Shapley 1953; Lundberg and Lee 2017 (kernel); Castro et al. 2009 (permutation).
    """

    estimator: str = "kernel"
    samples: int = 2048
    segments: int = 64
    features: str = "superpixels"
    background: float | str = 0.0
    references: int = 32
    backend: str = "own"
    rows: int = ROWS
    reads: ClassVar[str] = "examples"

    def __post_init__(self):
        check_rows(self.rows)
        check_segments(self.segments, self.features)
        for name, choices in (("estimator", ESTIMATORS), ("backend", BACKENDS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"method.{name}={getattr(self, name)!r} is unknown{nearest(getattr(self, name), choices)}")
        if isinstance(self.background, str) and self.background != "data":
            raise ConfigError(f"method.background={self.background!r}: must be a number, or data")
        for name in ("samples", "references"):
            if getattr(self, name) < 1:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be at least 1")
        if self.backend == "shap":
            _package()

    def fits(self, model: Model) -> str | None:
        """Why the background cannot be had."""
        if self.background == "data" and model.data is None:
            return "background=data needs the run's data; give background=NUMBER"
        return None

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Attribution:
        """The values; beside them `expected`, the output at the background."""
        output, value = read(model, examples)
        if self.background == "data":
            base = read(model, drawn(model, examples, self.references, key))[1]
            baseline = np.broadcast_to(base.mean(0), value.shape)
        else:
            base, baseline = float(self.background), np.full_like(value, self.background)
        groups = features_of(model, examples, self.segments, self.features)
        values, expected, errors, counts = [], [], [], []
        for i in track(range(len(examples)), f"{self.estimator} shap"):
            row, count = examples.row(i), int(groups[i].max()) + 1
            game = functools.partial(coalition_scores, model, row, base, groups[i], rows=self.rows)
            numbers, start, error = (self._by_package if self.backend == "shap" else self._estimate)(game, count, key)
            values.append(spread(numbers, groups[i], shape(model, value)))
            expected.append(start)
            errors.append(error)
            counts.append(count)
        stacked = np.stack(values)
        delta = stacked.reshape(len(stacked), -1).sum(1, dtype=np.float64) - (output - np.array(expected))
        told = {"expected": np.array(expected), "features": np.array(counts)}
        if None not in errors:
            told["standard_error"] = np.array(errors)
        return Attribution(stacked, baseline, delta, output, examples.target, numbers=told)

    def _estimate(self, game: Game, count: int, key: jax.Array) -> tuple[Float[np.ndarray, "n"], float, float | None]:
        """(values, worth of no feature, the largest standard error of a value where there is an estimate of it)."""
        self._check(count)
        if self.estimator == "exact":
            worth = game(every_coalition(count))
            return exact_shapley(worth), float(worth[0]), None
        if self.estimator == "permutation":
            return permutation_shapley(game, count, max(1, round(self.samples / max(2 * (count - 1), 1))), generator(key))
        start, end = game(np.array([[False] * count, [True] * count]))
        z, weights = kernel_coalitions(count, self.samples, generator(key))
        return kernel_shapley(z, game(z) - start, weights, float(end - start)), float(start), None

    def _check(self, count: int) -> None:
        if self.estimator == "exact" and count > EXACT:
            raise ConfigError(
                f"method.estimator=exact: {count} features have 2^{count} coalitions; at most {EXACT}, or estimator=kernel"
                + (f"; segments={EXACT} cuts an image so" if self.segments > EXACT else "")
            )
        if self.estimator == "kernel" and self.samples < min(2 * count, 2**count - 2):
            raise ConfigError(f"method.samples={self.samples}: {count} features need at least {min(2 * count, 2**count - 2)}")

    def _by_package(self, game: Game, count: int, key: jax.Array) -> tuple[Float[np.ndarray, "n"], float, float | None]:
        """The same from the `shap` package."""
        self._check(count)
        shap: Any = _package()
        none, all_of_them = np.zeros((1, count)), np.ones((1, count))
        seed = int(generator(key).integers(2**31))

        def worth(z: np.ndarray) -> np.ndarray:
            return game(z > 0.5)

        if self.estimator == "kernel":
            state = np.random.get_state()  # noqa: NPY002  # which the package draws from
            np.random.seed(seed)  # noqa: NPY002  # likewise
            try:
                explainer = shap.KernelExplainer(worth, none)
                values = explainer.shap_values(all_of_them, nsamples=self.samples, l1_reg=False, silent=True)
            finally:
                np.random.set_state(state)  # noqa: NPY002  # likewise
            return np.ravel(values), float(np.ravel(explainer.expected_value)[0]), None
        if self.estimator == "exact":
            found = shap.ExactExplainer(worth, none)(all_of_them)
        else:
            found = shap.PermutationExplainer(worth, none, seed=seed)(all_of_them, max_evals=max(self.samples, 2 * count + 1), silent=True)
        return np.ravel(found.values), float(np.ravel(found.base_values)[0]), None


def as_explanation(attribution: Attribution) -> Any:
    """The attribution as the `shap` package's Explanation, for its plots: `shap.plots.waterfall(as_explanation(result)[0])`.

    Raises:  ConfigError: the package is not installed.
    """
    values = np.asarray(attribution.values, np.float64)
    base = attribution.output - values.reshape(len(values), -1).sum(1)
    data = names = None
    if attribution.subject is not None:
        model, examples = attribution.subject
        data = np.asarray(examples.batch[model.field])
        names = list(model.spec.get("columns") or ()) or None
        if model.field == "tokens" and values.ndim == 2:
            data = np.array([[model.token(int(token)) for token in row] for row in data], object)
    return _package().Explanation(values=values, base_values=base, data=data, feature_names=names)


def every_coalition(count: int) -> Bool[np.ndarray, "m n"]:
    """All coalitions; feature j is in number k where bit j of k is set."""
    return (np.arange(2**count)[:, None] >> np.arange(count)) & 1 > 0


def exact_shapley(worth: Float[np.ndarray, "m"]) -> Float[np.ndarray, "n"]:
    """The Shapley values of a game by their definition.

    Args:    worth: of each coalition, in the order of `every_coalition`.
    """
    count = len(worth).bit_length() - 1
    number = np.arange(len(worth))
    sizes = every_coalition(count).sum(1)
    weight = np.array([1 / (count * math.comb(count - 1, size)) for size in range(count)])
    values = np.empty(count)
    for j in range(count):
        without = number[(number >> j) & 1 == 0]
        values[j] = weight[sizes[without]] @ (worth[without | 1 << j] - worth[without])
    return values


def kernel_coalitions(count: int, samples: int, random: np.random.Generator) -> tuple[Bool[np.ndarray, "m n"], Float[np.ndarray, "m"]]:
    """(coalitions, weight of each) for the least squares, the empty and the full one left out.

    The Shapley kernel gives all coalitions of size s together the weight (n - 1) / (s (n - s)). Sizes whose coalitions fit into their share of the
    samples are gone through, from the outside in; of the rest a lot is drawn, each with its opposite, and a coalition drawn twice counts twice.

    Args:    samples: at most so many.
    """
    if 2**count - 2 <= samples:
        z = every_coalition(count)[1:-1]
        sizes = z.sum(1)
        each = np.array([0.0, *((count - 1) / (math.comb(count, s) * s * (count - s)) for s in range(1, count))])
        return z, each[sizes]
    sizes = np.arange(1, count // 2 + 1)
    opposites = np.where(2 * sizes == count, 1, 2)
    kernel = opposites * (count - 1) / (sizes * (count - sizes))
    whole: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    left = samples
    while sizes.size and (number := math.comb(count, int(sizes[0])) * int(opposites[0])) <= left * kernel[0] / kernel.sum():
        some = _subsets(count, int(sizes[0]))
        found = some if opposites[0] == 1 else np.concatenate([some, ~some])
        whole.append(found)
        weights.append(np.full(number, kernel[0] / number))
        left -= number
        sizes, opposites, kernel = sizes[1:], opposites[1:], kernel[1:]
    pairs = left // 2
    if pairs and sizes.size:
        drawn_sizes = random.choice(sizes, 4 * pairs, p=kernel / kernel.sum())
        ranks = random.random((4 * pairs, count)).argsort(1).argsort(1)
        lot = ranks < drawn_sizes[:, None]
        lot ^= (~lot[:, :1]) & (2 * drawn_sizes == count)[:, None]  # of two opposites of one size, the one that holds the first feature
        first = np.sort(np.unique(lot, axis=0, return_index=True)[1])
        lot = lot[: first[pairs] if len(first) > pairs else len(lot)]  # until one more would be too many
        kept, counts = np.unique(lot, axis=0, return_counts=True)
        share = counts / counts.sum() * kernel.sum() / 2
        whole += [kept, ~kept]
        weights += [share, share]
    return np.concatenate(whole), np.concatenate(weights)


def kernel_shapley(
    z: Bool[np.ndarray, "m n"], worth: Float[np.ndarray, "m"], weights: Float[np.ndarray, "m"], total: float
) -> Float[np.ndarray, "n"]:
    """The values with the least weighted squared error over the coalitions, among those that sum to `total`.

    Args:    worth: of each coalition, less that of none.
    """
    if z.shape[1] == 1:
        return np.array([total])
    last = z[:, -1].astype(np.float64)
    root = np.sqrt(weights)
    rows = (z[:, :-1] - last[:, None]) * root[:, None]  # the sum takes the last value's place
    wanted = (worth - last * total) * root
    values = np.linalg.lstsq(rows.T @ rows, rows.T @ wanted, rcond=None)[0]  # well conditioned, and 20 times faster than on the rows themselves
    return np.append(values, total - values.sum())


def permutation_shapley(game: Game, count: int, pairs: int, random: np.random.Generator) -> tuple[Float[np.ndarray, "n"], float, float | None]:
    """(values, worth of none, the largest standard error of a value): the mean over random orders, each forwards and backwards."""
    orders = random.random((pairs, count)).argsort(1)
    orders = np.stack([orders, orders[:, ::-1]], 1).reshape(-1, count)
    ranks = orders.argsort(1)
    z = ranks[:, None, :] < np.arange(1, count)[None, :, None]  # 2p (n - 1) n: after each step but the last
    worth = game(np.concatenate([np.array([[False] * count, [True] * count]), z.reshape(-1, count)]))
    start, end, steps = worth[0], worth[1], worth[2:].reshape(len(orders), count - 1)
    path = np.concatenate([np.full((len(orders), 1), start), steps, np.full((len(orders), 1), end)], 1)
    gains = np.empty((len(orders), count))
    np.put_along_axis(gains, orders, np.diff(path, axis=1), 1)
    each = gains.reshape(pairs, 2, count).mean(1)
    error = float((each.std(0, ddof=1) / math.sqrt(pairs)).max()) if pairs > 1 else None
    return each.mean(0), float(start), error


def _subsets(count: int, size: int) -> Bool[np.ndarray, "m n"]:
    chosen = np.array(list(itertools.combinations(range(count), size)))
    z = np.zeros((len(chosen), count), bool)
    np.put_along_axis(z, chosen, True, 1)
    return z


def _package() -> Any:
    """The `shap` package.

    Raises:  ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("shap")
    except ImportError as error:
        raise ConfigError("method.backend=shap needs the shap package: pip install 'ontogeny[explain]', or backend=own") from error
