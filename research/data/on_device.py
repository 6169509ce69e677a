"""The whole of a split on the device: an accelerator would wait for the copy of every batch, and a chunk of steps gathers its own."""

import functools
import os
from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from research.core.errors import ConfigError
from research.core.shared import shared
from research.core.spec import Spec
from research.data.dataset import Source
from research.data.text import Windows

_SHARE = 0.25  # of the device's memory that a split may take


@flax.struct.dataclass
class Rows:
    """Every field of every example: a pytree, whose arrays are arguments of a program and not constants in it."""

    fields: Mapping[str, Array]

    def take(self, indices: Int[Array, "b"]) -> dict[str, Array]:
        """The fields of these examples."""
        return {name: values[indices] for name, values in self.fields.items()}


@flax.struct.dataclass
class Stretches:
    """The tokens of a text, of which windows at any offset are cut: a pytree."""

    tokens: Int[Array, "n"]
    time: int = flax.struct.field(pytree_node=False)

    def take(self, indices: Int[Array, "b"]) -> dict[str, Array]:
        """tokens, target and mask [b, t] of these windows."""
        place = indices[:, None] + jnp.arange(self.time, dtype=jnp.int32)[None]  # b t
        return {"tokens": self.tokens[place], "target": self.tokens[place + 1], "mask": jnp.ones(place.shape, bool)}


class OnDevice:
    """A source whose fields lie on the device, preprocessed once on the host, so that a batch has the same bits as from the host.

    Args:    source: one whose examples do not overlap; every field of all its examples is kept.
    """

    def __init__(self, source: Source):
        self._source = source
        self.held = Rows(jax.device_put(dict(source.take(np.arange(len(source))))))

    def __len__(self) -> int:
        return len(self._source)

    def take(self, indices: Int[np.ndarray, "b"]) -> dict[str, Array]:
        """The fields of these examples, gathered on the device."""
        return _take(self.held, indices)

    def check(self, spec: Spec, where: str) -> None:
        """As of the source that was copied."""
        self._source.check(spec, where)


class TokensOnDevice:
    """Overlapping windows of a text, cut on the device from one copy of its tokens.

    Args:    source: the windows; every one of them is full.
    """

    def __init__(self, source: Windows):
        self._source, self.held = source, Stretches(jax.device_put(source.tokens), source.time)
        self.draws, self.whole = source.draws, source.whole

    def __len__(self) -> int:
        return len(self._source)

    def take(self, indices: Int[np.ndarray, "b"]) -> dict[str, Array]:
        """tokens, target and mask [b, t] of these windows."""
        return _take(self.held, indices)

    def check(self, spec: Spec, where: str) -> None:
        """As of the source that was copied."""
        self._source.check(spec, where)


_take = jax.jit(lambda held, indices: held.take(indices))


def place(source: Source, chunk: int = 1) -> Source:
    """The source on the first device, where that is an accelerator with room for it, or where chunks of steps gather their own batches there.

    Else the source itself: for single steps a CPU would do the same gather.

    Args:    chunk: steps that are one program.
    Raises:  ConfigError: chunks of a source that cannot lie there, with the reason.
    """
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)  # a CPU has none
    if chunk > 1 and not memory:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    held: Callable[[], Source]
    if isinstance(source, Windows) and source.overlap:
        size, held = source.tokens.nbytes, functools.partial(TokensOnDevice, source)
    elif getattr(source, "draws", len(source)) == len(source):
        size, held = len(source) * sum(np.asarray(x).nbytes for x in source.take(np.zeros(1, np.int32)).values()), functools.partial(OnDevice, source)
    elif chunk > 1:
        kind = type(source).__name__
        raise ConfigError(f"train.chunk={chunk}: the examples of {kind} overlap, so they cannot all lie on the device; use train.chunk=1")
    else:
        return source
    if size <= _SHARE * memory:
        device = str(jnp.zeros(()).device)  # where what is made now lies
        return shared(("held", id(source), device), lambda: (source, held()))[1]  # the source too: no other gets its id
    if chunk > 1:
        raise ConfigError(
            f"train.chunk={chunk}: the training split takes {size / 1e9:.3g} GB on the device, more than the {_SHARE * memory / 1e9:.3g} GB that are "
            f"a quarter of its memory; use train.chunk=1"
        )
    return source
