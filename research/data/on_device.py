"""The whole of a split on the device, where an accelerator would wait for the copy of every batch."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from research.core.spec import Spec
from research.data.dataset import Source
from research.data.text import Windows

_SHARE = 0.25  # of the device's memory that a split may take


class OnDevice:
    """A source whose fields lie on the device, preprocessed once on the host, so that a batch has the same bits as from the host.

    Args:    source: one whose examples do not overlap; every field of all its examples is kept.
    """

    def __init__(self, source: Source):
        self._source = source
        self._fields = jax.device_put(dict(source.take(np.arange(len(source)))))

    def __len__(self) -> int:
        return len(self._source)

    def take(self, indices: Int[np.ndarray, "b"]) -> dict[str, Array]:
        """The fields of these examples, gathered on the device."""
        return _gather(self._fields, indices)

    def check(self, spec: Spec, where: str) -> None:
        """As of the source that was copied."""
        self._source.check(spec, where)


class TokensOnDevice:
    """Overlapping windows of a text, cut on the device from one copy of its tokens.

    Args:    source: the windows; every one of them is full.
    """

    def __init__(self, source: Windows):
        self._source, self._tokens = source, jax.device_put(source.tokens)
        self.draws, self.whole = source.draws, source.whole

    def __len__(self) -> int:
        return len(self._source)

    def take(self, indices: Int[np.ndarray, "b"]) -> dict[str, Array]:
        """tokens, target and mask [b, t] of these windows."""
        return _cut(self._tokens, indices, self._source.time)

    def check(self, spec: Spec, where: str) -> None:
        """As of the source that was copied."""
        self._source.check(spec, where)


@jax.jit
def _gather(fields: Mapping[str, Array], indices: Int[Array, "b"]) -> dict[str, Array]:
    return {name: values[indices] for name, values in fields.items()}


@functools.partial(jax.jit, static_argnames="time")
def _cut(tokens: Int[Array, "n"], start: Int[Array, "b"], time: int) -> dict[str, Array]:
    place = start[:, None] + jnp.arange(time, dtype=jnp.int32)[None]  # b t
    return {"tokens": tokens[place], "target": tokens[place + 1], "mask": jnp.ones(place.shape, bool)}


def place(source: Source) -> Source:
    """The source on the first device, where that is an accelerator with room for it; else the source itself: a CPU would do the same gather."""
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)  # a CPU has none
    if isinstance(source, Windows) and source.overlap:
        return TokensOnDevice(source) if source.tokens.nbytes <= _SHARE * memory else source
    example = sum(np.asarray(value).nbytes for value in source.take(np.zeros(1, np.int32)).values())
    return OnDevice(source) if example * len(source) <= _SHARE * memory else source
