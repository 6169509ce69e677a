"""Batches by step number: `loader[step]` is a function of (seed, step) and of nothing else."""

import collections
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from research.core.errors import ConfigError, DataError
from research.data.dataset import Source
from research.data.plan import plan

_AHEAD = 2  # batches that wait on the device while the current one is computed
_DIRECT_S = 1e-3  # a batch that is ready faster than this is fetched in the loop: handing it between threads would cost about as much


class Loader:
    """Random access to the batches of a split, epoch after epoch without end.

    An epoch has ceil(examples / batch) batches; the short last one is filled up with examples whose mask is False, so that sums over an
    epoch are exact and all batches have one shape. `mask` (True = counts) and `index` (number of the example in its split) are always there.

    Args:    source: the split.
             batch: examples per optimizer update over all shards, or "all": the whole split.
             seed: of the order; the same seed gives the same batches on any machine and for any number of threads or shards.
             shuffle: a new order in each epoch; one for all where every batch is the same whole split in one microbatch.
             False: one pass in the order of the source, in which overlapping examples are laid side by side.
             shard: (i, n): only the i-th of n equal parts of every batch.
             parts: what "all" is rounded up to a multiple of, for devices and microbatches of one size.
             microbatches: that a batch is cut into, which a batch norm normalises each by itself.
             threads: of Grain that prepare batches; 0: none; None: by how long a batch takes.
    Raises:  ConfigError: a batch that is no count or that n does not divide.  DataError: an empty split.
    """

    def __init__(
        self,
        source: Source,
        batch: int | str,
        *,
        seed: int = 0,
        shuffle: bool = True,
        shard: tuple[int, int] = (0, 1),
        parts: int = 1,
        microbatches: int = 1,
        threads: int | None = None,
    ):
        source = source if shuffle else getattr(source, "whole", source)
        self._source, self._seed, self._shuffle, self._shard, self._threads = source, seed, shuffle, shard, threads
        self.examples: int = getattr(source, "draws", len(source))
        if not self.examples:
            raise DataError("the split has no examples")
        if len(source) > np.iinfo(np.int32).max:
            raise DataError(f"the split has {len(source)} examples, more than the numbers of examples in 32 bits")
        if seed < 0:
            raise ConfigError(f"seed={seed}: the seed of the order must be 0 or more")
        self.batch = _batch(batch, self.examples, shard[1], parts)
        self._new_order = shuffle and not (len(self) == microbatches == 1 and self.examples == len(source))
        self._full = np.ones(self.batch // shard[1], bool)  # the same for each batch: a small one takes 50 microseconds in all
        self._full.flags.writeable = False

    def __len__(self) -> int:
        """The batches of one epoch."""
        return math.ceil(self.examples / self.batch)

    def indices(self, step: int) -> Int32[np.ndarray, "n"]:
        """The numbers of the examples that count in the global batch of a step; fewer than `batch` at the end of an epoch."""
        if step < 0:
            raise IndexError(f"step {step}: steps count from 0")
        epoch, place = divmod(step, len(self))
        order = plan(self._seed, epoch if self._new_order else 0, len(self._source), self._shuffle, self.examples)
        return order[place * self.batch : (place + 1) * self.batch]

    def __getitem__(self, step: int) -> dict[str, Any]:
        """This shard's part of the batch of a step."""
        index, keep = self._picked(step)
        batch = dict(self._source.take(index))
        mask = batch.get("mask", keep)
        if mask is not keep and keep is not self._full:
            mask = mask & keep.reshape(-1, *[1] * (mask.ndim - 1))
        return {**batch, "mask": mask, "index": index}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The batches of the first epoch."""
        return self.iterate(0, len(self))

    def iterate(self, start: int, stop: int, put: Callable[[dict[str, Any]], Any] = lambda batch: batch) -> Iterator[Any]:
        """`put(loader[step])` for each step from start to stop, prepared ahead of time.

        Args:    start, stop: as of `range`.  put: moves a batch to the devices; called two batches ahead of the one handed out.
        """
        if start >= stop:
            return iter(())
        threads = self._best_threads(start) if self._threads is None else self._threads
        return _ahead(map(put, self._threaded(start, stop, threads) if threads else map(self.__getitem__, range(start, stop))))

    def chunks(self, start: int, stop: int, length: int) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
        """(the whole split on the device, the examples of `length` batches) for each chunk of steps from start to stop.

        The split is of a source that `on_device.place` has put there. The examples are "index" and "keep" [k b]: which of them count.

        Args:    start, stop: as of `range`; `length` divides what lies between.
        """
        held = getattr(self._source, "held", None)
        if held is None:
            raise TypeError(f"{type(self._source).__name__} does not lie on the device")
        for at in range(start, stop, length):
            index, keep = zip(*map(self._picked, range(at, at + length)), strict=True)
            yield held, {"index": np.stack(index), "keep": np.stack(keep)}

    def _picked(self, step: int) -> tuple[Int32[np.ndarray, "b"], Bool[np.ndarray, "b"]]:
        """The examples of this shard's part of a batch, and which of them count."""
        part, parts = self._shard
        size = self.batch // parts
        valid = self.indices(step)
        if len(valid) == self.batch:
            return valid[part * size : (part + 1) * size], self._full
        index = np.resize(valid, self.batch)[part * size : (part + 1) * size]  # filled up with the batch's own examples
        return index, np.arange(part * size, (part + 1) * size) < len(valid)

    def _best_threads(self, step: int) -> int:
        """0 where a batch is ready at once, else a few; by the better of two trials, since the first one also fills caches."""
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            self[step]
            seconds.append(time.perf_counter() - began)
            if seconds[-1] < _DIRECT_S:
                return 0
        return 4

    def _threaded(self, start: int, stop: int, threads: int) -> Iterator[dict[str, Any]]:
        import grain  # a second to import, which small data need not pay

        steps = grain.MapDataset.source(_Steps(self, start, stop))
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def whole(source: Source, batch: int | str, *, parts: int = 1, shard: tuple[int, int] = (0, 1)) -> Loader:
    """One pass over every example of a split, in order, for scoring it.

    Args:    batch: examples per batch at most, or "all"; a smaller split is one batch of its own size.
             parts: what the size of a batch is rounded up to a multiple of.  shard: as `Loader` takes it; its n divides parts.
    """
    size = batch if isinstance(batch, str) else math.ceil(batch / parts) * parts
    loader = Loader(source, size, shuffle=False, shard=shard, parts=parts // shard[1])
    return loader if len(loader) > 1 else Loader(source, "all", shuffle=False, shard=shard, parts=parts // shard[1])


class _Steps:
    """The batches of a range of steps as a Grain source whose item is a whole batch: one at a time is 20 times slower."""

    def __init__(self, loader: Loader, start: int, stop: int):
        self._loader, self._start, self._stop = loader, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._loader[self._start + index]


def _batch(batch: int | str, examples: int, shards: int, parts: int) -> int:
    """The global batch as a number; "all" is rounded up to equal parts of equal parts."""
    if batch == "all":
        return math.ceil(examples / (shards * parts)) * shards * parts
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise ConfigError(f'data.batch={batch!r} must be a whole number of at least 1, or "all"')
    if batch % shards:
        raise ConfigError(
            f"data.batch={batch} cannot be cut into {shards} equal parts; the nearest that can is {max(1, round(batch / shards)) * shards}"
        )
    return batch


def _ahead(batches: Iterable[Any]) -> Iterator[Any]:
    waiting: collections.deque[Any] = collections.deque()
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > _AHEAD:
            yield waiting.popleft()
    yield from waiting
