"""Causal attention over a mesh of devices: each has its own heads and examples, and where a text is cut, keys and values go round in a ring."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.core.axis import Layout

Form = Callable[[Float[Array, "b h t k"], Float[Array, "b g t k"], Float[Array, "b g t k"]], Float[Array, "b h t k"]]
MASKED = -1e30  # added to the score of a masked key; finite, so that no row becomes NaN


def meshed_attention(
    layout: Layout, form: Form, query: Float[Array, "b h t k"], key: Float[Array, "b g t k"], value: Float[Array, "b g t k"]
) -> Float[Array, "b h t k"]:
    """Causal attention by all devices of a layout: `form` on each one's examples and heads, or a ring where positions are cut.

    Args:    form: causal attention of one device.
    """
    cut = layout.spec(("batch", "heads", "time", None))
    axes = layout.cut("time")
    local = form if not axes else lambda *qkv: _ring(*qkv, axis=axes[0], parts=layout.parts("time"))
    return jax.shard_map(local, mesh=layout.mesh, in_specs=(cut, cut, cut), out_specs=cut, check_vma=False)(query, key, value)


def _ring(query, key, value, *, axis, parts):
    """This device's part of the queries against every part of the keys, which pass by one after another.

    What was read so far is kept unnormalised beside its largest score and its sum of weights, so no device ever holds more than its own part of the
    keys and a square of scores; the backward pass computes the scores again. Parts of the text that lie after the queries' own are masked, not
    skipped: they pass by all the same, and another device computes meanwhile.

    Source:  Liu, Zaharia and Abbeel 2023 (Ring Attention).
    """
    (b, h, t, k), g = query.shape, key.shape[1]
    own = jax.lax.axis_index(axis)
    rows = (query * k**-0.5).reshape(b, g, h // g * t, k)
    place = jnp.tile(own * t + jnp.arange(t, dtype=jnp.int32), h // g)  # of each row in the whole text

    def visit(carry, turn):
        key, value, read, total, top = carry
        source = (own - turn) % parts  # whose part is here
        keys = source * t + jnp.arange(t, dtype=jnp.int32)
        mask = jnp.where(keys[None] <= place[:, None], 0.0, MASKED)[None, None]
        scores = jnp.einsum("bgnk,bgsk->bgns", rows, key, preferred_element_type=jnp.float32) + mask
        higher = jnp.maximum(top, jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        weights, shrink = jnp.exp(scores - higher), jnp.exp(top - higher)
        total = total * shrink + weights.sum(-1, keepdims=True)
        read = read * shrink + jnp.einsum("bgns,bgsk->bgnk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        key, value = (jax.lax.ppermute(x, axis, [(i, (i + 1) % parts) for i in range(parts)]) for x in (key, value))
        return (key, value, read, total, higher), None

    start = (key, value, jnp.zeros(rows.shape, jnp.float32), jnp.zeros((*rows.shape[:3], 1), jnp.float32), jnp.full((*rows.shape[:3], 1), MASKED))
    turns = jnp.arange(parts, dtype=jnp.int32)
    (_, _, read, total, _), _ = jax.lax.scan(jax.checkpoint(visit, prevent_cse=False), start, turns)
    return (read / total).astype(value.dtype).reshape(b, h, t, k)
