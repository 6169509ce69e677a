"""A source with one field more."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from research.core.spec import Spec
from research.data.dataset import Source


class Beside:
    """The examples of a source, each with its row of an array in memory, as a teacher's answer to it.

    Args:    source: one whose examples do not overlap.  name: of the field.  rows: one for each example.
    """

    def __init__(self, source: Source, name: str, rows: Shaped[np.ndarray, "n ..."]):
        if len(rows) != len(source):
            raise ValueError(f"{name}: {len(rows)} rows for {len(source)} examples")
        self._source, self._name, self._rows = source, name, rows

    def __len__(self) -> int:
        return len(self._source)

    def take(self, indices: Int[np.ndarray, "b"]) -> Mapping[str, Any]:
        """The fields of these examples, and this one."""
        return {**self._source.take(indices), self._name: self._rows[indices]}

    def check(self, spec: Spec, where: str) -> None:
        """As of the source."""
        self._source.check(spec, where)
