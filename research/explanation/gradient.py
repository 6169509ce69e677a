"""Attribution by gradients of the output with respect to a tap."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from research.explanation.model import INPUT, Examples, Model, replaced, score
from research.explanation.result import Attribution

ROWS = 256  # inputs in one call of a program that visits many points


@dataclasses.dataclass(frozen=True)
class Saliency:
    """|d output / d input|.

    Args:    at: the tap that is explained.  absolute: False keeps the sign.
    Source:  Simonyan, Vedaldi and Zisserman 2014.
    """

    at: str = INPUT
    absolute: bool = True
    reads: ClassVar[str] = "examples"

    def fits(self, model: Model) -> str | None:
        """None: every model has gradients."""
        return None

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Attribution:
        """The absolute gradient of each entry; of tokens its sum over the embedding."""
        model.require(self.at)
        output, _, slope = _slope(model.objective, self.at, model.arrays, examples.batch, examples.target)
        values = np.abs(slope) if self.absolute else np.asarray(slope)
        return Attribution(per_token(model, self.at, values), None, None, np.asarray(output), examples.target, at=self.at)


@dataclasses.dataclass(frozen=True)
class InputXGradient:
    """Input x gradient: exact for a linear model without bias.

    Args:    at: the tap that is explained.
    Source:  Shrikumar et al. 2016.
    """

    at: str = INPUT
    reads: ClassVar[str] = "examples"

    def fits(self, model: Model) -> str | None:
        """None: every model has gradients."""
        return None

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Attribution:
        """The product at each entry; of tokens its sum over the embedding."""
        model.require(self.at)
        output, value, slope = _slope(model.objective, self.at, model.arrays, examples.batch, examples.target)
        values = per_token(model, self.at, np.asarray(value * slope))
        return Attribution(values, None, None, np.asarray(output), examples.target, at=self.at)


@dataclasses.dataclass(frozen=True)
class IntegratedGradients:
    """(input - baseline) x the mean gradient on the straight line between them, by Gauss-Legendre quadrature.

    The values sum to the output's change between baseline and input; `delta` is what the quadrature misses of it.

    Args:    points: of the quadrature, at least 1.  baseline: a number that fills the tap, in the units in which the model reads it.
             at: the tap that is explained.  rows: inputs in one call of the model; more need more memory, fewer more calls.
    Raises:  ValueError: less than one point or row.
    Source:  Sundararajan, Taly and Yan 2017.
    """

    points: int = 64
    baseline: float = 0.0
    at: str = INPUT
    rows: int = ROWS
    reads: ClassVar[str] = "examples"

    def __post_init__(self):
        for name in ("points", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def fits(self, model: Model) -> str | None:
        """None: every model has gradients."""
        return None

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Attribution:
        """The integral at each entry; of tokens its sum over the embedding."""
        model.require(self.at)
        nodes, weights = np.polynomial.legendre.leggauss(self.points)
        at_once = max(1, min(self.points, self.rows // len(examples)))
        places, shares = (cut(x.astype(np.float32), at_once) for x in ((nodes + 1) / 2, weights / 2))
        made = _integrated(model.objective, self.at, model.arrays, examples.batch, examples.target, self.baseline, places, shares)
        output, before, values, base = jax.tree.map(np.asarray, made)
        values = per_token(model, self.at, values)
        delta = values.reshape(len(values), -1).sum(1) - (output - before)
        return Attribution(values, base, delta, output, examples.target, at=self.at)


def per_token(model: Model, at: str, values: Float[np.ndarray, "b ..."]) -> Float[np.ndarray, "b ..."]:
    """Attributions to an embedding summed over its units, b t d -> b t; any other comes back as it is."""
    return values.sum(-1) if model.field == "tokens" and at == INPUT and values.ndim == 3 else values


def cut(values: Float[np.ndarray, "n"], size: int) -> Float[np.ndarray, "m size"]:
    """The values in rows of this size, the last filled up with zeros."""
    short = -len(values) % size
    return np.pad(values, (0, short)).reshape(-1, size)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _slope(objective, at, arrays, batch, target):
    """(output, value of the tap, gradient of the output with respect to it)."""
    value = score(objective, arrays, batch, target)[1][at]
    slope, output = jax.grad(functools.partial(total, objective, at, arrays, batch, target), has_aux=True)(value)
    return output, value, slope


def total(objective, at: str, arrays, batch, target, value: Array) -> tuple[Float[Array, ""], Float[Array, "b"]]:
    """(sum over the examples of the output with this value at the tap, output of each): examples do not mix, so its gradient is each one's own."""
    output, _ = score(objective, arrays, batch, target, {at: replaced(value)})
    return output.sum(), output


@functools.partial(jax.jit, static_argnums=(0, 1))
def _integrated(objective, at, arrays, batch, target, baseline, places, shares):
    """(output, output at the baseline, integrated gradients, baseline): `places` in chunks, each one call of the model."""
    output, taps = score(objective, arrays, batch, target)
    value = taps[at]
    base = jnp.full_like(value, baseline)
    before, _ = score(objective, arrays, batch, target, {at: replaced(base)})
    size = places.shape[1]
    many, aim = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), size, 0), (batch, target))  # b -> b n, examples slowest

    def add(sums, chunk):
        where, share = chunk
        line = base[:, None] + where.reshape(-1, *(1,) * (value.ndim - 1)) * (value - base)[:, None]  # b n ...
        flat = line.reshape(-1, *value.shape[1:])
        slope = jax.grad(functools.partial(total, objective, at, arrays, many, aim), has_aux=True)(flat)[0]
        return sums + jnp.einsum("bn...,n->b...", slope.reshape(line.shape), share), None

    mean, _ = jax.lax.scan(add, jnp.zeros_like(value), (places, shares))
    return output, before, (value - base) * mean, base
