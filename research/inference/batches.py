"""Batches of one shape, so that one program serves them all, and results fetched one batch late, so that host and device overlap."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from research.core.types import Batch


def padded(batches: Iterable[Batch], rows: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Each batch filled up to `rows` examples with zeros, whose mask is therefore False.

    Args:    batches: fields with the batch axis first, `mask` among them.  rows: None: as many as the first batch has.
    Raises:  ValueError: a batch with more examples than `rows`.
    """
    for batch in batches:
        count = len(batch["mask"])
        rows = rows or count
        if count > rows:
            raise ValueError(f"a batch of {count} examples does not fit in {rows}")
        yield {name: np.concatenate([x, np.zeros((rows - count, *np.shape(x)[1:]), x.dtype)]) if count < rows else x for name, x in batch.items()}


def valid(batch: Batch) -> np.ndarray:
    """Which examples of a batch count: those with any True in their mask."""
    mask = np.asarray(batch["mask"])
    return np.asarray(mask.any(axis=tuple(range(1, mask.ndim))))


def fetched(results: Iterable[Any]) -> Iterator[Any]:
    """The same trees with numpy arrays for leaves, each handed out after the next has been dispatched to the device."""
    pending = None
    for result in results:
        if pending is not None:
            yield jax.tree.map(np.asarray, pending)
        pending = result
    if pending is not None:
        yield jax.tree.map(np.asarray, pending)
