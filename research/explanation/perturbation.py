"""Attribution by taking parts of an input away and looking at what becomes of the output."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from research.core.errors import ConfigError
from research.core.progress import track
from research.explanation.model import INPUT, Examples, Model, score
from research.explanation.result import Attribution
from research.explanation.segments import check_segments, features_of, spread

ROWS = 256  # inputs in one call of the model


@dataclasses.dataclass(frozen=True)
class Occlusion:
    """How much the output falls where a window slides over the input and puts a baseline in its place.

    Each position has the mean of all windows that cover it. A window that reaches over the far edge is cut off there.

    Args:    window: side of the window: pixels, tokens, times or columns; a number, or one for each axis.  stride: between windows, likewise.
             baseline: a number, in the units that the model reads.  rows: inputs in one call of the model.
    Raises:  ConfigError: a window larger than the input, strides that leave parts of it uncovered.
    Source:  Zeiler and Fergus 2014; the numbers are Captum's, but that channels share a position's evenly.
    """

    window: int | tuple[int, ...] = 3
    stride: int | tuple[int, ...] = 1
    baseline: float = 0.0
    rows: int = ROWS
    reads: ClassVar[str] = "examples"

    def __post_init__(self):
        check_rows(self.rows)
        for name in ("window", "stride"):
            if min(np.atleast_1d(getattr(self, name)), default=0) < 1:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be at least 1")

    def fits(self, model: Model) -> str | None:
        """None: parts of every input can be replaced."""
        return None

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Attribution:
        """The mean fall at each position, shared by its channels."""
        output, value = read(model, examples)
        places = value.shape[1 : 1 + axes(model)]
        window, stride = (self._each(name, places) for name in ("window", "stride"))
        for size, side, step in zip(places, window, stride, strict=True):
            if side > size:
                raise ConfigError(f"method.window={self.window}: the input has {size} positions there; a window is at most as large")
            if step > side and side < size:
                raise ConfigError(f"method.stride={self.stride}: with window={self.window} some positions are never covered; at most {side}")
        ranges = (range(0, math.ceil((size - side) / step) * step + 1, step) for size, side, step in zip(places, window, stride, strict=True))
        starts = np.array(list(itertools.product(*ranges)), np.int32)
        values = np.zeros((len(examples), *shape(model, value)), np.float32)
        for i in track(range(len(examples)), "occlusion"):
            valid = np.ones(places, bool) if examples.mask.ndim == 1 else examples.mask[i]
            fall = output[i] - self._outputs(model, examples.row(i), starts, np.array(window, np.int32), valid)
            values[i] = _averaged(fall, starts, window, valid).reshape(places + (1,) * (values.ndim - 1 - len(places)))
        return Attribution(values / math.prod(values.shape[1 + len(places) :]), np.full_like(value, self.baseline), None, output, examples.target)

    def _each(self, name: str, places: tuple[int, ...]) -> tuple[int, ...]:
        given = getattr(self, name)
        found = (given,) * len(places) if isinstance(given, int) else tuple(given)
        if len(found) != len(places):
            raise ConfigError(f"method.{name}={given}: this input has {len(places)} axes of positions; give a number, or one for each")
        return found

    def _outputs(self, model: Model, row: Examples, starts: np.ndarray, window: np.ndarray, valid: np.ndarray) -> Float[np.ndarray, "m"]:
        base = everywhere(model, self.baseline)
        made = [_windowed(model.objective, model.arrays, row.batch, row.target, base, chunk, window, valid) for chunk in chunks(starts, self.rows)]
        return np.concatenate(made)[: len(starts)].astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Ablation:
    """How much the output falls where a feature alone is replaced by a baseline; its entries share that evenly.

    Args:    segments: of an image, about so many.  features: of an image: superpixels | grid.  baseline: in the units that the model reads.
             rows: inputs in one call of the model.
    """

    segments: int = 64
    features: str = "superpixels"
    baseline: float = 0.0
    rows: int = ROWS
    reads: ClassVar[str] = "examples"

    def __post_init__(self):
        check_rows(self.rows)
        check_segments(self.segments, self.features)

    def fits(self, model: Model) -> str | None:
        """None: parts of every input can be replaced."""
        return None

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Attribution:
        """The fall at each feature."""
        output, value = read(model, examples)
        groups = features_of(model, examples, self.segments, self.features)
        values = []
        for i in track(range(len(examples)), "ablation"):
            without = ~np.eye(groups[i].max() + 1, dtype=bool)
            fall = output[i] - coalition_scores(model, examples.row(i), self.baseline, groups[i], without, self.rows)
            values.append(spread(fall, groups[i], shape(model, value)))
        counts = np.array([group.max() + 1 for group in groups])
        return Attribution(np.stack(values), np.full_like(value, self.baseline), None, output, examples.target, numbers={"features": counts})


def coalition_scores(
    model: Model,
    examples: Examples,
    baseline: float | Float[np.ndarray, "r ..."],
    groups: Int[np.ndarray, "..."],
    z: Bool[np.ndarray, "m n"],
    rows: int = ROWS,
) -> Float[np.ndarray, "m"]:
    """The output of one example where the features that a coalition lacks are replaced by a baseline, for each coalition.

    The number of features and of coalitions are filled up, so that inputs that are cut up differently share one program.

    Args:    examples: one row.  baseline: a number at the input tap, or references shaped as that tap: then the mean output over them.
             groups: the feature of each position, from 0; -1: of none, so never replaced.  z: which features each coalition has.
             rows: inputs in one call of the model.
    Raises:  ConfigError: groups that cover nothing, coalitions of another number of features.
    """
    groups, z = np.asarray(groups, np.int32), np.asarray(z, bool)
    sizes = np.bincount(groups[groups >= 0])
    if not sizes.size or not sizes.all():
        raise ConfigError(f"feature {int(sizes.argmin()) if sizes.size else 0} covers nothing of {examples.names[0]}")
    if z.ndim != 2 or z.shape[1] != len(sizes):
        raise ConfigError(f"coalitions of shape {z.shape}, and the input has {len(sizes)} features")
    base = everywhere(model, float(baseline)) if np.ndim(baseline) == 0 else np.asarray(baseline, np.float32)
    wide = _power(len(sizes) + 1)
    full = np.pad(z, ((0, 0), (0, wide - len(sizes))), constant_values=True)
    where = np.where(groups < 0, wide - 1, groups)  # the last one is always there
    pairs = np.stack([np.repeat(np.arange(len(z)), len(base)), np.tile(np.arange(len(base)), len(z))], 1).astype(np.int32)
    made = [
        _without(model.objective, model.arrays, examples.batch, examples.target, base, where, full[chunk[:, 0]], chunk[:, 1])
        for chunk in chunks(pairs, rows)
    ]
    outputs = np.concatenate(made)[: len(pairs)].astype(np.float64) if made else np.zeros(0)
    return outputs.reshape(len(z), len(base)).mean(1)


def read(model: Model, examples: Examples) -> tuple[Float[np.ndarray, "b"], Float[np.ndarray, "b ..."]]:
    """(the explained output of each example, its value at the input tap)."""
    outputs, taps = model.read(examples.batch, (INPUT,))
    return np.asarray(outputs)[(np.arange(len(examples)), *examples.target.T)], np.asarray(taps[INPUT], np.float32)


def everywhere(model: Model, baseline: float) -> Float[np.ndarray, "..."]:
    """The baseline as an array that spreads over the input tap."""
    return np.full((1,) * len(model.taps[INPUT].shape), baseline, np.float32)


def axes(model: Model) -> int:
    """How many axes of the input are positions: y and x of an image; tokens, times, columns."""
    return 2 if model.field == "image" else 1


def shape(model: Model, value: Float[np.ndarray, "b ..."]) -> tuple[int, ...]:
    """The shape of one example's attribution: an entry of the input each, of a text one number a token."""
    return value.shape[1:2] if model.field == "tokens" else value.shape[1:]


