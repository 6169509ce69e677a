"""Dropout whose rate may be a value and whose mask depends on the example alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.core.errors import ConfigError
from research.core.keys import per_example
from research.core.types import Hyper


class Dropout(nn.Module):
    """Zeroes a share of the entries of each example and scales the rest by 1 / (1 - rate).

    linen's own Dropout refuses a traced rate and draws one mask for the whole batch, which then depends on how the batch was cut.

    Args:    rate: share that is dropped, in [0, 1); None: read from `hyper["dropout"]`, a value that a sweep can vary without compiling.
    Raises:  ConfigError: a rate out of range.
    Source:  Srivastava et al. 2014.
    """

    rate: float | None = 0.0

    def __post_init__(self):
        if self.rate is not None and not 0.0 <= self.rate < 1.0:
            raise ConfigError(f"model: dropout={self.rate} must be in [0, 1)")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], *, index: Int[Array, "b"] | None, hyper: Hyper, train: bool) -> Float[Array, "b ..."]:
        if not train or self.rate == 0.0:
            return x
        if index is None:
            raise ValueError("dropout in training needs `index`, the examples' numbers")
        rate = hyper["dropout"] if self.rate is None else self.rate
        keys = per_example(self.make_rng("dropout"), index)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))
