"""Causal attention of given queries, keys and values: the plain formula, and the form that is fast on each platform."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jaxtyping import Array, Bool, Float

from research.core.axis import layout
from research.core.errors import ConfigError
from research.layers.ring import MASKED, meshed_attention

FORMS = ("auto", "reference", "blockwise", "cudnn", "splash")
BLOCK = 64  # queries on CPU that share one span of keys, in texts of usual length; keys beyond the span are never multiplied
SPANS = 8  # most spans: each is a piece of program of its own
KEPT = 512  # up to so many positions the weights of every span are kept for the backward pass; beyond, they are computed again
LONG_BLOCK = 128  # `BLOCK` beyond `KEPT` positions, and the queries of one turn of the loop over a span
_TILE = 128  # lanes of a TPU: positions come in multiples of it


def causal_attention(
    query: Float[Array, "b h t k"], key: Float[Array, "b g t k"], value: Float[Array, "b g t k"], attention: str = "auto"
) -> Float[Array, "b h t k"]:
    """What each position reads from the positions up to its own: g divides h, and each key head serves h / g neighbouring query heads.

    Args:    attention: "reference": the plain formula.  "blockwise": matrix products over spans of queries, fast on CPU.  "cudnn": a fused kernel
             for NVIDIA GPUs.  "splash": a fused kernel for TPUs.  "auto": blockwise on CPU; on a GPU cudnn, on a TPU splash, where they can do
             this type and head width, else `jax.nn.dot_product_attention`.
    Raises:  ConfigError: a form that this platform, type or head width does not have.
    """
    platform = jax.default_backend()
    reasons = _cudnn_reason(platform, query), _splash_reason(platform, query)
    if attention == "auto":
        fused = {"cpu": "blockwise", "gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(platform, "dot_product")
        attention = "dot_product" if {"cudnn": reasons[0], "splash": reasons[1]}.get(fused) else fused
    elif reason := {"cudnn": reasons[0], "splash": reasons[1]}.get(attention):
        raise ConfigError(f"model.attention={attention}: {reason}; use auto, or blockwise")
    form = _forms()[attention]
    if (found := layout()) is not None:
        return meshed_attention(found, form, query, key, value)
    return form(query, key, value)


def reference_attention(query: Float[Array, "b h t k"], key: Float[Array, "b g t k"], value: Float[Array, "b g t k"]) -> Float[Array, "b h t k"]:
    """Causal attention by the plain formula, which keeps a matrix of t x t weights for each head."""
    return weighted_values(attention_weights(query, key, jnp.tri(query.shape[2], dtype=bool)[None]), value)


def blockwise_attention(query: Float[Array, "b h t k"], key: Float[Array, "b g t k"], value: Float[Array, "b g t k"]) -> Float[Array, "b h t k"]:
    """Causal attention as matrix products over spans of queries that skip the keys after them: the form for CPU.

    XLA's CPU code is fast with the scale on the query, an additive mask, and a backward pass written by hand. That has no forward-mode
    derivative; gradients have one.

    Memory grows with b x t, not with t x t: beyond `KEPT` positions no weights are kept, but each query's largest score and the sum of its
    weights, from which the backward pass computes them again, a block of queries at a time. A long span is a loop over its blocks: XLA's
    scheduler for CPU holds the weights of many pieces of program at once.

    Source:  keeping largest scores and sums: Dao et al. 2022 (FlashAttention).
    """
    (b, h, t, k), g = query.shape, key.shape[1]
    query = (query * k**-0.5).reshape(b, g, h // g, t, k)
    size = span(t)
    read = _span if t <= KEPT else _blocks
    spans = [read(query[:, :, :, start : start + size], key[:, :, : start + size], value[:, :, : start + size], start) for start in range(0, t, size)]
    return jnp.concatenate(spans, axis=3).reshape(b, h, t, k)


def span(time: int) -> int:
    """Queries that share one span of keys in a text of this length: few, so that few masked keys are multiplied, but not more than `SPANS` spans."""
    block = BLOCK if time <= KEPT else LONG_BLOCK
    return max(block, -(-time // (SPANS * block)) * block)


def splash_attention(
    query: Float[Array, "b h t k"], key: Float[Array, "b g t k"], value: Float[Array, "b g t k"], interpret: bool = False
) -> Float[Array, "b h t k"]:
    """Causal attention by the fused kernel for TPUs; texts are padded at the end to whole tiles, which changes nothing before.

    Args:    interpret: run the kernel's program step by step, on any platform: for tests.
    """
    (_, h, t, k), padding = query.shape, -query.shape[2] % _TILE
    query, key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (query * k**-0.5, key, value))
    block = next(size for size in (512, 256, _TILE) if (t + padding) % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    sizes = splash.BlockSizes(**dict.fromkeys(names, block))  # type: ignore[arg-type]  # the other fields have defaults
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((t + padding, t + padding))] * h)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    return jnp.asarray(jax.vmap(kernel)(query, key, value))[:, :, :t]


def attention_weights(query: Float[Array, "b h t k"], key: Float[Array, "b g s k"], mask: Bool[Array, "#b t s"]) -> Float[Array, "b h t s"]:
    """softmax(query . key / sqrt(k)) over the keys where the mask is True, in float32: the plain formula."""
    key = jnp.repeat(key, query.shape[1] // key.shape[1], axis=1)
    scores = jnp.einsum("bhtk,bhsk->bhts", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED), axis=-1)


def weighted_values(weights: Float[Array, "b h t s"], value: Float[Array, "b g s k"]) -> Float[Array, "b h t k"]:
    """The values summed with these weights: the plain formula."""
    value = jnp.repeat(value, weights.shape[1] // value.shape[1], axis=1)
    return jnp.einsum("bhts,bhsk->bhtk", weights.astype(value.dtype), value)


def _span(query, key, value, start):
    """What n positions of a text read, from the start-th on: query b g h/g n k, key and value b g s k, those of the first s positions."""
    return _read(_rows(query), key, value, _mask(query, key, start)).reshape(query.shape)


def _blocks(query, key, value, start):
    """As `_span`, in blocks of queries one after the other, whose weights are computed again in the backward pass."""
    (*lead, n, k), parts = query.shape, []
    whole = n - n % LONG_BLOCK
    for first, last, size in ((0, whole, LONG_BLOCK), (whole, n, n - whole)):
        if first < last:
            blocks = jnp.moveaxis(query[..., first:last, :].reshape(*lead, -1, size, k), -3, 0)  # one block after the other
            starts = start + first + size * jnp.arange(len(blocks), dtype=jnp.int32)
            parts.append(jnp.moveaxis(_read_recomputed(blocks, key, value, starts), 0, -3).reshape(*lead, last - first, k))
    return jnp.concatenate(parts, axis=-2)


def _rows(query):
    """One product serves all queries of a key head: b g h/g n k -> b g (h/g n) k."""
    return query.reshape(*query.shape[:2], -1, query.shape[-1])


def _mask(query, key, start):
    """What is added to the scores of such rows."""
    shared, n, s = *query.shape[2:4], key.shape[2]
    causal = jnp.arange(s, dtype=jnp.int32)[None] <= start + jnp.arange(n, dtype=jnp.int32)[:, None]  # n s
    return jnp.tile(jnp.where(causal, 0.0, MASKED), (shared, 1))[None, None]


@jax.custom_vjp
def _read(rows, key, value, mask):
    """softmax(rows . key + mask) . value, of which the weights are kept: rows b g n k, key and value b g s k, mask 1 1 n s."""
    return _read_forward(rows, key, value, mask)[0]


def _read_forward(rows, key, value, mask):
    scores = _scores(rows, key, mask)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True)).astype(value.dtype)
    read = jnp.einsum("bgns,bgsk->bgnk", weights, value)
    return read, (rows, key, value, weights, read)


def _read_backward(kept, slope):
    rows, key, value, weights, read = kept
    slope_scores = _slope_scores(weights, slope, value, _mean(slope, read)).astype(rows.dtype)
    slope_rows = jnp.einsum("bgns,bgsk->bgnk", slope_scores, key)
    slope_key = jnp.einsum("bgns,bgnk->bgsk", slope_scores, rows)
    return slope_rows, slope_key, jnp.einsum("bgns,bgnk->bgsk", weights, slope), None


@jax.custom_vjp
def _read_recomputed(query, key, value, starts):
    """As `_read`, for one block of queries after the other, of which no weights are kept: query c b g h/g n k, key and value b g s k, starts c."""
    return _read_recomputed_forward(query, key, value, starts)[0]


def _read_recomputed_forward(query, key, value, starts):
    def block(at):
        query, start = at
        scores = _scores(_rows(query), key, _mask(query, key, start))
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        read = jnp.einsum("bgns,bgsk->bgnk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32) / total
        return read.astype(value.dtype).reshape(query.shape), top, total

    read, top, total = jax.lax.map(block, (query, starts))
    return read, (query, key, value, starts, read, top, total)


def _read_recomputed_backward(kept, slope):
    query, key, value, starts, read, top, total = kept

    def block(sums, at):
        query, start, slope, read, top, total = at
        rows, slope, mean = _rows(query), _rows(slope), _mean(_rows(slope), _rows(read))
        weights = jnp.exp(_scores(rows, key, _mask(query, key, start)) - top) / total
        slope_scores = _slope_scores(weights, slope, value, mean).astype(rows.dtype)
        slope_query = jnp.einsum("bgns,bgsk->bgnk", slope_scores, key).reshape(query.shape)
        return (sums[0] + _sums(slope_scores, rows), sums[1] + _sums(weights.astype(value.dtype), slope)), slope_query

    zeros = tuple(jnp.zeros_like(x, jnp.float32) for x in (key, value))
    (slope_key, slope_value), slope_query = jax.lax.scan(block, zeros, (query, starts, slope, read, top, total))
    return slope_query, slope_key.astype(key.dtype), slope_value.astype(value.dtype), None


def _scores(rows, key, mask):
    return jnp.einsum("bgnk,bgsk->bgns", rows, key, preferred_element_type=jnp.float32) + mask


def _mean(slope, read):
    """Of the slopes of a row's weights, by the weights: a sum over k instead of over s."""
    return (slope * read).astype(jnp.float32).sum(-1, keepdims=True)


