"""Which rows belong to training, validation and test, where the data does not say."""

import math

import numpy as np
from jaxtyping import Int

from research.core.errors import ConfigError, DataError

Share = int | float  # a whole number: rows; a fraction below 1: that share of all rows, rounded up; 0: none


def sizes(length: int, **parts: Share) -> dict[str, int]:
    """How many rows each part gets, `train` first with what the others leave.

    Args:    length: rows in all.  parts: name -> share.
    Raises:  DataError: no rows at all.  ConfigError: a negative part, or parts that leave nothing to train on.
    """
    if not length:
        raise DataError("the data has no rows")
    for name, part in parts.items():
        if part < 0 or (isinstance(part, float) and part >= 1 and part != int(part)):
            raise ConfigError(f"data.{name}={part} must be a number of rows, or a share in [0, 1)")
    counts = {name: int(part) if part >= 1 else math.ceil(part * length - 1e-9) for name, part in parts.items()}
    if sum(counts.values()) >= length:
        asked = " + ".join(f"data.{name}={parts[name]} ({count} rows)" for name, count in counts.items() if count)
        raise ConfigError(f"{asked} leaves nothing to train on: the data has {length} rows")
    return {"train": length - sum(counts.values()), **{name: count for name, count in counts.items() if count}}


def draw(length: int, seed: int, **parts: Share) -> dict[str, Int[np.ndarray, "rows"]]:
    """Row numbers of each part, drawn at random without overlap and sorted; the last part is drawn first, whatever the sizes of the others.

    Args:    length: rows in all.  seed: of the split (`data.seed`).  parts: name -> share, as validation=0.1, test=0.2.
    Raises:  as `sizes`; ConfigError: a negative seed.
    """
    counts = sizes(length, **parts)
    if seed < 0:
        raise ConfigError(f"data.seed={seed}: must be at least 0")
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed))).permutation(length)
    rows, end = {}, 0
    for name, count in reversed(counts.items()):
        rows[name] = np.sort(order[end : end + count])
        end += count
    return dict(reversed(rows.items()))


def cut(length: int, **parts: Share) -> dict[str, slice]:
    """The parts as consecutive stretches, `train` first: for text, where neighbours belong together.

    Raises:  as `sizes`.
    """
    stretches, start = {}, 0
    for name, count in sizes(length, **parts).items():
        stretches[name] = slice(start, start + count)
        start += count
    return stretches
