"""Text from a decoder, token by token."""

import functools
import logging
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from research.core.errors import ConfigError
from research.core.keys import named, per_example
from research.core.spec import Spec
from research.core.types import Hyper, Objective, Tree
from research.inference.batches import fetched
from research.inference.sample import Sampling, sample

DEFAULT = Sampling()
_log = logging.getLogger(__name__)


def generate(
    objective: Objective,
    params: Tree,
    extra: Tree,
    frozen: Tree,
    hyper: Hyper,
    prompts: Sequence[Sequence[int]],
    spec: Spec,
    *,
    tokens: int,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
    start: int = 0,
) -> Iterator[Int32[np.ndarray, "b"]]:
    """The next token of every row, `tokens` times, each as soon as the device has it.

    Two programs, whatever the prompts' lengths, the number of tokens and the sampling: one fills the key-value cache with the prompts, padded
    to the context; one advances by a token. When a row's context is full, its cache is filled anew with the last half of it, so a text may be
    of any length. A row depends on its prompt, its number and the seed alone, not on the other rows.

    Args:    prompts: token numbers, one row each; the same prompt several times gives several samples. Of a prompt longer than the context
             only the end is used. An empty one becomes `start`.  spec: the data spec; `time` and `vocabulary` are read.
             tokens: how many.  seed: the same seed gives the same tokens.  start: see `start_token`.
    Returns: an iterator over token numbers, one array per step; without the prompts.
    Raises:  ConfigError: at once: a model without a decoder, tokens below 1, a seed out of range, no prompts, a token outside the vocabulary.
    """
    context, vocabulary = spec["time"], spec["vocabulary"]
    if objective.decoder() is None:
        raise ConfigError(f"{type(objective).__name__} makes no text: only a language model has a decoder")
    if not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(f"tokens={tokens}: must be a whole number of at least 1")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed}: must be a whole number from 0 to 2^32 - 1")
    if not prompts:
        raise ConfigError("samples=0: must be at least 1")
    rows = [_checked(list(map(int, prompt)) or [start], vocabulary, context) for prompt in prompts]
    keys = per_example(named(jax.random.key(seed), "sample"), jnp.arange(len(rows)))
    model = jax.device_put((params, extra, frozen, hyper))  # once, not at every step
    return fetched(_steps(objective, model, rows, context, tokens, keys, sampling.values(vocabulary)))


def start_token(pieces: Sequence[bytes]) -> int:
    """The token that stands for an empty prompt: the line break, after which a text often begins; the first token where there is none.

    Args:    pieces: the tokenizer's tokens by number, as UTF-8.
    """
    return pieces.index(b"\n") if b"\n" in pieces else 0


def _checked(prompt, vocabulary, context):
    for place, token in enumerate(prompt):
        if not 0 <= token < vocabulary:
            raise ConfigError(f"prompt token {token} at position {place} is outside the vocabulary of {vocabulary}")
    if len(prompt) > context:
        _log.warning("the prompt has %s tokens and the context %s: only the last %s are used", f"{len(prompt):,}", f"{context:,}", f"{context:,}")
    return prompt[-context:]


def _steps(objective, model, rows, context, tokens, keys, settings):
    """Each step's tokens as a device array."""
    count = len(rows)
    cache = _empty(objective, model, count, context)
    used = np.full(count, context)  # positions in each row's cache; full, so that the first step fills it
    made: list[jax.Array] = []  # tokens that are not yet in `rows`
    token = None
    for step in range(tokens):
        full = used >= context
        if full.any():
            rows = [(row + [int(t[i]) for t in map(np.asarray, made)])[-context:] for i, row in enumerate(rows)]
            made.clear()
            windows = [row if step == 0 else row[-max(context // 2, 1) :] for row in rows]
            cache = _prefill(objective, model, cache, *_right_padded([window[:-1] for window in windows], context), jnp.asarray(full))
            used = np.where(full, [len(window) - 1 for window in windows], used)
            token = jnp.asarray([row[-1] for row in rows], jnp.int32)
        token, cache = _advance(objective, model, cache, token, keys, jnp.int32(step), settings)
        made.append(token)
        used += 1
        yield token


def _right_padded(rows, width):
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return jnp.asarray(tokens), jnp.asarray(mask)


def _empty(objective, model, count, context):
    """A cache of zeros, whose shapes come from tracing alone."""
    tokens, mask = _right_padded([[]] * count, context)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _begin.eval_shape(objective, model, tokens, mask))


@functools.partial(jax.jit, static_argnums=0)
def _begin(objective, model, tokens, mask):
    params, extra, frozen, hyper = model
    batch = {"tokens": tokens, "mask": mask, "index": jnp.arange(tokens.shape[0])}
    return objective.decoder().begin(params, extra, frozen, batch, tokens.shape[1], hyper)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(objective, model, cache, tokens, mask, fresh):
    """The cache with the rows that are `fresh` filled anew."""
    filled = _begin(objective, model, tokens, mask)
    return jax.tree.map(lambda new, old: jnp.where(fresh.reshape(-1, *[1] * (new.ndim - 1)), new, old), filled, cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(objective, model, cache, token, keys, step, settings):
    """(the next token of each row, the longer cache)."""
    params, extra, frozen, hyper = model
    logits, cache = objective.decoder().advance(params, extra, frozen, cache, token[:, None], hyper)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    return sample(logits[:, -1], keys, *settings), cache
