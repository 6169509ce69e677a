"""Named and per-example keys: randomness that does not depend on how a batch was cut."""

import zlib

import jax
from jaxtyping import Array, Int


def named(key: jax.Array, name: str) -> jax.Array:
    """The key of a named purpose, the same on every platform and Python version.

    Args:    key: a typed key.  name: the purpose, as "dropout".
    Returns: a typed key; equal names give equal keys.
    """
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def per_example(key: jax.Array, index: Int[Array, "b"]) -> jax.Array:
    """One key for each example, a function of the example's number in its split and of nothing else.

    So microbatches, devices and vmapped trials draw the same numbers for the same example.

    Args:    key: the step's key.  index: example numbers.
    Returns: typed keys of shape (b,).
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)
