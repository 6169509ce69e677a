"""Metrics of class scores, as (sum, weight)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from research.metrics.average import Pair, average


def accuracy(logits: Float[Array, "*b n"], label: Int[Array, "*b"], weight: Shaped[Array, "*b"]) -> Pair:
    """(weight of the elements whose highest score is their label's, weight of all); the first of equal scores counts, a NaN is never right."""
    return top_k(logits, label, weight, 1)  # on CPU 20 times faster than argmax, which XLA does not vectorise


def top_k(logits: Float[Array, "*b n"], label: Int[Array, "*b"], weight: Shaped[Array, "*b"], k: int) -> Pair:
    """(weight of the elements whose label is among the k highest scores, weight of all); ties go to the lower class, a NaN is never right."""
    own = jnp.take_along_axis(logits, label[..., None], axis=-1)
    lower = jax.lax.broadcasted_iota(label.dtype, logits.shape, logits.ndim - 1) < label[..., None]
    ahead = ~(logits <= own) | ((logits == own) & lower)
    return average(ahead.sum(-1) < k, weight)
