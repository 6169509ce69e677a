"""Which rows belong to training, validation and test, where the data does not say."""

import math

import numpy as np
from jaxtyping import Int

from research.core.errors import ConfigError, DataError

Share = int | float | str  # a whole number: rows; a fraction below 1: that share of all rows, rounded up; 0: none; "2/5": the third of five folds


def sizes(length: int, **parts: Share) -> dict[str, int]:
    """How many rows each part gets, `train` first with what the others leave.

    Args:    length: rows in all.  parts: name -> share.
    Raises:  DataError: no rows at all.  ConfigError: a negative part, or parts that leave nothing to train on.
    """
    if not length:
        raise DataError("the data has no rows")
    for name, part in parts.items():
        if isinstance(part, str):
            raise ConfigError(f"data.{name}={part!r}: folds are drawn by lot, which would tear these rows apart; give a share, as 0.1")
        if part < 0 or (isinstance(part, float) and part >= 1 and part != int(part)):
            raise ConfigError(f"data.{name}={part} must be a number of rows, or a share in [0, 1)")
    counts = {name: int(part) if float(part) >= 1 else math.ceil(float(part) * length - 1e-9) for name, part in parts.items()}
    if sum(counts.values()) >= length:
        asked = " + ".join(f"data.{name}={parts[name]} ({count} rows)" for name, count in counts.items() if count)
        raise ConfigError(f"{asked} leaves nothing to train on: the data has {length} rows")
    return {"train": length - sum(counts.values()), **{name: count for name, count in counts.items() if count}}


def draw(length: int, seed: int, **parts: Share) -> dict[str, Int[np.ndarray, "rows"]]:
    """Row numbers of each part, drawn at random without overlap and sorted; the last part is drawn first, whatever the sizes of the others.

    Args:    length: rows in all.  seed: of the split (`data.seed`).  parts: name -> share, as validation=0.1, test=0.2. One of them may be
             "i/n": the i-th, from 0, of n folds of the rows that the others leave; all n together are these rows.
    Raises:  as `sizes`; ConfigError: a negative seed, or a fold that is none.
    """
    folds = {name: _fold(name, part) for name, part in parts.items() if isinstance(part, str)}
    plain = {name: part for name, part in parts.items() if not isinstance(part, str)}
    if seed < 0:
        raise ConfigError(f"data.seed={seed}: must be at least 0")
    counts = sizes(length, **plain)
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed))).permutation(length)
    for name, (i, n) in folds.items():  # of the rows that the other parts leave
        fold = np.array_split(order[length - counts["train"] :], n)[i]
        if not 0 < len(fold) < counts["train"]:
            raise ConfigError(f"data.{name}={parts[name]!r}: {counts['train']} rows cannot be cut into {n} folds")
        rest = draw(length, seed, **plain)
        return {"train": np.setdiff1d(rest.pop("train"), fold), name: np.sort(fold), **rest}
    rows, end = {}, 0
    for name, count in reversed(counts.items()):
        rows[name] = np.sort(order[end : end + count])
        end += count
    return dict(reversed(rows.items()))


def _fold(name: str, part: str) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    i, _, n = part.partition("/")
    if not (i.isdigit() and n.isdigit() and int(i) < int(n) and int(n) > 1):
        raise ConfigError(f"data.{name}={part!r}: must be a number of rows, a share in [0, 1), or I/N, the I-th of N folds, counted from 0")
    return int(i), int(n)


def cut(length: int, **parts: Share) -> dict[str, slice]:
    """The parts as consecutive stretches, `train` first: for text, where neighbours belong together.

    Raises:  as `sizes`.
    """
    stretches, start = {}, 0
    for name, count in sizes(length, **parts).items():
        stretches[name] = slice(start, start + count)
        start += count
    return stretches
