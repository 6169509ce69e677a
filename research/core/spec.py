"""The data spec: the shapes and sizes that a model is built from, as plain JSON values."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from research.core.errors import DataError

Spec = Mapping[str, Any]


def fields(*, mask: tuple[int, ...] = (), **shapes: tuple[tuple[int, ...], str]) -> dict[str, dict[str, Any]]:
    """The `fields` of a spec: the shape and dtype of every array of one example; `mask` and `index` are always among them.

    Args:    mask: the mask's shape: () = one bit an example, (time,) = one a token.  shapes: name -> (shape, dtype).
    """
    every = {**shapes, "mask": (mask, "bool"), "index": ((), "int32")}
    return {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in every.items()}


def abstract_batch(spec: Spec, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a batch of this many examples, for `jax.eval_shape` and for compiling before any data is read."""
    return {name: jax.ShapeDtypeStruct((batch, *field["shape"]), np.dtype(field["dtype"])) for name, field in spec["fields"].items()}


def zero_batch(spec: Spec, batch: int) -> dict[str, np.ndarray]:
    """A batch of zeros of the right shapes and dtypes, for an objective's `init`."""
    return {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in abstract_batch(spec, batch).items()}


def check_spec(declared: Spec, opened: Spec, where: str = "data.spec") -> None:
    """Compares what a config declares of its data with what was opened; keys that the config leaves open are free.

    Raises:  DataError: at the first difference, naming the key and both values.
    """
    for name, value in declared.items():
        if name not in opened:
            raise DataError(f"{where}.{name}={_plain(value)} is declared, but the opened data has no such entry")
        if isinstance(value, Mapping) and isinstance(opened[name], Mapping):
            check_spec(value, opened[name], f"{where}.{name}")
        elif _plain(value) != _plain(opened[name]):
            raise DataError(f"{where}.{name}={_plain(value)} is declared, but the opened data has {name}={_plain(opened[name])}")


def _plain(value):
    """Sequences as lists, so that a config's own list type compares equal."""
    return value if isinstance(value, str | int | float | None | Mapping) else list(value)
