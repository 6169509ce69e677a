"""Seconds of training steps."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax

from research.core.tree import count
from research.core.types import State, Tree
from research.training.assembly import Assembly
from research.training.clock import Clock
from research.training.loop import Batches
from research.training.step import Metrics

Block: TypeAlias = list[tuple[float, float]]  # of each step: its seconds, and those of them spent waiting for its batch


class Timer:
    """A run's training step with its state and its batches, to be timed block by block.

    Args:    assembly: the step and what is around it.  batches: the loader of the training split.  steps: that will be asked for in all.
             frozen: what stands still beside the state.
    """

    def __init__(self, assembly: Assembly, batches: Batches, steps: int, frozen: Tree = None):
        self._clock, self._every, self._frozen = Clock(), assembly.settings.log_every, assembly.parallel.hold(frozen)
        with self._clock.span("start"):
            state = assembly.state()
            self.parameters = count(state.params)
            self._state, parallel, self._chunk = assembly.parallel.place(state), assembly.parallel, assembly.settings.chunk
        self._batches: Iterator[tuple[Any, ...]]
        self._train: Callable[..., tuple[State, Metrics]]
        if self._chunk == 1:
            self._train, self._batches = parallel.train(assembly.step), ((batch,) for batch in batches.iterate(0, steps, parallel.put))
        else:
            self._train = parallel.train_chunk(assembly.step)
            self._batches = batches.chunks(0, steps * self._chunk, self._chunk)  # a chunk for each step at most

    @property
    def compile_s(self) -> float:
        """Seconds that compiling the first state and the step has taken."""
        return self._clock.seconds["compile"]

    def warm_up(self, steps: int) -> None:
        """Compiles, and lets caches and threads settle."""
        with self._clock.span("train"):
            self.block(steps)

    def block(self, steps: int) -> Block:
        """The times of so many steps, each begun when all results of the one before are there; of whole chunks, each step an equal part."""
        return [timed for _ in range(math.ceil(steps / self._chunk)) for timed in [self._timed()] * self._chunk]

    def rate(self, steps: int) -> float:
        """Steps per second where results are looked at as rarely as in training, every `train.log_every` steps."""
        start, steps = time.perf_counter(), math.ceil(steps / self._chunk) * self._chunk
        for step in range(self._chunk, steps + 1, self._chunk):
            self._state, metrics = self._train(self._state, self._frozen, *next(self._batches))
            if step % self._every == 0:
                jax.block_until_ready(metrics)
        jax.block_until_ready(self._state)
        return steps / (time.perf_counter() - start)

    def _timed(self) -> tuple[float, float]:
        start = time.perf_counter()
        fed = next(self._batches)
        fetched = time.perf_counter()
        self._state, metrics = self._train(self._state, self._frozen, *fed)
        jax.block_until_ready((self._state, metrics))
        return (time.perf_counter() - start) / self._chunk, (fetched - start) / self._chunk


def settle(seconds: float = 0.4) -> float:
    """The share of the processor that other programs use while this one sleeps; NaN where the system does not say (Linux does).

    Args:    seconds: to sleep; the first half is not looked at, since thread pools spin for a while after their last task.
    """
    time.sleep(seconds / 2)
    whole, idle = _ticks()
    time.sleep(seconds / 2)
    later, idler = _ticks()
    return 1 - (idler - idle) / max(later - whole, 1)


def _ticks() -> tuple[float, float]:
    """(all ticks of all cores since the machine started, those of them without work)."""
    with contextlib.suppress(OSError), open("/proc/stat") as file:
        ticks = [int(word) for word in file.readline().split()[1:9]]
        return sum(ticks), ticks[3] + ticks[4]
    return math.nan, math.nan
