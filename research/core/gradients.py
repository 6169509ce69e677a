"""Gradients with respect to a tap: what explanations read, and what objectives that train explanations penalise."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.core.errors import ConfigError, nearest
from research.core.types import Edits

Run = Callable[[Edits | None], tuple[Array, Mapping[str, Array]]]  # edits -> (outputs, taps)
Pull = Callable[[Float[Array, "b ..."]], Float[Array, "b ..."]]


def pullback(run: Run, at: str) -> tuple[Float[Array, "b ..."], Pull]:
    """(outputs, the function from a cotangent of the outputs to the gradient at a tap); both can be differentiated again.

    Examples do not mix, so one cotangent for the whole batch gives each example its own gradient. The tap's value takes its own place, so
    the compiler merges this pass with any other one over the same batch.

    Args:    run: a forward pass.  at: the tap.
    Raises:  ConfigError: an unknown tap, or one that holds no real numbers.
    """
    value = named(run(None)[1], at)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ConfigError(f"{at!r} holds {value.dtype}, which has no gradient")
    outputs, pull = jax.vjp(lambda value: run({at: (jnp.ones((), bool), value)})[0], value)
    return outputs, lambda cotangent: pull(cotangent)[0]


def named(taps: Mapping[str, Any], path: str) -> Any:
    """The tap of this path.

    Raises:  ConfigError: there is none; the nearest is named.
    """
    if path not in taps:
        raise ConfigError(f"{path!r} is no tap of this model{nearest(path, taps)}")
    return taps[path]
