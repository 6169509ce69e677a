"""Activation functions by name."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.layers.arguments import one_of

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "elu": jax.nn.elu,
    "leaky_relu": jax.nn.leaky_relu,
    "identity": lambda x: x,
}


def activation(name: str) -> Callable[[Float[Array, "..."]], Float[Array, "..."]]:
    """The activation function of this name; the only way in which a model of this project reaches one.

    Args:    name: relu, gelu (exact), gelu_tanh (GPT-2's approximation), silu, tanh, sigmoid, elu, leaky_relu or identity.
    Raises:  ValueError: an unknown name; the message names the nearest right one.
    """
    return ACTIVATIONS[one_of(name, ACTIVATIONS, "activation")]
