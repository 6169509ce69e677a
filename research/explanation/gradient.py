"""Explanations by the gradient of an output, or of any unit inside, with respect to what the model reads, or to any of its taps."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from research.core.errors import ConfigError, nearest
from research.core.keys import named
from research.core.progress import track
from research.explanation.model import INPUT, Examples, Model, replaced, score
from research.explanation.result import Attribution, at_least
from research.layers.activation import guided

ROWS = 128  # inputs in one call of a program that visits many points
FILLS = ("blur", "mean")  # baselines made of the input itself
BLUR = 0.1  # standard deviation of the blur, in shorter sides of the image


@dataclasses.dataclass(frozen=True)
class Goal:
    """What is explained and where it is explained: the static part of every program here.

    Args:    at: the tap whose entries are explained.  of: the tap that holds the explained number; None: an output.
             axes: those of `of`, after the batch, at which a unit is chosen; the others are summed over.
             guided: whether gradients pass an activation only where they are positive.
    """

    at: str
    of: str | None = None
    axes: tuple[int, ...] = ()
    guided: bool = False


@dataclasses.dataclass(frozen=True)
class Aim:
    """Which number of each example: its target, and the place of the unit at the goal's axes where the goal has a tap."""

    target: Any  # i32[b k]
    unit: Any  # i32[b n]