def _slope_scores(weights, slope, value, mean):
    slope_weights = jnp.einsum("bgnk,bgsk->bgns", slope, value, preferred_element_type=jnp.float32)
    return weights.astype(jnp.float32) * (slope_weights - mean)


def _sums(weights, rows):
    """Rows summed with the weights of each key, b g n s and b g n k -> b g s k.

    As a product k x n times n x s, between barriers: XLA's CPU code for a sum over the first axis of both is up to five times slower where heads
    are narrow, and without barriers the compiler goes back to it.
    """
    sums = jnp.einsum("bgkn,bgns->bgks", jax.lax.optimization_barrier(rows.swapaxes(-1, -2)), weights, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(sums).swapaxes(-1, -2)


_read.defvjp(_read_forward, _read_backward)
_read_recomputed.defvjp(_read_recomputed_forward, _read_recomputed_backward)


def _dot_product(query, key, value, implementation=None):
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # b h t k -> b t h k
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation=implementation).swapaxes(1, 2)


def _forms() -> dict[str, Callable[..., Array]]:
    return {
        "reference": reference_attention,
        "blockwise": blockwise_attention,
        "dot_product": _dot_product,
        "cudnn": functools.partial(_dot_product, implementation="cudnn"),
        "splash": splash_attention,
    }


def _cudnn_reason(platform, query):
    """Why cuDNN's kernel cannot do this; None where it can."""
    if platform not in ("gpu", "cuda") or "cuda" not in jax.devices()[0].client.platform_version:
        return f"it needs an NVIDIA GPU, and this program runs on {platform}"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs train.precision=bfloat16, and this model computes in {query.dtype}"
    generation = float(getattr(jax.devices()[0], "compute_capability", 0.0))
    if generation < 8.0:
        return f"it needs compute capability 8.0, and this GPU has {generation}"
    widest = 256 if generation >= 9.0 else 128
    if query.shape[-1] % 8 or query.shape[-1] > widest:
        return f"it needs a head_width that is a multiple of 8 and at most {widest}, not {query.shape[-1]}"
    return None


def _splash_reason(platform, query):
    """Why the kernel for TPUs cannot do this; None where it can."""
    if platform != "tpu":
        return f"it needs a TPU, and this program runs on {platform}"
    if query.shape[-1] % 8:
        return f"it needs a head_width that is a multiple of 8, not {query.shape[-1]}"
    return None
