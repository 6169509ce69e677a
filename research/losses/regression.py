"""Losses of numbers, per element and in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def squared_error(value: Float[Array, "*b"], target: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """(value - target)^2 of each element."""
    return jnp.square(_difference(value, target))


def absolute_error(value: Float[Array, "*b"], target: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """|value - target| of each element; its gradient at 0 is 0."""
    d = _difference(value, target)
    return d * jnp.sign(d)  # the gradient of jnp.abs at 0 is 1


def huber(value: Float[Array, "*b"], target: Float[Array, "*b"], delta: float = 1.0) -> Float[Array, "*b"]:
    """d^2 / 2 of each difference d up to delta, delta x (|d| - delta / 2) beyond.

    Args:    delta: where the loss turns from quadratic to linear, above 0, in the unit of the target.
    Source:  Huber 1964; as torch.nn.functional.huber_loss.
    """
    d = jnp.abs(_difference(value, target))
    near = jnp.minimum(d, delta)
    return near * (d - 0.5 * near)


def _difference(value, target):
    return value.astype(jnp.float32) - target.astype(jnp.float32)
