"""Causal multi-head self-attention."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.layers.causal import attention_weights, causal_attention, weighted_values
from research.layers.embedding import rotate
from research.layers.projection import Projection
from research.layers.tap import tap


class Attention(nn.Module):
    """Each position reads the values of the positions up to its own, weighted by softmax(query . key / sqrt(k)).

    Kernels are (d, h, k) under query, key and value and (h, k, d) under out. With fewer key heads than query heads, neighbouring query heads
    share one. Where the collection `cache` holds this layer's `key` and `value`, the new ones are written there at `positions` and read from
    there. The tap `weights` comes from the plain formula: dead code unless it is asked for, and what the output follows where it is edited.

    Args:    heads: query heads.  kv_heads: key and value heads; divides heads.  head_width: k, of each head.
             rotary: whether queries and keys are rotated by their position.  bias: whether the four projections have one.
             scale: standard deviation of the initial kernels.  out_scale: that of the output projection.  dtype: compute type.
             attention: the form of the computation, as `causal_attention` takes it.  factor: what queries are multiplied by after their tap.
    Source:  Vaswani et al. 2017; shared key heads: Ainslie et al. 2023.
    """

    heads: int
    kv_heads: int
    head_width: int
    rotary: bool = False
    bias: bool = True
    scale: float = 0.02
    out_scale: float = 0.02
    dtype: str = "float32"
    attention: str = "auto"
    factor: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], positions: Int[Array, "#b t"]) -> tuple[Float[Array, "b t d"], dict[str, Any]]:
        """(what each position has read, taps: query, key, value, weights, heads)."""
        taps: dict[str, Any] = {}
        query = self._heads("query", self.heads, x)  # b t d -> b h t k
        key = self._heads("key", self.kv_heads, x)
        value = self._heads("value", self.kv_heads, x)
        if self.rotary:
            query, key = rotate(query, positions), rotate(key, positions)
        query, key, value = tap(self, taps, "query", query), tap(self, taps, "key", key), tap(self, taps, "value", value)
        query = query if self.factor == 1 else query * self.factor
        cached = self.has_variable("cache", "key")
        if cached:
            key, value = self._remember("key", key, positions), self._remember("value", value, positions)
        mask = jnp.arange(key.shape[2], dtype=jnp.int32)[None, None] <= positions[:, :, None]  # (1 or b) t s
        weights = tap(self, taps, "weights", attention_weights(query, key, mask))
        plain = cached or self.has_variable("edits", "weights")
        read = weighted_values(weights, value) if plain else causal_attention(query, key, value, self.attention)
        read = tap(self, taps, "heads", read)  # b h t k
        y = Projection((self.heads, self.head_width), x.shape[-1:], self.out_scale, self.bias, self.dtype, ("heads", None, "width"), name="out")(
            read.swapaxes(1, 2)
        )
        return y, taps

    def _heads(self, name, heads, x):
        return Projection(x.shape[-1:], (heads, self.head_width), self.scale, self.bias, self.dtype, ("width", "heads", None), name=name)(x).swapaxes(
            1, 2
        )

    def _remember(self, name, new, positions):
        """This layer's cache of keys or values with the new ones written at their positions, each row at its own."""
        cache = self.get_variable("cache", name)  # b g s k
        start = jnp.broadcast_to(positions[:, 0], new.shape[:1])
        write = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=1))
        cache = write(cache, new.astype(cache.dtype), start)
        self.put_variable("cache", name, cache)
        return cache.astype(new.dtype)