jax.tree_util.register_dataclass(Aim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient:
    """What all methods here share.

    Args:    at: the tap that is explained: the input, or what any layer holds (layer attribution).
             of: what is explained instead of an output, as {tap: maps_1, unit: [3, 3, 0]}, one number for each axis of the tap, null: all along
             it, summed (neuron attribution).
    """

    at: str = INPUT
    of: Mapping[str, Any] | None = None
    reads: ClassVar[str] = "examples"

    def fits(self, model: Model) -> str | None:
        """None: every model has gradients."""
        return None

    def goal(self, model: Model, examples: Examples, at: str, *, guided: bool = False) -> tuple[Goal, Aim]:
        """What is explained, as a program takes it.

        Raises:  ConfigError: no such tap or unit, or one that the tap `at` cannot change because it comes before.
        """
        model.require(at)
        target = np.asarray(examples.target, np.int32)
        if self.of is None:
            return Goal(at, guided=guided), Aim(target, np.zeros((len(target), 0), np.int32))
        tap, unit = _unit(model, self.of)
        order = list(model.taps)
        if order.index(tap) < order.index(at):
            raise ConfigError(f"of.tap={tap} comes before at={at}, so nothing there changes it; the taps in their order: {', '.join(order)}")
        axes = tuple(axis for axis, place in enumerate(unit) if place is not None)
        places = np.array([[unit[axis] for axis in axes]] * len(target), np.int32).reshape(len(target), len(axes))
        return Goal(at, tap, axes, guided), Aim(target, places)

    def slope(self, model: Model, examples: Examples, at: str, *, guided: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(explained number, value of the tap, its gradient there) of each example."""
        goal, aim = self.goal(model, examples, at, guided=guided)
        return jax.tree.map(np.asarray, _slope(model.objective, goal, model.arrays, dict(examples.batch), aim))

    def attribution(self, model: Model, examples: Examples, values: np.ndarray, output: np.ndarray, **more: Any) -> Attribution:
        """The values at the tap `at` as an attribution."""
        return Attribution(per_token(model, self.at, values, examples), output=output, target=examples.target, at=self.at, **_filled(more))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saliency(Gradient):
    """|d output / d input|.

    Args:    absolute: False keeps the sign.
    Source:  Simonyan, Vedaldi and Zisserman 2014.
    """

    absolute: bool = True

    def fits(self, model: Model) -> str | None:
        """Whether signed gradients, where they are wanted, are worth a look."""
        return None if self.absolute else vanishing(model, self.at, "use absolute=true or input_x_gradient")

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Attribution:
        """The absolute gradient of each entry; of tokens its sum over the embedding."""
        output, _, slope = self.slope(model, examples, self.at)
        return self.attribution(model, examples, np.abs(slope) if self.absolute else slope, output)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputXGradient(Gradient):
    """Input x gradient: exact for a linear model without bias.

    Source:  Shrikumar et al. 2016.
    """

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Attribution:
        """The product at each entry; of tokens its sum over the embedding."""
        output, value, slope = self.slope(model, examples, self.at)
        return self.attribution(model, examples, value * slope, output)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Path(Gradient):
    """The gradient along straight lines from baselines to the value, by Gauss-Legendre quadrature.

    The values sum to the output's change from baseline to input; `delta` is what the quadrature misses of it.

    Args:    points: of the quadrature on each line, at least 1.
             rows: inputs in one call of the model; more need more memory, fewer more calls.
    Raises:  ValueError: less than one point or row.
    """

    points: int = 64
    rows: int = ROWS

    def __post_init__(self):
        at_least(self, points=1, rows=1)

    def integrate(self, model: Model, examples: Examples, value: Float[np.ndarray, "b ..."], bases: Float[np.ndarray, "b r ..."]) -> Attribution:
        """The integral from each of the baselines, and their mean."""
        goal, aim = self.goal(model, examples, self.at)
        static = model.objective, goal, model.arrays
        count, references = bases.shape[:2]
        together = min(count, self.rows)  # examples in one call of the model, and points of each
        chunks = self._chunks(references, max(1, min(self.points * references, self.rows // together)))
        rows = np.minimum(np.arange(-(-count // together) * together), count - 1)  # the last call is filled up with the last example
        parts = []
        for part in rows.reshape(-1, together):
            batch, aims, here, base = jax.device_put(jax.tree.map(lambda x, part=part: x[part], (dict(examples.batch), aim, value, bases)))
            before = sum(_number_at(*static, batch, aims, base[:, i]) for i in range(references)) / references
            sums = jnp.zeros_like(here)
            for chunk in track(chunks, "integrate"):
                sums = _add(*static, batch, aims, here, base, sums, chunk)
            parts.append((_number_at(*static, batch, aims, here), before, sums))
        output, before, values = (np.concatenate([np.asarray(x) for x in each])[:count] for each in zip(*parts, strict=True))
        delta = values.reshape(count, -1).sum(1) - (output - before)
        return self.attribution(model, examples, values, output, baseline=bases.mean(1), delta=delta)

    def _chunks(self, references: int, size: int) -> list[tuple[np.ndarray, ...]]:
        """(baseline, place on the line from it, weight) of every point, so many at a time."""
        nodes, weights = np.polynomial.legendre.leggauss(self.points)
        which = np.repeat(np.arange(references, dtype=np.int32), self.points)
        place, share = (np.tile(x.astype(np.float32), references) for x in ((nodes + 1) / 2, weights / 2 / references))
        return list(zip(*(cut(x, size) for x in (which, place, share)), strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegratedGradients(Path):
    """(input - baseline) x the mean gradient on the straight line between them.

    Args:    baseline: a number that fills the tap, in the units in which the model reads it; of images also "blur" or "mean": the image
             itself blurred, or the mean of each of its channels; of a text "mean", the mean of its own embeddings. None: "mean" for a text,
             else 0. An embedding of zeros is a poor one: behind a norm all that happens on the line happens next to 0, where no quadrature sees it.
    Raises:  ValueError: less than one point or row, or a baseline that does not exist.
    Source:  Sundararajan, Taly and Yan 2017.
    """

    baseline: float | str | None = None

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.baseline, str) and self.baseline not in FILLS:
            raise ValueError(f"baseline={self.baseline!r} is neither a number{nearest(self.baseline, FILLS)}")

    def fits(self, model: Model) -> str | None:
        """None: every model has gradients; an image's own baseline needs images."""
        return misfit(model, self.at, self.baseline)

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Attribution:
        """The integral at each entry; of tokens its sum over the embedding."""
        value = read(model, examples, self.at)
        baseline = self.baseline
        if baseline is None:
            baseline = "mean" if model.field == "tokens" and self.at == INPUT else 0.0
        if baseline == "mean" and model.field == "tokens":
            base = token_mean(value, real(examples))
        else:
            base = fill(value, baseline)
        return self.integrate(model, examples, value, base[:, None])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedGradients(Path):
    """Integrated gradients averaged over many baselines, so that none has to be chosen.

    Args:    background: "data": baselines are examples of the training data, drawn by lot; "noise": normal numbers around 0, for which the run's
             data need not be there.  references: how many baselines, at least 1.  noise: standard deviation of background "noise".
    Raises:  ValueError: less than one point, row or reference, an unknown background.
    Source:  Erion et al. 2021. There the place on each line is drawn by lot too; quadrature needs fewer gradients for the same error, and the
             values sum to the output less its mean at the baselines.
    """

    points: int = 8
    background: str = "data"
    references: int = 32
    noise: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        at_least(self, references=1)
        if self.background not in ("data", "noise"):
            raise ValueError(f"background={self.background!r}{nearest(self.background, ('data', 'noise'))}")

    def fits(self, model: Model) -> str | None:
        """Whether there is data to draw from."""
        if self.background == "data" and model.data is None:
            return "background=data draws from the run's training data, which is not there; background=noise needs none"
        return None

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Attribution:
        """The mean integral at each entry; of tokens its sum over the embedding."""
        model.require(self.at)
        value = read(model, examples, self.at)
        if self.background == "noise":
            bases = self.noise * np.asarray(jax.random.normal(named(key, "noise"), (self.references, *value.shape[1:]), jnp.float32))
        else:
            bases = read(model, drawn(model, examples, self.references, key), self.at)
        return self.integrate(model, examples, value, np.broadcast_to(bases, (len(value), *bases.shape)))


def per_token(model: Model, at: str, values: Float[np.ndarray, "b ..."], examples: Examples) -> Float[np.ndarray, "b ..."]:
    """Attributions to an embedding summed over its units, b t d -> b t, 0 where a token is padding; any other comes back as it is."""
    tokens = model.field == "tokens" and at == INPUT and values.ndim == 3
    return np.where(real(examples), values.sum(-1), np.float32(0)) if tokens else values


def real(examples: Examples) -> np.ndarray:
    """Which positions of each example are no padding: b t; of an input without positions, b."""
    if examples.mask.ndim == 1:
        return np.ones(len(examples), bool)
    lengths = np.array([examples.length(i) for i in range(len(examples))])
    return np.arange(examples.mask.shape[1]) < lengths[:, None]


def read(model: Model, examples: Examples, at: str) -> Float[np.ndarray, "b ..."]:
    """What a tap holds, in float32."""
    return np.asarray(model.read(examples.batch, (at,))[1][at], np.float32)


def vanishing(model: Model, at: str, instead: str) -> str | None:
    """Why the signed gradient of a token says nothing: behind a layer norm its sum over the embedding is 0, whatever the token does."""
    return f"signed gradients sum to nothing over a token's embedding; {instead}" if model.field == "tokens" and at == INPUT else None


def misfit(model: Model, at: str, baseline: float | str | None) -> str | None:
    """Why there is no such baseline at this tap; None: there is."""
    made_of = ("image", "tokens") if baseline == "mean" else ("image",)
    if isinstance(baseline, str) and (model.field not in made_of or at != INPUT):
        return f"baseline={baseline} is made of {' or '.join(made_of)}, at the tap {INPUT}; give a number"
    return None


def token_mean(value: Float[np.ndarray, "b t d"], mask: np.ndarray) -> Float[np.ndarray, "b t d"]:
    """At each position the mean of the text's own embeddings, padding left out."""
    kept = mask[..., None].astype(np.float32)
    return np.broadcast_to((value * kept).sum(1, keepdims=True) / np.maximum(kept.sum(1, keepdims=True), 1), value.shape)


def fill(value: Float[np.ndarray, "b ..."], baseline: float | str) -> Float[np.ndarray, "b ..."]:
    """The baseline of each value: a number everywhere, "mean" of each channel, or the image blurred."""
    if baseline == "mean":
        return np.broadcast_to(value.mean((1, 2), keepdims=True), value.shape)
    if baseline == "blur":
        y, x = (_blur(size, BLUR * min(value.shape[1:3])) for size in value.shape[1:3])
        return np.einsum("byxc,yz,xw->bzwc", value, y, x)
    return np.full_like(value, float(baseline))


def drawn(model: Model, examples: Examples, count: int, key: jax.Array) -> Examples:
    """Examples of the training data, drawn by lot; texts as long as those that are explained.

    Raises:  ConfigError: there are fewer.
    """
    assert model.data is not None
    source = model.data().splits["train"]
    source = getattr(source, "whole", source)  # windows that do not overlap
    if len(source) < count:
        raise ConfigError(f"references={count}: the training data has {len(source)} examples")
    chosen = np.sort(np.asarray(jax.random.permutation(named(key, "references"), len(source)))[:count])
    field = model.field
    inputs = np.asarray(source.take(chosen)[field])
    if field == "tokens":
        inputs = inputs[:, : np.shape(examples.batch[field])[1]]
    mask = np.ones((count, *examples.mask.shape[1:]), bool)
    batch = {field: inputs, "mask": mask, "index": chosen.astype(np.int32)}
    return Examples(batch, [f"train {i}" for i in chosen], np.zeros((count, examples.target.shape[1]), np.int32))


def cut(values: np.ndarray, size: int) -> np.ndarray:
    """The values in rows of this size, the last filled up with zeros."""
    short = -len(values) % size
    return np.pad(values, (0, short)).reshape(-1, size)


def number(objective, goal: Goal, arrays, batch, aim: Aim, edits=None) -> tuple[Float[Array, "b"], dict[str, Array]]:
    """(the number to explain of each example, taps)."""
    with guided(goal.guided):
        output, taps = score(objective, arrays, batch, aim.target, edits)
    if goal.of is None:
        return output.astype(jnp.float32), taps
    front = jnp.moveaxis(taps[goal.of], [1 + axis for axis in goal.axes], range(1, 1 + len(goal.axes)))
    chosen = front[(jnp.arange(len(front), dtype=jnp.int32), *aim.unit.T)]
    return chosen.reshape(len(chosen), -1).sum(1, dtype=jnp.float32), taps


def total(objective, goal: Goal, arrays, batch, aim: Aim, value: Array) -> tuple[Float[Array, ""], Float[Array, "b"]]:
    """(sum over the examples of the number with this value at the tap, number of each): examples do not mix, so its gradient is each one's own."""
    each, _ = number(objective, goal, arrays, batch, aim, {goal.at: replaced(value)})
    return each.sum(), each


@functools.partial(jax.jit, static_argnums=(0, 1))
def _slope(objective, goal, arrays, batch, aim):
    """(number, value of the tap, gradient of the number with respect to it)."""
    value = number(objective, goal, arrays, batch, aim)[1][goal.at].astype(jnp.float32)
    slope, each = jax.grad(functools.partial(total, objective, goal, arrays, batch, aim), has_aux=True)(value)
    return each, value, slope


@functools.partial(jax.jit, static_argnums=(0, 1))
def _number_at(objective, goal, arrays, batch, aim, value):
    """The number of each example with this value at the tap."""
    return total(objective, goal, arrays, batch, aim, value)[1]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=7)
def _add(objective, goal, arrays, batch, aim, value, bases, sums, chunk):
    """The sums with what the points of a chunk add, all in one call of the model.

    One program that the host calls again and again: on CPU a scan over the chunks took 1.4 times as long (2 cores, mnist_cnn, 256 rows).
    """
    which, place, share = (x.reshape(1, -1, *(1,) * (value.ndim - 1)) for x in chunk)
    base = jnp.take(bases, which.ravel(), 1)  # b n ...
    along = value[:, None] - base
    line = base + place * along
    many, aims = jax.tree.map(lambda x: jnp.repeat(x, line.shape[1], 0), (batch, aim))  # b -> b n, examples slowest
    slope = jax.grad(functools.partial(total, objective, goal, arrays, many, aims), has_aux=True)(line.reshape(-1, *value.shape[1:]))[0]
    return sums + (slope.reshape(line.shape) * along * share).sum(1)


def _blur(size: int, deviation: float) -> Float[np.ndarray, "n n"]:
    """The weights with which each place enters each other one; at the border, of what lies inside."""
    distance = np.arange(size)[:, None] - np.arange(size)[None]
    weights = np.exp(-0.5 * np.square(distance / deviation))
    return (weights / weights.sum(0, keepdims=True)).astype(np.float32)


def _unit(model: Model, of: Mapping[str, Any]) -> tuple[str, tuple[int | None, ...]]:
    """(tap, place of the unit on each of its axes).

    Raises:  ConfigError: keys that are wrong or missing, no such tap, too few or too many places, one out of range.
    """
    if set(of) != {"tap", "unit"}:
        raise ConfigError(f"of={dict(of)}: it is written as {{tap: NAME, unit: [PLACES]}}")
    tap, unit = of["tap"], tuple(of["unit"])
    model.require(tap)
    shape = model.taps[tap].shape[1:]
    if len(unit) != len(shape):
        raise ConfigError(f"of.unit={list(unit)}: the tap {tap} has the shape {shape}, so a unit has {len(shape)} places; null: all, summed")
    for axis, (place, size) in enumerate(zip(unit, shape, strict=True)):
        if place is not None and not (isinstance(place, int) and 0 <= place < size):
            raise ConfigError(f"of.unit={list(unit)}: axis {axis} of the tap {tap} has the places 0 to {size - 1}")
    return tap, unit


def _filled(more: Mapping[str, Any]) -> dict[str, Any]:
    return {"baseline": None, "delta": None, **more}
