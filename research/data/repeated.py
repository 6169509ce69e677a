"""Sequences that repeat themselves: what a model can only continue by looking up how it went on the last time."""

import dataclasses

import numpy as np
from jaxtyping import Int, Int32

from research.core.errors import ConfigError
from research.core.spec import Spec, fields
from research.data.checks import check_tokens
from research.data.dataset import Dataset
from research.data.preprocess import Preprocessor


@dataclasses.dataclass(frozen=True, eq=False)
class Repeats:
    """Each example is one stretch of tokens, all of them different, over and over; mask True from where its first token comes again.

    There the token before has been seen with what followed it, so the target can be known; before that it is a lot.

    Args:    stretches: tokens to take the stretch from, all different in a row.  lengths: of the stretches.  time: tokens of an example.
    """

    stretches: Int32[np.ndarray, "n p"]
    lengths: Int32[np.ndarray, "n"]
    time: int

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, indices: Int[np.ndarray, "b"]) -> dict[str, np.ndarray]:
        """tokens, target and mask [b, t] of these examples."""
        place = np.arange(self.time + 1, dtype=np.int32)[None]
        lengths = self.lengths[indices, None]
        every = np.take_along_axis(self.stretches[indices], place % lengths, axis=1)  # b t+1
        return {"tokens": every[:, :-1], "target": every[:, 1:], "mask": place[:, :-1] >= lengths}

    def check(self, spec: Spec, where: str) -> None:
        """Refuses tokens outside the vocabulary.

        Raises:  DataError: naming the first one and its position.
        """
        check_tokens(self.stretches.ravel(), spec["vocabulary"], where)


def repeated(
    vocabulary: int = 64,
    time: int = 64,
    shortest: int | None = None,
    examples: int = 16_384,
    validation: int = 512,
    test: int = 0,
    seed: int = 0,
    fitted: Preprocessor | None = None,
) -> Dataset:
    """Random tokens whose second half repeats the first; with a `shortest`, the stretch that is repeated has another length in each example.

    Example i of a split is a function of the seed, the split and i.

    Args:    vocabulary: tokens, at least half of time.  time: of an example, at least 4.  shortest: of the lengths, which go up to half of
             time and are drawn anew for each example; None: all are half of time, so that a model can count positions instead of looking back.
             examples: to train on.  validation, test: further ones.  seed: of all.  fitted: unused, nothing is fitted.
    Raises:  ConfigError: sizes that do not fit each other.
    """
    half = time // 2
    least = half if shortest is None else shortest
    if time < 4:
        raise ConfigError(f"data.time={time}: a stretch and its repetition need at least 4 tokens")
    if not 2 <= least <= half:
        raise ConfigError(f"data.shortest={shortest}: must be from 2 to half of data.time, {half}")
    if vocabulary < half:
        raise ConfigError(f"data.vocabulary={vocabulary}: a stretch of {half} different tokens needs at least {half}")
    counts = {"train": examples, "validation": validation, "test": test}
    for name, count in {**counts, "seed": seed}.items():
        if count < (name == "train"):
            raise ConfigError(f"data.{'examples' if name == 'train' else name}={count}: must be at least {int(name == 'train')}")
    splits = {name: _drawn(vocabulary, time, least, count, (seed, i)) for i, (name, count) in enumerate(counts.items()) if count}
    spec = {
        "fields": fields(mask=(time,), tokens=((time,), "int32"), target=((time,), "int32")),
        "vocabulary": vocabulary,
        "time": time,
        "bytes_per_token": None,  # these tokens are no text
        "examples": {name: len(source) for name, source in splits.items()},
    }
    return Dataset(splits, Preprocessor(spec))


def _drawn(vocabulary: int, time: int, least: int, count: int, seed: tuple[int, int]) -> Repeats:
    """Row after row from two streams of their own, so that more examples change none of the first."""
    order, size = (np.random.Generator(np.random.Philox(child)) for child in np.random.SeedSequence(seed).spawn(2))
    half = time // 2
    stretches = order.permuted(np.tile(np.arange(vocabulary, dtype=np.int32), (count, 1)), axis=1)[:, :half]
    return Repeats(np.ascontiguousarray(stretches), size.integers(least, half + 1, count, dtype=np.int32), time)
