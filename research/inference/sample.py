"""One token from a row of logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from research.core.errors import ConfigError

Number = float | int | Shaped[Array, ""] | Shaped[np.ndarray, ""]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; values, not constants of the program, so that changing them compiles nothing.

    Args:    temperature: logits are divided by it; 0: always the likeliest token.  top_k: only the k likeliest; None: all.
             top_p: of those only the fewest that together have this probability; None: all.
    Raises:  ConfigError: temperature below 0, top_k below 1, top_p outside (0, 1], or no numbers.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not _is(self.temperature, float | int) or not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature}: must be a number of at least 0 (0: always the likeliest token)")
        if self.top_k is not None and (not _is(self.top_k, int) or self.top_k < 1):
            raise ConfigError(f"top_k={self.top_k}: must be a whole number of at least 1, or null for all tokens")
        if self.top_p is not None and (not _is(self.top_p, float | int) or not 0.0 < self.top_p <= 1.0):
            raise ConfigError(f"top_p={self.top_p}: must be a number above 0 and at most 1, or null for all tokens")

    def values(self, vocabulary: int) -> tuple[np.float32, np.int32, np.float32]:
        """(temperature, top_k, top_p) as the arguments of `sample`."""
        return np.float32(self.temperature), np.int32(min(self.top_k or vocabulary, vocabulary)), np.float32(self.top_p or 1.0)


def _is(value, kind):
    return isinstance(value, kind) and not isinstance(value, bool)


def sample(logits: Float[Array, "b v"], keys: Key[Array, "b"], temperature: Number, top_k: Number, top_p: Number) -> Int[Array, "b"]:
    """A token for each row, drawn from softmax(logits / temperature) restricted by `top_k` and then `top_p`.

    Args:    keys: one typed key a row, so that a row does not depend on the others.  temperature: 0 = the largest logit, the first of equals.
             top_k, top_p: as in `candidates`; the vocabulary size and 1.0 restrict nothing.  All three may be traced.
    """
    scaled = scale(logits, temperature)
    drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(candidates(scaled, top_k, top_p), scaled, -jnp.inf))
    return jnp.where(jnp.asarray(temperature) > 0, drawn, logits.argmax(-1)).astype(jnp.int32)


def scale(logits: Float[Array, "b v"], temperature: Number) -> Float[Array, "b v"]:
    """(logits - their largest) / temperature in float32: finite for any temperature above 0, the same softmax as logits / temperature."""
    logits = logits.astype(jnp.float32)
    return (logits - logits.max(-1, keepdims=True)) / jnp.maximum(jnp.asarray(temperature, jnp.float32), jnp.finfo(jnp.float32).tiny)


def candidates(logits: Float[Array, "b v"], top_k: Number, top_p: Number) -> Bool[Array, "b v"]:
    """Which tokens may be drawn: the `top_k` likeliest, and of those the fewest whose renormalised probabilities reach `top_p`.

    Of equal logits the lower token counts as likelier, so exactly min(top_k, v) tokens stay where top_p is 1, and at least one always.

    Source:  top_k Fan et al. 2018; top_p Holtzman et al. 2020. Order and renormalisation as in transformers, which keeps all that tie with the k-th.
    """

    def restricted():
        ranked = -jnp.sort(-logits, axis=-1)
        first = jnp.arange(logits.shape[-1])[None, :] < top_k
        probability = jax.nn.softmax(jnp.where(first, ranked, -jnp.inf), axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # of all likelier tokens
        count = (first & ((before < top_p) | (jnp.asarray(top_p) >= 1.0))).sum(-1, keepdims=True)
        last = jnp.take_along_axis(ranked, count - 1, axis=-1)  # the smallest logit that stays
        above, equal = logits > last, logits == last
        return above | (equal & (jnp.cumsum(equal, axis=-1) <= count - above.sum(-1, keepdims=True)))

    everything = (jnp.asarray(top_k) >= logits.shape[-1]) & (jnp.asarray(top_p) >= 1.0)
    return jax.lax.cond(everything, lambda: jnp.ones(logits.shape, bool), restricted)  # sorting a large vocabulary is slow