def check_rows(rows: int) -> None:
    """Refuses less than one input a call.

    Raises:  ConfigError: naming it.
    """
    if rows < 1:
        raise ConfigError(f"method.rows={rows}: must be at least 1")


def chunks(values: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """The values in pieces of one size, the last filled up with its own last row; few values make one small piece."""
    size = min(rows, _power(len(values)))
    for start in range(0, len(values), size):
        piece = values[start : start + size]
        yield np.concatenate([piece, np.repeat(piece[-1:], size - len(piece), 0)])


def _power(count: int) -> int:
    """The least power of two that holds so many, at least 8."""
    return max(8, 1 << (count - 1).bit_length())


def _averaged(fall: Float[np.ndarray, "m"], starts: np.ndarray, window: tuple[int, ...], valid: np.ndarray) -> Float[np.ndarray, "..."]:
    """The mean over the windows that cover a position."""
    sums, counts = np.zeros(valid.shape), np.zeros(valid.shape)
    for drop, start in zip(fall, starts, strict=True):
        covered = tuple(slice(first, first + side) for first, side in zip(start, window, strict=True))
        sums[covered] += drop
        counts[covered] += 1
    return np.where(valid, sums / counts, 0.0)


@functools.partial(jax.jit, static_argnums=0)
def _without(objective, arrays, batch, target, base, groups, z, reference):
    """The output for each row of z."""
    absent = ~z[:, groups]  # n places
    absent = absent.reshape(absent.shape + (1,) * (base.ndim - absent.ndim))
    many, aim = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(z), *x.shape[1:])), (batch, target))
    return score(objective, arrays, many, aim, {INPUT: (absent, base[reference])})[0]


@functools.partial(jax.jit, static_argnums=0)
def _windowed(objective, arrays, batch, target, base, starts, window, valid):
    """The output for each window."""
    covered = jnp.broadcast_to(valid, (len(starts), *valid.shape))
    for axis, size in enumerate(valid.shape):
        place = jnp.arange(size, dtype=jnp.int32)[None]
        inside = (place >= starts[:, axis, None]) & (place < starts[:, axis, None] + window[axis])  # n size
        covered &= inside.reshape(len(starts), *(size if a == axis else 1 for a in range(valid.ndim)))
    many, aim = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(starts), *x.shape[1:])), (batch, target))
    covered = covered.reshape(covered.shape + (1,) * (base.ndim - covered.ndim))
    return score(objective, arrays, many, aim, {INPUT: (covered, base)})[0]
