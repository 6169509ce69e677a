"""The order of examples: a function of the seed and the epoch."""

import functools

import numpy as np
from jaxtyping import Int32


@functools.lru_cache(maxsize=4)  # the current epoch and the next of two runs; a plan of 10 million examples is 40 MB
def plan(seed: int, epoch: int, length: int, shuffle: bool = True, draws: int | None = None) -> Int32[np.ndarray, "draws"]:
    """The example numbers of one epoch, in order; no number comes twice.

    Args:    seed: of the run, at least 0.  epoch: counted from 0.  length: examples to choose from.  shuffle: False: 0, 1, 2 …
             draws: examples in an epoch, at most `length`; None: all of them. Fewer where examples overlap, as windows of a text do.
    Returns: a read-only array, computed once for each epoch.
    """
    draws = length if draws is None else draws
    if shuffle:
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
        order = generator.choice(length, draws, replace=False).astype(np.int32)
    else:
        order = np.arange(draws, dtype=np.int32)
    order.flags.writeable = False
    return order
