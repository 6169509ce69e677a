"""The whole of a split on the device, where an accelerator would wait for the copy of every batch."""

from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array, Int

from research.core.spec import Spec
from research.data.dataset import Source

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


@jax.jit
def _gather(fields: Mapping[str, Array], indices: Int[Array, "b"]) -> dict[str, Array]:
    return {name: values[indices] for name, values in fields.items()}


def place(source: Source) -> Source:
    """The source on the first device, where that is an accelerator with room for it; else the source itself.

    A CPU gains nothing (the gather is the same work), and neither do overlapping windows, which are cheaper to cut than to keep.
    """
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)  # a CPU has none
    example = sum(np.asarray(value).nbytes for value in source.take(np.zeros(1, np.int32)).values())
    overlapping = getattr(source, "draws", len(source)) != len(source)
    fits = example * len(source) <= _SHARE * memory
    return OnDevice(source) if fits and not overlapping else source
