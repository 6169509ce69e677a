"""The pair that every metric is: a sum and its weight."""

from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

Pair: TypeAlias = tuple[Float[Array, ""], Float[Array, ""]]


def average(values: Shaped[Array, "*b"], weight: Shaped[Array, "*b"]) -> Pair:
    """(sum of weight x value, sum of weight), in float32: adds over batches and devices, is divided once at the end.

    Args:    values: one number or truth value per element.  weight: a mask or non-negative weights of the same shape; where it is 0 the value is not
             read, so it may be anything, NaN included.
    """
    weight = weight.astype(jnp.float32)
    values = jnp.where(weight > 0, values.astype(jnp.float32), 0.0)
    return (values * weight).sum(), weight.sum()
