"""LIME: a linear model of what the output does near one input."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from research.core.errors import ConfigError
from research.core.progress import track
from research.explanation.model import INPUT, Examples, Model, replaced, score
from research.explanation.perturbation import ROWS, check_rows, chunks, coalition_scores, read, shape
from research.explanation.result import Attribution
from research.explanation.segments import check_segments, features_of, spread

WIDTH = 0.25  # of the kernel over features that are there or not, in cosine distance
WIDTH_OF_COLUMNS = 0.75  # of the kernel over columns, for each root of their number, in deviations


@dataclasses.dataclass(frozen=True)
class Lime:
    """The coefficients of a linear model that is fitted to the output around the input, near inputs counting most.

    Of an image or a text, features are there or replaced by a baseline, each with chance 1/2, and a coefficient is what a feature's presence adds;
    its entries share it evenly. Of a table, normal numbers are added to all columns, and a coefficient is the output's slope along a column.
    Near means exp(-(distance / width)² / 2), of the cosine between the presences or of the length of what was added in deviations.

    Args:    samples: inputs that the model is asked about, at least 2.
             width: of the kernel; None: 0.25, or 0.75 x the root of the number of columns.
             ridge: penalty on the squared coefficients, at least 0.  segments, features, baseline: as of `Ablation`.
             deviation: of what is added to a column, in the units that the model reads.  rows: inputs in one call of the model.
    Raises:  ConfigError: a value out of range.
    Source:  Ribeiro, Singh and Guestrin 2016; the kernel, its widths, the ridge and the sampling of a table around the instance are those of
             the `lime` package.
    """

    samples: int = 1024
    width: float | None = None
    ridge: float = 1.0
    segments: int = 64
    features: str = "superpixels"
    baseline: float = 0.0
    deviation: float = 1.0
    rows: int = ROWS
    reads: ClassVar[str] = "examples"

    def __post_init__(self):
        check_rows(self.rows)
        check_segments(self.segments, self.features)
        if self.samples < 2:
            raise ConfigError(f"method.samples={self.samples}: must be at least 2")
        if self.ridge < 0:
            raise ConfigError(f"method.ridge={self.ridge}: must not be negative")
        for name in ("width", "deviation"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"method.{name}={value}: must be above 0")

    def fits(self, model: Model) -> str | None:
        """None: parts of every input can be replaced."""
        return None

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Attribution:
        """The coefficients; beside them how well the linear model fits the samples, by R²."""
        output, value = read(model, examples)
        explain = self._columns if model.field == "features" else self._parts
        values, fits = [], []
        for i in track(range(len(examples)), "lime"):
            numbers, fit = explain(model, examples.row(i), value[i], key)
            values.append(numbers)
            fits.append(fit)
        numbers = {name: np.array([fit[name] for fit in fits]) for name in fits[0]}
        baseline = None if model.field == "features" else np.full_like(value, self.baseline)
        return Attribution(np.stack(values), baseline, None, output, examples.target, numbers=numbers)

    def _parts(self, model: Model, row: Examples, value: Float[np.ndarray, "..."], key: jax.Array) -> tuple[np.ndarray, dict[str, float]]:
        """What each feature's presence adds."""
        groups = features_of(model, row, self.segments, self.features)[0]
        count = int(groups.max()) + 1
        z = generator(key).random((self.samples, count)) < 0.5
        z[0] = True
        outputs = coalition_scores(model, row, self.baseline, groups, z, self.rows)
        weights = np.exp(-((_cosine_distance(z) / (self.width or WIDTH)) ** 2) / 2)
        slopes, intercept, fit = weighted_ridge(z.astype(np.float64), outputs, weights, self.ridge)
        return spread(slopes, groups, shape(model, value[None])), {"r_squared": fit, "intercept": intercept, "features": count}

    def _columns(self, model: Model, row: Examples, value: Float[np.ndarray, "f"], key: jax.Array) -> tuple[np.ndarray, dict[str, float]]:
        """The slope along each column."""
        added = generator(key).standard_normal((self.samples, value.size))
        added[0] = 0.0
        near = (value + self.deviation * added.reshape(-1, *value.shape)).astype(np.float32)
        made = [_at(model.objective, model.arrays, row.batch, row.target, chunk) for chunk in chunks(near, self.rows)]
        outputs = np.concatenate(made)[: self.samples].astype(np.float64)
        width = self.width or WIDTH_OF_COLUMNS * math.sqrt(value.size)
        weights = np.exp(-((np.linalg.norm(added, axis=1) / width) ** 2) / 2)
        slopes, intercept, fit = weighted_ridge(added, outputs, weights, self.ridge)
        return (slopes / self.deviation).reshape(value.shape).astype(np.float32), {"r_squared": fit, "intercept": intercept}


def weighted_ridge(
    x: Float[np.ndarray, "m n"], y: Float[np.ndarray, "m"], weights: Float[np.ndarray, "m"], ridge: float
) -> tuple[Float[np.ndarray, "n"], float, float]:
    """(slopes, intercept, R²) of the least weighted squares with a penalty of ridge x the squared slopes; the intercept is free.

    R² is 1 where y is constant, since then nothing is left to explain.
    """
    share = weights / weights.sum()
    middle, height = share @ x, float(share @ y)
    here = x - middle
    weighted = here.T * weights
    slopes = np.linalg.lstsq(weighted @ here + ridge * np.eye(x.shape[1]), weighted @ (y - height), rcond=None)[0]
    missed = weights @ (y - height - here @ slopes) ** 2
    around = weights @ (y - height) ** 2
    constant = around <= 1e-20 * weights.sum() * (1 + height**2)  # what float64 makes of no spread at all
    return slopes, height - float(middle @ slopes), 1.0 if constant else float(1 - missed / around)


def generator(key: jax.Array) -> np.random.Generator:
    """Numpy's random numbers for a key: the same key, the same numbers."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())


def _cosine_distance(z: Bool[np.ndarray, "m n"]) -> Float[np.ndarray, "m"]:
    """1 - the cosine between each coalition and the whole; 1 for the empty one."""
    return 1.0 - np.sqrt(z.mean(1))


@functools.partial(jax.jit, static_argnums=0)
def _at(objective, arrays, batch, target, values):
    """The output for each value of the input."""
    many, aim = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(values), *x.shape[1:])), (batch, target))
    return score(objective, arrays, many, aim, {INPUT: replaced(values)})[0]
