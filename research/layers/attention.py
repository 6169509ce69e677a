"""Causal multi-head self-attention, in a form that is fast on each platform."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.core.axis import layout
from research.layers.embedding import rotate
from research.layers.projection import Projection
from research.layers.ring import MASKED, meshed_attention
from research.layers.tap import tap

BLOCK = 64  # queries that share one span of keys on CPU; keys beyond the span are never multiplied


class Attention(nn.Module):
    """Each position reads the values of the positions up to its own, weighted by softmax(query . key / sqrt(k)).

    Kernels are (d, h, k) under query, key and value and (h, k, d) under out. With fewer key heads than query heads, neighbouring query heads
    share one. Where the collection `cache` holds this layer's `key` and `value`, the new ones are written there at `positions` and read from
    there. The tap `weights` comes from the plain formula: dead code unless it is asked for, and what the output follows where it is edited.

    Args:    heads: query heads.  kv_heads: key and value heads; divides heads.  head_width: k, of each head.
             rotary: whether queries and keys are rotated by their position.  bias: whether the four projections have one.
             scale: standard deviation of the initial kernels.  out_scale: that of the output projection.  dtype: compute type.
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
        cached = self.has_variable("cache", "key")
        if cached:
            key, value = self._remember("key", key, positions), self._remember("value", value, positions)
        mask = jnp.arange(key.shape[2], dtype=jnp.int32)[None, None] <= positions[:, :, None]  # (1 or b) t s
        weights = tap(self, taps, "weights", attention_weights(query, key, mask))
        plain = cached or self.has_variable("edits", "weights")
        read = weighted_values(weights, value) if plain else causal_attention(query, key, value)
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


def causal_attention(query: Float[Array, "b h t k"], key: Float[Array, "b g t k"], value: Float[Array, "b g t k"]) -> Float[Array, "b h t k"]:
    """What each position reads from the positions up to its own: g divides h, and each key head serves h / g neighbouring query heads.

    On an accelerator this is `jax.nn.dot_product_attention`. On CPU that is several times slower than matrix products with the scale on the
    query, an additive mask, the division after the product with the values, and spans of queries that skip the keys after them.
    """
    form = blockwise_attention if jax.default_backend() == "cpu" else _fused_attention
    if (found := layout()) is not None:
        return meshed_attention(found, form, query, key, value)
    return form(query, key, value)


def _fused_attention(query, key, value):
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # b h t k -> b t h k
    return jax.nn.dot_product_attention(query, key, value, is_causal=True).swapaxes(1, 2)


def blockwise_attention(query: Float[Array, "b h t k"], key: Float[Array, "b g t k"], value: Float[Array, "b g t k"]) -> Float[Array, "b h t k"]:
    """Causal attention as plain matrix products over spans of `BLOCK` queries: the form for CPU."""
    (b, h, t, k), g = query.shape, key.shape[1]
    query = (query * k**-0.5).reshape(b, g, h // g, t, k)
    spans = []
    for start in range(0, t, BLOCK):
        stop = min(start + BLOCK, t)
        rows = query[:, :, :, start:stop].reshape(b, g, -1, k)  # b g (h/g n) k: one product serves all queries of a key head
        causal = jnp.arange(stop)[None] <= jnp.arange(start, stop)[:, None]  # n s
        mask = jnp.tile(jnp.where(causal, 0.0, MASKED), (h // g, 1))[None, None]
        scores = jnp.einsum("bgnk,bgsk->bgns", rows, key[:, :, :stop], preferred_element_type=jnp.float32) + mask
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        read = jnp.einsum("bgns,bgsk->bgnk", weights.astype(value.dtype), value[:, :, :stop], preferred_element_type=jnp.float32)
        read = (read / weights.sum(-1, keepdims=True)).astype(value.dtype)
        spans.append(read.reshape(b, h, stop - start, k))
    return jnp.concatenate(spans, axis=2)


def attention_weights(query: Float[Array, "b h t k"], key: Float[Array, "b g s k"], mask: Bool[Array, "#b t s"]) -> Float[Array, "b h t s"]:
    """softmax(query . key / sqrt(k)) over the keys where the mask is True, in float32: the plain formula."""
    key = jnp.repeat(key, query.shape[1] // key.shape[1], axis=1)
    scores = jnp.einsum("bhtk,bhsk->bhts", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED), axis=-1)


def weighted_values(weights: Float[Array, "b h t s"], value: Float[Array, "b g s k"]) -> Float[Array, "b h t k"]:
    """The values summed with these weights: the plain formula."""
    value = jnp.repeat(value, weights.shape[1] // value.shape[1], axis=1)
    return jnp.einsum("bhts,bhsk->bhtk", weights.astype(value.dtype), value)
